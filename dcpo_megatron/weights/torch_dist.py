"""Megatron-Core's ``torch_dist`` checkpoints on disk, read a piece at a time, without a process group and without a
model.

A folder holds records of tensors and of small objects, and an index that says where each lies:

    .metadata        key -> global shape, dtype, list of chunks (offsets, sizes); (key, offsets) -> file, first byte,
                     length
    __U_0.distcp     records, one after the other, each as torch.save writes it
    common.pt        what is no tensor: iteration, optimizer settings (Megatron-Core 0.19 keeps it as an object
                     ``common_state`` instead)
    metadata.json    the format's name; written last, so a folder without it is not a checkpoint

:class:`TorchDistFolder` reads any region of any tensor whatever its chunks are, so a checkpoint of one layout serves
every other. :mod:`dcpo_megatron.weights.torch_dist_writing` writes them.

The index is a pickle in this format. It is read by an unpickler that knows the dozen classes such an index is made of
and no other.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorStorageMetadata,
)

from dcpo_megatron.weights.hf_folder import CheckpointError

FORMAT_FILE = "metadata.json"
INDEX_FILE = ".metadata"
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
# A record larger than this is read in place, a region at a time; smaller ones whole.
_WHOLE_RECORD = 32 * 1024**2

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
}
_ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
# Placeholders that some Megatron-Core releases leave in the index; they carry nothing.
_EMPTY = {("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _EMPTY:
            return type(name, (), {"__setstate__": lambda self, state: self.__dict__.update(state or {})})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ALLOWED or module in _ALLOWED_MODULES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in an index")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint: its global shape, dtype, and chunks as ``(offsets, sizes)``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Record:
    """Where a piece lies: ``offsets`` and ``sizes`` of a tensor's chunk (None for an object), ``file``, ``start`` and
    ``length`` in bytes."""

    key: str
    file: str
    start: int
    length: int
    offsets: tuple[int, ...] | None = None
    sizes: tuple[int, ...] | None = None


def find_checkpoint(path: str | os.PathLike) -> Path | None:
    """The folder with the checkpoint itself: ``path``, or the iteration that ``path/latest_checkpointed_iteration.txt``
    (Megatron-LM) names.

    None where ``path`` is no Megatron checkpoint.
    """
    path = Path(path)
    if (path / FORMAT_FILE).is_file() and (path / INDEX_FILE).is_file():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    word = tracker.read_text(encoding="utf-8").strip()
    folder = path / (word if word == "release" else f"iter_{int(word):07d}" if word.isdigit() else word)
    if not (folder / FORMAT_FILE).is_file():
        raise CheckpointError(f"{tracker} names {folder.name}, which is not a complete checkpoint: give another folder")
    return folder


class TorchDistFolder:
    """Reads a checkpoint. ``tensors`` by key, ``objects`` (keys of small serialized ones).

    Raises:
        CheckpointError: not a ``torch_dist`` checkpoint, an incomplete or damaged one.
    """

    def __init__(self, path: str | os.PathLike):
        found = find_checkpoint(path)
        if found is None:
            raise CheckpointError(
                f"{path} is not a Megatron checkpoint: {FORMAT_FILE} and {INDEX_FILE} are not there (an interrupted"
                f" save has no {FORMAT_FILE})"
            )
        self.folder = found
        try:
            backend = json.loads((found / FORMAT_FILE).read_text())["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{found / FORMAT_FILE} cannot be read ({error}): copy the checkpoint again"
            ) from None
        if backend != "torch_dist":
            raise CheckpointError(
                f"{found} is in the format {backend!r}; only torch_dist is read: save it again with --ckpt-format"
                " torch_dist"
            )
        try:
            with open(found / INDEX_FILE, "rb") as handle:
                index = _IndexUnpickler(handle).load()
            self._read_index(index)
            sizes: dict[str, int] = {}
            for record in self._records.values():
                sizes[record.file] = max(sizes.get(record.file, 0), record.start + record.length)
            ends = sorted(sizes.items())
        except Exception as error:  # a damaged pickle can raise anything
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(f"{found / INDEX_FILE} cannot be read ({what}): copy the checkpoint again") from None
        for name, size in ends:
            file = found / name
            if not file.is_file():
                raise CheckpointError(f"{file} is not there: the checkpoint is incomplete, copy it again")
            if file.stat().st_size < size:
                raise CheckpointError(
                    f"{file} has {file.stat().st_size} bytes, its index needs {size}: the file is cut short, copy it"
                    " again"
                )

    def _read_index(self, index: Metadata) -> None:
        self.tensors: dict[str, TensorEntry] = {}
        self.objects: list[str] = []
        for key, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                chunks = tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
                self.tensors[key] = TensorEntry(tuple(entry.size), entry.properties.dtype, chunks)
            else:
                self.objects.append(key)
        self._records: dict[tuple[str, tuple[int, ...] | None], Record] = {}
        for place, info in index.storage_data.items():
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{place.fqn} is stored with {info.transform_descriptors}, which is not supported")
            offsets = None if place.offset is None else tuple(place.offset)
            self._records[place.fqn, offsets] = Record(place.fqn, info.relative_path, info.offset, info.length, offsets)
        for key, tensor in self.tensors.items():
            lost = [offsets for offsets, _ in tensor.chunks if (key, offsets) not in self._records]
            if lost:
                raise ValueError(f"the chunk of {key} at {lost[0]} is nowhere")

    # -- reading -----------------------------------------------------------------------------------

    def read(self, key: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """The region of tensor ``key`` that begins at ``offsets`` and has ``sizes`` (the whole by default), on the CPU.

        Held at a time: the region, and a chunk of at most 32 MiB (larger ones are read in place).

        Raises:
            CheckpointError: no such tensor, a region that its chunks do not cover, or a record that is damaged.
        """
        entry = self.tensors.get(key)
        if entry is None:
            raise CheckpointError(f"{self.folder} has no tensor {key!r}")
        offsets = tuple(offsets) if offsets is not None else (0,) * len(entry.shape)
        sizes = tuple(sizes) if sizes is not None else entry.shape
        result = torch.empty(sizes, dtype=entry.dtype)
        covered = 0
        for chunk_offsets, chunk_sizes in entry.chunks:
            low = [max(a, b) for a, b in zip(offsets, chunk_offsets)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk_offsets, chunk_sizes)]
            if any(a >= b for a, b in zip(low, high)):
                continue
            inside = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk_offsets))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offsets))
            result[target] = self._read_record(self._records[key, chunk_offsets], chunk_sizes, entry.dtype, inside)
            covered += math.prod(b - a for a, b in zip(low, high))
        if covered != math.prod(sizes):
            raise CheckpointError(
                f"{self.folder}: {key} {entry.shape} holds {covered} of the {math.prod(sizes)} numbers at {offsets},"
                f" sizes {sizes}: the checkpoint is incomplete"
            )
        return result

    def _read_record(self, record: Record, sizes: tuple[int, ...], dtype: torch.dtype, inside: tuple[slice, ...]):
        path = self.folder / record.file
        try:
            if record.length > _WHOLE_RECORD and (not inside or inside[0] != slice(0, sizes[0])):
                return _region_in_place(path, record, sizes, dtype, inside)
            with open(path, "rb") as file:
                file.seek(record.start)
                whole = torch.load(io.BytesIO(file.read(record.length)), map_location="cpu", weights_only=True)
            if tuple(whole.shape) != sizes or whole.dtype != dtype:
                raise ValueError(f"{tuple(whole.shape)} {whole.dtype} lies where {sizes} {dtype} should")
            return whole[inside]
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{path}: the record of {record.key} at {record.offsets} cannot be read"
                f" ({' '.join(str(error).split())[:200]}): copy the file again"
            ) from None

    def read_bytes(self, key: str) -> bytes:
        """The serialized object ``key`` as it lies in its file."""
        record = self._records[key, None]
        with open(self.folder / record.file, "rb") as file:
            file.seek(record.start)
            return file.read(record.length)

    def common(self) -> dict:
        """What is no tensor (iteration, optimizer settings). Only plain values are loaded; others come as None."""
        if (self.folder / COMMON_FILE).is_file():
            source: IO[bytes] = open(self.folder / COMMON_FILE, "rb")
        elif COMMON_OBJECT in self.objects:
            source = io.BytesIO(self.read_bytes(COMMON_OBJECT))
        else:
            return {}
        import argparse
        import enum

        with source, torch.serialization.safe_globals([argparse.Namespace, enum.Enum]):
            try:
                value = torch.load(source, map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(
                    f"{self.folder}: the part that is no tensor cannot be read safely"
                    f" ({' '.join(str(error).split())[:200]})"
                ) from None
        return value[0] if isinstance(value, list) else value


def _region_in_place(path: Path, record: Record, sizes, dtype, inside) -> torch.Tensor:
    """Reads rows of one record without reading all of it: torch.save keeps a tensor's numbers uncompressed, at a place
    its own reader tells."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with open(path, "rb") as file, FakeTensorMode():
        window = _Window(file, record.start, record.length)
        described = torch.load(window, weights_only=True)  # type: ignore[arg-type]  # it uses less than all of IO
    if tuple(described.shape) != tuple(sizes) or described.dtype != dtype or not described.is_contiguous():
        raise ValueError(f"{tuple(described.shape)} {described.dtype} lies where {sizes} {dtype} should")
    start = described.untyped_storage()._checkpoint_offset + described.storage_offset() * dtype.itemsize
    row = math.prod(sizes[1:]) * dtype.itemsize
    first, last = inside[0].start, inside[0].stop
    buffer = bytearray((last - first) * row)
    with open(path, "rb") as file:
        file.seek(record.start + start + first * row)
        if file.readinto(buffer) != len(buffer):
            raise EOFError("the file ends inside the record")
    rows = torch.frombuffer(buffer, dtype=dtype).reshape(last - first, *sizes[1:])
    return rows[(slice(None), *inside[1:])]


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        size = self._length - self._at if size < 0 else min(size, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(max(size, 0))
        self._at += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
