"""Llama 2 and 3: the plain shape, with Llama 3's rotary scaling where the configuration asks for it."""

from __future__ import annotations

from dcpo_megatron.mcore.families.base import DENSE_LAYER, TINY, Family, no_biases, only_silu


def problems(config) -> list[str]:
    return only_silu(config) + no_biases(config)


def tiny_config(**changes):
    from transformers import LlamaConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**TINY | dict(rope_parameters=rope) | changes)


FAMILY = Family(model_type="llama", layer=DENSE_LAYER, problems=problems, tiny_config=tiny_config)
