"""``dcpo convert inspect``: what a Hugging Face folder or a Megatron checkpoint holds, from headers and index alone.

:func:`describe` gives plain values (what ``--json`` prints), :func:`lines` puts them in words. What cannot be known (a
checkpoint without config.json does not say its family or real vocabulary) is None.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from dcpo_megatron.console.progress import size
from dcpo_megatron.mcore.hf_config import ModelShape, read_shape
from dcpo_megatron.weights.conversion import HF_SUBFOLDER
from dcpo_megatron.weights.folder_check import check_folder
from dcpo_megatron.weights.hf_folder import CheckpointError, SafetensorsFolder, companions
from dcpo_megatron.weights.mapping import hf_shapes, parameter_names, rule_for
from dcpo_megatron.weights.megatron_names import MegatronTensors
from dcpo_megatron.weights.torch_dist import TensorEntry, TorchDistFolder, find_checkpoint

_EMBEDDING = "embedding.word_embeddings.weight"
_STATE = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.")
_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(?:(\d+)\.)?")


def describe(path: str, config_from: str | None = None) -> dict:
    """The facts of a folder of either kind.

    Raises:
        CheckpointError, ModelConfigError: neither kind, damaged, or of an unknown family.
    """
    if find_checkpoint(path) is None:
        return _huggingface(Path(path))
    return _megatron(TorchDistFolder(path), config_from)


def _huggingface(folder: Path) -> dict:
    shape = read_shape(folder)
    found = SafetensorsFolder(folder)
    counts: Counter = Counter()
    for name in found.names():
        counts[_short(found.dtype(name))] += math.prod(found.shape(name))
    try:
        check_folder(found, shape)
        problem = None
    except CheckpointError as error:
        problem = str(error)
    return {
        "kind": "huggingface",
        "folder": str(folder),
        **_model_facts(shape),
        "numbers": dict(counts),
        "bytes": sum(file.stat().st_size for file in found.files),
        "files": len(found.files),
        "companions": _companions(folder),
        "problem": problem,
    }


def _model_facts(shape: ModelShape) -> dict:
    wanted = (size for name in parameter_names(shape) for size in hf_shapes(rule_for(name, shape), shape))
    return {
        "family": shape.model_type,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "experts": shape.experts,
        "parameters": sum(math.prod(sizes) for sizes in wanted),
        "vocabulary": shape.vocab,
        "tied": shape.tied_embeddings,
    }


def _megatron(found: TorchDistFolder, config_from: str | None) -> dict:
    folder = found.folder
    config = Path(config_from) if config_from else folder / HF_SUBFOLDER
    shape = read_shape(config) if config_from or (config / "config.json").is_file() else None
    optimizer = {key: entry for key, entry in found.tensors.items() if "optimizer." in key}
    model = {key: entry for key, entry in found.tensors.items() if key not in optimizer}
    embedding = next((entry for key, entry in model.items() if key.endswith(_EMBEDDING)), None)
    counts: Counter = Counter()
    for entry in model.values():
        counts[_short(entry.dtype)] += math.prod(entry.shape)
    problem = None
    if shape is not None:
        try:
            tensors = MegatronTensors(found, shape)
            for name in parameter_names(shape):
                tensors.places(name)
        except CheckpointError as error:
            problem = str(error)
    facts = {
        "family": None,
        "layers": _layers(model),
        "hidden": embedding.shape[1] if embedding else None,
        "experts": None,
        "parameters": None,
        "vocabulary": None,
        "tied": not any(key.endswith("output_layer.weight") for key in model),
    }
    return {
        "kind": "megatron",
        "folder": str(folder),
        **(facts if shape is None else _model_facts(shape)),
        "vocabulary_padded": embedding.shape[0] if embedding else None,
        "numbers": dict(counts),
        "bytes": sum(entry.bytes for entry in model.values()),
        "files": len(list(folder.glob("*.distcp"))),
        "dialect": _dialect(model),
        "tensors": len(model),
        "chunks": sum(len(entry.chunks) for entry in model.values()),
        "tensor_parallel": _column_parts(model, "self_attention.linear_proj.weight"),
        "expert_tensor_parallel": _column_parts(model, "linear_fc2.weight", "experts"),
        "iteration": iteration_of(found),
        "optimizer": _optimizer(found, optimizer),
        "companions": _companions(folder / HF_SUBFOLDER),
        "problem": problem,
    }


def _layers(model: dict[str, TensorEntry]) -> int | None:
    for key, entry in model.items():
        match = _LAYER.search(key)
        if match and match[1] is None and key.endswith("linear_qkv.weight"):
            return entry.shape[0]
    numbered = [int(match[1]) for match in map(_LAYER.search, model) if match and match[1]]
    return max(numbered) + 1 if numbered else None


def _dialect(model: Iterable[str]) -> str | None:
    keys = [key for key in model if _LAYER.search(key)]
    if any(key.endswith(("_w", "_v")) for key in keys):
        return "singleton"
    if not keys:
        return None
    return "per layer" if any(match[1] for match in map(_LAYER.search, keys) if match) else "stacked"


def _column_parts(model: dict[str, TensorEntry], ending: str, inside: str = "") -> int | None:
    """Parts into which a row-parallel weight is cut by columns: the tensor-parallel size whose ranks read whole
    chunks."""
    for key, entry in model.items():
        if key.endswith(ending) and inside in key:
            return len({offsets[-1] for offsets, _ in entry.chunks})
    return None


def _optimizer(found: TorchDistFolder, tensors: dict[str, TensorEntry]) -> dict | None:
    if not tensors and not any("optimizer." in key for key in found.objects):
        return None
    tied = any("optimizer.distributed.dp_group_idx" in key for key in [*tensors, *found.objects])
    states = sorted({match[1] for match in map(_STATE.match, tensors) if match})
    return {
        "format": "dp_reshardable" if tied else "model space" if states else "other",
        "states": states,
        "bytes": sum(entry.bytes for entry in tensors.values()),
        "any_layout": not tied,
    }


def iteration_of(found: TorchDistFolder) -> int | None:
    """The iteration that a checkpoint was saved at: its own word, else its folder's name."""
    try:
        value = found.common().get("iteration")
    except (CheckpointError, AttributeError):
        value = None  # written with classes that are not loaded here
    named = re.fullmatch(r"iter_(\d+)", found.folder.resolve().name)
    return value if isinstance(value, int) else int(named[1]) if named else None


def _companions(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.as_posix() for path in companions(folder))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- in words --------------------------------------------------------------------------------------


def lines(facts: dict) -> list[str]:
    """The facts as aligned lines."""
    megatron = facts["kind"] == "megatron"
    unknown = "unknown (no config.json: name one with --config-from)"
    sizes = [f"{facts['layers']} layers", f"hidden size {facts['hidden']}"]
    if facts["experts"]:
        sizes.append(f"{facts['experts']} experts")
    rows = {
        "kind": f"{'Megatron checkpoint (torch_dist)' if megatron else 'Hugging Face folder'}, {facts['folder']}",
        "model": f"{facts['family'] or 'family ' + unknown}; {', '.join(sizes)}",
        "parameters": unknown if facts["parameters"] is None else f"{facts['parameters']:,}",
        "weights": f"{size(facts['bytes'])} in {facts['files']} files; "
        + ", ".join(f"{count:,} x {dtype}" for dtype, count in facts["numbers"].items()),
        "vocabulary": f"{'unknown' if facts['vocabulary'] is None else facts['vocabulary']}"
        + (f", padded to {facts['vocabulary_padded']}" if megatron else "")
        + ("; output layer tied to the embedding" if facts["tied"] else "; output layer of its own"),
    }
    if megatron:
        cut = f"{facts['tensors']} tensors in {facts['chunks']} chunks, {facts['dialect']}"
        if facts["tensor_parallel"]:
            cut += f"; whole chunks at --tp {facts['tensor_parallel']}"
        if facts["expert_tensor_parallel"]:
            cut += f" --etp {facts['expert_tensor_parallel']}"
        rows["stored as"] = cut + " (any other layout can load it)"
        rows["iteration"] = "none" if facts["iteration"] is None else str(facts["iteration"])
        state = facts["optimizer"]
        rows["optimizer"] = "no state" if state is None else (
            f"{', '.join(state['states']) or 'state'}, {size(state['bytes'])}, {state['format']}"
            + ("" if state["any_layout"] else " (for the layout that wrote it only)")
        )  # fmt: skip
    rows["companions"] = ", ".join(facts["companions"]) or "none"
    if facts["problem"]:
        rows["problem"] = facts["problem"]
    return [f"{name:<11} {text}" for name, text in rows.items()]
