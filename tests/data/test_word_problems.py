"""Word problems are the additions they tell."""

import re

from dcpo_megatron.toys.word_problems import make_word_problems


def test_the_story_tells_the_numbers_and_the_answer_is_their_sum():
    rows = make_word_problems(200, seed=0)
    assert len({row["id"] for row in rows}) == 200
    for row in rows:
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        assert row["id"] == f"{a}+{b}" and int(row["answer"]) == a + b


def test_the_seed_alone_decides_and_no_sum_is_in_both_splits():
    rows = make_word_problems(300, seed=1)
    assert rows == make_word_problems(300, seed=1) != make_word_problems(300, seed=2)
    sums = {frozenset(row["id"].split("+")) for row in rows}
    held_out = make_word_problems(30, seed=2, split="held_out")
    assert held_out and not sums & {frozenset(row["id"].split("+")) for row in held_out}
