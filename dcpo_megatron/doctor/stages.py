"""The questions of `dcpo doctor` that load torch, CUDA or NVML: each a stage of a child process, run by :func:`answer`.

Stages of a child run in order and answer with one JSON line each. What may hang in a driver or die in an extension
module comes last, so that it costs as few answers as possible.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from dcpo_megatron.doctor.facts import Apex, CudaView, Driver, Gpu, TorchBuild

STORE_TIMEOUT = datetime.timedelta(seconds=3)
_opened: list = []  # the store, for the stage after the one that opened it


def torch_build() -> TorchBuild:
    import torch
    import torch.distributed as dist

    backends = []
    if dist.is_available():
        backends = [name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()]
    return TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, tuple(backends))


def store() -> float:
    import torch.distributed as dist

    start = time.monotonic()
    opened = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=STORE_TIMEOUT)
    opened.set("doctor", "ok")
    opened.get("doctor")
    _opened.append(opened)
    return time.monotonic() - start


def gloo() -> bool:
    import torch
    import torch.distributed as dist

    opened = _opened[0] if _opened else dist.HashStore()
    dist.init_process_group("gloo", store=opened, rank=0, world_size=1, timeout=STORE_TIMEOUT)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    return True


def apex() -> Apex:
    from dcpo_megatron.mcore.platform import find_apex

    kind = find_apex()
    if kind == "none":
        return Apex(kind)
    spec = importlib.util.find_spec("apex")
    return Apex(kind, next(iter(spec.submodule_search_locations or ()), str(spec.origin)))


def cuda() -> CudaView:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        count = torch.cuda.device_count() if available else 0
    complaint = " ".join(str(said[0].message).split()) if said else ""
    return CudaView(available, count, tuple(torch.cuda.get_arch_list()), complaint)


def platform() -> tuple[str, str]:
    from dcpo_megatron.mcore.platform import select_platform

    selected = select_platform()
    return selected.name, selected.backend


def transformer_engine() -> bool | None:
    import torch

    if importlib.util.find_spec("transformer_engine") is None or not torch.cuda.is_available():
        return None
    import transformer_engine.pytorch  # noqa: F401

    return True


def driver() -> Driver:
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        return Driver(absent=str(error))

    def ask(question: str, *arguments) -> Any:
        # Which questions have an answer depends on the GPU, the driver and the user.
        try:
            return getattr(pynvml, question)(*arguments)
        except pynvml.NVMLError:
            return None

    def look_at(index: int) -> Gpu:
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
        except pynvml.NVMLError as error:
            return Gpu(index, problem=str(error))
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        counters = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        mig = ask("nvmlDeviceGetMigMode", handle)
        return Gpu(
            index=index,
            name=_text(name),
            memory_total=memory.total if memory else None,
            memory_free=memory.free if memory else None,
            capability=ask("nvmlDeviceGetCudaComputeCapability", handle),
            ecc_errors=ask("nvmlDeviceGetTotalEccErrors", handle, *counters),
            mig=bool(mig and mig[0]),
        )

    runs = ask("nvmlSystemGetCudaDriverVersion_v2")
    return Driver(
        version=_text(ask("nvmlSystemGetDriverVersion") or "of unknown version"),
        cuda=(runs // 1000, runs % 1000 // 10) if runs else None,
        gpus=tuple(look_at(index) for index in range(pynvml.nvmlDeviceGetCount())),
    )


def _text(value: str | bytes) -> str:
    # Old releases of the bindings answer bytes.
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# Child -> its stages; the name of a stage is that of the field of Facts.
STAGES: dict[str, dict[str, Callable[[], Any]]] = {
    "torch": {
        "torch": torch_build,
        "store": store,
        "gloo": gloo,
        "apex": apex,
        "cuda": cuda,
        "platform": platform,
        "transformer_engine": transformer_engine,
    },
    "nvml": {"driver": driver},
}


def answer(child: str) -> None:
    """The body of a child process: runs its stages. Without its first one the others are not tried."""
    # Libraries print where they like; the answers have a descriptor of their own.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for number, (stage, ask) in enumerate(STAGES[child].items()):
        try:
            line = {"stage": stage, "value": ask()}
        except Exception as error:  # whatever a broken installation raises is what was asked for
            missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            line = {"stage": stage, "error": text[:500], "missing": missing}
        print(json.dumps(line, default=dataclasses.asdict), file=lines, flush=True)
        if "error" in line and number == 0:
            return
