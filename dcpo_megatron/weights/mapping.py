"""Weights between Hugging Face names and Megatron-Core parameters: the operations on the tables of
:mod:`dcpo_megatron.mcore.families`.

Everything that moves weights goes through here. For one Megatron parameter

    rule_for     its rule, with Hugging Face names filled in        hf_shapes, full_shape   the sizes of both sides
    merge        Hugging Face tensors -> the full Megatron tensor   split                   back
    shard        the full tensor -> one tensor-parallel part        unshard                 back

Merge, split, shard and unshard are pure and exact (no arithmetic), so a round trip is bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.families.base import FUSED_NORMS, SIZES, Rule, single_expert
from dcpo_megatron.mcore.hf_config import ModelShape

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


class UnknownParameter(ValueError):
    """A Megatron parameter without a rule: the model has a part that its family's table does not know."""


def rule_for(name: str, shape: ModelShape, layer_offset: int = 0, expert_offset: int = 0) -> Rule:
    """The rule of a Megatron parameter, with Hugging Face names filled in. A tied output layer has the embedding's
    rule.

    Args:
        name: as ``GPTModel.named_parameters()`` gives it (layer and expert numbers local to this rank).
        layer_offset: global number of this chunk's first layer.
        expert_offset: global number of this rank's first expert.

    Raises:
        UnknownParameter: the table of the shape's family does not know the name.
    """
    family = FAMILIES[shape.model_type]
    if name in family.outer:
        return family.outer[_EMBEDDING if shape.tied_embeddings and name == _OUTPUT else name]
    match = _LAYER.match(name)
    if match:
        layer, part = int(match[1]) + layer_offset, single_expert(match[2])
        expert = _EXPERT.search(part)
        key = part if expert is None else part[: expert.start(1)] + "{e}" + part[expert.end(1) :]
        rule = family.layer.get(FUSED_NORMS.get(key, key))
        if rule is not None:
            prefix = family.layer_prefix.replace("{i}", str(layer))
            number = "" if expert is None else str(int(expert[1]) + expert_offset)
            return replace(rule, hf_names=tuple(prefix + hf.replace("{e}", number) for hf in rule.hf_names))
    raise UnknownParameter(
        f"Megatron parameter {name!r} has no Hugging Face counterpart in the table of {shape.model_type}"
    )


def parameter_names(shape: ModelShape) -> list[str]:
    """Every Megatron parameter of the whole model, with global layer and expert numbers, under the local layer spec's
    names.

    In the order embedding, layers, final norm, output layer (left out when tied).
    """
    family = FAMILIES[shape.model_type]
    names = [_EMBEDDING]
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}."
        names += [prefix + part for part, rule in family.layer.items() if not rule.expert]
        names += [
            prefix + part.replace("{e}", str(expert))
            for expert in range(shape.experts)
            for part, rule in family.layer.items()
            if rule.expert
        ]
    outer = [name for name in family.outer if name not in (_EMBEDDING, _OUTPUT)]
    return names + outer + ([] if shape.tied_embeddings else [_OUTPUT])


def hf_names(shape: ModelShape) -> list[str]:
    """Every tensor name that a Hugging Face checkpoint of ``shape`` has, in the order of :func:`parameter_names`."""
    return [hf for name in parameter_names(shape) for hf in rule_for(name, shape).hf_names]


def hf_shapes(rule: Rule, shape: ModelShape) -> list[tuple[int, ...]]:
    """Sizes of the rule's Hugging Face tensors, in the rule's order."""
    return [tuple(SIZES[word](shape) for word in sizes) for sizes in rule.sizes]


def full_shape(rule: Rule, name: str, shape: ModelShape, padded_rows: int) -> tuple[int, ...]:
    """Sizes of the full Megatron tensor (not cut for tensor ranks) of parameter ``name``.

    ``padded_rows``: rows of the vocabulary as Megatron-Core holds it
    (:func:`~dcpo_megatron.mcore.layout.padded_vocab`).

    Raises:
        ValueError: fewer rows than the vocabulary has.
    """
    parts = hf_shapes(rule, shape)
    rows = sum(part[0] for part in parts)
    if rule.vocab:
        if padded_rows < rows:
            raise ValueError(f"{name} would have {padded_rows} rows for a vocabulary of {rows}: pad up, not down")
        rows = padded_rows
    return (rows, *parts[0][1:])


def merge(rule: Rule, tensors: list[torch.Tensor], shape: ModelShape, padded_rows: int | None = None) -> torch.Tensor:
    """Hugging Face tensors (in the rule's order) -> the full Megatron tensor; vocabulary rows padded with zeros to
    ``padded_rows``."""
    if rule.kind == "qkv":
        q, k, v = tensors
        per_group = shape.heads // shape.kv_heads
        rest = q.shape[1:]
        parts = (
            q.reshape(shape.kv_heads, per_group * shape.head_dim, *rest),
            k.reshape(shape.kv_heads, shape.head_dim, *rest),
            v.reshape(shape.kv_heads, shape.head_dim, *rest),
        )
        return torch.cat(parts, dim=1).reshape(-1, *rest)
    if rule.kind == "gated":
        return torch.cat(tensors, dim=0)
    (tensor,) = tensors
    if rule.vocab and padded_rows is not None and padded_rows > tensor.shape[0]:
        tensor = torch.cat((tensor, tensor.new_zeros(padded_rows - tensor.shape[0], *tensor.shape[1:])))
    return tensor


def split(rule: Rule, full: torch.Tensor, shape: ModelShape) -> list[tuple[str, torch.Tensor]]:
    """The full Megatron tensor -> ``[(Hugging Face name, tensor), ...]``; padded vocabulary rows are dropped."""
    if rule.kind == "qkv":
        per_group = shape.heads // shape.kv_heads
        rest = full.shape[1:]
        grouped = full.reshape(shape.kv_heads, (per_group + 2) * shape.head_dim, *rest)
        sizes = [per_group * shape.head_dim, shape.head_dim, shape.head_dim]
        return [
            (name, part.reshape(-1, *rest))
            for name, part in zip(rule.hf_names, grouped.split(sizes, dim=1), strict=True)
        ]
    if rule.kind == "gated":
        return list(zip(rule.hf_names, full.chunk(2, dim=0), strict=True))
    return [(rule.hf_names[0], full[: shape.vocab] if rule.vocab else full)]


def shard(rule: Rule, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of the full Megatron tensor that tensor-parallel ``rank`` of ``size`` holds."""
    if size == 1 or rule.kind == "plain":
        return full
    if rule.kind == "row":
        return full.chunk(size, dim=1)[rank]
    if rule.kind == "gated":
        return torch.cat([half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0)])
    return full.chunk(size, dim=0)[rank]


def unshard(rule: Rule, parts: list[torch.Tensor]) -> torch.Tensor:
    """Joins the tensor-parallel parts (in rank order) to the full Megatron tensor."""
    if len(parts) == 1 or rule.kind == "plain":
        return parts[0]
    if rule.kind == "row":
        return torch.cat(parts, dim=1)
    if rule.kind == "gated":
        gates, ups = zip(*(part.chunk(2, dim=0) for part in parts), strict=True)
        return torch.cat((*gates, *ups))
    return torch.cat(parts, dim=0)
