"""Where each parameter of a model lies in a Megatron-Core checkpoint.

Megatron-Core has written three dialects over the years; all are read, the first is written (it is what stock
Megatron-Core asks for by default):

    stacked      decoder.layers.mlp.linear_fc1.weight                      [layers, ...]
                 decoder.layers.mlp.experts.experts.linear_fc1.weight      [layers, experts, ...]
    per layer    decoder.layers.7.mlp.linear_fc1.weight                    [...]
                 decoder.layers.7.mlp.experts.experts.linear_fc1.weight    [experts, ...]
    singleton    decoder.layers.7.mlp.linear_fc1.weight_w, .weight_v       gate and up apart
                 decoder.layers.7.mlp.experts.experts.3.linear_fc1.weight_w, .weight_v

Names of parameters are those of the local layer spec with global layer and expert numbers
(:func:`~dcpo_megatron.weights.mapping.parameter_names`). In a checkpoint the norms bear Transformer Engine's names,
fused into the linear layer after them; with experts the second norm has two names, one a layer spec, and is written
under both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from dcpo_megatron.mcore.families.base import FUSED_NORMS, single_expert
from dcpo_megatron.mcore.hf_config import ModelShape
from dcpo_megatron.weights.folder_check import check_tie
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.torch_dist import TorchDistFolder
from dcpo_megatron.weights.torch_dist_writing import serialized

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(.+)$")
_FUSED = {plain: fused for fused, plain in FUSED_NORMS.items()}
# Empty states: the local linear layers ask for theirs, Transformer Engine's norms too (those that it does not fuse into
# a linear layer).
_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj")
_QK_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
OPTIMIZER_PREFIX = "optimizer.state."


def global_name(name: str, shape: ModelShape, layer_offset: int, expert_offset: int) -> str:
    """A parameter's name on one rank -> the model's own: global layer and expert numbers, norms as the local layer spec
    names them.

    A tied output layer is the embedding.
    """
    match = _LAYER.match(name)
    if match is None:
        return _EMBEDDING if shape.tied_embeddings and name == _OUTPUT else name
    part = single_expert(FUSED_NORMS.get(match[2], match[2]))
    expert = _EXPERT.match(part)
    if expert:
        part = f"mlp.experts.local_experts.{int(expert[1]) + expert_offset}.{expert[2]}"
    return f"decoder.layers.{int(match[1]) + layer_offset}.{part}"


@dataclass(frozen=True)
class TensorPlace:
    """A parameter's tensor in a checkpoint: ``key``, and the leading index (layer, expert) of the stacked tensor it is
    part of."""

    key: str
    lead: tuple[int, ...] = ()


def stacked_places(name: str, shape: ModelShape) -> list[TensorPlace]:
    """Where ``name`` is written: one place, or two for a norm that two layer specs name differently."""
    return [TensorPlace(key, lead) for key, lead in _stacked(name, shape)]


def _stacked(name: str, shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    match = _LAYER.match(name)
    if match is None:
        return [(name, ())]
    layer, part = int(match[1]), match[2]
    expert = _EXPERT.match(part)
    if expert:
        return [(f"decoder.layers.mlp.experts.experts.{expert[2]}", (layer, int(expert[1])))]
    parts = [_FUSED.get(part, part)]
    if shape.experts and part == "pre_mlp_layernorm.weight":
        parts.append(part)
    return [(f"decoder.layers.{part}", (layer,)) for part in parts]


def lead_shape(place: TensorPlace, shape: ModelShape) -> tuple[int, ...]:
    """Sizes of the leading dimensions of a stacked tensor: (layers,) or (layers, experts)."""
    return (shape.layers, shape.experts)[: len(place.lead)]


def layer_states(layer: int, shape: ModelShape) -> list[tuple[str, bytes]]:
    """``(key, serialized object)`` of the empty extra states of one layer, without which stock Megatron-Core refuses
    the checkpoint."""
    empty = serialized(None)
    parts = _STATES + (_QK_STATES if shape.qk_norm else ()) + (("pre_mlp_layernorm",) if shape.experts else ())
    found = [(f"decoder.layers.{part}._extra_state/shard_{layer}_{shape.layers}", empty) for part in parts]
    for linear in ("linear_fc1", "linear_fc2"):
        if shape.experts:
            name, sizes = f"decoder.layers.mlp.experts.experts.{linear}", f"{shape.layers}.{shape.experts}"
            found += [(f"{name}._extra_state/shard_{layer}.{e}_{sizes}", empty) for e in range(shape.experts)]
        else:
            found.append((f"decoder.layers.mlp.{linear}._extra_state/shard_{layer}_{shape.layers}", empty))
    return found


def outer_states() -> list[tuple[str, bytes]]:
    """The same of what stands outside the layers."""
    return [("decoder.final_layernorm._extra_state/shard_0_1", serialized(None))]


class MegatronTensors:
    """Reads whole parameters, or rows of them, of a checkpoint in any dialect and layout.

    Raises:
        CheckpointError: no model in the checkpoint, one of another number of layers or experts than ``shape`` says, or
            one with an output layer of its own where ``shape`` is tied.
    """

    def __init__(self, folder: TorchDistFolder, shape: ModelShape):
        self.folder, self.shape = folder, shape
        found = [key for key in folder.tensors if key.endswith(_EMBEDDING) and not key.startswith(OPTIMIZER_PREFIX)]
        if not found:
            raise CheckpointError(
                f"{folder.folder} has no tensor {_EMBEDDING}: it holds no model of the GPT kind (its tensors begin with"
                f" {', '.join(sorted(folder.tensors)[:3]) or 'nothing'})"
            )
        self.prefix = min(found, key=len).removesuffix(_EMBEDDING)  # "module." where a wrapper was saved
        for key, entry in folder.tensors.items():
            if key.startswith(self.prefix + "decoder.layers.") and key.endswith("self_attention.linear_qkv.weight"):
                stacked = not key.removeprefix(self.prefix + "decoder.layers.")[0].isdigit()
                if stacked and entry.shape[0] != shape.layers:
                    raise CheckpointError(
                        f"{folder.folder} has {entry.shape[0]} layers, config.json says num_hidden_layers"
                        f" {shape.layers}: they do not belong together"
                    )
        if shape.tied_embeddings and self.prefix + _OUTPUT in folder.tensors:
            self._check_tie()

    def _check_tie(self) -> None:
        def rows_of(name: str):
            entry = self.folder.tensors[self.prefix + name]
            return lambda rows: self.folder.read(
                self.prefix + name, (rows[0], 0), (rows[1] - rows[0], *entry.shape[1:])
            )

        # Too few rows are found out when they are read.
        vocab = min(self.folder.tensors[self.prefix + name].shape[0] for name in (_EMBEDDING, _OUTPUT))
        place = f"{self.folder.folder}: {self.prefix}{_OUTPUT} (lm_head.weight)"
        check_tie(rows_of(_EMBEDDING), rows_of(_OUTPUT), min(vocab, self.shape.vocab), place, self.prefix + _EMBEDDING)

    def places(self, name: str) -> list[TensorPlace]:
        """The places that make up ``name`` in this checkpoint: one, or gate and up. Raises :class:`CheckpointError`
        where it has none."""
        tensors, prefix = self.folder.tensors, self.prefix
        candidates: list[list[TensorPlace]] = []
        for key, lead in _stacked(name, self.shape):
            candidates.append([TensorPlace(prefix + key, lead)])
            if lead:
                layered = key.replace("decoder.layers.", f"decoder.layers.{lead[0]}.", 1)
                candidates.append([TensorPlace(prefix + layered, lead[1:])])
                if len(lead) == 2:
                    layered = layered.replace("experts.experts.", f"experts.experts.{lead[1]}.", 1)
                    candidates.append([TensorPlace(prefix + layered)])
                candidates.append([TensorPlace(f"{prefix}{layered}_{half}") for half in "wv"])
        # A norm under the plain name of the local spec.
        candidates.append([TensorPlace(prefix + name)])
        for places in candidates:
            if all(place.key in tensors for place in places):
                return places
        raise CheckpointError(
            f"{self.folder.folder} has no tensor for {name} (looked for {candidates[0][0].key} and other spellings): "
            "the checkpoint is of another architecture or incomplete"
        )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which ``name`` is stored."""
        return self.folder.tensors[self.places(name)[0].key].dtype

    def read(self, name: str, sizes: tuple[int, ...], rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The full parameter of ``sizes``, or its rows ``[first, last)`` alone.

        Raises:
            CheckpointError: it is stored in another shape.
        """
        places = self.places(name)
        parts = []
        for place in places:
            entry = self.folder.tensors[place.key]
            lead = len(place.lead)
            wanted = sizes if len(places) == 1 else (sizes[0] // 2, *sizes[1:])
            # Rows of a vocabulary beyond the real ones are padding of any length.
            fits = entry.shape[lead + 1 :] == wanted[1:] and entry.shape[lead] >= wanted[0]
            if not fits or (entry.shape[lead] != wanted[0] and not name.endswith(("word_embeddings.weight", _OUTPUT))):
                raise CheckpointError(
                    f"{self.folder.folder}: {place.key} holds {entry.shape[lead:]} for {name}, config.json calls for"
                    f" {wanted}: they do not belong together"
                )
            if any(index >= size for index, size in zip(place.lead, entry.shape)):
                raise CheckpointError(
                    f"{self.folder.folder}: {place.key} {entry.shape} has no layer or expert {place.lead}: it is of a"
                    " smaller model than config.json says"
                )
            first, last = rows if rows is not None and len(places) == 1 else (0, wanted[0])
            offsets = (*place.lead, first, *(0 for _ in wanted[1:]))
            region = self.folder.read(place.key, offsets, (*(1 for _ in place.lead), last - first, *wanted[1:]))
            parts.append(region.reshape(last - first, *wanted[1:]))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if rows is None or len(places) == 1 else whole[rows[0] : rows[1]]
