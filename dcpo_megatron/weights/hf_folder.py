"""Hugging Face folders on disk: which files of them count, and tensors read by name from safetensors.
:mod:`dcpo_megatron.weights.hf_writing` writes them.

weights       what config.json names as transformers_weights, else model.safetensors, else the shards of its index: as
              transformers chooses
companions    every other file, and the subfolders of tokenizer, processor and code (additional_chat_templates)
left alone    weights in other forms, hidden folders, caches
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The key of config.json by which transformers takes another file than these two.
NAMED = "transformers_weights"
# Everything of a folder that is not weights, or an index of them, is carried over untouched.
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".gguf", ".msgpack", ".h5", ".onnx", ".onnx_data",
    ".index.json",
)  # fmt: skip
_LOG = "events.out.tfevents"

# safetensors' names of the dtypes that weights come in.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A Hugging Face folder's weights cannot be used; the message names the file or tensor and what to do."""


def weights_file(folder: str | os.PathLike) -> Path:
    """The safetensors file, or index of several, that counts in a Hugging Face folder: the choice of transformers
    (5.12, ``_get_resolved_checkpoint_files``).

    A whole file beside an index counts, whatever the index says: ``save_pretrained`` leaves older shards, and their
    index, where they are.

    Raises:
        CheckpointError: there is none; names what lies there instead.
    """
    folder = Path(folder)
    named = _config(folder).get(NAMED)
    if named and not (isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))):
        raise CheckpointError(
            f"{folder / 'config.json'} names {named!r} ({NAMED}), which is no safetensors file: convert the weights to"
            " safetensors first"
        )
    for name in (named,) if named else (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    if named:
        raise CheckpointError(
            f"{folder / 'config.json'} names {named} ({NAMED}), which is not there: the checkpoint is incomplete, copy"
            " it again"
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if not others:
        raise CheckpointError(f"{folder} has no *.safetensors file: convert the weights to safetensors first")
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}, only {others[0]}{more}, which transformers does not take either: "
        f"rename the one file that holds all weights to {SINGLE}, or restore the index"
    )


def _config(folder: Path) -> dict:
    """config.json, or nothing where there is none: whoever needs it says what is wrong."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class SafetensorsFolder:
    """Tensors of a Hugging Face folder by name, read one at a time (nothing is held). Which files count,
    :func:`weights_file` says.

    Raises:
        CheckpointError: no safetensors file, a broken one, or an index that names files which are not there.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        # Of each file: name -> (shape, dtype, first byte).
        self._headers: dict[Path, dict[str, tuple[tuple[int, ...], torch.dtype, int]]] = {}
        file = weights_file(folder)
        if not file.name.endswith(".index.json"):
            with self._open(file) as handle:
                self._file_of = dict.fromkeys(handle.keys(), file)
            return
        try:
            weight_map = json.loads(file.read_text())["weight_map"]
            self._file_of = {name: self.folder / shard for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is not a safetensors index ({error}): restore it from the original checkpoint"
            ) from None
        missing = sorted(shard.name for shard in set(self._file_of.values()) if not shard.is_file())
        if missing:
            raise CheckpointError(
                f"{file} names {missing[0]}, which is not there: the checkpoint is incomplete, copy it again"
            )

    @staticmethod
    def _open(file: Path):
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a complete safetensors file ({error}): copy it again") from None

    def names(self) -> set[str]:
        return set(self._file_of)

    def unlisted(self) -> list[str]:
        """Tensors that lie in the files and that the index does not name. Raises :class:`CheckpointError` where a file
        is broken."""
        found: set[str] = set()
        for file in self.files:
            found |= self._read_header(file).keys()
        return sorted(found - self._file_of.keys())

    def _file(self, name: str) -> Path:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}, which its config.json calls for: is it a checkpoint of another"
                " architecture?"
            )
        return file

    def _header(self, name: str) -> tuple[tuple[int, ...], torch.dtype, int]:
        file = self._file(name)
        header = self._read_header(file)
        if name not in header:
            raise CheckpointError(
                f"tensor {name!r} in {file} cannot be read (the index puts it there, and it is not): copy the"
                " checkpoint again"
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
                key: (
                    tuple(entry["shape"]),
                    DTYPES.get(entry["dtype"], entry["dtype"]),
                    8 + length + entry["data_offsets"][0],
                )
                for key, entry in entries.items()
                if key != "__metadata__"
            }
        return self._headers[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's sizes, from its file's header (each file is opened once). Raises :class:`CheckpointError` where
        it is missing or unreadable."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype, from its file's header.

        Raises:
            CheckpointError: missing or unreadable, or numbers of a kind that is not trained in (quantised weights,
                say).
        """
        dtype = self._header(name)[1]
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has dtype {dtype}, only {', '.join(DTYPES)} are supported: use the"
                " checkpoint before quantisation"
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
                count = handle.readinto(result.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise CheckpointError(f"tensor {name!r} in {file} cannot be read ({error}): copy the file again") from None
        if count != result.nbytes:
            raise CheckpointError(
                f"tensor {name!r} in {file} cannot be read ({count} of {result.nbytes} bytes): copy the file again"
            )
        return result


def companions(folder: str | os.PathLike, destination: Path | None = None) -> list[Path]:
    """What of a Hugging Face folder is not weights (configuration, tokenizer, chat templates, code, licence), as paths
    relative to it.

    Subfolders belong to it, but for hidden ones, caches, logs of a training, and such with weights in them: another
    form of the weights, or a checkpoint. ``destination``: a folder that is being written; where it lies below
    ``folder``, the way to it is left out.
    """
    root = Path(folder)
    found: list[Path] = []
    seen: set[Path] = set()
    target = destination.resolve() if destination is not None else None

    def walk(here: Path) -> None:
        real = here.resolve()
        if here != root and (real in seen or (target is not None and target.is_relative_to(real))):
            return
        seen.add(real)
        try:
            entries = sorted(here.iterdir())
        except PermissionError:
            if here == root:
                raise
            return  # a file system's own, such as lost+found
        files = [entry for entry in entries if entry.is_file()]
        if here != root and any(file.name.endswith(_WEIGHT_SUFFIXES) or file.name.startswith(_LOG) for file in files):
            return
        found.extend(
            file.relative_to(root)
            for file in files
            if not file.name.endswith(_WEIGHT_SUFFIXES) and not (here != root and file.name.startswith("."))
        )
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith(".") and not entry.name.strip("_").endswith("cache"):
                walk(entry)

    walk(root)
    return found


def copy_companions(source: str | os.PathLike, destination: Path) -> None:
    """Copies :func:`companions` of a Hugging Face folder untouched; only a name of its weights' file goes from
    config.json: they get the usual one."""
    for path in companions(source, destination):
        target = destination / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(source) / path, target)
    content = _config(destination)
    if content.pop(NAMED, None):
        (destination / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
