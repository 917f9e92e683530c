"""The tokenizer of a model folder and the tokens that end a response."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from dcpo_megatron.config.schema import ConfigError

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in _FILES)


def load_tokenizer(folder: str | Path, vocab: int):
    """The folder's tokenizer (nothing is fetched).

    Raises:
        ConfigError: there is none, it cannot be read, or it has tokens beyond the model's ``vocab`` rows.
    """
    from transformers import AutoTokenizer

    # Without its files transformers would quietly make an empty tokenizer of the model's class.
    if not has_tokenizer(folder):
        raise ConfigError(
            f"model.path={folder} has no tokenizer ({', '.join(_FILES)}): copy the tokenizer's files there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model.path={folder} has no usable tokenizer (tokenizer.json, tokenizer_config.json): {reason[:300]}"
        ) from None
    if len(tokenizer) > vocab:
        raise ConfigError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model's vocabulary {vocab}: they do not belong"
            " together"
        )
    return tokenizer


def stop_token_ids(folder: str | Path, tokenizer, more: Iterable[int] = ()) -> tuple[int, ...]:
    """Tokens that end a response: those of ``generation_config.json``, the tokenizer's end of text, and ``more``.

    Raises:
        ConfigError: there are none, so no response would ever end by itself.
    """
    found: set[int] = set(more)
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        if file.is_file():
            try:
                value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
                raise ConfigError(f"{file} is not a JSON object ({error}): restore it or remove it") from None
            if value is not None:
                found.update(value if isinstance(value, list) else [value])
                break
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ConfigError(
            f"{folder} names no end-of-text token: set eos_token_id in its generation_config.json, or"
            " rollout.stop_token_ids"
        )
    return tuple(sorted(found))
