"""The k3 estimate of the KL divergence to a reference policy: with d = log p_ref - log p, k3 = e^d - d - 1 >= 0.

It is unbiased under samples of the current policy and has a small variance (Schulman, "Approximating KL divergence",
2020); GRPO adds it to the token loss with a coefficient (arXiv 2402.03300, eq. 4). DCPO uses none.
"""

import torch
from torch import Tensor

from .numerics import LOG_RATIO_LIMIT, compute_dtype, limit_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, cap: float | None = None) -> Tensor:
    """k3 of every token, to be added to its loss times `kl_coef`.

    Args:
        logprobs: natural log-probs of the current policy, any shape. The gradient flows here only:
            d k3/d log p = 1 - e^d.
        ref_logprobs: log-probs of the reference policy, the same shape. Detached here.
        cap: k3 above it counts as it, without gradient (`Objective.kl_cap`); None: k3 itself.

    Returns:
        >= 0, the shape of `logprobs`, at least float32; d is limited to -20 .. 20, beyond which the gradient is 0.

    Raises:
        ValueError: shapes that differ.
        TypeError: log-probs that are not floating point.
    """
    if ref_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"ref_logprobs {tuple(ref_logprobs.shape)} must have the shape of logprobs {tuple(logprobs.shape)}"
        )
    dtype = compute_dtype(logprobs, ref_logprobs)
    difference = limit_logprobs(ref_logprobs.detach(), dtype) - limit_logprobs(logprobs, dtype)
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    k3 = torch.expm1(difference) - difference  # expm1 keeps the result >= 0 where d is tiny
    return k3 if cap is None else k3.clamp(max=cap)
