"""Every random generator of a rank, as plain JSON values: Python, NumPy, PyTorch (CPU and GPU), and Megatron-Core's
tracker of named streams."""

from __future__ import annotations

import random

import numpy
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dcpo_megatron.mcore.platform import Platform


def random_state(platform: Platform) -> dict:
    """The states of this rank's generators."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "megatron": {name: _hex(stream) for name, stream in get_cuda_rng_tracker().get_states().items()},
    }
    if not platform.is_cpu:
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict, platform: Platform) -> None:
    """Puts the generators where :func:`random_state` found them. Raises KeyError, TypeError or ValueError for anything
    else."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    get_cuda_rng_tracker().set_states({name: _bytes(text) for name, text in state["megatron"].items()})
    if not platform.is_cpu and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    torch.set_rng_state(_bytes(state["torch"]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy().tobytes()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
