"""What happens to a block of logits between two matrix products, in plain PyTorch: its softmax statistics, and its
gradient.

A block is worked on in pieces of a few rows that stay in a CPU's cache: the passes over a piece then cost little beside
the products, and the temporaries are as small as a piece. :mod:`~dcpo_megatron.mcore.head.triton_blocks` has the same
two functions as one kernel each.
"""

from __future__ import annotations

import torch

from dcpo_megatron.mcore.head.chunks import chunks

# A CPU's cache holds a piece; a GPU wants few launches.
PIECE_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}


def _pieces(logits: torch.Tensor):
    size = PIECE_BYTES.get(logits.device.type, PIECE_BYTES["cuda"])
    row_bytes = max(1, logits.shape[1]) * logits.element_size()
    return chunks(logits.shape[0], max(1, size // row_bytes))


def block_statistics(logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(peak, total, moment, picked) of every row, ``[4, n]``, see :mod:`~dcpo_megatron.mcore.head.chunks`.

    Args:
        logits: ``[n, v]`` with v > 0, fp32 or fp64, left as they are.
        columns: ``[n]`` column of each row's target; any number outside ``0 .. v - 1`` means that it is not in this
            block.
    """
    stats = logits.new_empty(4, logits.shape[0])
    for rows in _pieces(logits):
        piece = logits[rows]
        peak = piece.amax(-1)
        below = piece - peak[:, None]
        exp = below.exp()
        stats[0, rows], stats[1, rows] = peak, exp.sum(-1)
        stats[2, rows] = exp.mul_(below).sum(-1)
    here = (columns >= 0) & (columns < logits.shape[1])
    picked = logits.gather(1, columns.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    stats[3] = torch.where(here, picked, picked.new_zeros(()))
    return stats


def block_gradient(
    logits: torch.Tensor,
    columns: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``[n, v]`` gradient with respect to the logits, in ``dtype``, written over ``logits`` where that has the dtype.
    With p the softmax and H the entropy:

        d log p(target) / dz_j = 1[j = target] - p_j            dH / dz_j = -p_j (log p_j + H)

    Args:
        logits: ``[n, v]``; their content is lost.
        columns: as in :func:`block_statistics`.
        log_sum: ``[n]`` log-sum-exp over the WHOLE vocabulary.
        entropy: ``[n]``.
        grad_logprobs, grad_entropy: ``[n]`` incoming gradients; None for the entropy's saves a pass.
    """
    for rows in _pieces(logits):
        logp = logits[rows].sub_(log_sum[rows, None])
        if grad_entropy is None:
            logp.exp_().mul_(-grad_logprobs[rows, None])
        else:
            factor = (logp + entropy[rows, None]).mul_(grad_entropy[rows, None]).add_(grad_logprobs[rows, None])
            logp.exp_().mul_(factor).neg_()
    here = (columns >= 0) & (columns < logits.shape[1])
    at_target = torch.where(here, grad_logprobs, grad_logprobs.new_zeros(()))
    logits.scatter_add_(1, columns.clamp(0, logits.shape[1] - 1)[:, None], at_target[:, None])
    return logits.to(dtype)
