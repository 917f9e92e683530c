"""Megatron-Core's ``torch_dist`` checkpoints, written a piece at a time; :mod:`dcpo_megatron.weights.torch_dist` has
the format and reads them.

:func:`write_records` and :func:`write_index` are the two halves: processes write records of their own, one of them the
index.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcpo_megatron.files import sync
from dcpo_megatron.weights.torch_dist import COMMON_FILE, FORMAT_FILE, INDEX_FILE, Record

# Bytes, and buffers (Linux takes 1024), of one system call that writes.
_WRITTEN_TOGETHER = 32 * 1024**2
_BUFFERS_TOGETHER = 1000


@dataclass(frozen=True)
class Rendered:
    """A piece as its bytes in a file: ``buffers`` one after the other. Those of a tensor are its memory, not a copy of
    it."""

    key: str
    offsets: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    buffers: list[bytes | memoryview]


def render(key: str, offsets: tuple[int, ...] | None, value: torch.Tensor | bytes) -> Rendered:
    """What torch.save writes of a tensor; a serialized object as it is. Costs some 0.1 ms, whatever the size."""
    if isinstance(value, bytes):
        return Rendered(key, None, None, [value])
    # torch.save writes the whole storage of a view.
    if not value.is_contiguous() or value.untyped_storage().nbytes() != value.numel() * value.itemsize:
        value = value.clone(memory_format=torch.contiguous_format)
    collected = _Collector(value)
    try:
        with _without_zip_checksums():
            torch.save(value, collected)  # type: ignore[arg-type]  # it uses less than all of IO
    except RuntimeError as error:
        # Interrupted inside, torch closes its archive and complains of that instead.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    return Rendered(key, offsets, tuple(value.shape), collected.buffers)


class _Collector:
    """A file that keeps what is written into it, the numbers of ``tensor`` by reference."""

    def __init__(self, tensor: torch.Tensor):
        self.buffers: list[bytes | memoryview] = []
        self._start = tensor.data_ptr()
        self._numbers = tensor.detach().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else None

    def write(self, data) -> int:
        numbers, size = self._numbers, len(data)
        if numbers is not None and size == len(numbers) and _address(data) == self._start:
            self.buffers.append(numbers)
        elif self.buffers and isinstance(self.buffers[-1], bytes):
            self.buffers[-1] += bytes(data)
        else:
            self.buffers.append(bytes(data))
        return size

    def flush(self) -> None:
        """Nothing waits."""


def _address(data) -> int:
    return np.frombuffer(data, dtype=np.uint8).ctypes.data


def write_records(
    path: Path, pieces: Iterable[tuple[str, tuple[int, ...] | None, torch.Tensor | bytes]], progress=lambda count: None
) -> list[Record]:
    """Writes ``(key, offsets, tensor)`` and ``(key, None, serialized object)`` into a new file and returns where each
    lies.

    ``progress`` is told the bytes of each tensor. The file is synced to the disk before its name is the final one.
    """
    return write_rendered(path, (render(*piece) for piece in pieces), progress)


def write_rendered(path: Path, pieces: Iterable[Rendered], progress=lambda count: None) -> list[Record]:
    """As :func:`write_records`, of pieces that are rendered already: few long system calls, beside which other threads
    of the process run undisturbed."""
    records, waiting, held, at = [], [], 0, 0
    work = path.with_name(path.name + ".part")
    with open(work, "wb", buffering=0) as file:
        for piece in pieces:
            length = sum(len(buffer) for buffer in piece.buffers)
            records.append(Record(piece.key, path.name, at, length, piece.offsets, piece.sizes))
            at += length
            held += length
            waiting += piece.buffers
            if held >= _WRITTEN_TOGETHER or len(waiting) > _BUFFERS_TOGETHER:
                _write_all(file.fileno(), waiting)
                waiting, held = [], 0
            if piece.sizes is not None:
                progress(sum(len(buffer) for buffer in piece.buffers if isinstance(buffer, memoryview)))
        _write_all(file.fileno(), waiting)
        os.fsync(file.fileno())
    work.rename(path)
    return records


def _write_all(file: int, buffers: list[bytes | memoryview]) -> None:
    buffers = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while buffers:
        written = os.writev(file, buffers[:_BUFFERS_TOGETHER])
        done = 0
        while done < len(buffers) and written >= len(buffers[done]):
            written -= len(buffers[done])
            done += 1
        buffers = buffers[done:]
        if written:
            buffers[0] = buffers[0][written:]


@contextlib.contextmanager
def _without_zip_checksums():
    """torch.save sums up every byte for the zip format that it writes, which takes five times as long as writing them;
    torch.load does not look at the sums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_index(
    folder: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    records: Iterable[Record],
    common: dict | None,
) -> None:
    """Makes ``folder`` with its records a checkpoint: index, common part, and last the format's name.

    Args:
        tensors: key -> (global shape, dtype) of every tensor.
        records: of every piece; those with ``sizes`` None are objects.
        common: what is no tensor; None where it is there already.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        info = _StorageInfo(record.file, record.start, record.length)
        if record.sizes is None:
            state[record.key] = BytesStorageMetadata()
            storage[MetadataIndex(record.key)] = info
        else:
            assert record.offsets is not None  # a chunk has both
            number = len(chunks[record.key])
            chunks[record.key].append(ChunkStorageMetadata(torch.Size(record.offsets), torch.Size(record.sizes)))
            storage[MetadataIndex(record.key, torch.Size(record.offsets), number)] = info
    for key, (shape, dtype) in tensors.items():
        state[key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size(shape),
            chunks[key],
        )
    with open(folder / INDEX_FILE, "wb") as file:
        pickle.dump(Metadata(state, storage_data=storage), file)
        file.flush()
        os.fsync(file.fileno())
    if common is not None:
        torch.save(common, folder / COMMON_FILE)
        sync(folder / COMMON_FILE)
    (folder / FORMAT_FILE).write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        )
    )
    sync(folder / FORMAT_FILE)


def serialized(value: object) -> bytes:
    """An object as Megatron-Core stores it beside tensors (a list with one shard)."""
    buffer = io.BytesIO()
    torch.save([value], buffer)
    return buffer.getvalue()
