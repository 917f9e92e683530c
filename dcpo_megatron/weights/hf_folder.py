"""Hugging Face folders on disk: tensors read by name from safetensors, and a whole folder written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
# Everything of a folder that is not weights, or an index of them, is carried over untouched.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".index.json")


class CheckpointError(ValueError):
    """A Hugging Face folder's weights cannot be used; the message names the file or tensor and what to do."""


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time (nothing is held).

    Raises:
        CheckpointError: no safetensors file, a broken one, or an index that names files which are not there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
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
            files = sorted(self.folder.glob("*.safetensors"))
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

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in the checkpoint's dtype. Raises :class:`CheckpointError` where it is missing or unreadable."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}, which its config.json calls for: is it a checkpoint of another architecture?"
            )
        with self._open(file) as handle:
            try:
                return handle.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(
                    f"tensor {name!r} in {file} cannot be read ({error}): copy the file again"
                ) from None


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
        OSError: disk full or not writable; the final name is then untouched.
    """
    destination, source = Path(destination), Path(source)
    work = destination.with_name(destination.name + ".incomplete")
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy2(file, work / file.name)

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

    if len(shards) == 1:
        (work / "part-0.safetensors").rename(work / "model.safetensors")
    else:
        weight_map = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (work / f"part-{number}.safetensors").rename(work / file)
            weight_map |= dict.fromkeys(names, file)
        (work / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))

    old = destination.with_name(destination.name + ".old")
    if destination.exists():
        if old.exists():
            shutil.rmtree(old)
        destination.rename(old)
    work.rename(destination)
    if old.exists():
        shutil.rmtree(old)
    return destination
