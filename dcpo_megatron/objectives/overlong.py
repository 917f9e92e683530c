"""Soft overlong penalty (DAPO, arXiv 2503.14476, eq. 13): a reward that falls linearly over the last C tokens.

0                      L <= L_max - C
((L_max - C) - L)/C    L_max - C < L <= L_max
-1                     L > L_max
"""

import torch
from torch import Tensor


def soft_overlong_penalty(length: Tensor | int, max_response_tokens: int, buffer: int) -> Tensor:
    """Penalty to be added to the reward of a response.

    Args:
        length: response tokens, any shape (or one whole number).
        max_response_tokens: L_max > 0.
        buffer: C, 0 <= C <= L_max, in tokens; 0 = no penalty at all, as `Objective.overlong_buffer` says.

    Returns:
        float64 in [-1, 0], the shape of `length`.

    Raises:
        ValueError: L_max or C out of range.
    """
    if max_response_tokens <= 0 or not 0 <= buffer <= max_response_tokens:
        raise ValueError(
            f"buffer = {buffer!r}, max_response_tokens = {max_response_tokens!r} are not possible; "
            "need 0 <= buffer <= max_response_tokens and max_response_tokens > 0"
        )
    tokens = torch.as_tensor(length).to(torch.float64)
    if buffer == 0:
        return torch.zeros_like(tokens)
    return (((max_response_tokens - buffer) - tokens) / buffer).clamp(-1.0, 0.0)
