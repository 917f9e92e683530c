"""A step with one update takes old log-probs from the update's own forward pass: bit for bit the run with a pass before
it."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.arithmetic import make_arithmetic
from dcpo_megatron.verification.certificate import RUNS_OF_A_POOL
from dcpo_megatron.verification.ranks import RankPool

STEPS = 3
TIS = ["objective.correction=tis", "objective.correction_cap=1.0001"]
CASES = {
    "fused": (1, []),
    "not fused, TIS": (1, ["model.fused_head_loss=off", *TIS]),
    "gspo": (1, ["objective.preset=gspo", "training.packing=padded"]),
    "tensor 2, KL": (2, ["parallel.tensor=2", "objective.kl_coef=0.1", *TIS]),
    "pipeline 2": (2, ["parallel.pipeline=2", "model.recompute=full"]),
    "context 2, gspo, TIS": (2, ["parallel.context=2", "objective.preset=gspo", *TIS]),
    "data 2, not fused": (2, ["model.fused_head_loss=off"]),
}


@pytest.fixture(scope="module")
def pool():
    """``pool()``: a pool that is not worn yet (process groups leave open files in the ranks)."""
    with ExitStack() as stack:
        newest: list[RankPool] = []

        def pool() -> RankPool:
            if not newest or newest[-1].runs >= RUNS_OF_A_POOL:
                stack.close()
                newest.append(stack.enter_context(RankPool(2, python_path=[str(Path(__file__).parents[2])])))
            return newest[-1]

        yield pool


@pytest.fixture
def train(pool, demo_start, tmp_path):
    """``train(name, world, *overrides)``: metrics without the clock's, passes for old log-probs, weights. One
    update a step and no limit where the overrides say nothing else."""
    write_jsonl(make_arithmetic(8, 0, 9), tmp_path / "train.jsonl")

    def train(name: str, world: int, *overrides: str, **stops):
        output = tmp_path / name
        settings = [
            f"model.path={demo_start}", "model.dtype=float32", f"data.files=[{tmp_path / 'train.jsonl'}]",
            "data.template=plain", "data.max_prompt_tokens=8", "rollout.prompts_per_step=4", "rollout.group_size=4",
            "rollout.max_response_tokens=6", "rollout.max_mismatch=null", "training.minibatch_prompts=4",
            "training.micro_batch_tokens=64", f"training.steps={STEPS}", "training.platform=cpu",
            "reward.function=tests.training.rewards:digits", "optimizer.lr=1e-3", "optimizer.warmup_steps=0",
            "logging.console=false", "logging.tensorboard=false", "logging.report=false", "logging.samples=0",
            f"output={output}", *overrides,
        ]  # fmt: skip
        per_rank = pool().run("tests.training.jobs:train_and_count", world, settings, timeout=200, **stops)
        if stops:
            return None
        (passes,) = {passes for _, passes in per_rank}
        rows = [
            {key: value for key, value in row.items() if not key.startswith(("seconds", "tokens_per_second", "step"))}
            for metrics, _ in per_rank
            for row in metrics
        ]
        assert all("seconds_old_logprobs" in row for metrics, _ in per_rank for row in metrics)
        assert all(row["gradient_norm"] > 0 and row["updates"] for row in rows)
        return rows, passes, load_file(output / "model" / "model.safetensors")

    return train


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("case", CASES)
def test_a_run_without_the_pass_is_the_run_with_it(train, case):
    world, overrides = CASES[case]
    # With a mismatch limit every step takes the pass.
    before, with_pass, wanted = train("limit", world, *overrides, "rollout.max_mismatch=1000")
    own, without, found = train("no-limit", world, *overrides)
    assert (with_pass, without) == (STEPS, 0)
    assert before == own
    assert all(row["first_update_ratio_deviation"] == 0 and row["mismatch_abs"] > 0 for row in own)
    assert same_weights(wanted, found)


def test_two_minibatches_take_the_pass_and_see_other_ratios_in_the_second(train):
    rows, passes, _ = train("two", 1, "training.minibatch_prompts=2")
    assert passes == STEPS
    assert all(row["first_update_ratio_deviation"] == 0 and row["ratio"] != 1 for row in rows)


def test_a_step_whose_samples_are_kept_takes_the_pass_and_changes_nothing(train, tmp_path):
    usual, none, wanted = train("usual", 2)
    rows, passes, found = train("samples", 2, "logging.samples=2")
    assert (none, passes) == (0, 4)  # in steps 1 and 2 of three: the pass, and what the samples show
    assert rows == usual and same_weights(found, wanted)
    kept = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    ratios = {ratio for row in kept if row["kind"] == "response" for _, _, ratio, *_ in row["tokens"]}
    assert ratios == {1.0}


def test_a_run_that_is_stopped_and_started_again_ends_like_one_that_is_not(train, tmp_path):
    rows, _, wanted = train("whole", 2)
    train("halved", 2, stop_after=2)
    assert not (tmp_path / "halved" / "model").exists()
    rest, passes, found = train("halved", 2)
    assert passes == 0 and rest == rows
    assert same_weights(found, wanted)
