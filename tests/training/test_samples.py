"""The file of samples stays small, survives a resume, and costs no run that cannot write it. That its ratios are the
update's is in test_layouts_train_alike."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dcpo_megatron.advantages.sas import RewardHistory
from dcpo_megatron.data import Response
from dcpo_megatron.mcore.batch import TrainingSample
from dcpo_megatron.monitor import samples
from dcpo_megatron.monitor.samples import SampleLog
from dcpo_megatron.objectives import get_preset
from tests.training.tables import table_of_responses

ALONE = SimpleNamespace(owns_loss=True, data_rank=0, context_rank=0, context_size=1, pipeline_size=1)
LENGTH = 1000


def grown(micro_batches) -> dict[int, torch.Tensor]:
    """Log-probs whose ratio to the old ones is 1.5."""
    return {s.number: s.old_logprobs + math.log(1.5) for micro_batch in micro_batches for s in micro_batch}


def train(log: SampleLog, steps, length=LENGTH) -> RewardHistory:
    """Two prompts of four responses each step, all ratios 1.5."""
    history, objective = RewardHistory(), get_preset("dcpo-paper")
    for step in steps:
        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0] * 2)
        ids = ["a"] * 4 + ["b"] * 4
        found = history.observe(ids, rewards).tolist()
        responses = [
            Response(name, [1], "5", n % 4, [7] * length, [-1.0] * length, "stop", [0] * length,
                     reward=reward, advantage=advantage, correct=reward == 1)
            for n, (name, reward, advantage) in enumerate(zip(ids, rewards.tolist(), found, strict=True))
        ]  # fmt: skip
        table = table_of_responses(responses)
        log.visits(step, table, history)
        if log.due(step):
            batch = [
                TrainingSample(n, [1], r.token_ids, r.advantage, old_logprobs=torch.full((length,), -1.0))
                for n, r in enumerate(responses)
            ]
            log.responses(step, table, [[batch]], grown, objective, chr)
    return history


def rows(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_what_is_kept_is_bounded_and_right(tmp_path):
    log = SampleLog(tmp_path, 20, ALONE, ["a", "b", "c"], print)
    train(log, range(1, 401))
    kept = rows(tmp_path)
    steps = sorted({row["step"] for row in kept if row["kind"] == "response"})
    assert steps == [1, *range(400 - 20 * (samples.STEPS - 2), 401, 20)]
    found = next(row for row in kept if row["kind"] == "response")
    assert len(found["tokens"]) == samples.TOKENS and found["length"] == LENGTH
    text, old, ratio, lower, upper, clipped = found["tokens"][0]
    # q = 1/e, eps 0.16 and 0.20, A > 0: beyond the upper bound
    assert (text, old, clipped) == (chr(7), -1.0, "upper") and ratio == pytest.approx(1.5, abs=1e-4)
    assert upper == pytest.approx(0.5 + 0.5 * (1 + 4 * 0.2 * 2.71828) ** 0.5, abs=1e-4) and lower == 0.5
    assert [row["visits"] for row in kept if row["kind"] == "visit" and row["prompt_id"] == "b"] == list(
        range(1, samples.VISITS + 1)
    )
    assert (tmp_path / "samples.jsonl").stat().st_size < 4_000_000


def test_a_resumed_run_drops_later_rows_and_goes_on(tmp_path):
    train(SampleLog(tmp_path, 2, ALONE, ["a"], print), range(1, 6), length=3)
    before = rows(tmp_path)
    SampleLog(tmp_path, 2, ALONE, ["a"], print, resumed_at=3)
    assert rows(tmp_path) == [row for row in before if row["step"] <= 3] != before
    SampleLog(tmp_path, 2, ALONE, ["a"], print)
    assert rows(tmp_path) == []


def test_without_a_place_or_a_wish_nothing_is_written_and_training_goes_on(tmp_path):
    said = []
    (tmp_path / "samples.jsonl.part").mkdir()
    log = SampleLog(tmp_path, 1, ALONE, ["a"], said.append)
    train(log, range(1, 4), length=3)
    assert len(said) == 1 and "training goes on" in said[0]
    train(SampleLog(tmp_path, 0, ALONE, ["a"], said.append), range(1, 4), length=3)
    assert not (tmp_path / "samples.jsonl").exists()
