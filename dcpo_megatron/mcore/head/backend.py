"""Who works on a block of logits: plain PyTorch, which always exists, or Triton kernels on a GPU. No Megatron here: the
configuration's checks ask too."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from types import ModuleType

HEADS = ("auto", "torch", "triton")
# What the fused head may hold between forward and backward before `auto` takes the recomputing one.
FUSED_HELD_BYTES = 1024**3


def held_by_fused_head(rows: int, hidden: int, dtype: str) -> int:
    """Bytes beyond the gradients themselves that the fused head keeps from forward to backward: the weight's gradient
    in fp32 where it is rounded in the end.

    ``rows``: of the output layer on one tensor-parallel rank.
    """
    return 0 if dtype == "float32" else 4 * rows * hidden


def takes_fused_head(setting: str, ratio_level: str, rows: int, hidden: int, dtype: str) -> bool:
    """Whether the head forms the objective's gradients in its forward pass.

    ``setting``: model.fused_head_loss (auto | on | off). ``ratio_level``: the objective's; a ratio of a whole response
    cannot be fused. ``rows``: as above.
    """
    if setting == "off" or ratio_level != "token":
        return False
    return setting == "on" or held_by_fused_head(rows, hidden, dtype) <= FUSED_HELD_BYTES


def missing_for_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device; None where they can (on a CPU only in Triton's
    interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return "triton does not import"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return missing_to_build() if device_type == "cuda" else "there is no GPU"


def missing_to_build() -> str | None:
    """What Triton lacks to build what starts its kernels, at the first one: a C compiler (``CC``, else gcc or clang) or
    Python's headers; None where it has both."""
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"Triton needs a C compiler, and CC={compiler} is none"
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and there is neither gcc nor clang (Debian: apt install gcc)"
    # Where Triton looks: not at Debian's own scheme, which names another folder.
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").is_file():
        return (
            f"Triton needs Python's headers, and there is no {headers / 'Python.h'} (Debian: apt install python3-dev)"
        )
    return None


def head_blocks(head: str, device_type: str) -> ModuleType:
    """The module that works on blocks of logits: ``auto`` takes Triton's on a GPU where Triton works, plain PyTorch's
    elsewhere.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot be had, with the reason.
    """
    from dcpo_megatron.mcore.head import torch_blocks as head_torch

    if head not in HEADS:
        raise ValueError(f"model.head={head!r} is not known: use {', '.join(HEADS)}")
    if head == "torch" or (head == "auto" and device_type != "cuda"):
        return head_torch
    missing = missing_for_triton(device_type)
    if missing is None:
        from dcpo_megatron.mcore.head import triton_blocks as head_triton

        return head_triton
    if head == "triton":
        raise ValueError(f"model.head=triton, but {missing}: set model.head=auto, which then takes plain PyTorch")
    return head_torch
