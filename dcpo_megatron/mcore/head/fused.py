"""Head and loss in one: the gradients are formed in the forward pass, while a chunk's logits are there.

For an objective whose gradient is known as soon as the token's own log-prob and entropy are (DCPO, GRPO, DAPO, CISPO: a
ratio per token), the chunk's logits need not be made again. Token chunks are outside, the whole local vocabulary
inside:

    logits of the chunk -> log-prob, entropy -> loss, dloss/dlogprob, dloss/dentropy -> gradient of the chunk's logits
    -> of hidden states and weight

Three matrix products of n x V x H instead of four. The backward pass of the schedule arrives with one number, the
gradient of the scaled loss with respect to this sum, and multiplies what is stored by it. A ratio of the whole response
(GSPO) is known only after all of its chunks: it recomputes (:mod:`~dcpo_megatron.mcore.head.recompute`).
Tensor-parallel ranks exchange their statistics once a chunk: the gradient needs the whole vocabulary's log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dcpo_megatron.mcore.head.chunks import (
    FUSED_BLOCK_BYTES,
    HeadSettings,
    LogitsBlock,
    accumulation_dtype,
    add_product,
    chunks,
    factor_dtype,
    merge_over_ranks,
    no_statistics,
    of_device,
    outcome,
    times_weight,
    whole_blocks,
)

# (logprobs [c], entropy [c], which of the n tokens they are) -> their part of the loss, a scalar with gradient.
TokenLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]


def fused_chunk_tokens(weight: torch.Tensor, chunk_tokens: int) -> int:
    """Tokens of a chunk: a block of fp32 logits over the local vocabulary has at most ``FUSED_BLOCK_BYTES``. The same
    on every tensor-parallel rank."""
    budget = of_device(FUSED_BLOCK_BYTES, weight.device)
    return min(chunk_tokens, whole_blocks(budget // (4 * weight.shape[0])))


def loss_gradients(token_loss: TokenLoss, logprobs: torch.Tensor, entropy: torch.Tensor, part: slice):
    """``(loss, dloss/dlogprobs [c], dloss/dentropy [c] or None)`` of one chunk, from the loss function itself."""
    with torch.enable_grad():
        logprobs, entropy = logprobs.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss = token_loss(logprobs, entropy, part)
        grad_logprobs, grad_entropy = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs, grad_entropy


class FusedHeadAndLoss(torch.autograd.Function):
    """``apply(hidden, weight, targets, token_loss, settings)`` -> ``(loss, logprobs, entropy)``; only the loss has a
    gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss: TokenLoss, settings: HeadSettings):
        count, accumulate, factor = hidden.shape[0], accumulation_dtype(hidden), factor_dtype(weight)
        needs_weight = ctx.needs_input_grad[1]
        size, temperature = fused_chunk_tokens(weight, settings.chunk_tokens), settings.temperature
        real = slice(0, settings.real_rows)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        logprobs, entropy = (torch.empty(count, dtype=accumulate, device=hidden.device) for _ in range(2))
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        block = LogitsBlock(min(size, count), settings.real_rows, hidden)
        columns = targets - settings.first_row
        part_weight = weight[real]
        for part in chunks(count, size):
            part_hidden = hidden[part].to(factor)
            stats = no_statistics(part_hidden.shape[0], hidden)
            logits = None
            if settings.real_rows:
                logits = block.logits(part_hidden, part_weight, temperature)
                stats = settings.blocks.block_statistics(logits, columns[part])
            stats = merge_over_ranks(stats, settings.group)
            logprobs[part], entropy[part], log_sum = outcome(stats)
            part_loss, grad_logprobs, grad_entropy = loss_gradients(token_loss, logprobs[part], entropy[part], part)
            loss += part_loss
            if logits is None:  # this rank has rows of padding alone
                grad_hidden[part] = 0
                continue
            grad = settings.blocks.block_gradient(
                logits,
                columns[part],
                log_sum,
                entropy[part],
                grad_logprobs / temperature,
                None if grad_entropy is None else grad_entropy / temperature,
                factor,
            )
            grad_hidden[part] = times_weight(grad, part_weight, accumulate)
            if needs_weight:
                add_product(grad_weight[real], grad.t(), part_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _logprobs, _entropy):
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: a second tensor of the weight's size would be the largest of the step.
        grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
