"""Micro-batches as tensors: what one forward step of a Megatron model takes.

A :class:`TrainingSample` is prompt and response tokens plus what the loss needs per response token.
:func:`make_micro_batch` lays a few of them out, either packed end to end in one row (THD) or one a row, padded on the
right; with context parallelism each rank gets its zigzag part. The position that predicts response token t is the one
before it, so a response of n tokens always has n predicting positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcpo_megatron.mcore.attention import AttentionPlan, PackedRow


@dataclass
class TrainingSample:
    """One response to train on. Per-token tensors have shape ``[len(response_ids)]``, fp32; ``weight`` is the same for
    every token of it.

    ``number`` is the caller's own index of the response; log-probs come back under it. ``old_logprobs`` None: the
    forward pass of the only update gives them.
    """

    number: int
    prompt_ids: Sequence[int] | np.ndarray
    response_ids: Sequence[int] | np.ndarray
    advantage: float = 0.0
    weight: float = 0.0
    old_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass
class MicroBatch:
    """Tensors of one forward step on this rank. ``n`` counts the response tokens predicted here (a context-parallel
    rank's share).

    ``input_ids``, ``position_ids``: ``[B, S]``; ``positions``: ``[n]`` into the row-major tokens; ``targets``: ``[n]``;
    ``response``: ``[n]`` index into ``numbers`` / ``response_lengths``; ``token``: ``[n]`` place inside its response.
    Loss inputs are ``[n]`` fp32 or None.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    packed: PackedRow | None
    positions: torch.Tensor
    targets: torch.Tensor
    response: torch.Tensor
    token: torch.Tensor
    numbers: list[int]
    response_lengths: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None


def make_micro_batch(
    sequences: Sequence[TrainingSample],
    device: torch.device,
    *,
    packed: bool = True,
    align: int = 1,
    row_align: int = 1,
    context_size: int = 1,
    context_rank: int = 0,
    pad_id: int = 0,
    by_position: bool = False,
) -> MicroBatch:
    """Lays ``sequences`` out as one micro-batch on this context-parallel rank.

    An empty list gives a micro-batch of padding alone (a rank that has fewer responses than its peers still takes part
    in every collective).

    Args:
        packed: one row, sequences end to end, no token attends outside its own; otherwise one sequence a row.
        align: every sequence (packed) or the row (padded) is padded to a multiple of this.
        row_align: the row is, too; a multiple of ``align`` (the last of packed sequences takes the padding).
        by_position: a packed row carries its tokens' positions (:class:`~dcpo_megatron.mcore.attention.PackedRow`); not
            for Transformer Engine's attention.

    Raises:
        ValueError: a sequence without prompt tokens (nothing predicts its first response token); old log-probs that
            some sequences have and others do not.
    """
    for sequence in sequences:
        if not len(sequence.prompt_ids):
            raise ValueError(
                f"response {sequence.number} has an empty prompt: at least one token must come before the response"
            )
    totals = [s.length for s in sequences] or [0]
    lengths = [max(1, -(-length // align)) * align for length in totals]
    if not packed:
        lengths = [max(lengths) + -max(lengths) % row_align] * len(lengths)
    else:
        lengths[-1] += -sum(lengths) % row_align

    if len({sequence.old_logprobs is None for sequence in sequences}) > 1:
        raise ValueError("some responses of a micro-batch have old_logprobs and others have none: give all or none")

    # Whole arrays, since a micro-batch may hold hundreds of short sequences. First as if one rank held everything: T
    # tokens.
    sizes = np.array(lengths)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    begin = np.cumsum(sizes) - sizes
    place = np.arange(len(owner)) - begin[owner]
    prompt = np.array([len(s.prompt_ids) for s in sequences] or [0])
    total = np.array(totals)
    tokens = np.full(len(owner), pad_id, dtype=np.int64)
    ids = [np.asarray(part, dtype=np.int64) for s in sequences for part in (s.prompt_ids, s.response_ids)]
    if ids:
        tokens[place < total[owner]] = np.concatenate(ids)

    mine = _zigzag(sizes, begin, context_size, context_rank) if context_size > 1 else np.arange(len(owner))
    row, place, owner = tokens[mine], place[mine], owner[mine]
    predicting = (place >= prompt[owner] - 1) & (place < total[owner] - 1)
    positions, targets, response, token = (
        torch.from_numpy(found)
        for found in (
            np.flatnonzero(predicting),
            tokens[mine[predicting] + 1],
            owner[predicting],
            place[predicting] + 1 - prompt[owner[predicting]],
        )
    )
    first = torch.tensor([0, *(len(s.response_ids) for s in sequences)]).cumsum(0)

    def per_token(name):
        values = [getattr(s, name) for s in sequences]
        if not values or any(v is None for v in values):
            return None if values else torch.zeros(0, device=device)
        return torch.cat(values).float().cpu()[first[response] + token].to(device)

    def per_response(name):
        values = torch.tensor([getattr(s, name) for s in sequences], dtype=torch.float64)
        return (values[response] if len(sequences) else torch.zeros(0)).float().to(device)

    rows = 1 if packed else len(lengths)
    input_ids, position_ids = (torch.from_numpy(part.reshape(rows, -1)).to(device) for part in (row, place))
    packed_row = None
    if packed:
        plan = AttentionPlan(lengths, context_size, context_rank).build(device)
        packed_row = PackedRow(plan, device, position_ids[0] if by_position else None)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        packed=packed_row,
        positions=positions.to(device),
        targets=targets.to(device),
        response=response.to(device),
        token=token.to(device),
        numbers=[s.number for s in sequences],
        response_lengths=torch.tensor([len(s.response_ids) for s in sequences], dtype=torch.long, device=device),
        advantages=per_response("advantage"),
        weights=per_response("weight"),
        old_logprobs=per_token("old_logprobs"),
        rollout_logprobs=per_token("rollout_logprobs"),
        reference_logprobs=per_token("reference_logprobs"),
    )


def _zigzag(sizes: np.ndarray, begin: np.ndarray, context_size: int, context_rank: int) -> np.ndarray:
    """Where this rank's tokens lie among all: of each sequence chunk r and chunk 2 x cp - 1 - r, as
    :func:`~dcpo_megatron.mcore.attention.zigzag_slices`."""
    chunk = sizes // (2 * context_size)
    owner = np.repeat(np.arange(len(sizes)), 2 * chunk)
    step = np.arange(len(owner)) - (np.cumsum(2 * chunk) - 2 * chunk)[owner]
    width = chunk[owner]
    second = step >= width
    mirror = 2 * context_size - 1 - context_rank
    return begin[owner] + np.where(second, mirror * width + step - width, context_rank * width + step)
