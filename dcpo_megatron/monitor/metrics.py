"""Every metric of a training step, with its declared denominator; the same definition for every method.

Numerators and denominators are all-reduced sums, so a value does not depend on the rank layout. ``METRICS`` is the
whole list: a key that is not in it is not logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.data.response_table import ResponseTable
from dcpo_megatron.mcore.step import UpdateResult


@dataclass(frozen=True)
class Metric:
    """``of``: what is counted or averaged; ``denominator``: what it is divided by ("" for a plain value)."""

    of: str
    denominator: str = ""


_TOKENS = "response tokens trained on in the step (each once)"
_GENERATED = "responses generated in the step, also those that dynamic sampling threw away"
_UPDATES = "updates of the step"

# The spans of a step, in order.
STEP_PARTS = (
    "rollout",
    "reward",
    "rollout_wait",
    "advantage",
    "packing",
    "old_logprobs",
    "forward_backward",
    "optimizer",
    "publish",
)

METRICS: dict[str, Metric] = {
    "reward": Metric("reward before shaping, summed", _GENERATED),
    "accuracy": Metric("correct responses", _GENERATED),
    "response_length": Metric("response tokens", _GENERATED),
    "truncated": Metric("responses cut at rollout.max_response_tokens", _GENERATED),
    "reward_failures": Metric("responses on which the reward function failed", _GENERATED),
    "responses_generated": Metric("responses generated in the step"),
    "responses_trained": Metric("responses in the step's minibatches"),
    "sampling_rounds": Metric("rounds of sampling (more than 1 with dynamic sampling only)"),
    "response_utilization_ratio": Metric(
        "RUR: responses in the step's minibatches with an advantage other than 0", _GENERATED
    ),
    "advantage_abs": Metric("absolute advantage, summed over trained responses", "responses in the step's minibatches"),
    "prompt_visits": Metric(
        "visits so far of the step's prompts, this one included (SAS only)", "prompts in the step's minibatches"
    ),
    "token_clipping_ratio": Metric("TCR: tokens whose gradient the clip removed", _TOKENS),
    "clipped_upper": Metric("tokens beyond the upper bound with A > 0", _TOKENS),
    "clipped_lower": Metric("tokens below the lower bound with A < 0", _TOKENS),
    "clipped_cap": Metric("tokens beyond the cap with A < 0", _TOKENS),
    "first_update_clipping_ratio": Metric(
        "TCR of the step's first update alone (on-policy: 0)", "response tokens of that update"
    ),
    "first_update_ratio_deviation": Metric("largest |ratio - 1| in the step's first update (on-policy: float error)"),
    "entropy": Metric("exact entropy of the policy at each response token, natural units", _TOKENS),
    "ratio": Metric("ratio of current to old probability", _TOKENS),
    "bound_lower": Metric("lower clip bound", _TOKENS),
    "bound_upper": Metric("upper clip bound (an absent one counts as 1e6)", _TOKENS),
    "vacuous_upper": Metric("tokens where the upper DAC bound can never bind: q >= 1 / (1 + eps_high)", _TOKENS),
    "loss": Metric("minibatch loss as minimised", _UPDATES),
    "policy_loss": Metric("its policy part", _UPDATES),
    "kl_loss": Metric("its KL part", _UPDATES),
    "entropy_loss": Metric("its entropy part", _UPDATES),
    "reference_kl": Metric("k3 divergence to the reference model", _TOKENS),
    "gradient_norm": Metric("gradient norm before clipping", _UPDATES),
    "updates": Metric("optimizer updates done"),
    "updates_skipped": Metric("updates left out because the gradient was not finite"),
    "lr": Metric("learning rate of the step's last update"),
    "mismatch_abs": Metric("|log-prob of the training engine - log-prob of the rollout engine|", _TOKENS),
    "mismatch_abs_max": Metric("largest of these differences"),
    "mismatch_k3": Metric("k3 divergence between rollout and training engine", _TOKENS),
    "mismatch_ess": Metric("effective sample size of w = p_train / p_rollout: (sum w)^2 / sum w^2", _TOKENS),
    "stale_tokens": Metric(
        "response tokens sampled under older weights than old log-probs were computed with",
        "response tokens of the step",
    ),
    "tokens_trained": Metric("response tokens trained on in the step"),
    "seconds": Metric("wall-clock seconds of the step"),
    "seconds_rollout": Metric("of which sampling"),
    "seconds_rollout_wait": Metric("of which waiting until every rank has sampled and judged"),
    "seconds_reward": Metric("of which texts and rewards"),
    "seconds_advantage": Metric("of which advantages and the exchange of responses"),
    "seconds_packing": Metric("of which the plan of micro-batches and their tensors"),
    "seconds_old_logprobs": Metric("of which old and reference log-probs"),
    "seconds_forward_backward": Metric(
        "of which forward and backward passes of the updates, reduction of gradients included"
    ),
    "seconds_optimizer": Metric("of which clipping and the optimizer's step"),
    "seconds_publish": Metric("of which new weights to the rollout engine"),
    "seconds_rest": Metric("of which everything else"),
    "tokens_per_second": Metric("response tokens generated", "wall-clock seconds of the step"),
    "gpu_utilization": Metric("share of time a kernel ran on rank 0's GPU, as NVML reports it (GPU only)"),
    "gpu_memory_bytes": Metric("memory in use on rank 0's GPU, as NVML reports it (GPU only)"),
}


def rollout_metrics(
    table: ResponseTable,
    totals: Mapping[str, float],
    rounds: int,
    history: RewardHistory | None,
) -> dict[str, float]:
    """The part of a step's metrics that its rollout batch gives.

    Args:
        table: of the responses that are trained on, advantages filled in.
        totals: sums over all generated responses.
        rounds: of sampling.
        history: what prompts have earned (SAS), this step in it.
    """
    generated = totals["generated"]
    metrics = {
        "reward": totals["reward"] / generated,
        "accuracy": totals["correct"] / generated,
        "response_length": totals["tokens"] / generated,
        "truncated": totals["truncated"] / generated,
        "reward_failures": totals["reward_failures"] / generated,
        "responses_generated": generated,
        "responses_trained": float(len(table)),
        "sampling_rounds": float(rounds),
        "response_utilization_ratio": int(np.count_nonzero(table.advantage)) / generated,
    }
    if len(table):
        metrics["stale_tokens"] = int(table.stale.sum()) / max(int(table.length.sum()), 1)
        metrics["advantage_abs"] = sum(map(abs, table.advantage.tolist())) / len(table)
        if history is not None:
            ids = {table.prompts[number].id for number in set(table.prompt.tolist())}
            metrics["prompt_visits"] = sum(history.visits(i) for i in ids) / len(ids)
    return metrics


def update_metrics(updates: Sequence[UpdateResult]) -> dict[str, float]:
    """The part of a step's metrics that its updates give. ``updates`` hold sums over all ranks; an empty list gives no
    token metrics."""
    done = sum(update.stepped for update in updates)
    metrics: dict[str, float] = {"updates": done, "updates_skipped": len(updates) - done}
    if not updates:
        return metrics
    totals = {name: math.fsum(update.sums[name] for update in updates) for name in updates[0].sums}
    tokens = totals["tokens"]
    metrics["tokens_trained"] = tokens

    def share(value: float, denominator: float) -> float:
        return value / denominator if denominator else 0.0

    for name in (
        "clipped_upper",
        "clipped_lower",
        "clipped_cap",
        "entropy",
        "ratio",
        "bound_lower",
        "bound_upper",
        "vacuous_upper",
        "reference_kl",
    ):
        metrics[name] = share(totals[name], tokens)
    metrics["token_clipping_ratio"] = share(totals["gradient_removed"], tokens)
    first = updates[0]
    metrics["first_update_clipping_ratio"] = share(first.sums["gradient_removed"], first.sums["tokens"])
    metrics["first_update_ratio_deviation"] = first.maxima["ratio_deviation_max"]
    for name in ("loss", "policy_loss", "kl_loss", "entropy_loss"):
        metrics[name] = totals[name] / len(updates)
    metrics["gradient_norm"] = math.fsum(update.gradient_norm for update in updates) / len(updates)
    metrics["lr"] = updates[-1].lr
    compared = totals["mismatch_tokens"]
    if compared:
        metrics["mismatch_abs"] = totals["mismatch_abs"] / compared
        metrics["mismatch_k3"] = totals["mismatch_k3"] / compared
        metrics["mismatch_abs_max"] = max(update.maxima["mismatch_abs_max"] for update in updates)
        metrics["mismatch_ess"] = share(totals["mismatch_weight"] ** 2, totals["mismatch_weight_squared"] * compared)
    return metrics


def seconds_metrics(seconds: dict[str, float]) -> dict[str, float]:
    """``seconds`` of one step by span, nested spans taken out, as metrics: they add up to ``"seconds"``. The outermost
    span, ``"step"``, gives the rest."""
    parts = dict.fromkeys(STEP_PARTS, 0.0) | seconds
    rest = parts.pop("step")
    return (
        {"seconds": math.fsum(seconds.values())}
        | {f"seconds_{name}": own for name, own in parts.items()}
        | {"seconds_rest": rest}
    )


def check_declared(metrics: dict[str, float]) -> dict[str, float]:
    """Returns ``metrics``. Raises KeyError for a name that ``METRICS`` does not declare."""
    for name in metrics:
        if name not in METRICS:
            raise KeyError(f"metric {name!r} has no declared denominator: add it to METRICS")
    return metrics
