"""Weights for the gap between the engine that sampled a token and the engine that trains on it.

Both compute the same model, yet their log-probs differ: kernels, precision, and age of the weights. With
w = p_train_old / p_rollout, detached, outside the surrogate:

    none    1
    tis     min(w, C)               truncated importance sampling
    mis     w 1[w <= C]             masked importance sampling
    icepop  w 1[low <= w <= high]   masked on both sides

The ratio r and DAC's q stay those of the training engine; w multiplies the policy term of the token's loss. With one
ratio for the whole response (GSPO) w still differs from token to token: the gradient is sum_t w_t (-A s) dlog p_t, as
in verl, and not the derivative of the reported value sum_t w_t (-A s), which would have the mean of w in place of each
w_t (TRL, slime).
"""

import torch
from torch import Tensor

from .numerics import compute_dtype, limit_logprobs, limited_ratio
from .objective import Objective


def rollout_correction(old_logprobs: Tensor, rollout_logprobs: Tensor | None, objective: Objective) -> Tensor:
    """Weight of every token's loss under `objective.correction`.

    Args:
        old_logprobs: log-probs of the training engine before the update, any shape.
        rollout_logprobs: log-probs the rollout engine reported, the same shape; may be None for correction "none".
        objective: gives correction, correction_cap (C), correction_low, correction_high.

    Returns:
        the shape of `old_logprobs`, detached, at least float32. A NaN log-prob gives a NaN weight, never a silent 0.

    Raises:
        ValueError: rollout log-probs that are missing or have another shape.
        TypeError: log-probs that are not floating point.
    """
    if objective.correction == "none":
        return torch.ones_like(old_logprobs, dtype=compute_dtype(old_logprobs), requires_grad=False)
    if rollout_logprobs is None:
        raise ValueError(
            f"correction = {objective.correction!r} needs the rollout engine's log-probs; ask it to return them"
        )
    if rollout_logprobs.shape != old_logprobs.shape:
        raise ValueError(
            f"rollout_logprobs {tuple(rollout_logprobs.shape)} must have the shape of old_logprobs "
            f"{tuple(old_logprobs.shape)}"
        )
    dtype = compute_dtype(old_logprobs, rollout_logprobs)
    weight = limited_ratio(
        limit_logprobs(old_logprobs.detach(), dtype) - limit_logprobs(rollout_logprobs.detach(), dtype)
    )
    if objective.correction == "tis":
        return weight.clamp(max=objective.correction_cap)
    # Masks say what is thrown away, not what is kept: a comparison with NaN is False, and a NaN has to stay visible.
    if objective.correction == "mis":
        return torch.where(weight > objective.correction_cap, 0.0, weight)
    outside = (weight < objective.correction_low) | (weight > objective.correction_high)
    return torch.where(outside, 0.0, weight)
