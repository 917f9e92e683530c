"""Hugging Face folders on disk: tensors read by name from safetensors, and a whole folder written atomically."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Everything of a folder that is not weights, or an index of them, is carried over untouched.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".index.json")

# safetensors' names of the dtypes that weights come in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A Hugging Face folder's weights cannot be used; the message names the file or tensor and what to do."""


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time (nothing is held).

    Raises:
        CheckpointError: no safetensors file, a broken one, or an index that names files which are not there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        # Of each file: name -> (shape, dtype, first byte).
        self._headers: dict[Path, dict[str, tuple[tuple[int, ...], torch.dtype, int]]] = {}
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                self._file_of = {name: self.folder / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is not a safetensors index ({error}): restore it from the original checkpoint"
                ) from None
            missing = sorted(file.name for file in set(self._file_of.values()) if not file.is_file())
            if missing:
                raise CheckpointError(
                    f"{index} names {missing[0]}, which is not there: the checkpoint is incomplete, copy it again"
                )
        else:
            # As transformers does: another copy of the weights may lie beside it (Mistral's consolidated.safetensors).
            single = self.folder / SINGLE
            files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
            if not files:
                raise CheckpointError(
                    f"{self.folder} has no *.safetensors file: convert the weights to safetensors first"
                )
            self._file_of = {}
            for file in files:
                with self._open(file) as handle:
                    self._file_of |= dict.fromkeys(handle.keys(), file)

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a complete safetensors file ({error}): copy it again") from None

    def names(self) -> set[str]:
        return set(self._file_of)

    def unlisted(self) -> list[str]:
        """Tensors that lie in the files and that the index does not name. Raises :class:`CheckpointError` where a file is broken."""
        found: set[str] = set()
        for file in self.files:
            found |= self._read_header(file).keys()
        return sorted(found - self._file_of.keys())

    def _file(self, name: str) -> Path:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}, which its config.json calls for: is it a checkpoint of another architecture?"
            )
        return file

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype, int]:
        file = self._file(name)
        header = self._read_header(file)
        if name not in header:
            raise CheckpointError(
                f"tensor {name!r} in {file} cannot be read (the index puts it there, and it is not): copy the checkpoint again"
            )
        return header[name]

    def _read_header(self, file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
        if file not in self._headers:
            # The package checks the header against the file; where the numbers lie only the header itself tells.
            with self._open(file):
                pass
            with open(file, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                entries = json.loads(handle.read(length))
            self._headers[file] = {
                key: (tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"]), 8 + length + entry["data_offsets"][0])
                for key, entry in entries.items()
                if key != "__metadata__"
            }  # fmt: skip
        return self._headers[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's sizes, from its file's header (each file is opened once). Raises :class:`CheckpointError` where it is missing or unreadable."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from its file's header.

        Raises:
            CheckpointError: missing or unreadable, or numbers of a kind that is not trained in (quantised weights, say).
        """
        dtype = self._header(name)[1]
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has dtype {dtype}, only {', '.join(DTYPES)} are supported: use the checkpoint before quantisation"
            )
        return dtype

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        return sorted(set(self._file_of.values()))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One tensor, or its rows ``[first, last)`` alone, on the CPU, in the checkpoint's dtype.

        Raises:
            CheckpointError: it is missing or unreadable.
        """
        sizes, _, start = self._header(name)
        dtype, file = self.dtype(name), self._file(name)
        first, last = (0, sizes[0] if sizes else 1) if rows is None else rows
        result = torch.empty((last - first, *sizes[1:]) if sizes else (), dtype=dtype)
        # Not through a memory map: mapped pages would count as the process's memory.
        try:
            with open(file, "rb") as handle:
                handle.seek(start + first * math.prod(sizes[1:]) * dtype.itemsize)
                count = handle.readinto(result.reshape(-1).view(torch.uint8).numpy())
        except OSError as error:
            raise CheckpointError(f"tensor {name!r} in {file} cannot be read ({error}): copy the file again") from None
        if count != result.nbytes:
            raise CheckpointError(
                f"tensor {name!r} in {file} cannot be read ({count} of {result.nbytes} bytes): copy the file again"
            )
        return result


def copy_companions(source: str | os.PathLike, destination: Path) -> None:
    """Copies every file of a Hugging Face folder that is not weights (configuration, tokenizer, licence) untouched."""
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy2(file, destination / file.name)


def shard_name(number: int, count: int) -> str:
    """File name of weight shard ``number`` (from 0) of ``count``."""
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_weight_index(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Writes the index of several shards (tensor names of each); one shard alone needs none."""
    if len(shards) > 1:
        weight_map = {name: shard_name(number, len(shards)) for number, names in enumerate(shards) for name in names}
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2))


def write_safetensors(
    path: Path,
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]],
    pieces: Iterable[tuple[str, torch.Tensor]],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one safetensors file of any size with one piece in memory at a time (the safetensors package itself wants all tensors at once).

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
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
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
            data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
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
) -> Path:
    """Writes a Hugging Face folder: ``tensors`` in safetensors shards with an index, every other file copied from ``source``.

    The folder appears under its final name only when complete; an existing one is replaced. At most one shard is held in memory.

    Raises:
        OSError: disk full or not writable; the final name is then untouched, and nothing is left beside it.
    """
    destination, source = Path(destination), Path(source)
    work = destination.with_name(destination.name + ".incomplete")
    if work.exists():
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True)
        copy_companions(source, work)
        _write_shards(work, tensors, dtype, shard_bytes)
    except SafetensorError as error:  # the package's word for a full disk, too
        shutil.rmtree(work, ignore_errors=True)
        raise OSError(f"{destination} could not be written: {error}") from None
    except OSError:
        shutil.rmtree(work, ignore_errors=True)
        raise

    old = destination.with_name(destination.name + ".old")
    if destination.exists():
        if old.exists():
            shutil.rmtree(old)
        destination.rename(old)
    work.rename(destination)
    if old.exists():
        shutil.rmtree(old)
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
