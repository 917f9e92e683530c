"""Chains are right step by step, of mixed difficulty, and never in both splits."""

import re

import pytest

from dcpo_megatron.toys.chains import CHARACTERS, ChainTask, make_chains


def operands(row) -> list[str]:
    return re.findall(r"\d+", row["id"])


@pytest.mark.parametrize("task", [ChainTask(), ChainTask((2, 6), (1, 4), "+-*"), ChainTask((2, 2), (1, 2), "*")])
def test_answers_and_every_worked_step_are_right(task):
    for row in make_chains(300, 0, task):
        assert eval(row["id"]) == int(row["answer"]) >= 0
        *steps, box = row["worked"].split(";")
        assert box == f"\\boxed{{{row['answer']}}}"
        assert len(steps) == len(operands(row)) - 1
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert steps[-1].endswith(f"={row['answer']}")
        assert set(row["prompt"] + row["worked"].replace("\\boxed{", "")) <= set(CHARACTERS)


def test_a_set_mixes_lengths_and_digits():
    rows = make_chains(500, 0, ChainTask((2, 4), (1, 2)))
    assert {len(operands(row)) for row in rows} == {2, 3, 4}
    assert {len(number) for row in rows for number in operands(row)} == {1, 2}
    lengths = [len(row["worked"]) for row in rows]
    assert max(lengths) > 2 * min(lengths)


def test_harder_tasks_have_longer_answers_and_solutions():
    easy, hard = make_chains(100, 0, ChainTask((2, 3), (1, 1))), make_chains(100, 0, ChainTask((5, 8), (4, 6)))
    assert max(len(row["worked"]) for row in easy) < min(len(row["worked"]) for row in hard)


def test_problems_are_distinct_and_the_seed_alone_decides():
    rows = make_chains(400, 3)
    assert len({row["prompt"] for row in rows}) == 400
    assert rows == make_chains(400, 3)
    assert rows != make_chains(400, 4)


def test_no_problem_is_in_both_splits_whatever_the_seed_and_the_order_of_its_terms():
    def terms(row):
        return tuple(sorted(re.findall(r"[+-]\d+", "+" + row["id"])))

    train = {terms(row) for row in make_chains(2000, 1, ChainTask((2, 3), (1, 1)))}
    held_out = {terms(row) for row in make_chains(150, 2, ChainTask((2, 3), (1, 1)), split="held_out")}
    assert train and held_out and not train & held_out


def test_a_question_in_words_holds_the_chain():
    row = make_chains(1, 0, ChainTask(question="What is CHAIN? Put it within \\boxed{}."))[0]
    assert row["prompt"] == f"What is {row['id']}? Put it within \\boxed{{}}."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": (1, 2)}, "terms is 1 to 2: it must rise within 2 to 50"),
        ({"digits": (3, 2)}, "digits is 3 to 2"),
        ({"operations": "+/"}, "operations is '\\+/'"),
        ({"operations": "*"}, "a product has two terms"),
        ({"question": "{}="}, "must hold CHAIN"),
    ],
)
def test_impossible_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChainTask(**arguments)


def test_a_task_with_too_few_problems_is_refused():
    with pytest.raises(ValueError, match=r"500 problems were asked for, and train has hardly more than \d+"):
        make_chains(500, 0, ChainTask((2, 2), (1, 1)))
