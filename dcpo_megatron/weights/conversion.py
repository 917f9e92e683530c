"""What the conversions share: the layout they cut for, the chunks they cut, and where a checkpoint's configuration is.

    hf-to-megatron  to_megatron.py  a unit a layer              Hugging Face tensors -> merge -> chunks of the layout
                                                                -> records
    megatron-to-hf  to_hf.py        a unit a safetensors shard  records of any layout -> full parameter -> split
                                                                -> rows of the file
    reshard         reshard.py      a unit a layer              records of any layout -> chunks of the new layout,
                                                                optimizer state too

Each is a job of independent units (:mod:`~dcpo_megatron.weights.conversion_jobs`). A ``torch_dist`` checkpoint holds
whole tensors cut into chunks, and every layout can be loaded from every other. The layout that a conversion is given
decides how tensors are cut (tensor and expert-tensor sizes) and how far the vocabulary is padded, so that a run of that
layout reads whole records; pipeline, virtual pipeline and expert sizes decide nothing on disk, and are checked against
the model.

Memory: one tensor of one layer and its merged copy; embedding and output layer, which may be larger than a layer, in
stretches of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dcpo_megatron.files import sync_tree
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.weights.hf_folder import CheckpointError, copy_companions
from dcpo_megatron.weights.mapping import Rule
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from dcpo_megatron.weights.torch_dist_writing import write_index

HF_SUBFOLDER = "huggingface"
# No piece of a record is larger: what a reader of another layout must hold.
PIECE_BYTES = 64 * 1024**2


class LayoutError(ValueError):
    """A layout that the model cannot have; one reason a line."""


def check_layout(layout: ParallelLayout, shape: ModelShape) -> None:
    """Raises :class:`LayoutError` with every reason why ``layout`` does not fit the model, on as many ranks as it
    needs."""
    world = layout.model_ranks
    if shape.experts:
        world = math.lcm(world, layout.expert * (layout.expert_tensor or layout.tensor) * layout.pipeline)
    found = layout.problems(shape, world)
    if found:
        raise LayoutError("\n".join(found))


def hf_folder_of(path: str | Path, config_from: str | Path | None = None) -> Path:
    """The folder with config.json and tokenizer that belongs to a checkpoint of either kind.

    Raises:
        CheckpointError: a Megatron checkpoint that carries none (``config_from`` names one then).
    """
    if config_from is not None:
        return Path(config_from)
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    carried = TorchDistFolder(path).folder / HF_SUBFOLDER
    if not (carried / "config.json").is_file():
        raise CheckpointError(
            f"{path} carries no {HF_SUBFOLDER}/config.json (it was not made by this tool): name a Hugging Face folder"
            " of the same model (--config-from; in training model.path, with the checkpoint as model.weights)"
        )
    return carried


def write_index_with_companions(folder: Path, tensors, records, common: dict | None, hf_source) -> None:
    """Completes a Megatron checkpoint: configuration and tokenizer files first, the index last."""
    (folder / HF_SUBFOLDER).mkdir(exist_ok=True)
    copy_companions(hf_source, folder / HF_SUBFOLDER)
    sync_tree(folder / HF_SUBFOLDER)
    write_index(folder, tensors, records, common)


def chunk_grid(
    rule: Rule, sizes: tuple[int, ...], parts: int, itemsize: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """``(offsets, sizes)`` of the chunks of a full parameter of ``sizes``, cut for ``parts`` tensor ranks, none above
    :data:`PIECE_BYTES` (by rows)."""
    rows, rest = sizes[0], sizes[1:]
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]
    if rule.kind == "row":
        blocks = [((0, column), (rows, sizes[1] // parts)) for column in range(0, sizes[1], sizes[1] // parts)]
    else:
        count = {"plain": 1, "gated": 2 * parts}.get(rule.kind, parts)
        step = rows // count
        blocks = [((first, *(0 for _ in rest)), (step, *rest)) for first in range(0, rows, step)]
    cut: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for offsets, block in blocks:
        most = max(1, PIECE_BYTES // (math.prod(block[1:]) * itemsize))
        for first in range(0, block[0], most):
            cut.append(((offsets[0] + first, *offsets[1:]), (min(most, block[0] - first), *block[1:])))
    return cut


def cut(
    read_rows: Callable[[int, int], torch.Tensor], whole: torch.Tensor | None, grid
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    for offsets, sizes in grid:
        if whole is None:
            yield offsets, read_rows(offsets[0], offsets[0] + sizes[0])
        else:
            yield offsets, whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))]


def padded_rows(
    read: Callable[[int, int], torch.Tensor], first: int, last: int, vocab: int, like: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``[first, last)`` of a vocabulary tensor with zeros from row ``vocab`` on."""
    real = read(first, min(last, vocab)) if first < vocab else read(0, 1)[:0]
    return (
        torch.cat((real, real.new_zeros(last - max(first, min(last, vocab)), *real.shape[1:])))
        if last > vocab
        else real
    )


def vocab_stretches(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    step = max(1, PIECE_BYTES // row_bytes)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]
