"""Precision and limits that every function of log-probs here shares.

Log-probs come as differences in an exponent, exp(a - b): half precision is not enough for them, -inf - -inf is NaN, and
the exponential overflows. A NaN is an error of whoever computed the log-prob; the limits let it through, so that it is
seen.
"""

import torch
from torch import Tensor

# |log r| is cut here before exp. e^20 = 4.9e8 is far beyond every bound and cap, so no active gradient changes.
LOG_RATIO_LIMIT = 20.0
# Log-probs of -inf become this, so that a difference of two of them is 0.
LOGPROB_LIMIT = 1.0e4


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype the objective computes in: float64 if any argument is float64, else float32 (also for half inputs).

    Raises:
        TypeError: an argument is not a floating point tensor.
    """
    dtype = torch.float32
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(f"log-probs must be a floating point tensor, got {tensor.dtype}; convert with .float()")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def limit_logprobs(logprobs: Tensor, dtype: torch.dtype) -> Tensor:
    """`logprobs` in `dtype`, infinities made finite, NaN kept; the gradient passes where nothing was cut."""
    return logprobs.to(dtype).clamp(-LOGPROB_LIMIT, LOGPROB_LIMIT)


def limited_ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) within e^-20 .. e^20."""
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
