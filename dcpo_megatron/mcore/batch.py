"""Micro-batches as tensors: what one forward step of a Megatron model takes.

A :class:`Sequence` is prompt and response tokens plus what the loss needs per response token. :func:`make_micro_batch` lays a few of them out, either
packed end to end in one row (THD) or one a row, padded on the right; with context parallelism each rank gets its zigzag part. The position that predicts
response token t is the one before it, so a response of n tokens always has n predicting positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dcpo_megatron.mcore.attention import AttentionPlan, PackedRow, zigzag_slices


@dataclass
class Sequence:
    """One response to train on. Per-token tensors have shape ``[len(response_ids)]``, fp32; ``weight`` is the same for every token of it.

    ``number`` is the caller's own index of the response; log-probs come back under it.
    """

    number: int
    prompt_ids: Seq[int]
    response_ids: Seq[int]
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
    """Tensors of one forward step on this rank. ``n`` counts the response tokens predicted here (a context-parallel rank's share).

    ``input_ids``, ``position_ids``: ``[B, S]``; ``positions``: ``[n]`` into the row-major tokens; ``targets``: ``[n]``; ``response``: ``[n]`` index into
    ``numbers`` / ``response_lengths``; ``token``: ``[n]`` place inside its response. Loss inputs are ``[n]`` fp32 or None.
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
    sequences: Seq[Sequence],
    device: torch.device,
    *,
    packed: bool = True,
    align: int = 1,
    context_size: int = 1,
    context_rank: int = 0,
    pad_id: int = 0,
) -> MicroBatch:
    """Lays ``sequences`` out as one micro-batch on this context-parallel rank.

    An empty list gives a micro-batch of padding alone (a rank that has fewer responses than its peers still takes part in every collective).

    Args:
        packed: one row, sequences end to end, no token attends outside its own; otherwise one sequence a row.
        align: every sequence (packed) or the row (padded) is padded to a multiple of this.

    Raises:
        ValueError: a sequence without prompt tokens (nothing predicts its first response token).
    """
    for sequence in sequences:
        if not len(sequence.prompt_ids):
            raise ValueError(
                f"response {sequence.number} has an empty prompt: at least one token must come before the response"
            )
    lengths = [max(1, math.ceil(s.length / align)) * align for s in sequences] or [align]
    if not packed:
        lengths = [max(lengths)] * len(lengths)

    # numpy: a micro-batch of hundreds of short sequences is many tiny operations.
    rows, places, positions, targets, response, token = [], [], [], [], [], []
    start = 0
    for number, length in enumerate(lengths):
        tokens = np.full(length, pad_id, dtype=np.int64)
        if number < len(sequences):
            prompt, total = len(sequences[number].prompt_ids), sequences[number].length
            tokens[:prompt] = sequences[number].prompt_ids
            tokens[prompt:total] = sequences[number].response_ids
        if context_size == 1:
            place = np.arange(length)
        else:
            place = np.concatenate(
                [np.arange(s.start, s.stop) for s in zigzag_slices(length, context_size, context_rank)]
            )
        rows.append(tokens[place])
        places.append(place)
        if number < len(sequences):
            local = np.flatnonzero((place >= prompt - 1) & (place < total - 1))
            positions.append(start + local)
            targets.append(tokens[place[local] + 1])
            response.append(np.full(len(local), number))
            token.append(place[local] + 1 - prompt)
        start += len(place)

    def join(parts):
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.long)

    positions, targets, response, token = join(positions), join(targets), join(response), join(token)
    first = torch.tensor([0, *(len(s.response_ids) for s in sequences)]).cumsum(0)

    def per_token(name):
        values = [getattr(s, name) for s in sequences]
        if not values or any(v is None for v in values):
            return None if values else torch.zeros(0, device=device)
        return torch.cat(values).float().cpu()[first[response] + token].to(device)

    def per_response(name):
        values = torch.tensor([getattr(s, name) for s in sequences], dtype=torch.float64)
        return (values[response] if len(sequences) else torch.zeros(0)).float().to(device)

    if packed:
        plan = AttentionPlan(lengths, context_size, context_rank).build(device)
        input_ids, position_ids = join(rows)[None], join(places)[None]
        row = PackedRow(plan, device)
    else:
        input_ids, position_ids = (torch.from_numpy(np.stack(part)) for part in (rows, places))
        row = None
    return MicroBatch(
        input_ids=input_ids.to(device),
        position_ids=position_ids.to(device),
        packed=row,
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
