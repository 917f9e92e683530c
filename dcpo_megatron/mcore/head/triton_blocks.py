"""The two functions of :mod:`~dcpo_megatron.mcore.head.torch_blocks` as one Triton kernel each, for a GPU (or Triton's
interpreter on a CPU).

The matrix products stay with the vendor's library; the kernels are what lies between them. Statistics: one program a
row walks over the columns once, with the running (peak, total, moment) of an online softmax. Gradient: one program for
a row and ``COLUMNS`` columns, reading a logit and writing its gradient once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 2048  # a power of two
_NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _statistics_kernel(logits, columns, stats, rows, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, COLUMNS)
    peak = tl.full((), _NOTHING, logits.dtype.element_ty)
    total = tl.full((), 0.0, logits.dtype.element_ty)
    moment = tl.full((), 0.0, logits.dtype.element_ty)
    for start in range(0, width, COLUMNS):
        inside = start + lanes < width
        z = tl.load(logits + row * width + start + lanes, mask=inside, other=_NOTHING)
        new_peak = tl.maximum(peak, tl.max(z, 0))
        moved = peak - new_peak
        kept = tl.exp(moved)
        below = z - new_peak
        exp = tl.where(inside, tl.exp(below), 0.0)
        moment = kept * (moment + moved * total) + tl.sum(tl.where(inside, exp * below, 0.0), 0)
        total = kept * total + tl.sum(exp, 0)
        peak = new_peak
    column = tl.load(columns + row)
    here = (column >= 0) & (column < width)
    picked = tl.load(logits + row * width + column, mask=here, other=0.0)
    tl.store(stats + row, peak)
    tl.store(stats + rows + row, total)
    tl.store(stats + 2 * rows + row, moment)
    tl.store(stats + 3 * rows + row, picked)


@triton.jit
def _gradient_kernel(
    logits, columns, log_sum, entropy, grad_logprobs, grad_entropy, out, width, HAS_ENTROPY: tl.constexpr,
    COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = lanes < width
    z = tl.load(logits + row * width + lanes, mask=inside, other=_NOTHING)
    logp = z - tl.load(log_sum + row)
    at_target = tl.load(grad_logprobs + row)
    factor = at_target
    if HAS_ENTROPY:
        factor = at_target + tl.load(grad_entropy + row) * (logp + tl.load(entropy + row))
    grad = tl.where(lanes == tl.load(columns + row), at_target, 0.0) - tl.exp(logp) * factor
    tl.store(out + row * width + lanes, grad.to(out.dtype.element_ty), mask=inside)


def block_statistics(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """As :func:`dcpo_megatron.mcore.head.torch_blocks.block_statistics`."""
    rows, width = logits.shape
    stats = logits.new_empty(4, rows)
    if rows:
        _statistics_kernel[(rows,)](logits, columns.contiguous(), stats, rows, width, COLUMNS=COLUMNS)
    return stats


def block_gradient(logits, columns, log_sum, entropy, grad_logprobs, grad_entropy, dtype) -> torch.Tensor:
    """As :func:`dcpo_megatron.mcore.head.torch_blocks.block_gradient`; a gradient in another dtype is written straight
    into memory of its own."""
    rows, width = logits.shape
    out = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    if rows:
        _gradient_kernel[(rows, triton.cdiv(width, COLUMNS))](
            logits,
            columns.contiguous(),
            log_sum.contiguous(),
            entropy.contiguous(),
            grad_logprobs.contiguous(),
            (entropy if grad_entropy is None else grad_entropy).contiguous(),
            out,
            width,
            HAS_ENTROPY=grad_entropy is not None,
            COLUMNS=COLUMNS,
        )
    return out
