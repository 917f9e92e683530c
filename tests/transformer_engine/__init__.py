"""Transformer Engine's real Python on a CPU: where it lies, and the import path that ranks need for it (see ``standin/transformer_engine``)."""

import sys
from pathlib import Path

import pytest

UNPACKED = Path(sys.prefix) / "transformer-engine-2.20.2"
LATEST = Path(sys.prefix) / "megatron-core-0.19.2"


def python_path(megatron: str) -> list[str]:
    """For ranks that build with Transformer Engine on the "installed" or the "latest" Megatron-Core. Skips the test where one was not unpacked."""
    needed = [UNPACKED] + ([LATEST] if megatron == "latest" else [])
    for folder in needed:
        if not folder.is_dir():
            pytest.skip(f"no {folder}: `make test` unpacks it")
    return [str(Path(__file__).parent / "standin"), *map(str, reversed(needed))]
