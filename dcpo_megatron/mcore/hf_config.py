"""Reads a Hugging Face ``config.json`` into the few facts a Megatron model is built from. Nobody types a rotary base.

:class:`ModelShape` is what the rest of the project sees; the families are told apart by ``model_type``. A new family is one more line in
``FAMILIES`` where its layers are pre-norm, rotary, gated (the shape that Qwen2, Qwen3, Llama and Mistral share).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


class ModelConfigError(ValueError):
    """The Hugging Face folder cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Family:
    """What differs between families beyond numbers: biases on q, k, v; a norm on each query and key head; experts."""

    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts=True),
    "llama": Family(),
    "mistral": Family(),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model in tokens-free units: heads, layers, widths. ``inverse_frequencies`` has ``head_dim / 2`` rotary frequencies."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_base: float
    inverse_frequencies: tuple[float, ...]
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk_prob: bool = False


def read_config(folder: str | os.PathLike):
    """Loads the folder's ``config.json`` through transformers. Local folders only: nothing is fetched.

    Raises:
        ModelConfigError: no such folder, no config.json, or not readable as a Hugging Face configuration.
    """
    from transformers import AutoConfig

    path = Path(folder)
    if not path.is_dir():
        raise ModelConfigError(f"model folder {path} does not exist: give a local Hugging Face folder with config.json")
    file = path / "config.json"
    if not file.is_file():
        raise ModelConfigError(f"model folder {path} has no config.json: give a complete Hugging Face folder")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelConfigError(
            f"{file} is not a JSON object ({error}): restore it from the original checkpoint"
        ) from None
    if model_type not in FAMILIES:
        raise ModelConfigError(
            f"{file} has model_type {model_type!r}, which is not supported: the known ones are {', '.join(sorted(FAMILIES))}"
        )
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelConfigError(f"{file} cannot be read as a {model_type} configuration: {error}") from None


def read_shape(folder: str | os.PathLike) -> ModelShape:
    """Reads ``folder/config.json`` into a :class:`ModelShape`. Raises :class:`ModelConfigError` as :func:`read_config` does."""
    return shape_of(read_config(folder))


def shape_of(config) -> ModelShape:
    """Turns a transformers configuration into a :class:`ModelShape`.

    Raises:
        ModelConfigError: a family or a feature that the layers here do not have (sliding windows in use, another activation, attention
            biases beyond the family's, mixed dense and expert layers, a rotary scheme that also scales the attention).
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelConfigError(
            f"model_type {config.model_type!r} is not supported: the known ones are {', '.join(sorted(FAMILIES))}"
        )
    if config.hidden_act != "silu":
        raise ModelConfigError(f"hidden_act={config.hidden_act!r} is not supported: these families use silu (gated)")
    if getattr(config, "sliding_window", None) and (
        config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    ):
        raise ModelConfigError(
            f"sliding_window={config.sliding_window} is not supported: set it to null if your sequences are no longer than that"
        )
    if getattr(config, "attention_bias", False) and not family.qkv_bias:
        raise ModelConfigError(f"attention_bias=true is not supported for {config.model_type}")
    if getattr(config, "mlp_bias", False):
        raise ModelConfigError("mlp_bias=true is not supported")
    if family.experts and (getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1):
        raise ModelConfigError(
            "mlp_only_layers and decoder_sparse_step other than 1 are not supported: every layer must have experts"
        )
    heads = config.num_attention_heads
    frequencies, scaling = rotary_frequencies(config)
    if scaling != 1.0:
        raise ModelConfigError(
            f"rotary scheme {config.rope_parameters} also scales the attention by {scaling}, which is not supported"
        )
    return ModelShape(
        model_type=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_base=float(config.rope_parameters["rope_theta"]),
        inverse_frequencies=frequencies,
        experts=config.num_experts if family.experts else 0,
        experts_per_token=config.num_experts_per_tok if family.experts else 0,
        expert_ffn=config.moe_intermediate_size if family.experts else 0,
        norm_topk_prob=bool(getattr(config, "norm_topk_prob", False)) if family.experts else False,
    )


def rotary_frequencies(config) -> tuple[tuple[float, ...], float]:
    """Inverse rotary frequencies ``[head_dim / 2]`` and the attention scaling, by transformers' own rule for this configuration.

    Computed by the library that defines the checkpoint, so that Llama 3's scaling (and any other it knows) is exact.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        base = float(config.rope_parameters["rope_theta"])
        # fp32 like transformers' own, so that positions of 10,000 and more rotate by the same angle.
        import torch

        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
        return tuple((1.0 / (base**exponents)).tolist()), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ModelConfigError(
            f"rope_type {kind!r} is not known: the known ones are default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    if kind in ("dynamic", "longrope"):
        raise ModelConfigError(f"rope_type {kind!r} changes with the sequence's length, which is not supported")
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return tuple(frequencies.float().tolist()), float(scaling)
