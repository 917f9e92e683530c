"""What `dcpo doctor` thinks of the facts: one pure function an area, each ``Facts -> [Finding]``.

    ok      as it should be                     info    worth knowing
    warn    will bite sooner or later           fail    training cannot run, or not on what this machine has

Nothing is read here: whatever a check needs is in :class:`Facts`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dcpo_megatron.doctor.facts import CudaView, Driver, Facts, Gpu, Problem, TorchBuild
from dcpo_megatron.doctor.probes import REQUIRED
from dcpo_megatron.gpus import select

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)
MEGATRON_BELOW_312, MEGATRON_FROM_312 = "0.16.1", "0.19.2"
TRITON_SINCE = (0, 19)  # Megatron-Core imports it from this version on
GIB = 1 << 30
SMALLEST_SHM = GIB
SMALLEST_DISK = 10 * GIB
FEWEST_OPEN_FILES = 4096

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


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding about ``facts``, in the order of the table."""
    checks = (
        check_python,
        check_torch,
        check_packages,
        check_optional,
        check_gpus,
        check_distributed,
        check_host,
        check_environment,
        tell_what_will_be_used,
    )
    return [finding for check in checks for finding in check(facts)]


def check_python(facts: Facts) -> list[Finding]:
    """Python itself."""
    version = _dotted(facts.host.python)
    if facts.host.python[:2] < OLDEST_PYTHON:
        fix = "make an environment with Python 3.11 or newer, such as: uv venv --python 3.12"
        return [Finding("python", "fail", f"Python {version} is older than {_dotted(OLDEST_PYTHON)}", fix)]
    return [Finding("python", "ok", f"Python {version}")]


def check_torch(facts: Facts) -> list[Finding]:
    """torch: that it imports, its age, and what it was built for."""
    torch = facts.torch
    if isinstance(torch, Problem):
        if torch.missing == "torch":
            return [Finding("torch", "fail", "torch is not installed", f"pip install torch (builds: {BUILDS})")]
        fix = REINSTALL_TORCH
        if torch.kind == "silent":
            fix = (
                f"{LONGER} (a first start is slow); should that be silent too, the file system or the GPU driver hangs"
            )
        return [Finding("torch", "fail", f"torch does not import: {torch.text}", fix)]
    if torch.hip:
        what = f"torch {torch.version} is built for ROCm, which is not supported: the CPU is used"
        return [Finding("torch", "warn", what, f"on NVIDIA GPUs: {REINSTALL_TORCH}; on the CPU nothing is to do")]
    what = f"torch {torch.version}, " + (f"built for CUDA {torch.cuda}" if torch.cuda else "CPU build")
    if _release(torch.version) < OLDEST_TORCH:
        return [Finding("torch", "fail", f"{what}: older than {_dotted(OLDEST_TORCH)}", "pip install --upgrade torch")]
    return [Finding("torch", "ok", what)]


def check_packages(facts: Facts) -> list[Finding]:
    """What the trainer cannot do without."""
    packages = facts.packages
    findings = [_check_megatron(facts)]
    megatron = packages.get("megatron-core", "")
    if _release(megatron) >= TRITON_SINCE and "triton" not in packages:
        what = f"megatron-core {megatron} imports triton, which is not installed"
        findings.append(Finding("packages", "fail", what, "pip install triton"))
    for name in REQUIRED:
        if name in packages:
            findings.append(Finding("packages", "ok", _named(name, packages[name])))
        else:
            findings.append(Finding("packages", "fail", f"{name} is not installed", f"pip install {name}"))
    return findings


def _check_megatron(facts: Facts) -> Finding:
    tested = MEGATRON_BELOW_312 if facts.host.python < (3, 12) else MEGATRON_FROM_312
    fix = f"pip install megatron-core=={tested}"
    version = facts.packages.get("megatron-core")
    if version is None:
        return Finding("packages", "fail", "megatron-core is not installed", fix)
    if version != tested:
        python = _dotted(facts.host.python[:2])
        return Finding("packages", "warn", f"{_named('megatron-core', version)} is not tested on Python {python}", fix)
    return Finding("packages", "ok", f"megatron-core {version}")


def check_optional(facts: Facts) -> list[Finding]:
    """What may be there, and what had better not."""
    packages = facts.packages
    findings = [_check_transformer_engine(facts), _check_apex(facts)]
    for name in ("triton", "flash-attn"):
        if name == "triton" and name in packages and _on_gpu(facts) and facts.host.triton_lacks:
            what = f"{_named(name, packages[name])}: {facts.host.triton_lacks}; model.head=auto takes plain PyTorch"
            fix = "install gcc and Python's headers, on every node (Debian: apt install gcc python3-dev)"
            findings.append(Finding("optional", "warn", what, fix))
        elif name in packages:
            findings.append(Finding("optional", "ok", _named(name, packages[name])))
        else:
            findings.append(Finding("optional", "info", f"{name} is not installed (of use on GPUs only)"))
    # The default configuration writes to tensorboard, not to wandb.
    for name, status in (("tensorboard", "warn"), ("wandb", "info")):
        if name in packages:
            findings.append(Finding("optional", "ok", _named(name, packages[name])))
        else:
            fix = f"pip install {name}, or train with logging.{name}=false"
            findings.append(Finding("optional", status, f"{name} is not installed: no metrics can go there", fix))
    if "sglang" in packages:
        what = f"{_named('sglang', packages['sglang'])} is in this environment, and pins a torch of its own"
        fix = "pip uninstall sglang; give the server an environment of its own: it and the trainer meet over HTTP"
        findings.append(Finding("optional", "warn", what, fix))
    pullers = [name for name in ("torchvision", "torchaudio") if name in packages]
    if pullers and isinstance(facts.torch, TorchBuild) and not facts.torch.cuda and not facts.torch.hip:
        names = " and ".join(_named(name, packages[name]) for name in pullers)
        what = f"{names} next to a CPU build of torch: the next pip install may put the CUDA build in its place"
        findings.append(Finding("optional", "warn", what, f"not used here: pip uninstall {' '.join(pullers)}"))
    return [finding for finding in findings if finding is not None]


def _check_apex(facts: Facts) -> Finding | None:
    apex = facts.apex
    if isinstance(apex, Problem):
        return _unanswered("optional", "warn", "apex", apex, "pip uninstall apex")
    if apex.kind == "impostor":
        what = f"`apex` in {apex.where} is not NVIDIA Apex (it has no amp_C), and Megatron-Core would import it"
        fix = (
            "pip uninstall apex, or take that folder off the path; NVIDIA Apex is optional, and built from source only"
        )
        return Finding("optional", "fail", what, fix)
    if apex.kind == "nvidia":
        return Finding("optional", "ok", f"NVIDIA Apex in {apex.where}")
    return Finding("optional", "info", "NVIDIA Apex is not installed (never needed)")


def _check_transformer_engine(facts: Facts) -> Finding | None:
    imports = facts.transformer_engine
    version = facts.packages.get("transformer-engine")
    name = _named("Transformer Engine", version or "")
    if isinstance(imports, Problem):
        fix = "build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation transformer-engine"
        # What kills this process would kill the trainer's too; and Megatron-Core, which imports it, goes on after an
        # ImportError alone: half an installation raises FileNotFoundError.
        harmless = imports.kind == "silent" or imports.text.startswith(("ImportError", "ModuleNotFoundError"))
        status = "warn" if harmless else "fail"
        return _unanswered("optional", status, name, imports, LONGER if imports.kind == "silent" else fix)
    if imports:
        return Finding("optional", "ok", f"{name} imports")
    if version is not None:
        return Finding("optional", "info", f"{name} is installed (of use on GPUs only)")
    if _on_gpu(facts):
        fix = "for faster layers: pip install --no-build-isolation 'transformer-engine[pytorch]'"
        return Finding("optional", "info", "Transformer Engine is not installed", fix)
    return Finding("optional", "info", "Transformer Engine is not installed (of use on GPUs only)")


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
        runs = f", runs CUDA up to {_dotted(driver.cuda)}" if driver.cuda else ""
        findings.append(Finding("gpu", "ok", f"driver {driver.version}{runs}, {counted(len(driver.gpus), 'GPU')}"))
        for gpu in driver.gpus:
            findings += _check_gpu(gpu, facts)
    if isinstance(cuda, Problem):
        fix = f"nvidia-smi must answer at once: a GPU that hangs needs a reset; {LONGER}"
        findings.append(_unanswered("gpu", "fail", "CUDA", cuda, fix))
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
        parts.append(f"{_gib(gpu.memory_free)} of {_gib(gpu.memory_total)} free")
    if gpu.capability:
        parts.append(f"compute capability {_dotted(gpu.capability)}")
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
        what = f"{label} has only {_gib(gpu.memory_free)} of {_gib(gpu.memory_total)} free"
        fix = "nvidia-smi shows who holds it: end that process, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        findings.append(Finding("gpu", "warn", what, fix))
    if gpu.capability and gpu.capability < (8, 0):
        what = f"{label} has no bfloat16 arithmetic (compute capability {_dotted(gpu.capability)}, needs 8.0)"
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
        status = "info" if _hides_gpus(facts) else "fail"
        return [Finding("gpu", status, what, f"install the CUDA build of torch: {REINSTALL_TORCH}")]
    if not cuda.available:
        if _hides_gpus(facts):
            return []  # said with the environment variables
        if driver.cuda and driver.cuda[0] < _release(torch.cuda)[0]:
            what = f"the driver runs CUDA up to {_dotted(driver.cuda)}, but torch is built for CUDA {torch.cuda}"
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
            capability = f"compute capability {_dotted(gpu.capability)}"
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


def check_distributed(facts: Facts) -> list[Finding]:
    """Collective libraries, and whether processes of this machine reach each other."""
    torch = facts.torch
    if isinstance(torch, Problem):
        return []
    findings: list[Finding | None] = []
    needed = ["gloo", "nccl"] if _on_gpu(facts) else ["gloo"]
    missing = [name for name in needed if name not in torch.backends]
    if not missing:
        findings.append(Finding("distributed", "ok", f"backends: {', '.join(torch.backends)}"))
    else:
        what = (
            f"torch {torch.version} was built without {' and '.join(missing)} (it has"
            f" {', '.join(torch.backends) or 'no backend'})"
        )
        findings.append(Finding("distributed", "fail", what, REINSTALL_TORCH))
    if isinstance(facts.store, Problem):
        fix = "allow TCP connections on 127.0.0.1: see the firewall, the sandbox, and `ip addr show lo`"
        findings.append(_unanswered("distributed", "fail", "a TCP store on 127.0.0.1", facts.store, fix))
    else:
        what = f"a TCP store on 127.0.0.1 opens in {facts.store * 1000:.0f} ms"
        findings.append(Finding("distributed", "ok", what))
    if "gloo" in torch.backends and isinstance(facts.gloo, Problem):
        fix = "let the host name resolve (in /etc/hosts: 127.0.1.1 and the name), or export GLOO_SOCKET_IFNAME=lo"
        # Also on GPUs: what ranks tell each other on the host goes through gloo.
        findings.append(_unanswered("distributed", "fail", "a gloo group of one", facts.gloo, fix))
    elif "gloo" in torch.backends:
        findings.append(Finding("distributed", "ok", "a gloo group of one works"))
    return [finding for finding in findings if finding is not None]


def check_host(facts: Facts) -> list[Finding]:
    """Cores, shared memory, open files, disk."""
    host = facts.host
    return [
        Finding("host", "ok", f"{host.cores:g} CPU cores"),
        _check_shared_memory(host.shm_total, host.shm_free),
        _check_open_files(host.open_files),
        _check_disk(host.folder, host.disk_free),
    ]


def _check_shared_memory(total: int | None, free: int | None) -> Finding:
    if total is None or free is None:
        return Finding("host", "info", "there is no /dev/shm")
    what = f"/dev/shm: {_gib(free)} of {_gib(total)} free"
    if total < SMALLEST_SHM:
        fix = "docker run --shm-size=8g (or --ipc=host); without a container: mount -o remount,size=8G /dev/shm"
        return Finding("host", "warn", f"{what}; nccl may want 1 GiB", fix)
    if free < SMALLEST_SHM:
        return Finding("host", "warn", f"{what}; nccl may want 1 GiB", "remove what dead processes left in /dev/shm")
    return Finding("host", "ok", what)


def _check_open_files(limit: int | None) -> Finding:
    if limit is None:
        return Finding("host", "info", "the limit on open files is not known")
    if limit < FEWEST_OPEN_FILES:
        what = f"a process may open {limit} files: too few for the process groups of many ranks"
        return Finding("host", "warn", what, "ulimit -n 65536 before the start (docker run --ulimit nofile=65536)")
    return Finding("host", "ok", f"a process may open {'any number of' if limit == sys.maxsize else limit} files")


def _check_disk(folder: str, free: int | None) -> Finding:
    if free is None:
        what = f"the free space of {folder or 'the current folder'} cannot be read"
        return Finding("host", "warn", what, "change to a folder that exists")
    if free < SMALLEST_DISK:
        what = f"{_gib(free)} free in {folder}: a trained model and its checkpoints may not fit"
        return Finding("host", "warn", what, "free some, or set output to a folder on a larger disk")
    return Finding("host", "ok", f"{_gib(free)} free in {folder}")


def check_environment(facts: Facts) -> list[Finding]:
    """Environment variables that bite."""
    findings = (
        _check_visible_devices(facts),
        _check_max_connections(facts),
        _check_cumem(facts),
        _check_threads(facts),
    )
    return [finding for finding in findings if finding is not None]


def _check_visible_devices(facts: Facts) -> Finding | None:
    visible = facts.host.environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    setting = f"CUDA_VISIBLE_DEVICES={visible}"
    if not _hides_gpus(facts):
        return Finding("environment", "ok", setting)
    fix = "to use GPUs: unset CUDA_VISIBLE_DEVICES"
    gpus = len(facts.driver.gpus) if isinstance(facts.driver, Driver) else 0
    if gpus:
        return Finding("environment", "warn", f"{setting} hides {counted(gpus, 'GPU')}: the CPU is used", fix)
    return Finding("environment", "info", f"{setting} hides all GPUs", fix)


def _check_max_connections(facts: Facts) -> Finding | None:
    gpus = facts.driver.gpus if isinstance(facts.driver, Driver) else ()
    capabilities = [gpu.capability for gpu in gpus if gpu.capability]
    if not _on_gpu(facts) or (capabilities and min(capabilities) >= (10, 0)):
        return None  # only GPUs before Blackwell order their kernels by it
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = facts.host.environment.get(name)
    if value == "1":
        return Finding("environment", "ok", f"{name}=1")
    setting = f"{name} is not set" if value is None else f"{name}={value}"
    what = f"{setting}: with parallel.tensor above 1, communication does not overlap with computation"
    return Finding("environment", "warn" if facts.cuda.count > 1 else "info", what, f"export {name}=1")


def _check_cumem(facts: Facts) -> Finding | None:
    value = facts.host.environment.get("NCCL_CUMEM_ENABLE")
    if value in (None, "0") or not _on_gpu(facts):
        return None  # unset: the trainer takes 0, as SGLang does
    what = (
        f"NCCL_CUMEM_ENABLE={value}: servers that take weights over nccl must have the same value, and SGLang takes 0"
    )
    return Finding("environment", "warn", what, f"unset it, or start each server with NCCL_CUMEM_ENABLE={value} too")


def _check_threads(facts: Facts) -> Finding | None:
    cores = max(int(facts.host.cores), 1)
    ranks = max(facts.cuda.count, 1) if _on_gpu(facts) else 1
    fix = f"export OMP_NUM_THREADS={max(cores // ranks, 1)} (cores divided by the ranks of this machine)"
    value = facts.host.environment.get("OMP_NUM_THREADS")
    if value is None:
        what = "OMP_NUM_THREADS is not set: torchrun gives each of several ranks one thread, others all cores to each"
        return Finding("environment", "info", what, fix) if cores > 1 else None
    # A list has the thread count of each nested level; the first one counts here.
    threads = value.split(",")[0].strip()
    if not (threads.isdecimal() and int(threads) > 0):
        return Finding("environment", "warn", f"OMP_NUM_THREADS={value} is not a number of threads", fix)
    if int(threads) > cores:
        return Finding("environment", "warn", f"OMP_NUM_THREADS={value}, but there are {cores} cores", fix)
    return Finding("environment", "ok", f"OMP_NUM_THREADS={value}")


def tell_what_will_be_used(facts: Facts) -> list[Finding]:
    """What a run with the default configuration takes here."""
    area = "will be used"
    platform = facts.platform
    if isinstance(platform, Problem):
        if platform.kind == "skipped":
            return [Finding(area, "info", "cannot be told before the failures above are fixed")]
        fix = "unset LOCAL_RANK (torchrun sets it)" if "LOCAL_RANK" in platform.text else LONGER
        return [Finding(area, "fail", f"no platform can be chosen: {platform.text}", fix)]
    name, backend = platform
    if name == "cuda" and facts.transformer_engine is True:
        layers = "Transformer Engine's, with its norm and its attention"
        optimizer = "Transformer Engine's fused Adam"
    elif name == "cuda" and isinstance(facts.transformer_engine, Problem) and facts.transformer_engine.kind == "silent":
        layers = optimizer = "Transformer Engine's if it imports: it gave no answer in time"
    else:
        layers = (
            "Megatron-Core's local ones, with RMSNorm and causal attention in PyTorch (scaled_dot_product_attention)"
        )
        apex = not isinstance(facts.apex, Problem) and facts.apex.kind == "nvidia"
        optimizer = "NVIDIA Apex's fused Adam" if apex else "PyTorch's AdamW"
    return [
        Finding(area, "info", f"platform: {name} with {backend}"),
        Finding(area, "info", f"layers: {layers}"),
        Finding(area, "info", f"optimizer: {optimizer}"),
        Finding(
            area,
            "info",
            "rollout engine: embedded (transformers inside the trainer), or sglang (servers in an environment of their"
            " own)",
        ),
    ]


def _unanswered(area: str, status: str, subject: str, problem: Problem, fix: str) -> Finding | None:
    # What was skipped has its reason in the finding about the stage that stopped the process.
    return None if problem.kind == "skipped" else Finding(area, status, f"{subject}: {problem.text}", fix)


def _on_gpu(facts: Facts) -> bool:
    built = isinstance(facts.torch, TorchBuild) and bool(facts.torch.cuda)
    return built and isinstance(facts.cuda, CudaView) and facts.cuda.available


def _hides_gpus(facts: Facts) -> bool:
    visible = facts.host.environment.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.strip() in ("", "-1", "NoDevFiles")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0); an unknown one sorts first."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)


def counted(number: int, thing: str) -> str:
    """ "1 GPU", "2 GPUs"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)


def _named(name: str, version: str) -> str:
    return f"{name} {version}" if version else f"{name} (version unknown)"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
