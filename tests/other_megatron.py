"""Both ends of Megatron-Core: one is installed, the other's wheel was unpacked by `make test`: 0.19.2 on Python 3.11,
0.16.1 on a later one."""

import importlib.metadata
import sys
from pathlib import Path

import pytest


def other_megatron() -> Path:
    """The folder of the one that is not installed, to be put first on the import path. Skips the test where there is
    none."""
    installed = importlib.metadata.version("megatron-core")
    others = [f for f in Path(sys.prefix).glob("megatron-core-*") if f.is_dir() and not f.name.endswith(installed)]
    if not others:
        pytest.skip(f"no other Megatron-Core than {installed} in {sys.prefix}: `make test` unpacks one")
    return others[0]
