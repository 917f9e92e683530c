"""Who works on a block of logits: plain PyTorch, which always exists, or Triton kernels on a GPU. No Megatron here: the configuration's checks ask too."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

HEADS = ("auto", "torch", "triton")


def missing_for_triton(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device; None where they can (on a CPU only in Triton's interpreter)."""
    if importlib.util.find_spec("triton") is None:
        return "triton does not import"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU"
    return None


def head_blocks(head: str, device_type: str) -> ModuleType:
    """The module that works on blocks of logits: ``auto`` takes Triton's on a GPU where Triton imports, plain PyTorch's elsewhere.

    Raises:
        ValueError: an unknown name, or ``triton`` where it cannot be had, with the reason.
    """
    from dcpo_megatron.mcore import head_torch

    if head not in HEADS:
        raise ValueError(f"model.head={head!r} is not known: use {', '.join(HEADS)}")
    if head == "torch" or (head == "auto" and device_type != "cuda"):
        return head_torch
    missing = missing_for_triton(device_type)
    if missing is None:
        from dcpo_megatron.mcore import head_triton

        return head_triton
    if head == "triton":
        raise ValueError(f"model.head=triton, but {missing}: set model.head=auto, which then takes plain PyTorch")
    return head_torch
