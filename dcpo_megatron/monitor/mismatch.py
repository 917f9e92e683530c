"""Two engines, one model: how far the log-probs of training and rollout lie apart, looked at before a batch is trained
on.

    |log p_train(token) - log p_rollout(token)|       mean over the batch's tokens that the rollout engine sampled
                                                      under the weights of now

Rounding makes it 1e-6 (fp32) to some 1e-2 (bf16). Far above that the rollout engine does not serve this model: other
weights, another temperature, another dtype or a broken kernel; the ratios of every update would be wrong without a
message. Tokens of older weights differ rightly: they are counted, and left out where there are others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dcpo_megatron.distributed import all_reduce_on_host
from dcpo_megatron.mcore.batch import TrainingSample


class MismatchError(RuntimeError):
    """Training and rollout engine disagree beyond ``rollout.max_mismatch``; the message says by how much and what to
    look at."""


def check_mismatch(
    step: int,
    sequences: Iterable[TrainingSample],
    stale: Sequence[int] | np.ndarray,
    *,
    limit: float,
    counts_here: bool,
) -> None:
    """Compares old with rollout log-probs of the step, before its first update. Collective over all ranks.

    Args:
        sequences: this rank's, with ``old_logprobs`` where it has them (NaN at places that another context-parallel
            rank holds).
        stale: by ``TrainingSample.number``, how many of its first tokens older weights sampled than those that old
            log-probs were computed with.
        limit: largest mean difference (nats).
        counts_here: whether this rank's tokens are to be counted (one rank of each set of tensor-parallel peers).

    Raises:
        MismatchError: on every rank.
    """
    # [tokens of these weights: difference, count; older tokens: difference, count]
    sums = torch.zeros(4, dtype=torch.float64)
    if counts_here:
        for sequence in sequences:
            if sequence.old_logprobs is None or sequence.rollout_logprobs is None:
                continue
            difference = (sequence.old_logprobs - sequence.rollout_logprobs).abs().double()
            old = int(stale[sequence.number])
            # A place that another rank holds is NaN here; a log-prob that is NaN by fault stops the run by its
            # gradient.
            held = ~sequence.old_logprobs.isnan()
            for place, part in ((0, slice(old, None)), (2, slice(0, old))):
                sums[place] += difference[part][held[part]].sum()
                sums[place + 1] += held[part].sum()
    fresh, fresh_count, aged, aged_count = all_reduce_on_host(sums).tolist()
    mean, count, which = (
        (fresh / fresh_count, fresh_count, "sampled under the weights of now")
        if fresh_count
        else (aged / max(aged_count, 1), aged_count, "all sampled under older weights")
    )
    if mean <= limit:
        return
    raise MismatchError(
        f"step {step}: training and rollout log-probs differ by {mean:.3g} nats on average over {count:.0f} tokens"
        f" {which} (rollout.max_mismatch={limit:g}): the rollout engine does not sample from the model that is trained."
        " Nothing was trained on this batch. Look at: the servers' model folder and dtype beside model.path and"
        " model.dtype; SGLANG_RETURN_ORIGINAL_LOGPROB, which must not be set for them; mismatch_abs of the steps"
        " before in metrics.jsonl. A gap that is understood can be corrected (objective.correction=tis, mis or icepop)"
        " and allowed (rollout.max_mismatch)"
    )


def mean_of(rows: Sequence[dict[str, float]], name: str) -> float | None:
    """Mean of a metric over the steps that have it; None where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None
