"""What `dcpo doctor` thinks of the facts: one pure function an area, each ``Facts -> [Finding]``.

    ok      as it should be                     info    worth knowing
    warn    will bite sooner or later           fail    training cannot run, or not on what this machine has

Nothing is read here: whatever a check needs is in :class:`Facts`.
"""

from __future__ import annotations

import sys

from dcpo_megatron.doctor.facts import Driver, Facts, Problem, TorchBuild
from dcpo_megatron.doctor.findings import (
    BUILDS,
    GIB,
    LONGER,
    REINSTALL_TORCH,
    Finding,
    counted,
    dotted,
    gib,
    hides_gpus,
    named_version,
    on_gpu,
    release,
    unanswered,
)
from dcpo_megatron.doctor.gpu_checks import check_gpus
from dcpo_megatron.doctor.probes import REQUIRED

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)
MEGATRON_BELOW_312, MEGATRON_FROM_312 = "0.16.1", "0.19.2"
TRITON_SINCE = (0, 19)  # Megatron-Core imports it from this version on
SMALLEST_SHM = GIB
SMALLEST_DISK = 10 * GIB
FEWEST_OPEN_FILES = 4096


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
    version = dotted(facts.host.python)
    if facts.host.python[:2] < OLDEST_PYTHON:
        fix = "make an environment with Python 3.11 or newer, such as: uv venv --python 3.12"
        return [Finding("python", "fail", f"Python {version} is older than {dotted(OLDEST_PYTHON)}", fix)]
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
    if release(torch.version) < OLDEST_TORCH:
        return [Finding("torch", "fail", f"{what}: older than {dotted(OLDEST_TORCH)}", "pip install --upgrade torch")]
    return [Finding("torch", "ok", what)]


def check_packages(facts: Facts) -> list[Finding]:
    """What the trainer cannot do without."""
    packages = facts.packages
    findings = [_check_megatron(facts)]
    megatron = packages.get("megatron-core", "")
    if release(megatron) >= TRITON_SINCE and "triton" not in packages:
        what = f"megatron-core {megatron} imports triton, which is not installed"
        findings.append(Finding("packages", "fail", what, "pip install triton"))
    for name in REQUIRED:
        if name in packages:
            findings.append(Finding("packages", "ok", named_version(name, packages[name])))
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
        python = dotted(facts.host.python[:2])
        return Finding(
            "packages", "warn", f"{named_version('megatron-core', version)} is not tested on Python {python}", fix
        )
    return Finding("packages", "ok", f"megatron-core {version}")


def check_optional(facts: Facts) -> list[Finding]:
    """What may be there, and what had better not."""
    packages = facts.packages
    findings = [_check_transformer_engine(facts), _check_apex(facts)]
    for name in ("triton", "flash-attn"):
        if name == "triton" and name in packages and on_gpu(facts) and facts.host.triton_lacks:
            what = (
                f"{named_version(name, packages[name])}: {facts.host.triton_lacks}; model.head=auto takes plain PyTorch"
            )
            fix = "install gcc and Python's headers, on every node (Debian: apt install gcc python3-dev)"
            findings.append(Finding("optional", "warn", what, fix))
        elif name in packages:
            findings.append(Finding("optional", "ok", named_version(name, packages[name])))
        else:
            findings.append(Finding("optional", "info", f"{name} is not installed (of use on GPUs only)"))
    # The default configuration writes to tensorboard, not to wandb.
    for name, status in (("tensorboard", "warn"), ("wandb", "info")):
        if name in packages:
            findings.append(Finding("optional", "ok", named_version(name, packages[name])))
        else:
            fix = f"pip install {name}, or train with logging.{name}=false"
            findings.append(Finding("optional", status, f"{name} is not installed: no metrics can go there", fix))
    if "sglang" in packages:
        what = f"{named_version('sglang', packages['sglang'])} is in this environment, and pins a torch of its own"
        fix = "pip uninstall sglang; give the server an environment of its own: it and the trainer meet over HTTP"
        findings.append(Finding("optional", "warn", what, fix))
    pullers = [name for name in ("torchvision", "torchaudio") if name in packages]
    if pullers and isinstance(facts.torch, TorchBuild) and not facts.torch.cuda and not facts.torch.hip:
        names = " and ".join(named_version(name, packages[name]) for name in pullers)
        what = f"{names} next to a CPU build of torch: the next pip install may put the CUDA build in its place"
        findings.append(Finding("optional", "warn", what, f"not used here: pip uninstall {' '.join(pullers)}"))
    return [finding for finding in findings if finding is not None]


def _check_apex(facts: Facts) -> Finding | None:
    apex = facts.apex
    if isinstance(apex, Problem):
        return unanswered("optional", "warn", "apex", apex, "pip uninstall apex")
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
    name = named_version("Transformer Engine", version or "")
    if isinstance(imports, Problem):
        fix = "build it for this torch: pip install --force-reinstall --no-deps --no-build-isolation transformer-engine"
        # What kills this process would kill the trainer's too; and Megatron-Core, which imports it, goes on after an
        # ImportError alone: half an installation raises FileNotFoundError.
        harmless = imports.kind == "silent" or imports.text.startswith(("ImportError", "ModuleNotFoundError"))
        status = "warn" if harmless else "fail"
        return unanswered("optional", status, name, imports, LONGER if imports.kind == "silent" else fix)
    if imports:
        return Finding("optional", "ok", f"{name} imports")
    if version is not None:
        return Finding("optional", "info", f"{name} is installed (of use on GPUs only)")
    if on_gpu(facts):
        fix = "for faster layers: pip install --no-build-isolation 'transformer-engine[pytorch]'"
        return Finding("optional", "info", "Transformer Engine is not installed", fix)
    return Finding("optional", "info", "Transformer Engine is not installed (of use on GPUs only)")


def check_distributed(facts: Facts) -> list[Finding]:
    """Collective libraries, and whether processes of this machine reach each other."""
    torch = facts.torch
    if isinstance(torch, Problem):
        return []
    findings: list[Finding | None] = []
    needed = ["gloo", "nccl"] if on_gpu(facts) else ["gloo"]
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
        findings.append(unanswered("distributed", "fail", "a TCP store on 127.0.0.1", facts.store, fix))
    else:
        what = f"a TCP store on 127.0.0.1 opens in {facts.store * 1000:.0f} ms"
        findings.append(Finding("distributed", "ok", what))
    if "gloo" in torch.backends and isinstance(facts.gloo, Problem):
        fix = "let the host name resolve (in /etc/hosts: 127.0.1.1 and the name), or export GLOO_SOCKET_IFNAME=lo"
        # Also on GPUs: what ranks tell each other on the host goes through gloo.
        findings.append(unanswered("distributed", "fail", "a gloo group of one", facts.gloo, fix))
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
    what = f"/dev/shm: {gib(free)} of {gib(total)} free"
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
        what = f"{gib(free)} free in {folder}: a trained model and its checkpoints may not fit"
        return Finding("host", "warn", what, "free some, or set output to a folder on a larger disk")
    return Finding("host", "ok", f"{gib(free)} free in {folder}")


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
    if not hides_gpus(facts):
        return Finding("environment", "ok", setting)
    fix = "to use GPUs: unset CUDA_VISIBLE_DEVICES"
    gpus = len(facts.driver.gpus) if isinstance(facts.driver, Driver) else 0
    if gpus:
        return Finding("environment", "warn", f"{setting} hides {counted(gpus, 'GPU')}: the CPU is used", fix)
    return Finding("environment", "info", f"{setting} hides all GPUs", fix)


def _check_max_connections(facts: Facts) -> Finding | None:
    gpus = facts.driver.gpus if isinstance(facts.driver, Driver) else ()
    capabilities = [gpu.capability for gpu in gpus if gpu.capability]
    if not on_gpu(facts) or (capabilities and min(capabilities) >= (10, 0)):
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
    if value in (None, "0") or not on_gpu(facts):
        return None  # unset: the trainer takes 0, as SGLang does
    what = (
        f"NCCL_CUMEM_ENABLE={value}: servers that take weights over nccl must have the same value, and SGLang takes 0"
    )
    return Finding("environment", "warn", what, f"unset it, or start each server with NCCL_CUMEM_ENABLE={value} too")


def _check_threads(facts: Facts) -> Finding | None:
    cores = max(int(facts.host.cores), 1)
    ranks = max(facts.cuda.count, 1) if on_gpu(facts) else 1
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
