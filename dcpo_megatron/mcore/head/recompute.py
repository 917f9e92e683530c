"""Log-probs and entropy whose logits are made twice: in the forward pass, and again in the backward pass. Fits every
use of the log-probs.

Both passes go over the vocabulary outside and over the tokens inside, so that a bf16 weight needs one chunk of its
gradient in fp32 and never all of it. Four matrix products of n x V x H: logits, logits again, gradient of the hidden
states, gradient of the weight.
"""

from __future__ import annotations

import torch

from dcpo_megatron.mcore.head.chunks import (
    HeadSettings,
    LogitsBlock,
    accumulation_dtype,
    add_product,
    chunks,
    factor_dtype,
    merge_over_ranks,
    merge_statistics,
    no_statistics,
    outcome,
)


def chunked_statistics(hidden, weight, targets, settings: HeadSettings):
    """``(logprobs, entropy, log_sum)``, ``[n]`` each, over the whole vocabulary of all tensor-parallel ranks; keeps
    nothing but these.

    One collective for all tokens and chunks. ``hidden [n, H]``, ``weight [V_padded / tp, H]``, ``targets [n]``.
    """
    stats = no_statistics(hidden.shape[0], hidden)
    tokens, rows = min(settings.chunk_tokens, hidden.shape[0]), min(settings.chunk_vocab, settings.real_rows)
    block, factor = LogitsBlock(tokens, rows, hidden), factor_dtype(weight)
    columns = targets - settings.first_row
    for vocab in chunks(settings.real_rows, settings.chunk_vocab):
        part_weight = weight[vocab].to(factor)
        for part in chunks(hidden.shape[0], settings.chunk_tokens):
            logits = block.logits(hidden[part].to(factor), part_weight, settings.temperature)
            found = settings.blocks.block_statistics(logits, columns[part] - vocab.start)
            stats[:, part] = merge_statistics(stats[:, part], found)
    return outcome(merge_over_ranks(stats, settings.group))


class RecomputedLogProbs(torch.autograd.Function):
    """``apply(hidden, weight, targets, settings)`` -> ``(logprobs, entropy)``."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, settings):
        logprobs, entropy, log_sum = chunked_statistics(hidden, weight, targets, settings)
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        ctx.settings = settings
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        settings, factor = ctx.settings, factor_dtype(weight)
        count, accumulate = hidden.shape[0], accumulation_dtype(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=accumulate)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        tokens, rows = min(settings.chunk_tokens, count), min(settings.chunk_vocab, settings.real_rows)
        block = LogitsBlock(tokens, rows, hidden)
        grad_logprobs = grad_logprobs / settings.temperature
        # A loss without entropy sends zeros; leaving them out saves a pass over every block.
        grad_entropy = grad_entropy / settings.temperature if bool(grad_entropy.any()) else None
        columns = targets - settings.first_row
        for vocab in chunks(settings.real_rows, settings.chunk_vocab):
            part_weight = weight[vocab].to(factor)
            part_grad = None
            if grad_weight is not None:
                # A slice of the gradient itself where that has the precision to add up in.
                same = grad_weight.dtype == accumulate
                part_grad = grad_weight[vocab] if same else torch.zeros_like(weight[vocab], dtype=accumulate)
            for part in chunks(count, settings.chunk_tokens):
                part_hidden = hidden[part].to(factor)
                grad = settings.blocks.block_gradient(
                    block.logits(part_hidden, part_weight, settings.temperature),
                    columns[part] - vocab.start,
                    log_sum[part],
                    entropy[part],
                    grad_logprobs[part],
                    None if grad_entropy is None else grad_entropy[part],
                    factor,
                )
                add_product(grad_hidden[part], grad, part_weight)
                if part_grad is not None:
                    add_product(part_grad, grad.t(), part_hidden)
            if part_grad is not None and part_grad.dtype != grad_weight.dtype:
                grad_weight[vocab] = part_grad
        return grad_hidden.to(hidden.dtype), grad_weight, None, None
