"""One ratio per response instead of per token: log s_j = (1/|o_j|) sum_t log(p_t/q_t) (GSPO, arXiv 2507.18071, eq. 7).

The tokens of a response may lie anywhere in a flat `[T]` batch and, with context parallelism, on several ranks; its
length is that of the full response. Only constants are summed, so the reduction over ranks is a plain, undifferentiated
all-reduce.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sequence_log_ratio(
    log_ratio: Tensor,
    response_ids: Tensor,
    response_lengths: Tensor,
    *,
    num_responses: int | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mean log-ratio of its response, for every token.

    Args:
        log_ratio: `[T]`, detached log p - log q of the local tokens.
        response_ids: int64 `[T]`, 0 .. num_responses - 1; negative = a token outside every response (result 0).
        response_lengths: int `[num_responses]`, full lengths in tokens, over all context-parallel ranks.
        num_responses: optional, checked against `response_lengths`.
        all_reduce: sums a float64 `[num_responses]` over the context-parallel ranks and returns it; None = all tokens
            are here.

    Returns:
        `[T]`, the dtype of `log_ratio`.

    Raises:
        ValueError: shapes, dtypes or ids that do not fit, or a response with tokens but length 0.
    """
    if log_ratio.dim() != 1 or response_ids.shape != log_ratio.shape:
        raise ValueError(
            "ratio_level = 'sequence' needs flat log-probs [T] and response_ids [T], got "
            f"{tuple(log_ratio.shape)} and {tuple(response_ids.shape)}"
        )
    if response_ids.dtype != torch.int64:
        raise ValueError(f"response_ids must be int64, got {response_ids.dtype}")
    if response_lengths.dim() != 1 or response_lengths.is_floating_point():
        raise ValueError(
            f"response_lengths must be whole numbers [num_responses], got {response_lengths.dtype} "
            f"{tuple(response_lengths.shape)}"
        )
    count = response_lengths.numel()
    if num_responses is not None and num_responses != count:
        raise ValueError(f"num_responses = {num_responses}, but response_lengths has {count} entries")
    if response_ids.numel() and int(response_ids.max()) >= count:
        raise ValueError(f"response id {int(response_ids.max())} is out of range: response_lengths has {count} entries")

    inside = response_ids >= 0
    # Tokens outside go to a spare slot: it keeps the shapes static, and a NaN of theirs reaches no response.
    slots = torch.where(inside, response_ids, count)
    sums = torch.zeros(count + 1, dtype=torch.float64, device=log_ratio.device)
    sums.index_add_(0, slots, log_ratio.to(torch.float64))
    sums = sums[:count]
    if all_reduce is not None:
        sums = all_reduce(sums)
        if not isinstance(sums, Tensor) or sums.shape != (count,):
            raise ValueError("all_reduce must return the summed tensor, in the shape that it was given")
    lengths = response_lengths.to(device=log_ratio.device, dtype=torch.float64)
    present = torch.zeros(count + 1, dtype=torch.bool, device=log_ratio.device)
    present[slots] = True
    if bool((present[:count] & (lengths <= 0)).any()):
        raise ValueError(
            "a response has tokens here but a response_lengths entry of 0; give the full lengths in tokens"
        )
    means = torch.cat([sums / lengths.clamp(min=1.0), sums.new_zeros(1)])
    return means[slots].to(log_ratio.dtype)
