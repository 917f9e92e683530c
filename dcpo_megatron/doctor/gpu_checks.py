"""What `dcpo doctor` thinks of GPUs, their driver and the torch that was built for them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dcpo_megatron.doctor.facts import CudaView, Driver, Facts, Gpu, Problem
from dcpo_megatron.doctor.findings import (
    BUILDS,
    GIVE_GPUS,
    LONGER,
    REINSTALL_TORCH,
    Finding,
    counted,
    dotted,
    gib,
    hides_gpus,
    release,
    unanswered,
)
from dcpo_megatron.gpus import select


def check_gpus(facts: Facts) -> list[Finding]:
    """What the driver sees, what torch sees, and where they disagree."""
    driver, cuda = facts.driver, facts.cuda
    findings: list[Finding | None] = []
    if isinstance(driver, Problem):
        if driver.missing == "pynvml":
            what = "nvidia-ml-py is not installed: the state of GPUs cannot be read"
            findings.append(Finding("gpu", "warn", what, "pip install nvidia-ml-py"))
        else:
            fix = "nvidia-smi must list the GPUs; after an update of the driver, reboot"
            findings.append(Finding("gpu", "fail", f"the NVIDIA driver does not answer: {driver.text}", fix))
    elif driver.absent:
        fix = f"where there should be GPUs: load the driver until nvidia-smi works; {GIVE_GPUS}"
        findings.append(Finding("gpu", "info", f"no NVIDIA driver ({driver.absent})", fix))
    else:
        runs = f", runs CUDA up to {dotted(driver.cuda)}" if driver.cuda else ""
        findings.append(Finding("gpu", "ok", f"driver {driver.version}{runs}, {counted(len(driver.gpus), 'GPU')}"))
        for gpu in driver.gpus:
            findings += _check_gpu(gpu, facts)
    if isinstance(cuda, Problem):
        fix = f"nvidia-smi must answer at once: a GPU that hangs needs a reset; {LONGER}"
        findings.append(unanswered("gpu", "fail", "CUDA", cuda, fix))
    elif isinstance(driver, Driver) and driver.gpus:
        findings += _check_agreement(facts, driver, cuda)
    elif cuda.available:
        findings.append(Finding("gpu", "ok", f"torch sees {counted(cuda.count, 'GPU')}"))
    return [finding for finding in findings if finding is not None]


def _check_gpu(gpu: Gpu, facts: Facts) -> list[Finding]:
    label = f"GPU {gpu.index}"
    if gpu.problem:
        fix = "reset it (nvidia-smi --gpu-reset) or reboot; until then leave it out with CUDA_VISIBLE_DEVICES"
        return [Finding("gpu", _unless_chosen(facts), f"{label} does not answer: {gpu.problem}", fix)]
    parts = [f"{label}: {gpu.name}"]
    if gpu.memory_total is not None and gpu.memory_free is not None:
        parts.append(f"{gib(gpu.memory_free)} of {gib(gpu.memory_total)} free")
    if gpu.capability:
        parts.append(f"compute capability {dotted(gpu.capability)}")
    if gpu.ecc_errors is not None:
        parts.append(counted(gpu.ecc_errors, "uncorrected ECC error"))
    if gpu.mig:
        parts.append("MIG on")
    findings = [Finding("gpu", "ok", ", ".join(parts))]
    if gpu.ecc_errors:
        what = f"{label} had {counted(gpu.ecc_errors, 'uncorrected ECC error')} since the driver started"
        fix = "see nvidia-smi -q -d ECC; a reboot retires the bad memory; replace a GPU that does it again"
        findings.append(Finding("gpu", "warn", what, fix))
    if gpu.memory_total and gpu.memory_free is not None and gpu.memory_free < gpu.memory_total / 2:
        what = f"{label} has only {gib(gpu.memory_free)} of {gib(gpu.memory_total)} free"
        fix = "nvidia-smi shows who holds it: end that process, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        findings.append(Finding("gpu", "warn", what, fix))
    if gpu.capability and gpu.capability < (8, 0):
        what = f"{label} has no bfloat16 arithmetic (compute capability {dotted(gpu.capability)}, needs 8.0)"
        findings.append(Finding("gpu", "warn", what, "train with model.dtype=float32"))
    return findings


def _check_agreement(facts: Facts, driver: Driver, cuda: CudaView) -> list[Finding]:
    """The driver sees GPUs: does torch see the same ones, and has it kernels for them?"""
    torch = facts.torch
    if isinstance(torch, Problem):
        return []
    gpus = counted(len(driver.gpus), "GPU")
    visible = facts.host.environment.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda:
        what = f"the driver sees {gpus}, but torch {torch.version} is not a CUDA build: the CPU is used"
        status = "info" if hides_gpus(facts) else "fail"
        return [Finding("gpu", status, what, f"install the CUDA build of torch: {REINSTALL_TORCH}")]
    if not cuda.available:
        if hides_gpus(facts):
            return []  # said with the environment variables
        if driver.cuda and driver.cuda[0] < release(torch.cuda)[0]:
            what = f"the driver runs CUDA up to {dotted(driver.cuda)}, but torch is built for CUDA {torch.cuda}"
            fix = f"update the driver, or install a torch built for CUDA {driver.cuda[0]} ({BUILDS})"
            return [Finding("gpu", "fail", what, fix)]
        what = f"the driver sees {gpus}, but torch sees none: {cuda.complaint or 'it does not say why'}"
        fix = f"nvidia-smi must list them; after an update of the driver, reboot; {GIVE_GPUS}"
        return [Finding("gpu", "fail", what, fix)]
    findings = []
    expected = len(driver.gpus) if visible is None else len(select(visible, None))
    if cuda.count != expected and not any(gpu.mig for gpu in driver.gpus):
        whose = "the driver sees" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} names"
        what = f"{whose} {counted(expected, 'GPU')}, torch sees {cuda.count}"
        fix = f"name GPUs from 0 to {len(driver.gpus) - 1} in CUDA_VISIBLE_DEVICES, or unset it"
        findings.append(Finding("gpu", "warn", what, fix))
    else:
        findings.append(Finding("gpu", "ok", f"torch sees {counted(cuda.count, 'GPU')}"))
    for gpu in driver.gpus:
        if gpu.capability and cuda.architectures and not has_kernels(gpu.capability, cuda.architectures):
            capability = f"compute capability {dotted(gpu.capability)}"
            what = f"torch {torch.version} has no kernels for GPU {gpu.index}, {capability}"
            fix = f"install a torch built for it ({BUILDS}), or leave it out with CUDA_VISIBLE_DEVICES"
            findings.append(Finding("gpu", _unless_chosen(facts), what, fix))
    return findings


def _unless_chosen(facts: Facts) -> str:
    # Among chosen GPUs the bad one may be left out already; the numbers of CUDA and of the driver need not agree.
    return "warn" if "CUDA_VISIBLE_DEVICES" in facts.host.environment else "fail"


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for ``architectures`` ("sm_90", "compute_90", "sm_90a") runs on a GPU of ``capability``.

    Machine code runs on its own and later minor versions of its major one, PTX ("compute") on everything later, and
    code with an "a" on exactly its own.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if not match:
            continue
        built_for = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = built_for == capability
        else:
            fits = built_for <= capability and (match[1] == "compute" or built_for[0] == capability[0])
        if fits:
            return True
    return False
