"""Qwen3-MoE: Qwen3's attention, and experts in every layer."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import (
    EXPERT_LAYER,
    QK_NORM,
    TINY,
    ExpertFields,
    Family,
    no_biases,
    only_silu,
)


def problems(config) -> list[str]:
    found = only_silu(config) + no_biases(config)
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        found.append(
            "mlp_only_layers and decoder_sparse_step other than 1 are not supported: every layer must have experts"
        )
    return found


def tiny_config(**changes):
    from transformers import Qwen3MoeConfig

    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
    return Qwen3MoeConfig(**TINY | dict(head_dim=16) | experts | changes)


FAMILY = Family(
    model_type="qwen3_moe",
    layer=EXPERT_LAYER | QK_NORM,
    problems=problems,
    tiny_config=tiny_config,
    experts=ExpertFields(),
)
