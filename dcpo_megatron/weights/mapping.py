"""One table between Hugging Face names and Megatron-Core parameters, used by everything that moves weights.

A :class:`Rule` says for one Megatron parameter which Hugging Face tensors it is made of and how:

    plain     the same tensor                                                                   norms, router
    column    rows split over tensor ranks (vocab: padded with zero rows first)                 embedding, output layer
    row       columns split over tensor ranks                                                   attention output, feed-forward down
    qkv       q, k, v interleaved by query group: [group: its q heads, its k head, its v head]  weight and bias
    gated     gate and up stacked, each split over tensor ranks on its own                      feed-forward in

``merge`` builds the full Megatron tensor from Hugging Face ones, ``split`` undoes it, ``shard`` and ``unshard`` cut and join tensor-parallel parts. All are
pure and exact (no arithmetic), so a round trip is bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from dcpo_megatron.mcore.hf_config import ModelShape


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter relates to Hugging Face tensors. ``expert``: it belongs to an expert (expert-parallel groups)."""

    kind: str
    hf_names: tuple[str, ...]
    expert: bool = False
    vocab: bool = False


# Megatron name (layer number left out, {e} an expert) -> rule with {i} the layer. Transformer Engine fuses each norm into the linear layer after it.
_LAYER_RULES: dict[str, Rule] = {
    "input_layernorm.weight": Rule("plain", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": Rule("plain", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Rule(
        "qkv", ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
    ),
    "self_attention.linear_qkv.bias": Rule(
        "qkv", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
    ),
    "self_attention.q_layernorm.weight": Rule("plain", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Rule("plain", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Rule("row", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": Rule("plain", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Rule("plain", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Rule("gated", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Rule("row", ("mlp.down_proj.weight",)),
    "mlp.router.weight": Rule("plain", ("mlp.gate.weight",)),
    "mlp.experts.local_experts.{e}.linear_fc1.weight": Rule(
        "gated", ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"), expert=True
    ),
    "mlp.experts.local_experts.{e}.linear_fc2.weight": Rule("row", ("mlp.experts.{e}.down_proj.weight",), expert=True),
}

_OUTER_RULES: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Rule("column", ("model.embed_tokens.weight",), vocab=True),
    "decoder.final_layernorm.weight": Rule("plain", ("model.norm.weight",)),
    "output_layer.weight": Rule("column", ("lm_head.weight",), vocab=True),
}

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


class UnknownParameter(ValueError):
    """A Megatron parameter without a rule: the model has a part that the mapping does not know."""


def rule_for(name: str, layer_offset: int = 0, expert_offset: int = 0, tied: bool = False) -> Rule:
    """The rule of a Megatron parameter, with Hugging Face names filled in.

    Args:
        name: as ``GPTModel.named_parameters()`` gives it (layer and expert numbers local to this rank).
        layer_offset: global number of this chunk's first layer.
        expert_offset: global number of this rank's first expert.
        tied: the output layer shares the embedding's weights (the Hugging Face checkpoint has no ``lm_head.weight``).

    Raises:
        UnknownParameter: no rule knows the name.
    """
    if name in _OUTER_RULES:
        rule = _OUTER_RULES[name]
        return _OUTER_RULES["embedding.word_embeddings.weight"] if tied and name == "output_layer.weight" else rule
    match = _LAYER.match(name)
    if match:
        layer, part = int(match[1]) + layer_offset, match[2]
        expert = _EXPERT.search("." + part)
        key = part if expert is None else re.sub(r"local_experts\.\d+\.", "local_experts.{e}.", part)
        rule = _LAYER_RULES.get(key)
        if rule is not None:
            number = "" if expert is None else str(int(expert[1]) + expert_offset)
            names = tuple(f"model.layers.{layer}." + hf.replace("{e}", number) for hf in rule.hf_names)
            return Rule(rule.kind, names, rule.expert, rule.vocab)
    raise UnknownParameter(f"Megatron parameter {name!r} has no Hugging Face counterpart in the mapping")


def merge(rule: Rule, tensors: list[torch.Tensor], shape: ModelShape, padded_rows: int | None = None) -> torch.Tensor:
    """Hugging Face tensors (in the rule's order) -> the full Megatron tensor; vocabulary rows padded with zeros to ``padded_rows``."""
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
