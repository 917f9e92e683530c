"""Every ground truth of the benchmark files earns +1 against itself, also in another spelling, and not against
another."""

import json
import random

import pyarrow.parquet
import pytest

from dcpo_megatron.rewards import math_reward_batch
from dcpo_megatron.rewards.mathematics.verdict import quick_verdict


def _parquet_golds(path):
    return [row["reward_model"]["ground_truth"] for row in pyarrow.parquet.read_table(path).to_pylist()]


def _gsm8k_golds(path):
    return [json.loads(line)["answer"].rpartition("####")[2].strip() for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def math500(real_data):
    return _parquet_golds(real_data / "math500.parquet")


def _respell(gold):
    gold = (
        gold.replace(r"\dfrac", r"\tfrac")
        .replace(r"\frac", r"\dfrac")
        .replace("(", r"\left( ")
        .replace(")", r" \right)")
    )
    return gold.replace(",\\!", ",").replace(r"\mbox", r"\text").replace("+", " + ")


def test_all_math500_golds_earn_one_against_themselves(math500):
    assert len(math500) == 500
    responses = [f"Thus, the answer is\n\\[\n\\boxed{{{gold}}}.\n\\]" for gold in math500]
    assert math_reward_batch(responses, math500) == [1.0] * 500
    assert math_reward_batch(responses, [f"$\\boxed{{{gold}}}$" for gold in math500]) == [1.0] * 500


def test_all_math500_golds_earn_one_in_another_spelling(math500):
    golds = sorted(set(math500))
    rewards = math_reward_batch([f"\\boxed{{{_respell(gold)}}}" for gold in golds], golds, workers=2)
    assert [gold for gold, reward in zip(golds, rewards, strict=True) if reward != 1.0] == []


def test_math_verify_agrees_that_math500_golds_equal_themselves(math500):
    # A factor of one in front takes the string comparison out of the way.
    golds = [
        gold for gold in sorted(set(math500)) if quick_verdict(f"1 \\cdot {gold}", gold) is None and gold[0].isalnum()
    ]
    golds = [gold for gold in golds if "=" not in gold and "," not in gold and "\\in" not in gold]
    assert len(golds) > 30
    rewards = math_reward_batch([f"\\boxed{{1 \\cdot {gold}}}" for gold in golds], golds, workers=2)
    assert [gold for gold, reward in zip(golds, rewards, strict=True) if reward != 1.0] == []


def test_math500_golds_do_not_earn_one_against_each_other(math500):
    golds = sorted(set(math500))
    others = random.Random(0).sample(golds, len(golds))
    pairs = [(a, b) for a, b in zip(golds, others, strict=True) if a != b][:150]
    rewards = math_reward_batch([f"\\boxed{{{a}}}" for a, _ in pairs], [b for _, b in pairs], workers=2)
    assert [pair for pair, reward in zip(pairs, rewards, strict=True) if reward != 0.0] == []


@pytest.mark.parametrize("name", ["amc2023", "aime_2024", "aime_2025"])
def test_all_contest_golds_earn_one_against_themselves(real_data, name):
    golds = _parquet_golds(real_data / f"{name}.parquet")
    assert math_reward_batch([f"\\boxed{{{gold}}}" for gold in golds], golds) == [1.0] * len(golds)


@pytest.mark.parametrize(("name", "count"), [("gsm8k_train", 7473), ("gsm8k_test", 1319)])
def test_all_gsm8k_golds_earn_one_with_and_without_commas(real_data, name, count):
    golds = _gsm8k_golds(real_data / f"{name}.jsonl")
    assert len(golds) == count
    golds = sorted(set(golds))
    plain = [gold.replace(",", "") for gold in golds]
    assert math_reward_batch([f"\\boxed{{{gold}}}" for gold in golds], plain) == [1.0] * len(golds)
    assert math_reward_batch([f"\\boxed{{\\${int(gold):,}.00}}" for gold in plain], golds) == [1.0] * len(golds)
    assert math_reward_batch([f"\\boxed{{{int(gold) + 1}}}" for gold in plain], golds) == [0.0] * len(golds)
