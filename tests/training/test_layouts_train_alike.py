"""The same seed and weights: whatever the layout, the same run."""

import json
import math

import pytest
from safetensors.torch import load_file

from dcpo_megatron.files import write_jsonl
from dcpo_megatron.toys.arithmetic import make_arithmetic
from dcpo_megatron.verification.ranks import RankPool

LAYOUTS = {
    "one process": (1, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "data 2": (2, []),
    "context 2": (2, ["parallel.context=2"]),
    "padded rows": (1, ["training.packing=padded"]),
    "one micro-batch": (1, ["training.micro_batch_tokens=256"]),
}
# What depends on the clock, not on the mathematics.
CLOCK = ("seconds", "tokens_per_second", "mismatch", "ratio_deviation")


@pytest.fixture(scope="module")
def runs(demo_start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_jsonl(make_arithmetic(8, 0, 9), folder / "train.jsonl")
    results = {}
    with RankPool(2, python_path=[str(__import__("pathlib").Path(__file__).parents[2])]) as pool:
        for name, (world, overrides) in LAYOUTS.items():
            output = folder / name.replace(" ", "-")
            settings = [
                f"model.path={demo_start}", "model.dtype=float32", f"data.files=[{folder / 'train.jsonl'}]",
                "data.template=plain",
                "data.max_prompt_tokens=8", "rollout.prompts_per_step=4", "rollout.group_size=4",
                "rollout.max_response_tokens=6",
                "training.minibatch_prompts=2", "training.micro_batch_tokens=64", "training.steps=3",
                "training.platform=cpu",
                "reward.function=tests.training.rewards:digits", "optimizer.lr=1e-5", "optimizer.warmup_steps=0",
                "logging.console=false", "logging.tensorboard=false", "logging.report=false", "logging.samples=1",
                f"output={output}",
                *overrides,
            ]  # fmt: skip
            per_rank = pool.run("tests.training.jobs:train", world, settings, timeout=200)
            samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
            results[name] = (per_rank, load_file(output / "model" / "model.safetensors"), samples)
    return results


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_a_layout_gives_the_metrics_and_weights_of_one_process(runs, name):
    (reference,), weights, _ = runs["one process"]
    per_rank, found, _ = runs[name]
    for metrics in per_rank:
        assert len(metrics) == 3
        for wanted, got in zip(reference, metrics):
            assert wanted.keys() == got.keys()
            for key, value in wanted.items():
                if not key.startswith(CLOCK) and key != "first_update_ratio_deviation":
                    assert math.isclose(got[key], value, rel_tol=1e-5, abs_tol=1e-6), (key, value, got[key])
    assert found.keys() == weights.keys()
    # Over all weights at once: Adam divides by the gradient's size, so a parameter whose true gradient is 0 (a key's
    # bias) moves by rounding noise alone.
    difference = sum((found[key] - tensor).double().pow(2).sum() for key, tensor in weights.items()) ** 0.5
    size = sum(tensor.double().pow(2).sum() for tensor in weights.values()) ** 0.5
    assert difference <= 1e-5 * size


def test_the_runs_learn_something_at_all(runs):
    # Otherwise the comparison above would compare zeros.
    (reference,), *_ = runs["one process"]
    assert all(metrics["gradient_norm"] > 0 and metrics["response_utilization_ratio"] > 0 for metrics in reference)
    assert reference[-1]["prompt_visits"] > 1


def test_the_first_update_after_a_rollout_is_on_policy(runs):
    for per_rank, *_ in runs.values():
        for metrics in per_rank[0]:
            assert metrics["first_update_ratio_deviation"] < 1e-5
            assert metrics["first_update_clipping_ratio"] == 0


def test_rollout_and_training_engine_agree_on_log_probs(runs):
    for per_rank, *_ in runs.values():
        for metrics in per_rank[0]:
            assert metrics["mismatch_abs_max"] < 1e-4


def test_every_rank_reports_the_same_numbers(runs):
    for per_rank, *_ in runs.values():
        for metrics in per_rank[1:]:
            for mine, first in zip(metrics, per_rank[0]):
                assert {k: v for k, v in mine.items() if not k.startswith(CLOCK[:2])} == {
                    k: v for k, v in first.items() if not k.startswith(CLOCK[:2])
                }


def sampled_ratios(rows) -> dict[tuple, list[float]]:
    return {
        (row["step"], row["prompt_id"], *(token[0] for token in row["tokens"])): [token[2] for token in row["tokens"]]
        for row in rows
        if row["kind"] == "response"
    }


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one process"])
def test_samples_hold_the_ratios_of_one_process(runs, name):
    reference, found = (sampled_ratios(runs[n][2]) for n in ("one process", name))
    common = reference.keys() & found.keys()
    assert len(common) >= 6 and {key[0] for key in common} == {1, 2, 3}
    for key in common:
        assert found[key] == pytest.approx(reference[key], abs=2e-6)
    visits = [[row for row in runs[n][2] if row["kind"] == "visit"] for n in ("one process", name)]
    assert visits[0] == visits[1] and max(row["visits"] for row in visits[0]) > 1


def test_sampled_ratios_are_those_of_the_update(runs):
    """Where a micro-batch holds the whole last minibatch: they and the ones of the first, on-policy update give the
    step's mean ratio."""
    (metrics,), _, rows = runs["one micro-batch"]
    for step, row in enumerate(metrics, 1):
        ratios = [token[2] for r in rows if r["kind"] == "response" and r["step"] == step for token in r["tokens"]]
        moved = sum(ratio - 1 for ratio in ratios)
        assert abs(moved) > 1e-4
        assert row["tokens_trained"] * (row["ratio"] - 1) == pytest.approx(moved, abs=3e-5, rel=0.02)
