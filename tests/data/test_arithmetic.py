"""The demonstration's problems are right, distinct, and never in both splits."""

import pytest

from dcpo_megatron.data import load_prompts
from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.arithmetic import make_arithmetic


def test_problems_are_right_and_distinct():
    rows = make_arithmetic(500, seed=0)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 500
    for row in rows:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"])
        assert 0 <= int(a) <= 99


def test_no_problem_is_in_both_splits_whatever_the_seed_and_the_order_of_the_operands():
    def pairs(rows):
        return {tuple(sorted(int(number) for number in row["id"].split("+"))) for row in rows}

    train = pairs(make_arithmetic(800, seed=1, max_operand=30))
    held_out = pairs(make_arithmetic(60, seed=2, max_operand=30, split="held_out"))
    assert train
    assert held_out
    assert not train & held_out


def test_the_seed_alone_decides():
    assert make_arithmetic(50, seed=3) == make_arithmetic(50, seed=3)
    assert make_arithmetic(50, seed=3) != make_arithmetic(50, seed=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 200, "max_operand": 9}, "200 problems were asked for, and train has"),
        ({"n": 1, "split": "test"}, "it must be train or held_out"),
        ({"n": 1, "max_operand": 10_000}, "from 0 to 1999"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_arithmetic(seed=0, **arguments)


def test_written_problems_load_as_prompts(tmp_path, plain_tokenizer):
    rows = make_arithmetic(20, seed=0)
    write_jsonl(rows, tmp_path / "sums.jsonl")
    prompts = load_prompts([tmp_path / "sums.jsonl"], plain_tokenizer).prompts
    assert [(p.id, p.text, p.ground_truth) for p in prompts] == [
        (f"sums/{r['id']}", r["prompt"], r["answer"]) for r in rows
    ]
