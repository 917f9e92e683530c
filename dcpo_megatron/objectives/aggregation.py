"""From token losses to the loss of a global minibatch: one weight per token, the same for all tokens of a response.

    loss = sum_t weight(response of t) * l_t

    otm  1 / (P |o_j|)            only-token-mean (DCPO, arXiv 2509.02333, section "OTM loss"): mean over the tokens of
                                  a response, SUM over the responses of a prompt, mean over the P prompts
    slm  1 / (P G_p |o_j|)        sequence-level mean (GRPO, arXiv 2402.03300): also a mean over the G_p responses
    tlm  1 / sum_j |o_j|          token-level mean (DAPO, arXiv 2503.14476)
    dr   1 / (n L_max)            Dr.GRPO (arXiv 2503.20783): a constant

The weights are made once, from the whole minibatch, before it is cut into micro-batches and spread over ranks. Whoever
sums weighted token losses over whatever it happens to hold, and adds those sums up, gets the same loss; nobody divides
again.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .objective import Aggregation


def aggregation_weights(
    aggregation: Aggregation,
    response_lengths: Tensor | Sequence[int],
    prompt_index: Tensor | Sequence[int],
    *,
    max_response_tokens: int | None = None,
) -> Tensor:
    """Weight of EACH token of response j, for the n responses of one global minibatch.

    Args:
        aggregation: "otm", "slm", "tlm" or "dr", see the module.
        response_lengths: `[n]`, whole numbers of response tokens, of the full response (never a context-parallel
            slice).
        prompt_index: `[n]`, whole numbers; equal numbers mean the same prompt. P counts the distinct ones.
        max_response_tokens: L_max, only for "dr".

    Returns:
        float64 `[n]` on the device of `response_lengths`; 0 for an empty response. Cast it to the loss's dtype when
        spreading it over tokens.

    Raises:
        ValueError: unknown aggregation, shapes or dtypes that do not fit, a negative length, "dr" without L_max.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation = {aggregation!r} is not known; allowed: {', '.join(get_args(Aggregation))}")
    lengths = _whole_numbers("response_lengths", response_lengths)
    prompts = _whole_numbers("prompt_index", prompt_index).to(lengths.device)
    if lengths.shape != prompts.shape:
        raise ValueError(
            f"response_lengths has {lengths.numel()} entries, prompt_index {prompts.numel()}; one each per response"
        )
    if lengths.numel() == 0:
        return lengths.to(torch.float64)
    if int(lengths.min()) < 0:
        raise ValueError(f"a response length of {int(lengths.min())} is not possible")

    tokens = lengths.to(torch.float64)
    if aggregation == "tlm":
        denominator = tokens.sum().expand_as(tokens)
    elif aggregation == "dr":
        if max_response_tokens is None or max_response_tokens <= 0:
            raise ValueError(f"aggregation 'dr' needs max_response_tokens > 0, got {max_response_tokens!r}")
        denominator = torch.full_like(tokens, float(len(tokens) * max_response_tokens))
    else:
        _, group, group_sizes = prompts.unique(return_inverse=True, return_counts=True)
        denominator = len(group_sizes) * tokens
        if aggregation == "slm":
            denominator = denominator * group_sizes[group]
    return torch.where(lengths > 0, 1.0 / denominator, 0.0)


def _whole_numbers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers [n], got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor
