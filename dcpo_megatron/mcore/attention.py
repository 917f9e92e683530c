"""Causal core attention for packed rows and context parallelism, on PyTorch's scaled-dot-product attention.

Megatron-Core's local ``DotProductAttention`` refuses both. Here a micro-batch is a set of *query blocks*: block
``(start, offset, length)`` holds ``length`` queries of one sequence, the first of which stands at position ``offset``
of that sequence, and may see keys ``0 .. offset + its own place``.

    no context parallelism    one block a sequence: (start, 0, L)
    context parallelism       two blocks a sequence and rank, the zigzag order: of 2*cp chunks rank r holds chunk r and
                              chunk 2*cp-1-r, so that every rank has the same number of (query, key) pairs; keys and
                              values are gathered over the group

Blocks of similar size share one attention call: they are padded to the largest of their group on the right, where
causality keeps the padding out of every real query's sight. The grouping is computed once a micro-batch
(:class:`AttentionPlan`) and used by every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

# Two blocks share a call while padding stays below this share of the call's area.
MAX_PADDING = 0.35


class AttentionBlock(NamedTuple):
    """``query_start``: place in the local packed row; ``key_start``: place of the sequence in the gathered row; both in
    tokens."""

    query_start: int
    key_start: int
    offset: int
    length: int

    @property
    def keys(self) -> int:
        return self.offset + self.length


@dataclass
class Group:
    """Index tensors of one attention call over ``n`` blocks: queries ``[n, Q]``, keys ``[n, K]``, real outputs ``[sum
    of lengths]``."""

    query_index: torch.Tensor
    key_index: torch.Tensor
    output_from: torch.Tensor
    offset: torch.Tensor | None  # [n, 1], or None where every block starts its sequence (plain causal)

    def mask(self) -> torch.Tensor | None:
        """``[n, 1, Q, K]``, true where a query may look; made for the call, since its size is quadratic."""
        if self.offset is None:
            return None
        device = self.offset.device
        last = self.offset + torch.arange(self.query_index.shape[1], device=device)[None]
        return (torch.arange(self.key_index.shape[1], device=device) <= last[:, :, None])[:, None]


@dataclass
class AttentionPlan:
    """How one packed row is computed: built on the host once a micro-batch from the (padded) sequence lengths.

    ``lengths`` are full sequence lengths in tokens; with context parallelism each must be a multiple of ``2 *
    context_size``.
    """

    lengths: list[int]
    context_size: int = 1
    context_rank: int = 0
    groups: list[Group] = field(default_factory=list)
    gather_index: torch.Tensor | None = None
    restore: torch.Tensor | None = (
        None  # [T]: where each local token's result lies in the groups' results laid end to end
    )

    def build(self, device: torch.device) -> AttentionPlan:
        """Fills the index tensors on ``device``. Raises ValueError on a length that does not divide."""
        if self.context_size > 1:
            for length in self.lengths:
                if length % (2 * self.context_size):
                    raise ValueError(
                        f"sequence of {length} tokens: context parallelism of {self.context_size} needs a multiple of"
                        f" {2 * self.context_size}"
                    )
            self.gather_index = zigzag_inverse(self.lengths, self.context_size).to(device)
        computed = []
        for blocks in group_blocks(self._blocks()):
            group, places = self._group(blocks, device)
            self.groups.append(group)
            computed.append(places)
        self.restore = torch.from_numpy(np.concatenate(computed).argsort()).to(device)
        return self

    def _blocks(self) -> list[AttentionBlock]:
        blocks, local, full = [], 0, 0
        for length in self.lengths:
            if self.context_size == 1:
                blocks.append(AttentionBlock(local, full, 0, length))
                local += length
            else:
                chunk = length // (2 * self.context_size)
                for number in (self.context_rank, 2 * self.context_size - 1 - self.context_rank):
                    blocks.append(AttentionBlock(local, full, number * chunk, chunk))
                    local += chunk
            full += length
        return [block for block in blocks if block.length]

    def _group(self, blocks: list[AttentionBlock], device: torch.device) -> tuple[Group, np.ndarray]:
        """The call's index tensors, and the local places of its real outputs in their order."""
        # numpy: a micro-batch of short sequences is a matter of many small operations.
        query_start, key_start, offset, length = (column[:, None] for column in np.array(blocks).T)
        keys = offset + length
        steps_q, steps_k = np.arange(length.max()), np.arange(keys.max())
        # Padding repeats the block's last token: any valid place serves, since nothing reads the result.
        query_index = query_start + np.minimum(steps_q, length - 1)
        key_index = key_start + np.minimum(steps_k, keys - 1)
        real = steps_q < length
        group = Group(
            query_index=torch.from_numpy(query_index).to(device),
            key_index=torch.from_numpy(key_index).to(device),
            output_from=torch.from_numpy(np.flatnonzero(real)).to(device),
            offset=torch.from_numpy(offset.copy()).to(device) if offset.any() else None,
        )
        return group, query_index[real]


def group_blocks(blocks: list[AttentionBlock]) -> list[list[AttentionBlock]]:
    """Groups blocks so that in each group padding stays below ``MAX_PADDING`` of the padded (query x key) area.
    Deterministic."""
    groups: list[list[AttentionBlock]] = []
    area = longest_q = longest_k = 0
    for block in sorted(blocks, key=lambda b: (-b.keys, -b.length, b.query_start)):
        length, keys = block.length, block.keys
        if groups:
            longest_q = max(longest_q, length)
            padded = (len(groups[-1]) + 1) * longest_q * longest_k
            if 1.0 - (area + length * keys) / padded <= MAX_PADDING:
                groups[-1].append(block)
                area += length * keys
                continue
        groups.append([block])
        area, longest_q, longest_k = length * keys, length, keys
    return groups


def zigzag_slices(length: int, context_size: int, context_rank: int) -> tuple[slice, slice]:
    """The two slices of a sequence of ``length`` tokens that ``context_rank`` holds, in the order in which it holds
    them."""
    chunk = length // (2 * context_size)
    mirror = 2 * context_size - 1 - context_rank
    return slice(context_rank * chunk, (context_rank + 1) * chunk), slice(mirror * chunk, (mirror + 1) * chunk)


def zigzag_inverse(lengths: list[int], context_size: int) -> torch.Tensor:
    """Index ``[sum(lengths)]`` into the rows of all ranks laid end to end that restores the packed row's own order."""
    total = sum(lengths)
    order = torch.empty(total, dtype=torch.long)
    local_total = total // context_size
    for rank in range(context_size):
        place, start = rank * local_total, 0
        for length in lengths:
            for piece in zigzag_slices(length, context_size, rank):
                count = piece.stop - piece.start
                order[start + piece.start : start + piece.stop] = torch.arange(place, place + count)
                place += count
            start += length
    return order


class PackedRow(PackedSeqParams):
    """Megatron-Core's packed-sequence parameters plus the attention plan. Boundaries ``cu_seqlens`` are over FULL
    sequences, in tokens.

    ``positions``: ``[T]``, the place of each of this rank's tokens in its sequence. Given them, Megatron-Core is told
    of one plain row (``sbhd``): it turns queries and keys by these positions (:mod:`~dcpo_megatron.mcore.rotary`), and
    only :class:`CausalCoreAttention` knows the sequences. Transformer Engine's attention reads the boundaries: its rows
    have none.
    """

    def __init__(self, plan: AttentionPlan, device: torch.device, positions: torch.Tensor | None = None):
        ends = torch.tensor([0, *plan.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        longest = max(plan.lengths)
        super().__init__(
            qkv_format="thd" if positions is None else "sbhd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.plan = plan
        self.positions = positions


class CausalCoreAttention(torch.nn.Module):
    """Drop-in ``core_attention`` of Megatron-Core's ``SelfAttention``: causal, grouped queries, packed (THD) and padded
    rows, context parallelism.

    Shapes: padded rows take query ``[S, B, heads, d]`` and give ``[S, B, heads * d]``; packed rows take ``[T, heads,
    d]`` and give ``[T, heads * d]``, or with a dimension of one between (all divided by the tensor- and
    context-parallel sizes as Megatron-Core does).
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
        **_unused,
    ):
        super().__init__()
        if config.attention_dropout:
            raise ValueError(
                f"attention_dropout={config.attention_dropout}: policy optimisation recomputes log-probs and needs 0"
            )
        if getattr(config, "window_size", None) is not None:
            raise ValueError(f"window_size={config.window_size}: sliding windows are not supported")
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self._padded_plans: dict[tuple, AttentionPlan] = {}

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        if packed_seq_params is not None:
            if query.dim() == 4:
                row = (t.squeeze(1) for t in (query, key, value))
                return self._rows(*row, packed_seq_params.plan).unsqueeze(1)
            return self._rows(query, key, value, packed_seq_params.plan)
        sequence, batch, heads, width = query.shape
        if self.context_group.size() == 1:
            out = self._attend(*(t.permute(1, 2, 0, 3) for t in (query, key, value)), None)
            return out.permute(2, 0, 1, 3).reshape(sequence, batch, heads * width)
        plan = self._padded_plan(sequence * self.context_group.size(), batch, query.device)
        flat = [t.transpose(0, 1).reshape(batch * sequence, *t.shape[2:]) for t in (query, key, value)]
        return self._rows(*flat, plan).view(batch, sequence, -1).transpose(0, 1).contiguous()

    def _padded_plan(self, length: int, batch: int, device: torch.device) -> AttentionPlan:
        found = self._padded_plans.get((length, batch))
        if found is None:
            self._padded_plans.clear()
            plan = AttentionPlan([length] * batch, self.context_group.size(), self.context_group.rank())
            found = self._padded_plans[(length, batch)] = plan.build(device)
        return found

    def _rows(self, query, key, value, plan: AttentionPlan):
        _, heads, width = query.shape
        if plan.gather_index is not None:
            key, value = (
                gather_from_sequence_parallel_region(
                    t.contiguous(), tensor_parallel_output_grad=True, group=self.context_group
                ).index_select(0, plan.gather_index)
                for t in (key, value)
            )
        results = []
        for group in plan.groups:
            out = self._attend(
                query[group.query_index].transpose(1, 2),
                key[group.key_index].transpose(1, 2),
                value[group.key_index].transpose(1, 2),
                group.mask(),
            )
            results.append(out.transpose(1, 2).reshape(-1, heads * width).index_select(0, group.output_from))
        return torch.cat(results).index_select(0, plan.restore)

    def _attend(self, query, key, value, mask):
        """``[n, heads, Q, d]``, ``[n, groups, K, d]`` x 2 -> ``[n, heads, Q, d]``."""
        grouped = query.shape[1] != key.shape[1]
        if grouped and (mask is not None or query.dtype == torch.float32):
            # The fast GPU kernels take grouped queries only in half precision without a mask: keys and values are
            # repeated for the others.
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
        )

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """No parameters: nothing to save (Megatron-Core's checkpointing asks every module)."""
        return {}
