"""A reward history as one safetensors file: nothing in it can run code, and a million prompts are read in a second or
two.

    ids         uint8   [bytes]   the utf-8 bytes of all prompt ids, one after another
    id_offsets  int64   [n + 1]   id k is ids[id_offsets[k] : id_offsets[k + 1]]
    visits      int64   [n]       counts  int64 [n]       means  float64 [n]       m2  float64 [n]
    metadata    format, version, std_ddof

A prompt takes 40 bytes and its id. The file appears under its name only when it is complete and on the disk. It has no
checksum of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dcpo_megatron.advantages.sas import RewardHistory

_FORMAT = "dcpo-reward-history"
_VERSION = "1"
_COLUMNS = ("visits", "counts", "means", "m2")


def save_history(history: RewardHistory, path: str | os.PathLike) -> None:
    """Writes ``history`` to ``path``, replacing a file there in one move. Raises OSError where it cannot be written."""
    save_history_state(history.state_dict(), path)


def save_history_state(state: dict[str, Any], path: str | os.PathLike) -> None:
    """As :func:`save_history`, of a copy made earlier by ``RewardHistory.state_dict``: for writing while the history
    goes on."""
    path = Path(path)
    encoded = [prompt_id.encode("utf-8", "surrogatepass") for prompt_id in state["prompt_ids"]]
    offsets = torch.zeros(len(encoded) + 1, dtype=torch.int64)
    if encoded:
        torch.cumsum(torch.tensor(list(map(len, encoded)), dtype=torch.int64), 0, out=offsets[1:])
    names = bytearray(b"".join(encoded))
    ids = torch.frombuffer(names, dtype=torch.uint8) if names else torch.zeros(0, dtype=torch.uint8)
    tensors = {"ids": ids, "id_offsets": offsets, **{name: state[name] for name in _COLUMNS}}
    metadata = {"format": _FORMAT, "version": _VERSION, "std_ddof": str(state["std_ddof"])}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"the reward history could not be written to {path}: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def load_history(path: str | os.PathLike, history: RewardHistory) -> None:
    """Replaces ``history`` by the one in ``path``, bit for bit. If this raises, nothing has changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole reward history, or was kept with another ``std_ddof``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reward history at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
                raise ValueError(
                    f"{path} is no reward history that this program reads: it says format {metadata.get('format')!r}, "
                    f"version {metadata.get('version')!r}, and this program reads {_FORMAT!r}, version {_VERSION!r}"
                )
            ids, offsets, *columns = (file.get_tensor(name) for name in ("ids", "id_offsets", *_COLUMNS))
        state = {
            "version": int(_VERSION),
            "std_ddof": {"0": 0, "1": 1}.get(metadata.get("std_ddof", "")),
            "prompt_ids": _split(ids, offsets),
            **dict(zip(_COLUMNS, columns, strict=True)),
        }
    except (SafetensorError, KeyError, RuntimeError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path} is not a whole reward history ({error}): it may have been cut off") from error
    try:
        history.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _split(ids: torch.Tensor, offsets: torch.Tensor) -> list[str]:
    """The ids as text. Raises RuntimeError where the offsets do not cut the bytes from end to end."""
    whole = ids.dtype == torch.uint8 and offsets.dtype == torch.int64 and ids.dim() == offsets.dim() == 1
    whole = whole and len(offsets) > 0 and int(offsets[0]) == 0 and int(offsets[-1]) == len(ids)
    if not whole or bool((offsets.diff() < 0).any()):
        raise RuntimeError("the offsets of the prompt ids do not fit their bytes")
    data, ends = ids.numpy().tobytes(), offsets.tolist()
    if data.isascii():
        text = data.decode("ascii")
        return [text[start:end] for start, end in itertools.pairwise(ends)]
    return [data[start:end].decode("utf-8", "surrogatepass") for start, end in itertools.pairwise(ends)]
