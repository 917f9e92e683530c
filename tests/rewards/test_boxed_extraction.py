"""Which part of a response counts as its answer."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.rewards import last_boxed, math_reward


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed {5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{5}}", "5"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"{ \boxed{5} never closed", "5"),
        (r"closed too often } } \boxed{5}", "5"),
        (r"\boxed{5} and then cut off: \boxed{\frac{1}", "5"),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)
def test_the_last_balanced_box_is_the_answer(response, answer):
    assert last_boxed(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "5",
        r"\boxed 5",
        r"\boxed{5",
        r"\boxed{\frac{1}{2}",
        r"\boxed{5\}",
        r"\fbox{5}",
        "boxed{5}",
        r"\boxed",
        r"\boxed\{5\}",
    ],
)
def test_without_a_balanced_box_the_reward_is_minus_one(response):
    assert last_boxed(response) is None
    assert math_reward(response, "5") == -1.0


def test_an_empty_box_is_well_formed_and_wrong():
    assert math_reward(r"\boxed{}", "5") == 0.0


def _content(text: str, start: int) -> str | None:
    depth = 1
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start:position].strip()
    return None


@settings(deadline=None)
@given(st.lists(st.sampled_from([r"\boxed{", r"\boxed", "{", "}", "x"]), max_size=30).map("".join))
def test_extraction_agrees_with_a_search_from_every_box(text):
    starts = [match.end() for match in re.finditer(r"\\boxed\{", text)]
    contents = [content for content in (_content(text, start) for start in starts) if content is not None]
    assert last_boxed(text) == (contents[-1] if contents else None)


@pytest.mark.parametrize("piece", [r"\boxed{", "{", "}", "\\", r"\boxed", r"\boxed{}", "\\boxed" + " " * 50])
def test_extraction_is_linear_in_hostile_text(piece):
    text = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    last_boxed(text)
    assert time.perf_counter() - start < 5
