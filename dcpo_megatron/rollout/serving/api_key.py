"""The servers' key: where the launcher and the trainer read it. It is never an argument: `ps` would show it."""

from __future__ import annotations

import os
from pathlib import Path

API_KEY_VARIABLE = "DCPO_SGLANG_API_KEY"


def read_api_key(file: str | Path | None) -> str | None:
    """The content of ``file``, else of the variable; None where neither is given. Raises ValueError for a file that
    cannot be read or is empty."""
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the key's file {file} cannot be read: {error}") from None
    if not key:
        raise ValueError(f"the key's file {file} is empty: put the key into it")
    return key
