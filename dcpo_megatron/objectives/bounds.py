"""Bounds of the probability ratio r = p/q outside which a token is clipped, one (lower, upper) pair per token.

Dynamic adaptive clipping (DAC, arXiv 2509.02333, section "Dynamic Adaptive Clipping") replaces PPO's `|r - 1| <= eps`
by `|(r - 1) p| <= eps`. With p = r q this is a quadratic in r whose solution depends on the old probability q of the
token:

    lower(q) = 1/2 + 1/2 sqrt(max(1 - 4 eps_low / q, 0))
    upper(q) = min(1/2 + 1/2 sqrt(1 + 4 eps_high / q), ratio_max)

so that rare tokens may move much further than frequent ones. The other rules are the ones it is compared with: fixed
bounds (PPO, GRPO, DAPO), RIPO's `1 +- sqrt(delta/q)`, and none. Everything works on log q, because q itself underflows.

The public functions check their numbers at each call; `dac`, `fixed` and `ripo` do not, so that an `Objective`, which
was checked when it was made, can be compiled (`torch.compile(fullgraph=True)`).
"""

import math

import torch
from torch import Tensor

from .checks import check_number, check_outer
from .numerics import compute_dtype


def _log_q(old_logprobs: Tensor) -> Tensor:
    """Old log-probs as the bounds use them: detached, at least fp32, at most 0, NaN read as 0 (q = 1)."""
    log_q = old_logprobs.detach().to(compute_dtype(old_logprobs))
    # A NaN gets the tightest bounds there are. The NaN itself is not hidden: it reaches the loss through the ratio.
    return torch.where(log_q.isnan(), 0.0, log_q).clamp(max=0.0)


def dynamic_clip_bounds(
    old_logprobs: Tensor, eps_low: float = 0.16, eps_high: float = 0.20, ratio_max: float = 10.0
) -> tuple[Tensor, Tensor]:
    """DAC bounds of the ratio from the old log-probs (arXiv 2509.02333, section "Dynamic Adaptive Clipping").

    For q < 4 eps_low the constraint has no lower end and `lower` is exactly 0.5 (the paper's convention); `upper` ends
    at `ratio_max`. Both fall to the interval around 1 as q grows: they are tightest at q = 1.

    Args:
        old_logprobs: natural log-probs of the training engine before the update, any shape. Values above 0 count as 0,
            NaN counts as 0 (q = 1, the tightest bounds), -inf is q = 0.
        eps_low: half-width below 1, >= 0; 0 gives lower = 1.
        eps_high: half-width above 1, >= 0; 0 gives upper = 1.
        ratio_max: largest upper bound, > 1.

    Returns:
        (lower, upper), the shape of `old_logprobs`, detached, finite for every input; float64 for float64 input,
        else float32.

    Raises:
        ValueError: eps_low, eps_high or ratio_max out of range.
        TypeError: `old_logprobs` is not floating point.
    """
    check_number("eps_low", eps_low, minimum=0.0)
    check_number("eps_high", eps_high, minimum=0.0)
    check_number("ratio_max", ratio_max, above=1.0)
    return dac(old_logprobs, eps_low, eps_high, ratio_max)


def dac(old_logprobs: Tensor, eps_low: float, eps_high: float, ratio_max: float) -> tuple[Tensor, Tensor]:
    """`dynamic_clip_bounds` of numbers that were checked, as those of an `Objective` are."""
    log_q = _log_q(old_logprobs)
    if eps_low > 0:
        # 1 - min(4 eps/q, 1), through expm1 because near q = 4 eps the square root magnifies a rounding of 1 - u.
        one_minus_u = -torch.expm1((math.log(4 * eps_low) - log_q).clamp(max=0.0))
        lower = 0.5 + 0.5 * torch.sqrt(one_minus_u)
    else:
        lower = torch.ones_like(log_q)
    if eps_high > 0:
        # The cap is applied to u = 4 eps/q, where upper = ratio_max: exp overflows at q = 0, the root must not.
        u_max = 4.0 * ratio_max * (ratio_max - 1.0)  # = (2 ratio_max - 1)^2 - 1
        u = torch.exp(math.log(4 * eps_high) - log_q).clamp(max=u_max)
        upper = 0.5 + 0.5 * torch.sqrt(1.0 + u)
    else:
        upper = torch.ones_like(log_q)
    return lower, upper


def fixed_clip_bounds(old_logprobs: Tensor, eps_low: float = 0.2, eps_high: float = 0.2) -> tuple[Tensor, Tensor]:
    """The same bounds 1 - eps_low, 1 + eps_high for every token (PPO, arXiv 1707.06347; DAPO's "clip higher" eps_high >
    eps_low).

    Args:
        old_logprobs: gives the shape, device and precision only.
        eps_low: in [0, 1]; 1 means no lower bound.
        eps_high: >= 0.

    Returns:
        (lower, upper), the shape of `old_logprobs`, at least float32.

    Raises:
        ValueError: an epsilon out of range.
    """
    check_number("eps_low", eps_low, minimum=0.0)
    check_number("eps_high", eps_high, minimum=0.0)
    if eps_low > 1.0:
        raise ValueError(f"eps_low = {eps_low!r} is not possible with fixed bounds; give a number in [0, 1]")
    return fixed(old_logprobs, eps_low, eps_high)


def fixed(old_logprobs: Tensor, eps_low: float, eps_high: float) -> tuple[Tensor, Tensor]:
    """`fixed_clip_bounds` of numbers that were checked."""
    like = old_logprobs.detach().to(compute_dtype(old_logprobs))
    return torch.full_like(like, 1.0 - eps_low), torch.full_like(like, 1.0 + eps_high)


def ripo_clip_bounds(
    old_logprobs: Tensor, delta: float = 0.05, outer: tuple[float, float] = (0.5, 10.0)
) -> tuple[Tensor, Tensor]:
    """RIPO's bounds 1 -+ sqrt(delta/q), kept inside `outer`.

    Args:
        old_logprobs: natural log-probs, any shape; NaN counts as q = 1, -inf is q = 0 (the outer interval).
        delta: squared half-width at q = 1, >= 0.
        outer: (low, high) with 0 <= low <= 1 <= high.

    Returns:
        (lower, upper), the shape of `old_logprobs`, detached, finite, at least float32.

    Raises:
        ValueError: delta or outer out of range.
    """
    check_number("delta", delta, minimum=0.0)
    check_outer("outer", outer)
    return ripo(old_logprobs, delta, outer)


def ripo(old_logprobs: Tensor, delta: float, outer: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """`ripo_clip_bounds` of numbers that were checked."""
    log_q = _log_q(old_logprobs)
    if delta == 0:
        return torch.ones_like(log_q), torch.ones_like(log_q)
    width = torch.exp(0.5 * (math.log(delta) - log_q))  # may be inf at q = 0; the clamps make it finite
    return (1.0 - width).clamp(min=outer[0]), (1.0 + width).clamp(max=outer[1])


def no_clip_bounds(old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds that never act: lower 0, upper +inf, the shape of `old_logprobs`, at least float32."""
    like = old_logprobs.detach().to(compute_dtype(old_logprobs))
    return torch.zeros_like(like), torch.full_like(like, math.inf)


def vacuous_upper_bound(old_logprobs: Tensor, eps_high: float = 0.20) -> Tensor:
    """Where DAC's upper bound can never act, because r = p/q <= 1/q <= upper(q): q >= 1/(1 + eps_high).

    Its share of the response tokens is a metric: there, nothing but the gradient norm limits an increase.

    Args:
        old_logprobs: natural log-probs, any shape.
        eps_high: DAC's upper half-width, >= 0.

    Returns:
        bool mask, the shape of `old_logprobs`; False for NaN.

    Raises:
        ValueError: eps_high out of range.
    """
    check_number("eps_high", eps_high, minimum=0.0)
    return old_logprobs.detach().to(compute_dtype(old_logprobs)) >= -math.log1p(eps_high)
