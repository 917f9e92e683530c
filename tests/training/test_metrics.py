"""A metric is a sum over a declared denominator; nothing else is logged."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.data import Response
from dcpo_megatron.data.packing import PackingOptions
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.mcore.loss import MAX_NAMES, SUM_NAMES
from dcpo_megatron.mcore.step import UpdateResult
from dcpo_megatron.monitor.bad_steps import BadSteps
from dcpo_megatron.monitor.gpu import GpuMonitor
from dcpo_megatron.monitor.metrics import METRICS, STEP_PARTS, check_declared, seconds_metrics, update_metrics
from dcpo_megatron.monitor.watchdog import Watchdog, WatchedTimeline
from dcpo_megatron.objectives import get_preset
from dcpo_megatron.training.loop import Trainer
from dcpo_megatron.training.minibatches import MinibatchMaker
from dcpo_megatron.training.parts import Monitors
from dcpo_megatron.training.rollout_phase import RolloutResult
from tests.training.tables import table_of_responses

TOKEN_SHARES = (
    "clipped_upper",
    "clipped_lower",
    "clipped_cap",
    "entropy",
    "ratio",
    "bound_lower",
    "bound_upper",
    "vacuous_upper",
    "reference_kl",
)


def update(stepped=True, norm=1.0, lr=1e-6, maxima=(), **sums):
    return UpdateResult(
        sums=dict.fromkeys(SUM_NAMES, 0.0) | sums,
        maxima=dict.fromkeys(MAX_NAMES, 0.0) | dict(maxima),
        gradient_norm=norm,
        stepped=stepped,
        lr=lr,
    )


def test_token_metrics_divide_by_the_tokens_of_all_updates():
    # Distinct numbers a name, so that no two can be mistaken for each other.
    first = {name: 1.0 + number for number, name in enumerate(TOKEN_SHARES)}
    second = {name: 10.0 * (1 + number) for number, name in enumerate(TOKEN_SHARES)}
    metrics = update_metrics(
        [update(tokens=30.0, gradient_removed=3.0, **first), update(tokens=10.0, gradient_removed=5.0, **second)]
    )
    for name in TOKEN_SHARES:
        assert metrics[name] == pytest.approx((first[name] + second[name]) / 40), name
    assert metrics["token_clipping_ratio"] == pytest.approx(8 / 40)
    assert metrics["tokens_trained"] == 40


def test_loss_and_gradient_norm_are_means_over_updates():
    metrics = update_metrics(
        [
            update(tokens=9.0, loss=1.0, policy_loss=2.0, kl_loss=3.0, entropy_loss=4.0, norm=0.5, lr=1e-7),
            update(tokens=1.0, loss=2.0, policy_loss=4.0, kl_loss=6.0, entropy_loss=8.0, norm=1.5, lr=2e-7),
        ]
    )
    names = ("loss", "policy_loss", "kl_loss", "entropy_loss", "gradient_norm", "lr")
    assert [metrics[name] for name in names] == [1.5, 3.0, 4.5, 6.0, 1.0, 2e-7]


def test_the_first_update_has_its_own_denominator():
    metrics = update_metrics(
        [
            update(tokens=30.0, gradient_removed=3.0, maxima={"ratio_deviation_max": 1e-6}),
            update(tokens=10.0, gradient_removed=5.0, maxima={"ratio_deviation_max": 0.7}),
        ]
    )
    assert metrics["first_update_clipping_ratio"] == pytest.approx(3 / 30)
    assert metrics["first_update_ratio_deviation"] == 1e-6


def test_mismatch_metrics_divide_by_the_tokens_compared():
    weights = [[1.0, 3.0], [2.0]]
    metrics = update_metrics(
        [
            update(
                tokens=10.0,
                mismatch_tokens=float(len(part)),
                mismatch_abs=0.3 * len(part),
                mismatch_k3=0.2 * len(part),
                mismatch_weight=sum(part),
                mismatch_weight_squared=sum(w * w for w in part),
                maxima={"mismatch_abs_max": max(part)},
            )
            for part in weights
        ]
    )
    assert metrics["mismatch_abs"] == pytest.approx(0.3)
    assert metrics["mismatch_k3"] == pytest.approx(0.2)
    assert metrics["mismatch_abs_max"] == 3.0
    # The share of the sample that is effective: (sum w)^2 / (n sum w^2); 1 where all weights are equal.
    assert metrics["mismatch_ess"] == pytest.approx(36 / (14 * 3))


def test_without_rollout_logprobs_there_is_no_mismatch():
    assert not {name for name in update_metrics([update(tokens=5.0)]) if name.startswith("mismatch")}


def test_skipped_updates_are_counted_and_their_tokens_too():
    metrics = update_metrics([update(tokens=5.0), update(stepped=False, tokens=7.0, norm=math.inf)])
    assert (metrics["updates"], metrics["updates_skipped"], metrics["tokens_trained"]) == (1, 1, 12)
    assert metrics["gradient_norm"] == math.inf


def test_updates_without_tokens_give_zeros_and_no_updates_give_counts_alone():
    metrics = update_metrics([update()])
    assert all(metrics[name] == 0.0 for name in (*TOKEN_SHARES, "token_clipping_ratio", "first_update_clipping_ratio"))
    assert update_metrics([]) == {"updates": 0, "updates_skipped": 0}


def test_an_undeclared_metric_is_refused_by_name():
    assert check_declared({"reward": 1.0}) == {"reward": 1.0}
    with pytest.raises(KeyError, match="metric 'rewards' has no declared denominator"):
        check_declared({"reward": 1.0, "rewards": 1.0})


def two_prompts_of_two_responses():
    rewards = {"a": [1.0, 0.0], "b": [1.0, 1.0]}
    found = [
        Response(
            prompt_id=prompt,
            prompt_token_ids=[1],
            ground_truth="",
            sample_index=sample,
            token_ids=[5, 6],
            rollout_logprobs=[-1.0, -1.0],
            finish_reason="stop",
            weight_versions=[0, 0],
            reward=reward,
        )
        for prompt, values in rewards.items()
        for sample, reward in enumerate(values)
    ]
    for response, advantage in zip(found, (0.5, -1.5, 0.0, 0.0), strict=True):
        response.advantage = advantage
    return found


def trainer_of(responses, history=None):
    """A Trainer whose parts do nothing but answer: one step runs without a model."""
    totals = {"reward": 3.0, "correct": 3.0, "tokens": 16.0, "truncated": 1.0, "reward_failures": 2.0, "generated": 8.0}
    rollout = RolloutResult(table_of_responses(responses), responses, totals, 2)
    section = SimpleNamespace
    config = section(
        rollout=section(
            prompts_per_step=2, max_sampling_rounds=2, max_response_tokens=4, max_staleness=0, max_mismatch=None
        ),
        training=section(minibatch_prompts=1),
        optimizer=section(warmup_steps=4, lr=1e-3),
        publish=section(colocated=False),
    )
    policy = section(
        position=section(data_rank=0, data_size=1, pipeline_size=1),
        logprobs=lambda micro_batches, objective: {},
        update=lambda micro_batches, objective, lr, only: update(tokens=4.0, mismatch_tokens=4.0, lr=lr),
    )
    watchdog = Watchdog(Path("nowhere"), 0, 1, 60.0)  # not started: it writes nothing
    return Trainer(
        run_=section(config=config, objective=get_preset("dcpo-paper"), layout=ParallelLayout()),
        folder=None,
        data=None,
        policy=policy,
        reference=None,
        gatherer=section(tensors=lambda: iter(())),
        engine=section(load_weights=lambda tensors, version: None, version=0),
        phase=section(run=lambda *args, **kwargs: rollout, history=history, take_back_visits=lambda *_: None),
        minibatches=MinibatchMaker(
            get_preset("dcpo-paper"), PackingOptions(64), 1, 4, 1, 0, (0,), WatchedTimeline(watchdog)
        ),
        saver=None,
        monitors=Monitors(
            sinks=section(progress=None),
            gpu=section(read=lambda: {}),
            watchdog=watchdog,
            timeline=WatchedTimeline(watchdog),
            bad_steps=BadSteps(Path("nowhere"), 5, False),
            samples=section(visits=lambda *_: None, due=lambda step: False),
        ),
    )


def test_every_metric_of_a_step_is_declared_and_the_rollouts_divide_by_all_generated_responses():
    history = RewardHistory()
    for ids in (["a", "a", "b", "b"], ["a", "a"]):
        history.observe(ids, torch.tensor([1.0, 0.0] * (len(ids) // 2)))
    metrics = trainer_of(two_prompts_of_two_responses(), history).step(1)
    check_declared(metrics)
    assert {"seconds_publish", "tokens_per_second", "mismatch_ess", "prompt_visits"} <= set(metrics)
    expected = {
        "reward": 3 / 8,
        "accuracy": 3 / 8,
        "response_length": 2.0,
        "truncated": 1 / 8,
        "reward_failures": 2 / 8,
        "responses_generated": 8,
        "responses_trained": 4,
        "sampling_rounds": 2,
        "response_utilization_ratio": 2 / 8,
        "advantage_abs": 2.0 / 4,
        "prompt_visits": 3 / 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_the_parts_of_a_steps_seconds_add_up_to_them():
    metrics = trainer_of(two_prompts_of_two_responses()).step(1)
    parts = {name: value for name, value in metrics.items() if name.startswith("seconds_")}
    assert set(parts) == {f"seconds_{part}" for part in (*STEP_PARTS, "rest")}
    assert min(parts.values()) >= 0 and math.fsum(parts.values()) == pytest.approx(metrics["seconds"], rel=1e-9)
    assert seconds_metrics({"step": 1.0, "rollout": 2.0, "publish": 4.0}) == {
        "seconds": 7.0,
        **dict.fromkeys((f"seconds_{part}" for part in STEP_PARTS), 0.0),
        "seconds_rollout": 2.0,
        "seconds_publish": 4.0,
        "seconds_rest": 1.0,
    }


def test_the_documented_metrics_of_a_step_are_the_declared_ones():
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    documented = {name: (of, of_what) for name, of, of_what in rows if name in METRICS}
    plain = {name: (metric.of.replace("|", "\\|"), metric.denominator or "-") for name, metric in METRICS.items()}
    assert documented == plain
    assert [name for name, _, _ in rows if name.startswith("seconds") and name not in METRICS] == []


def test_a_step_that_kept_no_response_gives_declared_metrics_alone():
    metrics = trainer_of([]).step(1)
    check_declared(metrics)
    assert metrics["updates"] == 0 and metrics["response_utilization_ratio"] == 0
    assert "advantage_abs" not in metrics and "entropy" not in metrics


def test_the_learning_rate_rises_linearly_over_the_first_steps():
    trainer = trainer_of(two_prompts_of_two_responses())
    # Warm-up over four steps, two updates each.
    assert [trainer.step(step)["lr"] for step in (1, 2, 3)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


def test_the_gpus_metrics_are_declared_and_absent_on_the_cpu(monkeypatch):
    monitor = GpuMonitor(SimpleNamespace(is_cpu=True))
    assert monitor.read() == {}
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=75),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monitor._handle = object()
    assert check_declared(monitor.read()) == {"gpu_utilization": 0.75, "gpu_memory_bytes": 2.0**30}


def test_every_metric_that_is_a_share_says_of_what():
    for name in (*TOKEN_SHARES, "reward", "accuracy", "response_length", "loss", "mismatch_ess"):
        assert METRICS[name].denominator, name
    assert all(metric.of for metric in METRICS.values())
