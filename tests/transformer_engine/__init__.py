"""Transformer Engine's real Python on a CPU: where it lies, and the import path that ranks need for it (see
``standin/transformer_engine``)."""

import sys
from pathlib import Path

import pytest

from tests.other_megatron import other_megatron

UNPACKED = Path(sys.prefix) / "transformer-engine-2.20.2"


def python_path(megatron: str) -> list[str]:
    """For ranks that build with Transformer Engine on the "installed" or the "other" Megatron-Core. Skips the test
    where one was not unpacked."""
    if not UNPACKED.is_dir():
        pytest.skip(f"no {UNPACKED}: `make test` unpacks it")
    return [str(Path(__file__).parent / "standin"), *other_path(megatron), str(UNPACKED)]


def other_path(megatron: str) -> list[str]:
    """What leads to the "other" Megatron-Core; nothing for the "installed" one."""
    return [str(other_megatron())] if megatron == "other" else []
