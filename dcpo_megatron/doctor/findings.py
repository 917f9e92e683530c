"""What a check of `dcpo doctor` gives, and the words that checks share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dcpo_megatron.doctor.facts import CudaView, Facts, Problem, TorchBuild

GIB = 1 << 30
BUILDS = "https://pytorch.org/get-started/locally"
REINSTALL_TORCH = f"pip install --force-reinstall torch (other builds: {BUILDS})"
GIVE_GPUS = "in a container give it the GPUs (docker run --gpus all)"
LONGER = "run again with --timeout 60"


@dataclass(frozen=True)
class Finding:
    """``status``: "ok", "info", "warn" or "fail". ``fix``: what to do; never empty for "warn" and "fail"."""

    area: str
    status: str
    what: str
    fix: str = ""


def unanswered(area: str, status: str, subject: str, problem: Problem, fix: str) -> Finding | None:
    """None where the stage was skipped: the finding about the stage that stopped the process has the reason."""
    return None if problem.kind == "skipped" else Finding(area, status, f"{subject}: {problem.text}", fix)


def on_gpu(facts: Facts) -> bool:
    """Whether torch is built for GPUs and sees one."""
    built = isinstance(facts.torch, TorchBuild) and bool(facts.torch.cuda)
    return built and isinstance(facts.cuda, CudaView) and facts.cuda.available


def hides_gpus(facts: Facts) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves no GPU."""
    visible = facts.host.environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0); an unknown one sorts first."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def counted(number: int, thing: str) -> str:
    """ "1 GPU", "2 GPUs"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def dotted(version: Sequence[int]) -> str:
    """(3, 11) -> "3.11"."""
    return ".".join(str(part) for part in version)


def named_version(name: str, version: str) -> str:
    """Name and version of a package."""
    return f"{name} {version}" if version else f"{name} (version unknown)"


def gib(size: int) -> str:
    """Bytes in GiB, as text."""
    return f"{size / GIB:.1f} GiB"
