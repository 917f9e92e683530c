"""What both heads are made of: the cut into chunks, the products of a chunk, and the statistics from which log-probs
and entropy follow.

With z = logits / temperature of one position, four numbers say all that the log-prob of a target and the entropy need,
and two of them merge exactly, in any order (the online log-sum-exp of a softmax read in pieces):

    peak    m = max z_j                          merged:  m = max(m1, m2), and with d_i = m_i - m:
    total   s = sum exp(z_j - m)                          s = sum_i exp(d_i) s_i
    moment  u = sum exp(z_j - m) (z_j - m)                u = sum_i exp(d_i) (u_i + d_i s_i)
    picked  t = z_target, or 0 outside                    t = sum_i t_i

    log-sum-exp = m + log s        log p(target) = t - m - log s        entropy = log s - u / s

Pieces are chunks of the vocabulary on one rank and the parts of tensor-parallel ranks. Rows of padding are in no piece,
so they can have neither probability nor gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist

# Bytes of one block of logits. Large enough for full speed of the products, small beside everything else that a
# training step holds.
# Recomputing head: tokens x a chunk of the vocabulary. On a GPU (an H200) a smaller block's products are over before
# the host has launched the next ones.
BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
# Fused head: tokens x the whole local vocabulary. Every chunk reads and writes the weight's whole gradient; a GPU,
# whose products are fast beside its memory, wants more tokens to that.
FUSED_BLOCK_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}
COPY_BYTES = 64 * 2**20  # of a tensor that is converted or added up piece by piece
_NOTHING = -1.0e30  # the peak of no logits at all; finite, so that differences of two of them are 0


@dataclass(frozen=True)
class HeadSettings:
    """This rank's part of the vocabulary, and how the work on it is cut.

    Args:
        first_row: the token id of this rank's first row.
        real_rows: how many of its rows are real; the others are padding.
        temperature: logits are divided by it.
        group: the tensor-parallel group, or None.
        blocks: :mod:`~dcpo_megatron.mcore.head.torch_blocks` or :mod:`~dcpo_megatron.mcore.head.triton_blocks`.
        chunk_tokens: tokens of a chunk, at most.
        chunk_vocab: rows of a chunk of the vocabulary.
    """

    first_row: int
    real_rows: int
    temperature: float
    group: dist.ProcessGroup | None
    blocks: ModuleType
    chunk_tokens: int
    chunk_vocab: int


def make_settings(
    weight: torch.Tensor,
    *,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    blocks: ModuleType,
    chunk_tokens: int,
    chunk_vocab: int | None = None,
) -> HeadSettings:
    """Settings for this rank's ``weight [V_padded / tp, H]``; without ``chunk_vocab`` a block of fp32 logits has about
    ``BLOCK_BYTES`` of its device.

    Raises:
        ValueError: a chunk of nothing, or a temperature that is not positive.
    """
    if chunk_tokens < 1 or (chunk_vocab is not None and chunk_vocab < 1):
        raise ValueError(f"chunk_tokens={chunk_tokens}, chunk_vocab={chunk_vocab}: a chunk holds at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not possible: logits are divided by it, give a number above 0")
    rank = dist.get_rank(group) if group is not None else 0
    first_row = rank * weight.shape[0]
    if chunk_vocab is None:
        chunk_vocab = vocab_chunk(of_device(BLOCK_BYTES, weight.device), chunk_tokens)
    real_rows = max(0, min(weight.shape[0], vocab - first_row))
    return HeadSettings(first_row, real_rows, temperature, group, blocks, chunk_tokens, chunk_vocab)


def vocab_chunk(block_bytes: int, chunk_tokens: int) -> int:
    """Rows of the vocabulary whose fp32 logits, ``chunk_tokens`` each, fill a block; at least 128."""
    return max(128, whole_blocks(block_bytes // (4 * chunk_tokens)))


def of_device(budget: dict[str, int], device: torch.device) -> int:
    """``budget`` for a device; for one that is no GPU, the CPU's."""
    return budget.get(device.type, budget["cpu"])


def chunks(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in slices of ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def whole_blocks(count: int) -> int:
    """``count``, rounded down to a multiple of 128 where it has that many.

    A slice of half-precision numbers that begins there is aligned to 256 bytes. A GPU's fast products want 16; a slice
    that begins anywhere has 2.
    """
    return max(1, count if count < 128 else count // 128 * 128)


def accumulation_dtype(hidden: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where the inputs are."""
    return torch.promote_types(hidden.dtype, torch.float32)


# -- products --------------------------------------------------------------------------------------


def factor_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of a product's factors: the weight's own on a GPU, whose products of bf16 accumulate and return fp32;
    elsewhere fp32 or more."""
    return weight.dtype if weight.device.type == "cuda" else accumulation_dtype(weight)


def product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``out = left @ right``; ``out`` is fp32 (fp64), the factors have :func:`factor_dtype`."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


@cache
def adds_in_place(kind: str, factor: torch.dtype, result: torch.dtype) -> bool:
    """Whether torch adds a product of ``factor`` to a tensor of ``result`` in place on a device of this ``kind``.

    Some versions take no fp32 to add to. Tried once.
    """
    ones = torch.ones(8, 8, dtype=factor, device=kind)
    out = torch.ones(8, 8, dtype=result, device=kind)
    try:
        torch.addmm(out, ones, ones, out_dtype=result, out=out)
    except (RuntimeError, TypeError):
        return False
    return bool((out == 9).all())


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``out += left @ right``, in fp32 (fp64) throughout, without a second ``out``.

    In place, or by rows of ``out`` where torch cannot with these factors.
    """
    if left.dtype == out.dtype:
        out.addmm_(left, right)
        return
    if adds_in_place(out.device.type, left.dtype, out.dtype):
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        return
    rows = whole_blocks(COPY_BYTES // (4 * max(1, out.shape[1])))
    for part in chunks(out.shape[0], rows):
        out[part] += torch.mm(left[part], right, out_dtype=out.dtype)


def _converted(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """``weight`` in ``dtype``: as it is, or chunk by chunk where it would have to be copied."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    for part in chunks(weight.shape[0], whole_blocks(COPY_BYTES // (4 * max(1, weight.shape[1])))):
        yield part, weight[part].to(dtype)


class LogitsBlock:
    """Memory for one block of logits, used again and again (a fresh one each time would be page faults on a CPU)."""

    def __init__(self, tokens: int, rows: int, hidden: torch.Tensor):
        self._memory = torch.empty(tokens * rows, dtype=accumulation_dtype(hidden), device=hidden.device)

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
        """``hidden @ weight.t() / temperature``, ``[tokens, rows]``, valid until the next call. ``hidden`` has
        :func:`factor_dtype`."""
        shape = hidden.shape[0], weight.shape[0]
        out = self._memory[: shape[0] * shape[1]].view(shape)
        for part, part_weight in _converted(weight, hidden.dtype):
            product_into(out[:, part], hidden, part_weight.t())
        return out if temperature == 1.0 else out.div_(temperature)


def times_weight(grad: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``grad @ weight`` in ``dtype`` (fp32 or fp64), ``[tokens, H]``; ``grad`` has :func:`factor_dtype`."""
    out = torch.zeros(grad.shape[0], weight.shape[1], dtype=dtype, device=grad.device)
    for part, part_weight in _converted(weight, grad.dtype):
        add_product(out, grad[:, part], part_weight)
    return out


# -- statistics ------------------------------------------------------------------------------------


def no_statistics(count: int, like: torch.Tensor) -> torch.Tensor:
    """``[4, count]`` (peak, total, moment, picked) of no logits: what merging starts from."""
    stats = torch.zeros(4, count, dtype=accumulation_dtype(like), device=like.device)
    stats[0] = _NOTHING
    return stats


def merge_statistics(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The statistics of two pieces taken together, ``[4, n]`` each."""
    peak = torch.maximum(first[0], second[0])
    moved = first[0] - peak, second[0] - peak
    kept = moved[0].exp(), moved[1].exp()
    total = kept[0] * first[1] + kept[1] * second[1]
    moment = kept[0] * (first[2] + moved[0] * first[1]) + kept[1] * (second[2] + moved[1] * second[1])
    return torch.stack((peak, total, moment, first[3] + second[3]))


def merge_over_ranks(stats: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The statistics of the whole vocabulary, bit for bit the same on every rank of ``group``: one all-gather of ``[4,
    n]``."""
    if group is None or dist.get_world_size(group) == 1 or not stats.shape[1]:
        return stats
    world = dist.get_world_size(group)
    everyone = stats.new_empty(world * 4, stats.shape[1])
    dist.all_gather_into_tensor(everyone, stats.contiguous(), group=group)
    parts = everyone.view(world, 4, -1)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_statistics(merged, part)
    return merged


def outcome(stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(logprobs, entropy, log_sum)``, ``[n]`` each, from the statistics of the whole vocabulary."""
    peak, total, moment, picked = stats
    log_total = total.log()
    log_sum = peak + log_total
    return picked - log_sum, log_total - moment / total, log_sum
