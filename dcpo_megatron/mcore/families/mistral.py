"""Mistral: the plain shape. Its sliding window is in use wherever it is set, and must be null."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import DENSE_LAYER, TINY, Family, no_biases, no_sliding_window, only_silu


def problems(config) -> list[str]:
    return only_silu(config) + no_biases(config) + no_sliding_window(config)


def tiny_config(**changes):
    from transformers import MistralConfig

    return MistralConfig(**TINY | dict(sliding_window=None) | changes)


FAMILY = Family(model_type="mistral", layer=DENSE_LAYER, problems=problems, tiny_config=tiny_config)
