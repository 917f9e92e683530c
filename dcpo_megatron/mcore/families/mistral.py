"""Mistral: the plain shape."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import DENSE_LAYER, TINY, Family, no_biases, only_silu


def problems(config) -> list[str]:
    return only_silu(config) + no_biases(config)


def tiny_config(**changes):
    from transformers import MistralConfig

    return MistralConfig(**TINY | dict(sliding_window=None) | changes)


FAMILY = Family(model_type="mistral", layer=DENSE_LAYER, problems=problems, tiny_config=tiny_config)
