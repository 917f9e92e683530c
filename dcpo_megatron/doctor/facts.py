"""The facts that `dcpo doctor` collects and judges: plain values, so that a test can write down any machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Why a stage has no answer.

    ``kind``: "error" (it raised), "died" (its process ended), "silent" (not within the limit), or "skipped" (a stage
    before it stopped the process). ``missing`` names the module that could not be found.
    """

    kind: str
    text: str
    missing: str = ""


@dataclass(frozen=True)
class TorchBuild:
    """``cuda`` and ``hip`` are the versions that torch was built for; None: built without."""

    version: str
    cuda: str | None
    hip: str | None
    backends: tuple[str, ...]


@dataclass(frozen=True)
class CudaView:
    """What torch sees. ``architectures``: it has kernels for these ("sm_90"); ``complaint``: what it said, asked."""

    available: bool
    count: int = 0
    architectures: tuple[str, ...] = ()
    complaint: str = ""


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it; sizes in bytes, None where it does not tell. ``problem``: why it does not answer."""

    index: int
    name: str = ""
    memory_total: int | None = None
    memory_free: int | None = None
    capability: tuple[int, int] | None = None
    ecc_errors: int | None = None
    mig: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver. ``cuda``: the newest CUDA (major, minor) that it runs; ``absent``: why there is no driver."""

    version: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Apex:
    """``kind``: "nvidia", "none" or "impostor"; ``where``: its folder."""

    kind: str
    where: str = ""


@dataclass(frozen=True)
class Host:
    """The operating system's side; sizes in bytes, None where it does not tell. ``environment``: what is set.
    ``triton_lacks``: what its kernels cannot be built without."""

    python: tuple[int, int, int]
    cores: float
    shm_total: int | None
    shm_free: int | None
    open_files: int | None
    folder: str
    disk_free: int | None
    environment: dict[str, str]
    triton_lacks: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything the checks judge.

    ``packages``: distribution -> version ("" where it does not tell); what is not installed is not in it. ``store``:
    seconds to open one. ``platform``: name and backend. ``transformer_engine``: True where it imports, None where that
    was not tried (not installed, or no GPU).
    """

    host: Host
    packages: dict[str, str]
    torch: TorchBuild | Problem
    store: float | Problem
    gloo: bool | Problem
    apex: Apex | Problem
    cuda: CudaView | Problem
    platform: tuple[str, str] | Problem
    transformer_engine: bool | Problem | None
    driver: Driver | Problem
