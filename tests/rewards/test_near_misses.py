"""A table of answers beside ground truths: equal in another form, or wrong by little. And the rules behind its rows."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.rewards import math_reward_batch
from dcpo_megatron.rewards.mathematics.commas import read_commas
from dcpo_megatron.rewards.mathematics.scripts import fold
from dcpo_megatron.rewards.mathematics.verdict import quick_verdict

TABLE = Path(__file__).with_name("near_misses.tsv")


def rows():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines if not line.startswith("#")]


def test_every_row_of_the_table_earns_what_it_says():
    table = rows()
    assert len(table) > 400 and len({(answer, gold) for _, _, answer, gold in table}) == len(table)
    golds = [gold for *_, gold in table]
    rewards = math_reward_batch([f"So $\\boxed{{{answer}}}$." for _, _, answer, _ in table], golds, 2, 60)
    assert [row for row, reward in zip(table, rewards, strict=True) if reward != float(row[1])] == []


items = st.lists(st.one_of(st.integers(-1500, 1500), st.integers(100, 999)), min_size=2, max_size=6)


@settings(deadline=None)
@given(items)
def test_commas_that_cannot_all_part_thousands_part_items_and_a_blank_says_so(numbers):
    tight, spaced = ",".join(map(str, numbers)), ", ".join(map(str, numbers))
    one_number = all(100 <= n <= 999 for n in numbers[1:]) and numbers[0] != 0 and abs(numbers[0]) < 1000
    read, beside = read_commas(tight, spaced)
    assert beside == spaced
    assert [int(item) for item in read.split(",")] == numbers  # beside a list it is one
    alone, _ = read_commas(tight, "x")
    if one_number:
        assert alone == tight.replace(",", "") or (alone == spaced and numbers == sorted(numbers))
    else:
        assert alone.replace(", ", ",") == tight


@settings(deadline=None)
@given(st.integers(1000, 10**30), st.integers(1000, 10**30))
def test_a_number_with_commas_beside_one_without_is_a_number(a, b):
    assert read_commas(f"{a:,}", str(b)) == (str(a), str(b))
    assert read_commas(f"{a:,}".replace(",", "{,}"), f"{b:,}".replace(",", r",\!")) == (str(a), str(b))


@given(st.text(alphabet="09x,;.{}()[]\\! ~$", max_size=40), st.text(alphabet="09,{}()", max_size=12))
def test_reading_commas_takes_and_adds_nothing_else(answer, gold):
    without = str.maketrans("", "", ", !\\{}")
    assert read_commas(answer, gold)[0].translate(without) == answer.translate(without)


@given(st.text(max_size=60))
def test_folding_twice_is_folding_once_and_ascii_stays(text):
    assert fold(fold(text)) == fold(text)
    ascii_only = "".join(c for c in text if c.isascii())
    assert fold(ascii_only) == ascii_only


@settings(deadline=None)
@given(
    st.text(alphabet="5２,，、。（或и½⁻²ⁿ万元км€¥°℃ά́नी ~{}\\$", max_size=40),
    st.sampled_from(["5", "x", "(1,2)", "5元", "и"]),
)
def test_the_quick_verdict_never_raises_in_any_script(answer, gold):
    assert quick_verdict(answer, gold) in (True, False, None)
    assert quick_verdict(gold, answer) in (True, False, None)


@pytest.mark.parametrize("piece", ["5，", "1或", "и ", "½", "⁻²", "5 км ", "111,", "1,\\!", "{,}", "(1,"])
def test_the_quick_verdict_is_fast_on_hostile_answers_in_any_script(piece):
    answer = (piece * 2000)[:2000]
    started = time.perf_counter()
    quick_verdict(answer, "5")
    quick_verdict("5" + answer[1:], "153,370,371,407")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"\boxed{4} 或 \boxed{5}", "5", 0.0),
        (r"\boxed{4}或者\boxed{5}", "5", 0.0),
        (r"$\boxed{4}$ или $\boxed{5}$", "5", 0.0),
        (r"\boxed{4} または \boxed{5}", "4", 0.0),
        (r"\boxed{4}、\boxed{5}", "5", 0.0),
        (r"\boxed{2} и \boxed{3}", "2,3", 1.0),
        (r"\boxed{3}，\boxed{2}", "2,3", 1.0),
        (r"先试 \boxed{4}。答案是 \boxed{5}。", "5", 1.0),
    ],
)
def test_boxes_joined_by_or_in_any_script_are_one_list(response, gold, reward):
    assert math_reward_batch([response], [gold], 2) == [reward]
