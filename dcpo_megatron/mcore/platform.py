"""Where the training runs: ``cuda`` with nccl, or ``cpu`` with gloo. One code path serves both.

:func:`select_platform` decides, :func:`start` makes the process group with a deadline, and everything else takes the
device from the :class:`Platform` it is handed. No other module asks whether there is a GPU.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dcpo_megatron import network
from dcpo_megatron.mcore.meeting import alone, explained, meet

# Until all ranks of a run have started.
FIRST_MEETING_SECONDS = 600.0


@dataclass(frozen=True)
class Platform:
    """``name`` is "cuda" or "cpu"; ``backend`` is the collective library; ``device`` is this rank's device."""

    name: str
    backend: str
    device: torch.device

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


def select_platform(requested: str = "auto") -> Platform:
    """Picks the platform of this rank. ``requested``: "auto" (a GPU when there is one), "cuda" or "cpu".

    Raises:
        ValueError: an unknown name, or "cuda" where torch sees no GPU.
    """
    if requested not in ("auto", "cuda", "cpu"):
        raise ValueError(f"platform={requested!r} is not known: use auto, cuda or cpu")
    has_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise ValueError("platform=cuda, but torch sees no CUDA device: run `dcpo doctor`, or set platform=cpu")
    if requested == "cpu" or not has_gpu:
        return Platform("cpu", "gloo", torch.device("cpu"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} GPUs: start at most one rank"
            " per GPU"
        )
    return Platform("cuda", "nccl", torch.device("cuda", local_rank))


def prepare(platform: Platform) -> None:
    """Makes Megatron-Core importable and usable on ``platform``; call it before importing ``megatron.core``."""
    apex = find_apex()
    if apex == "impostor":
        raise RuntimeError(
            "the installed package `apex` is not NVIDIA Apex (it has no amp_C) and Megatron-Core would import it: "
            "run `pip uninstall apex`; NVIDIA Apex is optional and installs from source only"
        )
    warnings.filterwarnings(
        "ignore", message=".*(Apex|apex|Transformer Engine|transformer_engine|local multi_tensor).*"
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\..*")
    warnings.filterwarnings("ignore", message=".*_(reduce_scatter|all_gather)_base.*")
    warnings.filterwarnings("ignore", message=".*jit.script.*")
    if platform.is_cpu:
        from dcpo_megatron.mcore import cpu_standins

        # "No CUDA runtime is found": a CUDA build of torch beside nvcc says so for each rank, and it is what was asked
        # for.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        cpu_standins.install()
    else:
        torch.cuda.set_device(platform.device)


def find_apex() -> str:
    """Tells "nvidia", "none", or "impostor": PyPI's `apex` is an unrelated web toolkit that Megatron-Core would try to
    import."""
    if importlib.util.find_spec("apex") is None:
        return "none"
    return "nvidia" if importlib.util.find_spec("amp_C") is not None else "impostor"


def has_transformer_engine() -> bool:
    """True where Transformer Engine imports."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def use_transformer_engine(wanted: str, dtype: str, platform: Platform) -> bool:
    """Whether layers come from Transformer Engine, and the optimizer's kernels with them.

    Its kernels multiply float32 numbers in TF32, 10 bits of mantissa, whatever torch is told, and it has no float32
    attention with context parallelism (Transformer Engine 2.20). So float32 keeps the local layers, and on a GPU the
    two together are refused: what was asked for would not be what is computed.

    Args:
        wanted: "auto" (on a GPU, for bfloat16, where it imports), "on" (wherever it imports) or "off".
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        ValueError: "on" where it does not import, or for float32 on a GPU.
    """
    if wanted == "off" or (wanted == "auto" and (platform.is_cpu or dtype != "bfloat16")):
        return False
    found = has_transformer_engine()
    if wanted == "on" and not found:
        raise ValueError(
            "model.transformer_engine=on, but it does not import here: install it, or set model.transformer_engine=auto"
        )
    if wanted == "on" and dtype == "float32" and not platform.is_cpu:
        raise ValueError(
            "model.transformer_engine=on with model.dtype=float32: its kernels multiply float32 in TF32 (10 bits) and"
            " have no float32 attention with context parallelism: set model.dtype=bfloat16, or"
            " model.transformer_engine=auto for layers that keep float32"
        )
    return found


def start(
    platform: Platform,
    timeout_seconds: float = 600.0,
    meeting_seconds: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Makes the default process group from torchrun's environment (or of one rank alone where there is none).

    gloo and nccl are told the interface that leads to the other hosts, where the user has not named one. Beside nccl's
    group it makes a gloo group of all ranks (:mod:`dcpo_megatron.distributed`). Every later collective raises after
    ``timeout_seconds`` instead of waiting for ever. The first meeting of the ranks (:mod:`dcpo_megatron.mcore.meeting`)
    has ``meeting_seconds``, by default ten minutes at least: they import at the pace of machine and file system;
    ``tick`` is called meanwhile, and may raise.

    Raises:
        MeetingError: ranks that did not come to the first meeting, or do not reach one another.
    """
    from dcpo_megatron.distributed import make_host_group

    prepare(platform)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        variables = [network.GLOO] if platform.is_cpu else [network.GLOO, network.NCCL]
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            met = meet(meeting_seconds or max(timeout_seconds, FIRST_MEETING_SECONDS), variables, tick)
        else:
            met = alone(variables)
        if met.interface is not None:
            # On one host nccl needs none, and may have other hosts to reach: servers'.
            network.use_interface(met.interface, nccl=not (platform.is_cpu or met.one_network))
        met.store.set_timeout(timeout)
        with explained(met):
            dist.init_process_group(
                platform.backend, store=met.store, rank=met.rank, world_size=met.world, timeout=timeout
            )
            make_host_group(timeout)
    make_host_group(timeout)


def stop() -> None:
    """Destroys the process groups, so that a finished rank leaves no thread behind."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        from dcpo_megatron.distributed import forget_host_group

        parallel_state.destroy_model_parallel()
        forget_host_group()
        dist.destroy_process_group()
