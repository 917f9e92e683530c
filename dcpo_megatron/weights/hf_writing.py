"""Hugging Face folders written atomically, one tensor at a time; :mod:`dcpo_megatron.weights.hf_folder` reads them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dcpo_megatron.files import move_aside, moved_aside, remove, replace, sync, sync_tree
from dcpo_megatron.weights.hf_folder import CODES, INDEX, SINGLE, copy_companions


def shard_name(number: int, count: int) -> str:
    """File name of weight shard ``number`` (from 0) of ``count``."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_weight_index(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Writes the index of several shards (tensor names of each); one shard alone needs none."""
    if len(shards) > 1:
        weight_map = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2))
        sync(folder / INDEX)


def write_safetensors(
    path: Path,
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
    pieces: Iterable[tuple[str, torch.Tensor]],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one safetensors file of any size with one piece in memory at a time (the safetensors package itself wants
    all tensors at once).

    Args:
        entries: every tensor as (name, dtype, shape), in the order in which ``pieces`` brings them.
        pieces: (name, tensor): a whole tensor, or consecutive rows of it.
        progress: is told the bytes of each piece.

    Raises:
        ValueError: the pieces are not what ``entries`` announced; the file does not get its final name.
        OSError: the disk is full or not writable.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    wanted, at = {}, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        wanted[name] = (at, size)
        at += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    work = path.with_name(path.name + ".part")
    written = dict.fromkeys(wanted, 0)
    with open(work, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, piece in pieces:
            data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            start, size = wanted[name]
            if file.tell() != 8 + len(encoded) + start + written[name] or written[name] + len(data) > size:
                raise ValueError(f"{path}: tensor {name!r} came out of turn or is larger than announced")
            file.write(data)
            written[name] += len(data)
            progress(len(data))
        file.flush()
        os.fsync(file.fileno())
    short = [name for name, (_, size) in wanted.items() if written[name] != size]
    if short:
        raise ValueError(
            f"{path}: tensor {short[0]!r} has {written[short[0]]} bytes, {wanted[short[0]][1]} were announced"
        )
    work.rename(path)


def write_hf_folder(
    destination: str | os.PathLike,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 1024**3,
    warn: Callable[[str], None] = warnings.warn,
) -> Path:
    """Writes a Hugging Face folder: ``tensors`` in safetensors shards with an index, every other file copied from
    ``source``.

    The folder appears under its final name only when complete and on the disk; an existing one is replaced. At most one
    shard is held in memory.

    Args:
        warn: is told what is left of older folders that cannot be removed.

    Raises:
        OSError: disk full or not writable, or the existing folder cannot be moved; the final name is then untouched,
            and nothing is left beside it.
    """
    destination, source = Path(destination), Path(source)
    work = destination.with_name(destination.name + ".incomplete")
    # First, since the disk may need the room.
    for left in [*moved_aside(destination), *([move_aside(work)] if work.exists() else [])]:
        if problem := remove(left):
            warn(problem)
    try:
        work.mkdir(parents=True)
        copy_companions(source, work)
        _write_shards(work, tensors, dtype, shard_bytes)
        sync_tree(work)
        old = replace(work, destination)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # The package's word for a full disk, too: "... No space left on device (os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"{destination} could not be written: {error}") from None
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(destination)) from None
    if old is not None and (problem := remove(old)):
        warn(problem)
    return destination


def _write_shards(
    work: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush():
        nonlocal size
        if pending:
            save_file(pending, work / f"part-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()
            size = 0

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)
        count = tensor.numel() * tensor.element_size()
        if pending and size + count > shard_bytes:
            flush()
        pending[name] = tensor
        size += count
        total += count
    flush()

    for number in range(len(shards)):
        (work / f"part-{number}.safetensors").rename(work / shard_name(number, len(shards)))
    write_weight_index(work, shards, total)
