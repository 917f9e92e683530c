"""Log-probs and entropy of response tokens straight from hidden states, through Megatron-Core's own output layer.

Full fp32 logits ``[tokens, vocabulary]`` are this field's first cause of out-of-memory. Here only the n positions that
predict a response token are taken, and their logits exist in blocks, in fp32 from fp32 or bf16 factors. Two heads have
the same forward contract:

- :mod:`~dcpo_megatron.mcore.head.recompute` makes each block again in the backward pass; it serves everything, also
  forward-only passes.
- :mod:`~dcpo_megatron.mcore.head.fused` forms the gradients of a token-level objective while the block is there: one
  matrix product in four is saved.

Bytes, with V rows of the output layer on this rank, H hidden size, w bytes of a weight or hidden state (2 or 4), B = 64
MiB for a block of logits (256 on a GPU; ``chunk_tokens`` x the chunk of the vocabulary v), F = 256 MiB for the fused
head's (512 on a GPU; its tokens c x V), P = two pieces of a block (4 MiB on a CPU, 128 on a GPU, none with Triton):

                           forward only     recompute                      fused
    kept for backward      -                n H w + 16 n                   n H w + 4 V H      (the gradients themselves)
    results                8 n              8 n                            8 n
    transient, forward     B + P + 32 n     B + P + 32 n                   F + P + 4 c H
    transient, backward    -                B + P + 4 n H                  -
    what bf16 adds, CPU    4 v H            8 v H                          B, and 2 V H when the gradient is rounded
    what bf16 adds, GPU    -                4 v H + B / 2                  F / 2, and 2 V H when the gradient is rounded

Where torch cannot add half-precision products in place, a GPU takes 64 MiB more.

Kept by the recomputing head: the selected hidden states (they exist once more as the layers' output), the target,
log-sum-exp and entropy of each. In fp32 the gradients 4 n H and 4 V H are what the backward pass returns, so no extra.
With bf16 weights the recomputing head adds up a chunk of the weight's gradient in fp32 at a time, and the fused head
holds all of it in fp32 from its forward to its backward pass; on the last stage the schedule has one micro-batch
between the two. Where these 4 V H bytes are more than 1 GiB (a vocabulary of 152,064 not split, hidden 3,584: 2 GiB),
``model.fused_head_loss=auto`` takes the recomputing head and its fourth product instead; ``on`` and ``off`` decide
otherwise. A forward-only pass that is to give the fused head's log-probs to the bit takes its blocks (F for B, V for
v). No Megatron-Core ``main_grad`` is written here: the gradient of the weight goes to autograd, in the weight's
dtype, which adds a tied embedding's own and then calls DistributedDataParallel's hook.

On a GPU where Triton imports, what lies between two products is one kernel each
(:mod:`~dcpo_megatron.mcore.head.triton_blocks`), elsewhere plain PyTorch
(:mod:`~dcpo_megatron.mcore.head.torch_blocks`).

:func:`response_head` puts it in place for one forward call of a GPTModel. From Megatron-Core 0.18 on this is the
official ``output_processor``; below that the output layer's ``forward`` is shadowed for the duration of the call (with
``labels=None`` the model then only transposes what it returns).
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from dcpo_megatron.mcore.compat import HAS_OUTPUT_PROCESSOR
from dcpo_megatron.mcore.fast_paths import finish_gathering_of
from dcpo_megatron.mcore.head.backend import head_blocks
from dcpo_megatron.mcore.head.chunks import make_settings
from dcpo_megatron.mcore.head.fused import FusedHeadAndLoss, TokenLoss, fused_chunk_tokens
from dcpo_megatron.mcore.head.recompute import RecomputedLogProbs


def logprobs_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab: int,
    temperature: float = 1.0,
    tensor_group=None,
    chunk_tokens: int = 1024,
    chunk_vocab: int | None = None,
    head: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and the exact entropy of its distribution, both with gradient. Where gradients are off,
    nothing is kept.

    Args:
        hidden: ``[n, H]`` last hidden states (after the final norm), the same on every tensor-parallel rank.
        weight: ``[V_padded / tp, H]`` this rank's rows of the output layer.
        targets: ``[n]`` token ids below ``vocab``.
        vocab: real vocabulary size; rows from there on are padding and receive no probability.
        temperature: logits are divided by it, as the rollout engine does when it samples.
        chunk_tokens, chunk_vocab: the largest block of logits; by default ``chunk_vocab`` fits a block into
            64 MiB, on a GPU into 256.
        head: auto | torch | triton, see :func:`~dcpo_megatron.mcore.head.backend.head_blocks`.

    Returns:
        ``(logprobs, entropy)``, natural units, fp32 (fp64 from fp64), ``[n]`` each. The gradient with respect to
        ``hidden`` is this rank's part; the sum over the tensor-parallel group is the caller's
        (``copy_to_tensor_model_parallel_region`` does it).
    """
    settings = make_settings(
        weight,
        vocab=vocab,
        temperature=temperature,
        group=tensor_group,
        blocks=head_blocks(head, weight.device.type),
        chunk_tokens=chunk_tokens,
        chunk_vocab=chunk_vocab,
    )
    return RecomputedLogProbs.apply(hidden, weight, targets, settings)


def loss_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    vocab: int,
    temperature: float = 1.0,
    tensor_group=None,
    chunk_tokens: int = 1024,
    head: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head and loss in one, for a loss that is a sum over tokens of a function of the token's own log-prob and entropy.

    Args:
        token_loss: ``f(logprobs [c], entropy [c], part)`` -> that part's share of the loss, with gradient, where
            ``part`` is the slice of the n tokens that the chunk holds. A part's share must not depend on other parts.

    The others are those of :func:`logprobs_from_hidden`.

    Returns:
        ``(loss, logprobs [n], entropy [n])``. The loss carries the gradient of ``hidden`` (this rank's part) and
        ``weight``, once; the others carry none.
    """
    settings = make_settings(
        weight,
        vocab=vocab,
        temperature=temperature,
        group=tensor_group,
        blocks=head_blocks(head, weight.device.type),
        chunk_tokens=chunk_tokens,
    )
    return FusedHeadAndLoss.apply(hidden, weight, targets, token_loss, settings)


class FusedLoss(Protocol):
    """What :func:`response_head` needs of a loss to fuse it: :func:`~dcpo_megatron.mcore.loss.make_loss` with
    ``fused=True`` gives one."""

    def token_loss(self, logprobs: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor: ...


def _selected(hidden_states, output_layer, positions):
    """``[S(/tp), B, H]`` -> ``[n, H]``, the same on every tensor-parallel rank, whose backward pass sums the ranks'
    parts of the gradient."""
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=True, group=group
        )
        return hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]).index_select(0, positions)
    selected = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1]).index_select(0, positions)
    return copy_to_tensor_model_parallel_region(selected, group=group)


@contextlib.contextmanager
def response_head(
    model: GPTModel,
    positions: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    head: str = "auto",
    fused_loss: FusedLoss | None = None,
    blocks_of_fused: bool = False,
):
    """Within the context, ``model(...)`` on the last pipeline stage returns ``[n, 2]`` (log-prob, entropy) instead of
    logits.

    With ``fused_loss`` it returns ``[n + 1, 2]``: the same n rows, without gradient, and a last row (loss, 0) with it,
    which the loss function takes. Yields the keyword arguments to pass to the model's forward call. On other stages it
    changes nothing.

    Args:
        positions: ``[n]`` places in the row-major ``[B, S]`` tokens of this call (local to a context-parallel rank)
            whose NEXT token is a target.
        targets: ``[n]`` token ids.
        blocks_of_fused: without ``fused_loss``: take the blocks that the fused head would take, so that the log-probs
            are its own to the bit. For a forward-only pass before it.
    """
    if not model.post_process:
        yield {}
        return

    def process(hidden_states, output_layer, output_weight):
        weight = output_layer.weight if output_weight is None else output_weight
        selected = _selected(hidden_states, output_layer, positions)
        settings = dict(
            vocab=vocab,
            temperature=temperature,
            tensor_group=output_layer.tp_group,
            chunk_tokens=chunk_tokens,
            head=head,
        )
        if fused_loss is None:
            if blocks_of_fused:
                settings |= dict(chunk_tokens=fused_chunk_tokens(weight, chunk_tokens), chunk_vocab=weight.shape[0])
            return torch.stack(logprobs_from_hidden(selected, weight, targets, **settings), dim=-1)
        loss, logprobs, entropy = loss_from_hidden(selected, weight, targets, fused_loss.token_loss, **settings)
        last = torch.stack((loss, torch.zeros_like(loss)))
        return torch.cat((torch.stack((logprobs, entropy), dim=-1), last[None]))

    if HAS_OUTPUT_PROCESSOR:

        def processor(*, hidden_states, output_layer, output_weight, **_others):
            finish_gathering_of(output_layer)
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
