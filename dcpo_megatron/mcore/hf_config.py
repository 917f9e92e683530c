"""Reads a Hugging Face ``config.json`` into the few facts a Megatron model is built from. Nobody types a rotary base.

:class:`ModelShape` is what the rest of the project sees. What the families have in common is read here; what differs
beyond numbers is said by each family's file in :mod:`dcpo_megatron.mcore.families`, found by ``model_type``:

    config.json -> model_type -> FAMILIES[model_type] -> its problems, its experts' fields -> ModelShape
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.mcore.families import FAMILIES
from dcpo_megatron.mcore.families.base import ExpertFields

# Fields of ``config.json`` that count something.
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
    "num_key_value_heads", "head_dim",
)  # fmt: skip
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")


class ModelConfigError(ValueError):
    """The Hugging Face folder cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model in tokens-free units: heads, layers, widths. ``inverse_frequencies`` has ``head_dim / 2`` rotary
    frequencies.

    ``max_positions``: the longest sequence, in tokens, that the layers here compute as the model does: its positions,
    or its sliding window where that is less.
    """

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
        ModelConfigError: no such folder, no config.json, a size that is no whole number above 0, or not readable as a
            Hugging Face configuration.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = Path(folder)
    if not path.is_dir():
        raise ModelConfigError(f"model folder {path} does not exist: give a local Hugging Face folder with config.json")
    file = path / "config.json"
    if not file.is_file():
        raise ModelConfigError(f"model folder {path} has no config.json: give a complete Hugging Face folder")
    try:
        content = json.loads(file.read_text())
        model_type = content.get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ModelConfigError(
            f"{file} is not a JSON object ({error}): restore it from the original checkpoint"
        ) from None
    if model_type not in FAMILIES:
        raise ModelConfigError(
            f"{file} has model_type {model_type!r}, which is not supported: the known ones are"
            f" {', '.join(sorted(FAMILIES))}"
        )
    if problems := _bad_counts(content, FAMILIES[model_type].experts):
        raise ModelConfigError(f"{file} has {', '.join(problems)}: each must be a whole number above 0")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except StrictDataclassError as error:  # two lines, the reason in the second
        reason = f"{str(error).splitlines()[0]} {error.__cause__}" if error.__cause__ else str(error)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = str(error)
    raise ModelConfigError(f"{file} cannot be read as a {model_type} configuration: {' '.join(reason.split())}")


def _bad_counts(content: dict, experts: ExpertFields | None) -> list[str]:
    names = [*_COUNTS, *((experts.count, experts.per_token, experts.width) if experts else ())]
    found = {name: content[name] for name in names if name in content}
    return [
        f"{name}={json.dumps(value)}"
        for name, value in found.items()
        if (type(value) is not int or value < 1) and not (value is None and name in _MAY_BE_NULL)
    ]


def read_shape(folder: str | os.PathLike) -> ModelShape:
    """Reads ``folder/config.json`` into a :class:`ModelShape`. Raises :class:`ModelConfigError` as :func:`read_config`
    does."""
    return shape_of(read_config(folder))


def shape_of(config) -> ModelShape:
    """Turns a transformers configuration into a :class:`ModelShape`.

    Raises:
        ModelConfigError: an unknown family, a feature that the layers here do not have (every problem that the family's
            file finds), key-value heads that do not divide the heads, heads that do not divide the width, a rotary
            scheme that also scales the attention.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelConfigError(
            f"model_type {config.model_type!r} is not supported: the known ones are {', '.join(sorted(FAMILIES))}"
        )
    problems = family.problems(config)
    if problems:
        raise ModelConfigError("; ".join(problems))
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if heads % kv_heads:
        raise ModelConfigError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}")
    head_dim = getattr(config, "head_dim", None)
    if not head_dim and config.hidden_size % heads:
        raise ModelConfigError(
            f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={heads}, and there is no head_dim"
        )
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
        kv_heads=kv_heads,
        head_dim=head_dim or config.hidden_size // heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=_positions(config),
        norm_eps=config.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_base=float(config.rope_parameters["rope_theta"]),
        inverse_frequencies=frequencies,
        **_expert_numbers(config, family.experts),
    )


def _positions(config) -> int:
    """A window of W tokens hides nothing from a sequence of up to W. Qwen says beside it whether it is in use;
    elsewhere it is wherever it is set."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _expert_numbers(config, fields: ExpertFields | None) -> dict:
    if fields is None:
        return {}
    renormalise = fields.renormalise
    found = dict(
        experts=getattr(config, fields.count),
        experts_per_token=getattr(config, fields.per_token),
        expert_ffn=getattr(config, fields.width),
        norm_topk_prob=renormalise if isinstance(renormalise, bool) else bool(getattr(config, renormalise)),
    )
    if found["experts_per_token"] == 1 and found["norm_topk_prob"]:
        raise ModelConfigError(
            f"{fields.per_token}=1 with weights made to sum to one is not supported: each expert's weight is then 1 and"
            " the router learns nothing"
        )
    return found


def rotary_frequencies(config) -> tuple[tuple[float, ...], float]:
    """Inverse rotary frequencies ``[head_dim / 2]`` and the attention scaling, by transformers' own rule for this
    configuration.

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
