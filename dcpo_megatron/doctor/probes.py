r"""What `dcpo doctor` sees: the facts of this machine and this Python environment, without a judgement on them.

    look(timeout) -> Facts
        files, the operating system       read here
        torch, sockets, apex, CUDA, TE    one child process  \  an import that hangs, or kills its process, costs its
        NVML                              another            /  own stage and those after it: each holds a Problem

Nothing of torch, CUDA or NVML is imported in the doctor's own process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from dcpo_megatron.doctor.facts import Apex, CudaView, Driver, Facts, Gpu, Host, Problem, TorchBuild
from dcpo_megatron.doctor.stages import STAGES
from dcpo_megatron.mcore.head.backend import missing_to_build
from dcpo_megatron.processes import signal_name

# Distribution -> the module that it installs.
REQUIRED = {
    "transformers": "transformers",
    "safetensors": "safetensors",
    "math-verify": "math_verify",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "rich": "rich",
    "matplotlib": "matplotlib",
}
OPTIONAL = {
    "transformer-engine": "transformer_engine",
    "triton": "triton",
    "flash-attn": "flash_attn",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "sglang": "sglang",
    "torchvision": "torchvision",
    "torchaudio": "torchaudio",
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE", "OMP_NUM_THREADS")


def look(timeout: float) -> Facts:
    """Looks at the machine. The child processes have ``timeout`` seconds together."""
    answers = run_children(list(STAGES), timeout)
    return Facts(host=look_at_host(), packages=find_packages(sys.path), **answers)


# ---- files and the operating system


def find_packages(path: Sequence[str]) -> dict[str, str]:
    """Distribution -> version of what is installed on ``path``. Imports nothing."""
    found = {}
    for distribution, module in {**REQUIRED, **OPTIONAL}.items():
        version = _metadata_version(distribution, path)
        if version is None:
            spec = PathFinder.find_spec(module, path)
            # Without an origin it is a plain folder of that name, such as the one that wandb writes its runs to.
            version = "" if spec is not None and spec.origin else None
        if version is not None:
            found[distribution] = version
    megatron = find_megatron(path)
    if megatron is None:  # an editable installation may hide its folder from the path
        megatron = _metadata_version("megatron-core", path)
    if megatron is not None:
        found["megatron-core"] = megatron
    return found


def _metadata_version(distribution: str, path: Sequence[str]) -> str | None:
    for candidate in importlib.metadata.distributions(name=distribution, path=list(path)):
        try:
            return candidate.version or ""
        except KeyError:  # a folder without its METADATA file
            return ""
    return None


def find_megatron(path: Sequence[str]) -> str | None:
    """The version of the ``megatron.core`` that an import would take; None: there is none.

    A checkout on PYTHONPATH hides an installed wheel, whose metadata would tell another version.
    """
    # `megatron` is a namespace: several folders of the path may hold a part of it.
    core = PathFinder.find_spec("megatron.core", [os.path.join(entry, "megatron") for entry in path])
    if core is None or core.origin is None:
        return None
    try:
        text = Path(core.origin).with_name("package_info.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    numbers = [re.search(rf"^{name}\s*=\s*(\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    if not all(numbers):
        return ""
    pre_release = re.search(r"^PRE_RELEASE\s*=\s*['\"](\w*)['\"]", text, re.MULTILINE)
    return ".".join(number[1] for number in numbers) + (pre_release[1] if pre_release else "")


def look_at_host() -> Host:
    """Limits, sizes and environment variables of this process."""
    try:
        folder = os.getcwd()
    except OSError:  # the folder was removed
        folder = ""
    shm_total, shm_free = _space("/dev/shm")
    return Host(
        python=tuple(sys.version_info[:3]),
        cores=_cores(),
        shm_total=shm_total,
        shm_free=shm_free,
        open_files=_open_files(),
        folder=folder,
        disk_free=_space(folder)[1] if folder else None,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        triton_lacks=missing_to_build(),
    )


def _space(path: str) -> tuple[int, int] | tuple[None, None]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None, None
    return usage.total, usage.free


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _cores() -> float:
    """Cores this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


# ---- the child processes

_BODY = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dcpo_megatron.doctor.stages import answer; answer(sys.argv[2])"
)


def run_children(children: Sequence[str], timeout: float, path: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs ``children`` side by side; they have ``timeout`` seconds together, and import from ``path`` (or sys.path).

    Returns stage -> its fact, or the :class:`Problem` that kept it away. Raises nothing, and waits half a second a
    child beyond ``timeout`` at most.
    """
    deadline = time.monotonic() + timeout
    started: dict[str, subprocess.Popen | Problem] = {}
    answers: dict[str, Any] = {}
    path = json.dumps(list(sys.path if path is None else path))
    for child in children:
        command = [sys.executable or "python3", "-c", _BODY, path, child]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        try:
            started[child] = subprocess.Popen(command, **pipes)
        except OSError as error:
            started[child] = Problem("error", f"no process could be started: {error}")
    try:
        for child, process in started.items():
            if isinstance(process, Problem):
                output, ending = b"", process
            else:
                output, ending = _finish(process, deadline, timeout)
            answers.update(read_answers(child, output, ending))
    finally:
        for process in started.values():
            if isinstance(process, subprocess.Popen) and process.poll() is None:
                process.kill()
    return answers


def _finish(process: subprocess.Popen, deadline: float, timeout: float) -> tuple[bytes, Problem]:
    """What the process wrote, and what to say of the first stage that it did not answer."""
    try:
        output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            output, _ = process.communicate(timeout=0.5)
        except subprocess.TimeoutExpired as stuck:  # a call into a hung driver cannot even be killed: leave it
            output = stuck.stdout or b""
        return output, Problem("silent", f"no answer within {timeout:g} s")
    code = process.returncode
    how = signal_name(-code) if code < 0 else f"exit status {code}"
    said = errors.decode("utf-8", "replace").strip().splitlines()
    return output, Problem("died", f"the process ended with {how}" + (f": {said[-1][:300]}" if said else ""))


def read_answers(child: str, output: bytes, ending: Problem) -> dict[str, Any]:
    """Facts of the stages of ``child``. The first stage without a line gets ``ending``; those after it were skipped."""
    lines = {}
    for text in output.decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut off when the process ended
            continue
        lines[line["stage"]] = line
    facts: dict[str, Any] = {}
    stopped_by = ""
    for number, stage in enumerate(STAGES[child]):
        line = lines.get(stage)
        if stopped_by:
            facts[stage] = Problem("skipped", f"not tried, because of {stopped_by}")
        elif line is None:
            facts[stage] = ending
            stopped_by = stage
        elif "error" in line:
            facts[stage] = Problem("error", line["error"], line["missing"])
            stopped_by = stage if number == 0 else ""
        else:
            facts[stage] = _fact(stage, _tuples(line["value"]))
    return facts


def _fact(stage: str, value: Any) -> Any:
    if stage == "driver":
        return Driver(**{**value, "gpus": tuple(Gpu(**gpu) for gpu in value["gpus"])})
    kinds = {"torch": TorchBuild, "apex": Apex, "cuda": CudaView}
    return kinds[stage](**value) if stage in kinds else value


def _tuples(value: Any) -> Any:
    """``value`` with tuples where JSON has lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
