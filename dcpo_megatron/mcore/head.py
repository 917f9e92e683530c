"""Log-probs and entropy of response tokens straight from hidden states, through Megatron-Core's own output layer.

Full fp32 logits ``[tokens, vocabulary]`` are this field's first cause of out-of-memory. Here only the positions that predict a response token are taken,
and their logits exist for ``chunk_tokens`` tokens at a time, in the forward pass and again (recomputed) in the backward pass:

    kept for backward        hidden states of n positions [n, H], log-sum-exp and entropy [n] fp32 each
    transient, forward       up to 4 fp32 tensors of [chunk_tokens, vocabulary/tp]
    transient, backward      the same, and the weight's gradient once in fp32 [vocabulary/tp, H]

:func:`response_head` puts it in place for one forward call of a GPTModel. From Megatron-Core 0.18 on this is the official ``output_processor``;
below that the output layer's ``forward`` is shadowed for the duration of the call (with ``labels=None`` the model then only transposes what it returns).
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from dcpo_megatron.mcore.compat import HAS_OUTPUT_PROCESSOR


def _sum_over(tensor: torch.Tensor, group) -> torch.Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


class _ChunkedLogProbs(torch.autograd.Function):
    """Forward: log p(target), entropy. Backward with z = logits / temperature, p = softmax(z), H = entropy:

    d logp / dz_j = 1[j = target] - p_j          d H / dz_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, first_row, real_rows, group, chunk_tokens):
        count = hidden.shape[0]
        log_sum = torch.empty(count, dtype=torch.float32, device=hidden.device)
        logprobs, entropy = torch.empty_like(log_sum), torch.empty_like(log_sum)
        for start in range(0, count, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, temperature, real_rows)
            peak = logits.max(dim=-1).values
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            exp = (logits - peak[:, None]).exp()
            local = targets[part] - first_row
            mine = (local >= 0) & (local < real_rows)
            picked = logits.gather(1, local.clamp(0, max(real_rows - 1, 0))[:, None])[:, 0].where(
                mine, logits.new_zeros(())
            )
            # An excluded row has exp = 0 and logit = -inf; its product must be 0, not NaN.
            weighted = (exp * logits.clamp_min(torch.finfo(torch.float32).min)).sum(-1)
            sums = _sum_over(torch.stack((exp.sum(-1), weighted, picked)), group)
            log_sum[part] = peak + sums[0].log()
            logprobs[part] = sums[2] - log_sum[part]
            entropy[part] = log_sum[part] - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        ctx.settings = (temperature, first_row, real_rows, chunk_tokens)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        temperature, first_row, real_rows, chunk_tokens = ctx.settings
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        has_entropy = grad_entropy is not None and bool(grad_entropy.any())
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logp = _logits(hidden[part], weight, temperature, real_rows) - log_sum[part, None]
            p = logp.exp()
            grad = p * -grad_logprobs[part, None]
            if has_entropy:
                logp = logp.clamp_min(torch.finfo(torch.float32).min)
                grad -= p * (logp + entropy[part, None]) * grad_entropy[part, None]
            local = targets[part] - first_row
            mine = (local >= 0) & (local < real_rows)
            grad.scatter_add_(1, local.clamp(0, max(real_rows - 1, 0))[:, None], (grad_logprobs[part] * mine)[:, None])
            grad = (grad / temperature).to(weight.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight += (grad.t() @ hidden[part]).float()
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 6


def _logits(hidden, weight, temperature, real_rows):
    logits = (hidden @ weight.t()).float().div_(temperature)
    if real_rows < logits.shape[-1]:
        logits[:, real_rows:] = float("-inf")
    return logits


def logprobs_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab: int,
    temperature: float = 1.0,
    tensor_group=None,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and the exact entropy of its distribution, both with gradient.

    Args:
        hidden: ``[n, H]`` last hidden states (after the final norm), the same on every tensor-parallel rank.
        weight: ``[V_padded / tp, H]`` this rank's rows of the output layer.
        targets: ``[n]`` token ids below ``vocab``.
        vocab: real vocabulary size; rows from there on are padding and receive no probability.
        temperature: logits are divided by it, as the rollout engine does when it samples.

    Returns:
        ``(logprobs, entropy)``, natural units, fp32, ``[n]`` each. The gradient with respect to ``hidden`` is this rank's part; the sum over the
        tensor-parallel group is the caller's (``copy_to_tensor_model_parallel_region`` does it).
    """
    rank = dist.get_rank(tensor_group) if tensor_group is not None else 0
    first_row = rank * weight.shape[0]
    real_rows = max(0, min(weight.shape[0], vocab - first_row))
    return _ChunkedLogProbs.apply(
        hidden, weight, targets, temperature, first_row, real_rows, tensor_group, chunk_tokens
    )


def _process(hidden_states, output_layer, output_weight, positions, targets, vocab, temperature, chunk_tokens):
    """``[S(/tp), B, H]`` -> ``[n, 2]``: log-prob and entropy of the selected positions. ``positions`` index the row-major ``[B, S]`` tokens."""
    weight = output_layer.weight if output_weight is None else output_weight
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=group
        )
        selected = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]).index_select(0, positions)
    else:
        selected = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]).index_select(0, positions)
        selected = copy_to_tensor_model_parallel_region(selected, group=group)
    logprobs, entropy = logprobs_from_hidden(
        selected, weight, targets, vocab=vocab, temperature=temperature, tensor_group=group, chunk_tokens=chunk_tokens
    )
    return torch.stack((logprobs, entropy), dim=-1)


@contextlib.contextmanager
def response_head(
    model: GPTModel, positions, targets, *, vocab: int, temperature: float = 1.0, chunk_tokens: int = 1024
):
    """Within the context, ``model(...)`` on the last pipeline stage returns ``[n, 2]`` (log-prob, entropy) instead of logits.

    Yields the keyword arguments to pass to the model's forward call. On other stages it changes nothing.

    Args:
        positions: ``[n]`` places in the row-major ``[B, S]`` tokens of this call (local to a context-parallel rank) whose NEXT token is a target.
        targets: ``[n]`` token ids.
    """
    if not model.post_process:
        yield {}
        return

    def process(hidden_states, output_layer, output_weight):
        return _process(
            hidden_states, output_layer, output_weight, positions, targets, vocab, temperature, chunk_tokens
        )

    if HAS_OUTPUT_PROCESSOR:

        def processor(*, hidden_states, output_layer, output_weight, **_others):
            return process(hidden_states, output_layer, output_weight)

        yield {"output_processor": processor}
        return

    layer = model.output_layer

    def shadow(input_, weight=None, runtime_gather_output=None):
        # GPTModel returns logits.transpose(0, 1): hand it [2, n].
        return process(input_, layer, weight).transpose(0, 1), None

    layer.forward = shadow
    try:
        yield {}
    finally:
        del layer.forward
