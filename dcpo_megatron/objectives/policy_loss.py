r"""The clipped surrogate, token by token (DCPO eq. in section DAC, arXiv 2509.02333; dual clip: arXiv 1912.09729).

With the ratio r = p/q, the advantage A and the bounds of the objective, the loss of one token, to be minimised, is

    l = max(-A r, -A clip(r, lower, upper));    if A < 0:  l = min(l, -A cap)

    A > 0   |                      A < 0   |               _______  |A| cap
            |\                             |              /
            | \                            |             /
            |  \________  -A upper         |____________/  |A| lower
            +-----------> r                +----------------------> r

On the slanted part, end points included, the token is "active" and the slope in log p is -A r; elsewhere it is 0.

The value and the gradient are formed apart, as `l = value + coefficient * (log p - sg(log p))` with sg = "constant from
here on": the second factor is 0 with slope 1, so `coefficient` IS the gradient with respect to log p. Nothing is left
to the tie-breaking of max and min, and an infinity or NaN that a mask has set aside cannot come back as 0 * inf.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics import LOG_RATIO_LIMIT, compute_dtype, limit_logprobs, limited_ratio
from .objective import Objective
from .presets import get_preset
from .sequence_ratio import sequence_log_ratio


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What `policy_loss` knows about every token; all tensors have the shape of the log-probs.

    The three masks are disjoint and False where A = 0. They say where the clip acted:

    - out_of_bound "zero": upper: A > 0 and r > upper; lower: A < 0 and r < lower; cap: A < 0 and r > cap_negative.
      Exactly these tokens have lost their gradient.
    - out_of_bound "cispo": upper: r > upper; lower: r < lower, for either sign of A; cap: nowhere. The weight of these
      tokens was changed, their gradient was not removed.

    Attributes:
        loss: per token, to be minimised; carries the gradient.
        ratio: r (the response's ratio for ratio_level "sequence"), detached, limited to e^-20 .. e^20.
        clipped_upper, clipped_lower, clipped_cap: bool.
        lower, upper: the bounds used, detached.
        clip_removes_gradient: False for "cispo".
    """

    loss: Tensor
    ratio: Tensor
    clipped_upper: Tensor
    clipped_lower: Tensor
    clipped_cap: Tensor
    lower: Tensor
    upper: Tensor
    clip_removes_gradient: bool

    @property
    def gradient_removed(self) -> Tensor:
        """bool mask of the tokens whose gradient the clip removed: the numerator of the token clipping ratio."""
        clipped = self.clipped_upper | self.clipped_lower | self.clipped_cap
        return clipped if self.clip_removes_gradient else torch.zeros_like(clipped)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    objective: Objective | str,
    *,
    response_ids: Tensor | None = None,
    response_lengths: Tensor | None = None,
    num_responses: int | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> PolicyLoss:
    """Loss of every token under `objective`; multiply with `aggregation_weights` and sum to get the minibatch loss.

    For ratio_level "sequence" the ratio of every token is its response's s_j = exp(mean_t log r_t) (GSPO, arXiv
    2507.18071, eq. 7), a constant, and the gradient is put back by the factor p/sg(p) on each token. That is exact: a
    token of response j has the gradient -A s_j dlog p_t where active, so with a weight w that is equal inside the
    response

        w sum_t (-A s_j) dlog p_t  =  w |o_j| (-A) s_j * (1/|o_j|) sum_t dlog p_t  =  w |o_j| d(-A s_j)

    and with w = 1/|o_j| it is the gradient of -A s_j. No collective ever has to be differentiated: `all_reduce` sees
    constants only.

    Args:
        logprobs: natural log-probs of the current policy, any shape; `[T]` for ratio_level "sequence". The gradient
            flows here only.
        old_logprobs: log-probs of the training engine before the update, the shape of `logprobs`. Detached here.
        advantages: broadcastable to `logprobs`. Detached here. Where it is 0 (padding, prompts) the loss is 0, whatever
            the log-probs are.
        objective: an `Objective` or the name of a preset.
        response_ids: int64 `[T]`, only for "sequence": the response of each token, 0 .. num_responses - 1; a negative
            id is a token outside every response (loss 0).
        response_lengths: int `[num_responses]`, only for "sequence": FULL lengths in tokens, over all context-parallel
            ranks.
        num_responses: only for "sequence", optional: checked against `response_lengths`.
        all_reduce: only for "sequence" with context parallelism: takes the float64 `[num_responses]` sums of log r over
            the local tokens, returns them summed over the context-parallel ranks.

    Returns:
        PolicyLoss. Its tensors are float64 if a log-prob is, else float32. NaN log-probs give a NaN loss where A != 0.

    Raises:
        ValueError: shapes that do not fit; for "sequence", missing or inconsistent response arguments.
        TypeError: log-probs that are not floating point.
    """
    objective = get_preset(objective) if isinstance(objective, str) else objective
    if old_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"old_logprobs {tuple(old_logprobs.shape)} must have the shape of logprobs {tuple(logprobs.shape)}"
        )
    dtype = compute_dtype(logprobs, old_logprobs)
    try:
        advantages = advantages.detach().to(dtype).broadcast_to(logprobs.shape)
    except RuntimeError as error:
        raise ValueError(
            f"advantages {tuple(advantages.shape)} do not broadcast to logprobs {tuple(logprobs.shape)}; "
            "give one per token, or one per response as [B, 1]"
        ) from error

    lower, upper = objective.clip_bounds(old_logprobs.to(dtype))
    logprobs = limit_logprobs(logprobs, dtype)
    log_ratio = logprobs.detach() - limit_logprobs(old_logprobs.detach(), dtype)
    if objective.ratio_level == "sequence":
        if response_ids is None or response_lengths is None:
            raise ValueError("ratio_level = 'sequence' needs response_ids [T] and response_lengths [num_responses]")
        log_ratio = sequence_log_ratio(
            log_ratio, response_ids, response_lengths, num_responses=num_responses, all_reduce=all_reduce
        )
        advantages = torch.where(response_ids < 0, 0.0, advantages)
    ratio = limited_ratio(log_ratio)
    # Where the numeric limit cuts a ratio that no bound or cap has stopped, it is the cap: flat, and counted as such.
    beyond_limit = log_ratio > LOG_RATIO_LIMIT

    positive, negative = advantages > 0, advantages < 0
    if objective.out_of_bound == "cispo":
        clipped_upper = (positive | negative) & ((ratio > upper) | beyond_limit)
        clipped_lower = (positive | negative) & (ratio < lower)
        clipped_cap = torch.zeros_like(positive)
        coefficient = -advantages * torch.minimum(torch.maximum(ratio, lower), upper)
        value = coefficient * logprobs.detach()
    else:
        clipped_upper = positive & ((ratio > upper) | beyond_limit)
        clipped_lower = negative & (ratio < lower)
        clipped_cap = negative & beyond_limit
        limited = torch.where(clipped_upper, torch.minimum(ratio, upper), ratio)
        limited = torch.where(clipped_lower, lower, limited)
        if objective.cap_negative is not None:
            clipped_cap = clipped_cap | (negative & (ratio > objective.cap_negative))
            limited = torch.where(clipped_cap, limited.clamp(max=objective.cap_negative), limited)
        value = -advantages * limited
        coefficient = torch.where(clipped_upper | clipped_lower | clipped_cap, 0.0, -advantages * ratio)
    # The zeros come last: -A r is NaN for A = 0 and a NaN log-prob, and padding must not poison the sum.
    zero = advantages == 0
    value, coefficient = torch.where(zero, 0.0, value), torch.where(zero, 0.0, coefficient)
    loss = torch.where(zero, 0.0, value + coefficient * (logprobs - logprobs.detach()))
    return PolicyLoss(
        loss=loss,
        ratio=ratio,
        clipped_upper=clipped_upper,
        clipped_lower=clipped_lower,
        clipped_cap=clipped_cap,
        lower=lower,
        upper=upper,
        clip_removes_gradient=objective.out_of_bound == "zero",
    )
