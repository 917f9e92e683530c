"""What a model family is, and the pieces that its table is put together from.

A family's table says for each Megatron-Core parameter which Hugging Face tensors it is made of, how, and how large they
are. A :class:`Rule` is one line:

    plain     the same tensor                                                        norms, router
    column    rows split over tensor ranks (vocab: padded with zero rows first)      embedding, output layer
    row       columns split over tensor ranks                                        attention output, feed-forward down
    qkv       q, k, v interleaved by query group: [group: its q heads, its k head,   weight and bias
              its v head]
    gated     gate and up stacked, each split over tensor ranks on its own           feed-forward in

Sizes are words, so that one table serves every size of model (:data:`SIZES`). What is done by a rule is in
:mod:`dcpo_megatron.weights.mapping`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("plain", "column", "row", "qkv", "gated")

# A word of a rule's sizes -> its value for a ModelShape.
SIZES: dict[str, Callable[[Any], int]] = {
    "hidden": lambda shape: shape.hidden,
    "queries": lambda shape: shape.heads * shape.head_dim,
    "keys": lambda shape: shape.kv_heads * shape.head_dim,
    "head": lambda shape: shape.head_dim,
    "ffn": lambda shape: shape.ffn,
    "experts": lambda shape: shape.experts,
    "expert_ffn": lambda shape: shape.expert_ffn,
    "vocab": lambda shape: shape.vocab,
}


@dataclass(frozen=True)
class Rule:
    """How one Megatron parameter relates to Hugging Face tensors.

    ``sizes``: one tuple of :data:`SIZES` words for each Hugging Face tensor. ``expert``: it belongs to an expert
    (expert-parallel groups).

    Raises:
        ValueError: an unknown kind or size, or another number of tensors or sizes than the kind has.
    """

    kind: str
    hf_names: tuple[str, ...]
    sizes: tuple[tuple[str, ...], ...]
    expert: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rule for {self.hf_names} has kind {self.kind!r}: use one of {', '.join(KINDS)}")
        wanted = {"qkv": 3, "gated": 2}.get(self.kind, 1)
        if len(self.hf_names) != wanted or len(self.sizes) != wanted:
            raise ValueError(
                f"a {self.kind} rule has {wanted} tensors with their sizes, not {self.hf_names}, {self.sizes}"
            )
        for word in sorted({word for tensor in self.sizes for word in tensor} - SIZES.keys()):
            raise ValueError(f"rule for {self.hf_names} has size {word!r}: use one of {', '.join(SIZES)}")

    @property
    def vocab(self) -> bool:
        """Whether its rows are the vocabulary (padded in Megatron, never in Hugging Face)."""
        return self.sizes[0][0] == "vocab"


def plain(name: str, *sizes: str) -> Rule:
    """The same tensor on every tensor rank."""
    return Rule("plain", (name,), (sizes,))


def column(name: str, rows: str, columns: str = "hidden") -> Rule:
    """Rows split over tensor ranks."""
    return Rule("column", (name,), ((rows, columns),))


def row(name: str, columns: str, *, rows: str = "hidden", expert: bool = False) -> Rule:
    """Columns split over tensor ranks."""
    return Rule("row", (name,), ((rows, columns),), expert)


def qkv(names: tuple[str, str, str], *columns: str) -> Rule:
    """Queries, keys, values, interleaved by query group; ``columns`` is empty for a bias."""
    return Rule("qkv", names, (("queries", *columns), ("keys", *columns), ("keys", *columns)))


def gated(gate: str, up: str, rows: str = "ffn", *, expert: bool = False) -> Rule:
    """Gate and up, stacked."""
    return Rule("gated", (gate, up), ((rows, "hidden"), (rows, "hidden")), expert)


# Tables of one layer: Megatron name -> rule with Hugging Face names, both without the layer's prefix; {e} is the
# expert's number.
ATTENTION: dict[str, Rule] = {
    "input_layernorm.weight": plain("input_layernorm.weight", "hidden"),
    "self_attention.linear_qkv.weight": qkv(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "hidden"
    ),
    "self_attention.linear_proj.weight": row("self_attn.o_proj.weight", "queries"),
    "pre_mlp_layernorm.weight": plain("post_attention_layernorm.weight", "hidden"),
}
QKV_BIAS: dict[str, Rule] = {
    "self_attention.linear_qkv.bias": qkv(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
}
QK_NORM: dict[str, Rule] = {
    "self_attention.q_layernorm.weight": plain("self_attn.q_norm.weight", "head"),
    "self_attention.k_layernorm.weight": plain("self_attn.k_norm.weight", "head"),
}
DENSE_LAYER: dict[str, Rule] = ATTENTION | {
    "mlp.linear_fc1.weight": gated("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": row("mlp.down_proj.weight", "ffn"),
}


def expert_layer(
    router: str = "mlp.gate",
    expert: str = "mlp.experts.{e}",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> dict[str, Rule]:
    """The table of a layer with experts, under a family's own names for them."""
    local = "mlp.experts.local_experts.{e}"
    return ATTENTION | {
        "mlp.router.weight": plain(f"{router}.weight", "experts", "hidden"),
        f"{local}.linear_fc1.weight": gated(
            f"{expert}.{gate}.weight", f"{expert}.{up}.weight", "expert_ffn", expert=True
        ),
        f"{local}.linear_fc2.weight": row(f"{expert}.{down}.weight", "expert_ffn", expert=True),
    }


EXPERT_LAYER: dict[str, Rule] = expert_layer()

# What stands outside the layers.
OUTER: dict[str, Rule] = {
    "embedding.word_embeddings.weight": column("model.embed_tokens.weight", "vocab"),
    "decoder.final_layernorm.weight": plain("model.norm.weight", "hidden"),
    "output_layer.weight": column("lm_head.weight", "vocab"),
}
LAYER_PREFIX = "model.layers.{i}."

# Transformer Engine fuses each norm into the linear layer after it: another Megatron name for the same rule.
FUSED_NORMS: dict[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


# So are a rank's experts where one product serves them all: its layer has a weight for each.
_GROUPED = re.compile(r"\bmlp\.experts\.(linear_fc[12])\.weight(\d+)$")


def single_expert(part: str) -> str:
    """A parameter's name within its layer -> the local layers' name for it:
    ``mlp.experts.linear_fc1.weight3`` -> ``mlp.experts.local_experts.3.linear_fc1.weight``."""
    return _GROUPED.sub(r"mlp.experts.local_experts.\2.\1.weight", part)


def grouped_dim(name: str) -> int | None:
    """Along which dimension a weight of grouped experts is split over expert-tensor ranks; None for any other
    parameter."""
    match = _GROUPED.search(name)
    return None if match is None else ("linear_fc1", "linear_fc2").index(match[1])


@dataclass(frozen=True)
class ExpertFields:
    """Names of the fields of ``config.json`` that describe the experts.

    ``renormalise``: the field that says whether the chosen experts' weights are made to sum to one, or the answer
    itself where the family has no such field.
    """

    count: str = "num_experts"
    per_token: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    renormalise: str | bool = "norm_topk_prob"


@dataclass(frozen=True)
class Family:
    """One model family: what its checkpoints say beyond numbers.

    Args:
        model_type: as ``config.json`` names it.
        layer: the table of a layer, put together from the tables above.
        problems: a transformers configuration -> every reason why the layers here cannot compute it; empty where they
            can.
        tiny_config: ``tiny_config(**changes)`` gives a transformers configuration of a model small enough for tests
            (start from :data:`TINY`).
        experts: where the family's configuration describes its experts; None: a dense family.
        outer: the table of what stands outside the layers.
        layer_prefix: what a layer's Hugging Face names begin with, {i} its number.

    Raises:
        ValueError: a table with experts without ``experts``, or the other way round.
    """

    model_type: str
    layer: Mapping[str, Rule]
    problems: Callable[[Any], list[str]]
    tiny_config: Callable[..., Any]
    experts: ExpertFields | None = None
    outer: Mapping[str, Rule] = field(default_factory=lambda: OUTER)
    layer_prefix: str = LAYER_PREFIX

    def __post_init__(self):
        if any(rule.expert for rule in self.layer.values()) != (self.experts is not None):
            raise ValueError(f"family {self.model_type}: a table with experts needs `experts`, one without has none")

    @property
    def qkv_bias(self) -> bool:
        """Biases on q, k, v."""
        return "self_attention.linear_qkv.bias" in self.layer

    @property
    def qk_norm(self) -> bool:
        """A norm on each query and key head."""
        return "self_attention.q_layernorm.weight" in self.layer


# -- refusals that families share ------------------------------------------------------------------


def only_silu(config) -> list[str]:
    """The feed-forward layers here are gated by silu."""
    if config.hidden_act != "silu":
        return [f"hidden_act={config.hidden_act!r} is not supported: these families use silu (gated)"]
    return []


def no_biases(config) -> list[str]:
    """No biases but those of the family's table."""
    return [
        f"{field}=true is not supported for {config.model_type}"
        for field in ("attention_bias", "mlp_bias")
        if getattr(config, field, False)
    ]


# Numbers of a model small enough for tests, with a vocabulary that needs padding for any tensor size.
TINY: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
