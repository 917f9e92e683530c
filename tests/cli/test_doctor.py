"""`dcpo doctor`: each fault of a machine is named with a status and a fix, and no fault of it stops the doctor."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcpo_megatron.cli import doctor
from dcpo_megatron.cli.doctor_checks import GIB, Finding, diagnose, has_kernels
from dcpo_megatron.cli.doctor_facts import Apex, CudaView, Driver, Facts, Gpu, Host, Problem, TorchBuild
from dcpo_megatron.cli.doctor_probes import REQUIRED, find_megatron, find_packages, read_answers, run_children
from dcpo_megatron.cli.doctor_stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds; for stages that import torch on a busy machine

CPU = Facts(
    host=Host(
        python=(3, 11, 7),
        cores=8.0,
        shm_total=16 * GIB,
        shm_free=16 * GIB,
        open_files=65536,
        folder="/data",
        disk_free=500 * GIB,
        environment={"OMP_NUM_THREADS": "4"},
    ),
    packages={**dict.fromkeys(REQUIRED, "1.0"), "megatron-core": "0.16.1", "tensorboard": "2.21.0"},
    torch=TorchBuild("2.13.0+cpu", cuda=None, hip=None, backends=("gloo",)),
    store=0.004,
    gloo=True,
    apex=Apex("none"),
    cuda=CudaView(available=False),
    platform=("cpu", "gloo"),
    transformer_engine=None,
    driver=Driver(absent="NVML Shared Library Not Found"),
)
H100 = Gpu(0, "NVIDIA H100", memory_total=80 * GIB, memory_free=79 * GIB, capability=(9, 0), ecc_errors=0)
GPU = dataclasses.replace(
    CPU,
    host=dataclasses.replace(CPU.host, environment={"OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    packages={**CPU.packages, "transformer-engine": "2.9.0", "triton": "3.5.0"},
    torch=TorchBuild("2.13.0+cu130", cuda="13.0", hip=None, backends=("gloo", "nccl")),
    cuda=CudaView(available=True, count=2, architectures=("sm_80", "sm_90", "compute_90")),
    platform=("cuda", "nccl"),
    transformer_engine=True,
    driver=Driver("580.65", cuda=(13, 0), gpus=(H100, dataclasses.replace(H100, index=1))),
)
CPU_BUILD_ON_GPUS = dataclasses.replace(GPU, torch=CPU.torch, cuda=CPU.cuda, platform=CPU.platform)
NOT_INSTALLED = Problem("error", "ModuleNotFoundError: No module named 'torch'", missing="torch")
SKIPPED = Problem("skipped", "not tried, because of torch")


def with_host(facts: Facts, **changes) -> Facts:
    return dataclasses.replace(facts, host=dataclasses.replace(facts.host, **changes))


def with_variable(facts: Facts, name: str, value: str | None) -> Facts:
    environment = {key: old for key, old in facts.host.environment.items() if key != name}
    return with_host(facts, environment=environment if value is None else {**environment, name: value})


def with_packages(facts: Facts, **changes: str | None) -> Facts:
    packages = {**facts.packages, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return dataclasses.replace(facts, packages={name: old for name, old in packages.items() if old is not None})


def with_gpu(**changes) -> Facts:
    bad = dataclasses.replace(H100, index=1, **changes)
    return dataclasses.replace(GPU, driver=dataclasses.replace(GPU.driver, gpus=(H100, bad)))


def without_torch(problem: Problem) -> Facts:
    stages = {stage: SKIPPED for stage in STAGES["torch"]}
    return dataclasses.replace(CPU, **{**stages, "torch": problem})


# (what it shows, the machine, area, status, words of the finding, words of the fix)
FAULTS = [
    ("old python", with_host(CPU, python=(3, 10, 14)), "python", "fail", "3.10.14", "3.11"),
    ("no torch", without_torch(NOT_INSTALLED), "torch", "fail", "not installed", "pip install torch"),
    (
        "torch kills its process",
        without_torch(Problem("died", "the process ended with SIGSEGV")),
        "torch",
        "fail",
        "SIGSEGV",
        "reinstall",
    ),
    ("torch hangs", without_torch(Problem("silent", "no answer within 8 s")), "torch", "fail", "8 s", "--timeout 60"),
    (
        "old torch",
        dataclasses.replace(CPU, torch=dataclasses.replace(CPU.torch, version="2.5.1+cpu")),
        "torch",
        "fail",
        "2.5.1",
        "upgrade",
    ),
    (
        "rocm",
        dataclasses.replace(CPU, torch=dataclasses.replace(CPU.torch, hip="6.4")),
        "torch",
        "warn",
        "ROCm",
        "NVIDIA",
    ),
    (
        "no megatron",
        with_packages(CPU, megatron_core=None),
        "packages",
        "fail",
        "megatron-core is not",
        "megatron-core==0.16.1",
    ),
    (
        "megatron of another version",
        with_packages(CPU, megatron_core="0.15.0"),
        "packages",
        "warn",
        "not tested",
        "megatron-core==0.16.1",
    ),
    (
        "megatron of the other python",
        with_host(CPU, python=(3, 12, 1)),
        "packages",
        "warn",
        "not tested on Python 3.12",
        "megatron-core==0.19.2",
    ),
    (
        "megatron that wants triton",
        with_packages(with_host(CPU, python=(3, 12, 1)), megatron_core="0.19.2"),
        "packages",
        "fail",
        "triton",
        "pip install triton",
    ),
    *(
        (f"no {name}", with_packages(CPU, **{name: None}), "packages", "fail", f"{name} is not", f"pip install {name}")
        for name in REQUIRED
    ),
    (
        "impostor apex",
        dataclasses.replace(CPU, apex=Apex("impostor", "/env/apex")),
        "optional",
        "fail",
        "/env/apex",
        "pip uninstall apex",
    ),
    (
        "transformer engine of another torch",
        dataclasses.replace(GPU, transformer_engine=Problem("error", "ImportError: undefined symbol")),
        "optional",
        "warn",
        "undefined symbol",
        "pip install",
    ),
    (
        "transformer engine kills its process",
        dataclasses.replace(GPU, transformer_engine=Problem("died", "the process ended with SIGSEGV")),
        "optional",
        "fail",
        "SIGSEGV",
        "pip install",
    ),
    (
        "transformer engine is slow",
        dataclasses.replace(GPU, transformer_engine=Problem("silent", "no answer within 8 s")),
        "optional",
        "warn",
        "8 s",
        "--timeout",
    ),
    ("no tensorboard", with_packages(CPU, tensorboard=None), "optional", "warn", "tensorboard", "logging.tensorboard"),
    ("no wandb", CPU, "optional", "info", "wandb", "pip install wandb"),
    (
        "sglang inside",
        with_packages(CPU, sglang="0.5.20"),
        "optional",
        "warn",
        "sglang 0.5.20",
        "environment of its own",
    ),
    (
        "torchvision next to a CPU torch",
        with_packages(CPU, torchvision="0.25"),
        "optional",
        "warn",
        "torchvision 0.25",
        "pip uninstall torchvision",
    ),
    ("no driver", CPU, "gpu", "info", "no NVIDIA driver", "nvidia-smi"),
    (
        "no nvidia-ml-py",
        dataclasses.replace(GPU, driver=Problem("error", "No module named 'pynvml'", missing="pynvml")),
        "gpu",
        "warn",
        "nvidia-ml-py",
        "pip install nvidia-ml-py",
    ),
    (
        "driver updated without a reboot",
        dataclasses.replace(CPU, driver=Problem("error", "NVMLError_LibRmVersionMismatch: mismatch")),
        "gpu",
        "fail",
        "mismatch",
        "reboot",
    ),
    (
        "driver hangs",
        dataclasses.replace(CPU, driver=Problem("silent", "no answer within 8 s")),
        "gpu",
        "fail",
        "no answer",
        "nvidia-smi",
    ),
    ("cpu torch on a gpu machine", CPU_BUILD_ON_GPUS, "gpu", "fail", "2 GPUs", "install the CUDA build of torch"),
    (
        "cpu torch on a gpu machine, on purpose",
        with_variable(CPU_BUILD_ON_GPUS, "CUDA_VISIBLE_DEVICES", ""),
        "gpu",
        "info",
        "2 GPUs",
        "install the CUDA build of torch",
    ),
    (
        "driver too old for torch",
        dataclasses.replace(
            GPU,
            cuda=CudaView(available=False),
            driver=dataclasses.replace(GPU.driver, cuda=(12, 4)),
            platform=CPU.platform,
        ),
        "gpu",
        "fail",
        "CUDA up to 12.4",
        "torch built for CUDA 12",
    ),
    (
        "torch sees no gpu",
        dataclasses.replace(GPU, cuda=CudaView(available=False, complaint="CUDA unknown error")),
        "gpu",
        "fail",
        "CUDA unknown error",
        "--gpus all",
    ),
    (
        "cuda hangs",
        dataclasses.replace(GPU, cuda=Problem("silent", "no answer within 8 s"), platform=SKIPPED),
        "gpu",
        "fail",
        "CUDA: no answer",
        "nvidia-smi",
    ),
    (
        "variable names a gpu that is not there",
        with_variable(
            dataclasses.replace(GPU, cuda=dataclasses.replace(GPU.cuda, count=1)), "CUDA_VISIBLE_DEVICES", "0,7"
        ),
        "gpu",
        "warn",
        "names 2 GPUs, torch sees 1",
        "from 0 to 1",
    ),
    (
        "torch sees fewer",
        dataclasses.replace(GPU, cuda=dataclasses.replace(GPU.cuda, count=1)),
        "gpu",
        "warn",
        "the driver sees 2 GPUs, torch sees 1",
        "CUDA_VISIBLE_DEVICES",
    ),
    ("no kernels for the gpu", with_gpu(capability=(12, 0), name="new"), "gpu", "ok", "capability 12.0", ""),
    ("no kernels for an old gpu", with_gpu(capability=(7, 0)), "gpu", "fail", "no kernels for GPU 1", "built for it"),
    ("no bfloat16", with_gpu(capability=(7, 5)), "gpu", "warn", "GPU 1 has no bfloat16", "model.dtype=float32"),
    ("lost gpu", with_gpu(problem="GPU is lost"), "gpu", "fail", "GPU is lost", "reboot"),
    (
        "lost gpu left out",
        with_variable(with_gpu(problem="GPU is lost"), "CUDA_VISIBLE_DEVICES", "0"),
        "gpu",
        "warn",
        "GPU is lost",
        "reboot",
    ),
    ("ecc errors", with_gpu(ecc_errors=3), "gpu", "warn", "3 uncorrected ECC errors", "reboot"),
    ("occupied gpu", with_gpu(memory_free=8 * GIB), "gpu", "warn", "8.0 GiB of 80.0 GiB", "CUDA_VISIBLE_DEVICES"),
    (
        "no gloo",
        dataclasses.replace(CPU, torch=dataclasses.replace(CPU.torch, backends=("mpi",))),
        "distributed",
        "fail",
        "without gloo (it has mpi)",
        "pip install",
    ),
    (
        "no nccl",
        dataclasses.replace(GPU, torch=dataclasses.replace(GPU.torch, backends=("gloo",))),
        "distributed",
        "fail",
        "without nccl (it has gloo)",
        "pip install",
    ),
    (
        "closed loopback",
        dataclasses.replace(CPU, store=Problem("error", "DistNetworkError: refused")),
        "distributed",
        "fail",
        "refused",
        "firewall",
    ),
    (
        "unknown host name on cpu",
        dataclasses.replace(CPU, gloo=Problem("error", "RuntimeError: unable to resolve")),
        "distributed",
        "fail",
        "unable to resolve",
        "/etc/hosts",
    ),
    (
        "unknown host name on gpus",
        dataclasses.replace(GPU, gloo=Problem("error", "RuntimeError: unable to resolve")),
        "distributed",
        "warn",
        "unable to resolve",
        "/etc/hosts",
    ),
    (
        "small shared memory",
        with_host(CPU, shm_total=GIB // 16, shm_free=GIB // 16),
        "host",
        "warn",
        "0.1 GiB",
        "--shm-size",
    ),
    ("full shared memory", with_host(CPU, shm_free=0), "host", "warn", "0.0 GiB of 16.0 GiB", "dead processes"),
    ("few open files", with_host(CPU, open_files=1024), "host", "warn", "1024 files", "ulimit -n"),
    ("full disk", with_host(CPU, disk_free=GIB), "host", "warn", "1.0 GiB free in /data", "larger disk"),
    ("removed folder", with_host(CPU, folder="", disk_free=None), "host", "warn", "current folder", "exists"),
    (
        "hidden gpus",
        with_variable(
            dataclasses.replace(GPU, cuda=CudaView(available=False), platform=CPU.platform), "CUDA_VISIBLE_DEVICES", ""
        ),
        "environment",
        "warn",
        "hides 2 GPUs",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    (
        "connections not set",
        with_variable(GPU, "CUDA_DEVICE_MAX_CONNECTIONS", None),
        "environment",
        "warn",
        "not set",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    (
        "connections set otherwise",
        with_variable(GPU, "CUDA_DEVICE_MAX_CONNECTIONS", "8"),
        "environment",
        "warn",
        "CUDA_DEVICE_MAX_CONNECTIONS=8",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ),
    (
        "cumem on one side",
        with_variable(GPU, "NCCL_CUMEM_ENABLE", "1"),
        "environment",
        "info",
        "NCCL_CUMEM_ENABLE=1",
        "the server",
    ),
    (
        "threads not set",
        with_variable(GPU, "OMP_NUM_THREADS", None),
        "environment",
        "info",
        "not set",
        "OMP_NUM_THREADS=4 ",
    ),
    ("threads not a number", with_variable(CPU, "OMP_NUM_THREADS", "all"), "environment", "warn", "all", "export"),
    ("too many threads", with_variable(CPU, "OMP_NUM_THREADS", "64"), "environment", "warn", "8 cores", "export"),
    (
        "rank without a gpu",
        dataclasses.replace(GPU, platform=Problem("error", "ValueError: LOCAL_RANK=5, but this host shows 2 GPUs")),
        "will be used",
        "fail",
        "LOCAL_RANK=5",
        "unset LOCAL_RANK",
    ),
]


@pytest.mark.parametrize(
    ("facts", "area", "status", "what", "fix"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_a_fault_is_named_with_its_status_and_its_fix(facts, area, status, what, fix):
    found = [finding for finding in diagnose(facts) if finding.area == area and what in finding.what]
    assert [finding.status for finding in found] == [status], found
    assert fix in found[0].fix
    if status in ("warn", "fail"):
        assert not [finding for finding in diagnose(CPU) + diagnose(GPU) if finding.what == found[0].what]


def test_every_warning_and_every_failure_has_a_fix():
    for name, facts, *_ in FAULTS:
        for finding in diagnose(facts):
            assert finding.status in ("ok", "info", "warn", "fail"), (name, finding)
            assert finding.fix or finding.status in ("ok", "info"), (name, finding)


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_sound_machine_has_neither_warnings_nor_failures(facts):
    assert [finding for finding in diagnose(facts) if finding.status in ("warn", "fail")] == []


def test_what_was_not_tried_is_no_failure_of_its_own():
    fails = [finding for finding in diagnose(without_torch(NOT_INSTALLED)) if finding.status == "fail"]
    assert [finding.area for finding in fails] == ["torch"]


def test_blackwell_does_not_ask_for_one_connection():
    blackwell = dataclasses.replace(H100, capability=(10, 0))
    facts = dataclasses.replace(GPU, driver=dataclasses.replace(GPU.driver, gpus=(blackwell, blackwell)))
    facts = with_variable(facts, "CUDA_DEVICE_MAX_CONNECTIONS", None)
    assert not [finding for finding in diagnose(facts) if "CUDA_DEVICE_MAX_CONNECTIONS" in finding.what]


def test_mig_slices_are_not_held_against_the_driver_count():
    gpus = tuple(dataclasses.replace(gpu, mig=True) for gpu in GPU.driver.gpus)
    facts = dataclasses.replace(GPU, driver=dataclasses.replace(GPU.driver, gpus=gpus), cuda=CudaView(True, count=1))
    assert not [finding for finding in diagnose(facts) if finding.status in ("warn", "fail")]


def test_a_gpu_that_tells_nothing_about_itself_is_listed_all_the_same():
    facts = dataclasses.replace(GPU, driver=Driver("580", gpus=(Gpu(0, "NVIDIA GB10"), Gpu(1, "NVIDIA GB10"))))
    assert "GPU 0: NVIDIA GB10" in [finding.what for finding in diagnose(facts)]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 6), ("sm_80",), True),  # a later minor version
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),  # machine code stays within its major version
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX is compiled for what comes later
        ((7, 0), ("sm_75", "compute_90"), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),  # for exactly 10.0
        ((10, 0), ("sm_100a", "sm_120"), True),
    ],
)
def test_kernels_run_where_cuda_says_they_run(capability, architectures, runs):
    assert has_kernels(capability, architectures) is runs


def used(facts: Facts) -> dict[str, str]:
    return dict(finding.what.split(": ", 1) for finding in diagnose(facts) if finding.area == "will be used")


def test_what_will_be_used_follows_from_the_gpu_and_transformer_engine():
    assert used(GPU)["platform"] == "cuda with nccl"
    assert "Transformer Engine" in used(GPU)["layers"] and "Transformer Engine" in used(GPU)["optimizer"]
    without = dataclasses.replace(GPU, transformer_engine=None)
    assert "local" in used(without)["layers"] and "PyTorch" in used(without)["optimizer"]
    apex = dataclasses.replace(without, apex=Apex("nvidia", "/env/apex"))
    assert "local" in used(apex)["layers"] and "Apex" in used(apex)["optimizer"]
    assert used(CPU)["platform"] == "cpu with gloo" and "local" in used(CPU)["layers"]


def test_the_rollout_engine_is_the_default_of_the_configuration():
    from dcpo_megatron.training.config import RolloutSection

    assert used(CPU)["rollout engine"].split()[0] == RolloutSection().engine


# ---- the child processes, with real packages in a real folder


@pytest.fixture
def folder(tmp_path):
    """Writes modules into a folder that stands first on the path: ``folder(apex="text", **{"a/b": "text"})``."""

    def write(**modules: str) -> list[str]:
        for name, text in modules.items():
            place = tmp_path / name / "__init__.py"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        return [str(tmp_path), *sys.path]

    return write


# Enough of torch for every stage but those of sockets, in no time.
TORCH = """
import types, sys
__version__ = "2.13.0+fake"
version = types.SimpleNamespace(cuda=None, hip=None)
cuda = types.SimpleNamespace(is_available=lambda: False, get_arch_list=lambda: [])
device = str
sys.modules["torch.distributed"] = distributed = types.ModuleType("torch.distributed")
distributed.is_available = lambda: False
"""
NVML = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
class NVMLError_GpuIsLost(NVMLError): pass
class NVMLError_NotSupported(NVMLError): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
class Memory: total, free = 85899345920, 42949672960
def not_supported(*arguments): raise NVMLError_NotSupported("Not Supported")
def nvmlInit(): pass
def nvmlSystemGetDriverVersion(): return b"580.65"
def nvmlSystemGetCudaDriverVersion_v2(): return 12080
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index):
    if index == 1: raise NVMLError_GpuIsLost("GPU is lost")
    return index
def nvmlDeviceGetName(handle): return "NVIDIA H100"
def nvmlDeviceGetMemoryInfo(handle): return Memory
def nvmlDeviceGetCudaComputeCapability(handle): return (9, 0)
nvmlDeviceGetTotalEccErrors = nvmlDeviceGetMigMode = not_supported
"""


def test_an_impostor_apex_is_told_from_nvidia_apex(folder, tmp_path):
    path = folder(torch=TORCH, apex="")
    assert run_children(["torch"], PATIENCE, path)["apex"] == Apex("impostor", str(tmp_path / "apex"))
    path = folder(amp_C="")
    assert run_children(["torch"], PATIENCE, path)["apex"] == Apex("nvidia", str(tmp_path / "apex"))


def test_a_stage_that_raises_does_not_keep_the_later_ones_from_answering(folder):
    answers = run_children(["torch"], PATIENCE, folder(torch=TORCH))
    assert answers["store"].kind == "error" and "TCPStore" in answers["store"].text
    assert answers["platform"] == ("cpu", "gloo")


def test_an_import_that_kills_its_process_is_told_with_its_signal(folder):
    answers = run_children(["torch"], PATIENCE, folder(torch="import os; os.abort()"))
    assert answers["torch"].kind == "died" and "SIGABRT" in answers["torch"].text
    assert {answers[stage].kind for stage in STAGES["torch"] if stage != "torch"} == {"skipped"}


def test_an_import_that_hangs_costs_the_limit_and_no_more(folder):
    start = time.monotonic()
    answers = run_children(["torch", "nvml"], 3.0, folder(torch="import time; time.sleep(600)", pynvml=NVML))
    assert time.monotonic() - start < 8
    assert answers["torch"] == Problem("silent", "no answer within 3 s")
    assert isinstance(answers["driver"], Driver)


def test_a_broken_transformer_engine_is_told_and_leaves_the_other_answers(folder):
    torch = TORCH.replace("cuda=None", "cuda='13.0'").replace(
        "is_available=lambda: False, get", "is_available=lambda: True, device_count=lambda: 1, get"
    )
    answers = run_children(["torch"], PATIENCE, folder(torch=torch, transformer_engine="import os; os._exit(3)"))
    assert answers["transformer_engine"] == Problem("died", "the process ended with exit status 3")
    assert answers["cuda"] == CudaView(available=True, count=1)


def test_what_a_library_prints_does_not_mix_with_the_answers(folder):
    noise = 'import os\nprint("{}")\nos.system("echo noise")\n'
    assert run_children(["torch"], PATIENCE, folder(torch=noise + TORCH))["torch"].version == "2.13.0+fake"


def test_a_missing_module_is_told_by_name(folder):
    text = "raise ModuleNotFoundError(\"No module named 'pynvml'\", name='pynvml')"
    answer = run_children(["nvml"], PATIENCE, folder(pynvml=text))["driver"]
    assert (answer.kind, answer.missing) == ("error", "pynvml")


def test_no_driver_is_an_answer_and_not_an_error(folder):
    text = NVML + "def nvmlInit(): raise NVMLError_LibraryNotFound('NVML Shared Library Not Found')\n"
    answer = run_children(["nvml"], PATIENCE, folder(pynvml=text))["driver"]
    assert answer == Driver(absent="NVML Shared Library Not Found")


def test_a_lost_gpu_does_not_hide_the_others_and_unsupported_questions_stay_open(folder):
    answer = run_children(["nvml"], PATIENCE, folder(pynvml=NVML))["driver"]
    first = Gpu(0, "NVIDIA H100", memory_total=80 * GIB, memory_free=40 * GIB, capability=(9, 0), ecc_errors=None)
    assert answer == Driver("580.65", cuda=(12, 8), gpus=(first, Gpu(1, problem="GPU is lost")))


def test_a_process_that_cannot_be_started_is_a_problem_of_its_stages(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    answer = run_children(["nvml"], PATIENCE)["driver"]
    assert answer.kind == "error" and "could be started" in answer.text


def test_an_answer_cut_off_in_the_middle_counts_as_none():
    output = (
        b'{"stage": "torch", "value": {"version": "2.13.0", "cuda": null, "hip": null, "backends": []}}\n{"stage": "st'
    )
    answers = read_answers("torch", output, Problem("died", "the process ended with SIGKILL"))
    assert answers["torch"].version == "2.13.0"
    assert answers["store"].kind == "died" and answers["gloo"].kind == "skipped"


# ---- packages, without importing them


def test_a_checkout_of_megatron_on_the_path_hides_the_installed_wheel(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = 'rc1'\n")
    assert find_megatron([str(tmp_path), *sys.path]) == "0.20.0rc1"
    assert find_packages([str(tmp_path), *sys.path])["megatron-core"] == "0.20.0rc1"


def test_packages_are_found_by_metadata_or_by_module_and_never_by_a_bare_folder(tmp_path):
    (tmp_path / "Math_Verify-0.9.0.dist-info").mkdir()
    (tmp_path / "Math_Verify-0.9.0.dist-info" / "METADATA").write_text("Name: math-verify\nVersion: 0.9.0\n")
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "wandb").mkdir()  # as its runs leave it behind
    assert find_packages([str(tmp_path)]) == {"math-verify": "0.9.0", "sglang": ""}


# ---- the command


def run_doctor(*arguments: str, path: str = "", folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT)))), **environment}
    command = [sys.executable, "-c", "import sys; from dcpo_megatron.cli.main import main; sys.exit(main())", "doctor"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_json_on_this_machine_agrees_with_the_trainer_and_with_the_exit_status():
    from dcpo_megatron.mcore.platform import find_apex, select_platform

    done = run_doctor("--json", "--timeout", "60")
    report = json.loads(done.stdout)
    assert all(set(finding) == {"area", "status", "what", "fix"} for finding in report["findings"])
    fails = [finding for finding in report["findings"] if finding["status"] == "fail"]
    assert done.returncode == int(bool(fails)) and report["ready"] is not bool(fails)
    platform = select_platform()
    whats = [finding["what"] for finding in report["findings"]]
    assert f"platform: {platform.name} with {platform.backend}" in whats
    assert (find_apex() == "impostor") == any("not NVIDIA Apex" in what for what in whats)


def test_an_impostor_apex_fails_the_command_with_the_way_out(folder, tmp_path):
    folder(apex="")
    done = run_doctor("--json", "--timeout", "60", path=str(tmp_path))
    [finding] = [one for one in json.loads(done.stdout)["findings"] if "not NVIDIA Apex" in one["what"]]
    assert done.returncode == 1
    assert finding["status"] == "fail" and str(tmp_path) in finding["what"] and "pip uninstall apex" in finding["fix"]


def test_a_hanging_torch_does_not_make_the_command_run_longer_than_ten_seconds(folder, tmp_path):
    folder(torch="import time; time.sleep(600)", pynvml="import time; time.sleep(600)")
    start = time.monotonic()
    done = run_doctor(path=str(tmp_path))
    assert time.monotonic() - start < 10
    assert done.returncode == 1 and "no answer within 8.5 s" in done.stdout


def test_the_command_runs_without_torch_and_rich_in_a_folder_that_is_gone(folder, tmp_path):
    missing = "raise ModuleNotFoundError('No module named ' + repr(__name__), name=__name__)"
    folder(torch=missing, rich=missing)
    gone = tmp_path / "gone"
    script = "import os, sys; os.rmdir(os.getcwd()); from dcpo_megatron.cli.doctor import main; sys.exit(main(['--timeout', '60']))"
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr == ""
    assert "torch is not installed" in done.stdout and "not ready to train" in done.stdout
    assert "current folder cannot be read" in done.stdout


def test_the_table_shows_every_finding_with_its_fix_and_its_brackets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    findings = [
        Finding("optional", "warn", "no engine", "pip install 'transformer-engine[pytorch]'"),
        Finding("gpu", "ok", "GPU 0"),
    ]
    doctor.print_table(findings)
    shown = capsys.readouterr().out
    for words in ("optional", "warn", "no engine", "fix: pip install 'transformer-engine[pytorch]'", "gpu", "GPU 0"):
        assert words in shown
    assert shown.rstrip().endswith("0 failures, 1 warning: ready to train")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("info", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_makes_the_exit_status_1(status, code):
    findings = [Finding("host", "ok", "fine"), Finding("host", status, "this", "do that")]
    assert doctor.exit_status(findings) == code
    assert json.loads(doctor.to_json(findings))["ready"] is (code == 0)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "1e9"])
def test_a_limit_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as refused:
        doctor.main([f"--timeout={text}"])
    assert refused.value.code == 2 and text in capsys.readouterr().err
