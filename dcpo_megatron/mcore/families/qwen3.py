"""Qwen3: a norm on each query and key head, no biases, heads wider than hidden / heads."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import (
    DENSE_LAYER,
    QK_NORM,
    TINY,
    Family,
    no_biases,
    only_silu,
)


def problems(config) -> list[str]:
    return only_silu(config) + no_biases(config)


def tiny_config(**changes):
    from transformers import Qwen3Config

    return Qwen3Config(**TINY | dict(head_dim=16) | changes)


FAMILY = Family(model_type="qwen3", layer=DENSE_LAYER | QK_NORM, problems=problems, tiny_config=tiny_config)
