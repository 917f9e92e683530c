"""Qwen2 and Qwen2.5: biases on q, k, v."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import DENSE_LAYER, QKV_BIAS, TINY, Family, only_silu


def problems(config) -> list[str]:
    return only_silu(config)


def tiny_config(**changes):
    from transformers import Qwen2Config

    return Qwen2Config(**TINY | changes)


FAMILY = Family(model_type="qwen2", layer=DENSE_LAYER | QKV_BIAS, problems=problems, tiny_config=tiny_config)
