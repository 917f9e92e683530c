"""`dcpo doctor`: each fault of a machine is named with a status and a fix, and no fault of it stops the doctor."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace as but
from pathlib import Path

import pytest

from dcpo_megatron.cli import doctor
from dcpo_megatron.doctor.checks import diagnose
from dcpo_megatron.doctor.facts import Apex, CudaView, Driver, Facts, Gpu, Host, Problem, TorchBuild
from dcpo_megatron.doctor.findings import GIB, Finding
from dcpo_megatron.doctor.gpu_checks import has_kernels
from dcpo_megatron.doctor.probes import REQUIRED
from dcpo_megatron.doctor.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]

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
GPU = but(
    CPU,
    host=but(CPU.host, environment={"OMP_NUM_THREADS": "4", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    packages={**CPU.packages, "transformer-engine": "2.9.0", "triton": "3.5.0"},
    torch=TorchBuild("2.13.0+cu130", cuda="13.0", hip=None, backends=("gloo", "nccl")),
    cuda=CudaView(available=True, count=2, architectures=("sm_80", "sm_90", "compute_90")),
    platform=("cuda", "nccl"),
    transformer_engine=True,
    driver=Driver("580.65", cuda=(13, 0), gpus=(H100, but(H100, index=1))),
)
UNUSED_GPUS = but(GPU, cuda=CudaView(available=False), platform=("cpu", "gloo"), transformer_engine=None)
CPU_BUILD = but(UNUSED_GPUS, torch=CPU.torch)

# As a torchrun-less shell, an old driver, a crash and a hang tell it.
NO_TORCH = Problem("error", "ModuleNotFoundError: No module named 'torch'", missing="torch")
NO_PYNVML = Problem("error", "ModuleNotFoundError: No module named 'pynvml'", missing="pynvml")
MISMATCH = Problem("error", "NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch.")
NO_SYMBOL = Problem("error", "ImportError: undefined symbol: _ZN3c10")
REFUSED = Problem("error", "DistNetworkError: connection refused")
NO_NAME = Problem("error", "RuntimeError: unable to resolve hostname")
NO_RANK = Problem("error", "ValueError: LOCAL_RANK=5, but this host shows 2 GPUs")
HALF = Problem("error", "FileNotFoundError: Could not find shared object file for Transformer Engine torch lib.")
DIED = Problem("died", "the process ended with SIGSEGV")
SILENT = Problem("silent", "no answer within 8 s")
SKIPPED = Problem("skipped", "not tried, because of torch")


def host(facts: Facts, **changes) -> Facts:
    return but(facts, host=but(facts.host, **changes))


def variable(facts: Facts, name: str, value: str | None) -> Facts:
    environment = {**facts.host.environment, name: value}
    return host(facts, environment={name: value for name, value in environment.items() if value is not None})


def package(facts: Facts, name: str, version: str | None) -> Facts:
    packages = {**facts.packages, name: version}
    return but(facts, packages={name: version for name, version in packages.items() if version is not None})


def torch(facts: Facts, **changes) -> Facts:
    return but(facts, torch=but(facts.torch, **changes))


def no_torch(problem: Problem) -> Facts:
    return but(CPU, **{**dict.fromkeys(STAGES["torch"], SKIPPED), "torch": problem})


def second_gpu(**changes) -> Facts:
    return but(GPU, driver=but(GPU.driver, gpus=(H100, but(H100, index=1, **changes))))


PYTHON_312 = host(CPU, python=(3, 12, 1))
OLD_DRIVER = but(UNUSED_GPUS, driver=but(GPU.driver, cuda=(12, 4)))
UNKNOWN_ERROR = but(UNUSED_GPUS, cuda=CudaView(available=False, complaint="CUDA unknown error"))
ONE_SEEN = but(GPU, cuda=but(GPU.cuda, count=1))
LOST = second_gpu(problem="GPU is lost")
VISIBLE, CONNECTIONS, CUMEM = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_CUMEM_ENABLE"
THREADS = "OMP_NUM_THREADS"

# what it shows -> the machine, area, status, words of the finding, words of the fix
FAULTS = {
    "old python": (host(CPU, python=(3, 10, 14)), "python", "fail", "3.10.14 is older", "3.11"),
    "no torch": (no_torch(NO_TORCH), "torch", "fail", "torch is not installed", "pip install torch"),
    "torch crashes": (no_torch(DIED), "torch", "fail", "SIGSEGV", "pip install --force-reinstall torch"),
    "torch hangs": (no_torch(SILENT), "torch", "fail", "no answer within 8 s", "--timeout 60"),
    "old torch": (torch(CPU, version="2.5.1+cpu"), "torch", "fail", "2.5.1+cpu", "pip install --upgrade torch"),
    "rocm": (torch(CPU, hip="6.4"), "torch", "warn", "ROCm", "NVIDIA"),
    "no megatron": (package(CPU, "megatron-core", None), "packages", "fail", "megatron-core is not", "==0.16.1"),
    "old megatron": (package(CPU, "megatron-core", "0.15.0"), "packages", "warn", "0.15.0 is not tested", "==0.16.1"),
    "newer python": (PYTHON_312, "packages", "warn", "0.16.1 is not tested on Python 3.12", "==0.19.2"),
    "no triton": (package(PYTHON_312, "megatron-core", "0.19.2"), "packages", "fail", "triton", "pip install triton"),
    **{
        f"no {name}": (package(CPU, name, None), "packages", "fail", f"{name} is not installed", f"pip install {name}")
        for name in REQUIRED
    },
    "impostor apex": (but(CPU, apex=Apex("impostor", "/x/apex")), "optional", "fail", "/x/apex", "pip uninstall apex"),
    "foreign te": (but(GPU, transformer_engine=NO_SYMBOL), "optional", "warn", "undefined symbol", "pip install"),
    "half a te": (but(GPU, transformer_engine=HALF), "optional", "fail", "torch lib", "pip install"),
    "te crashes": (but(GPU, transformer_engine=DIED), "optional", "fail", "2.9.0: the process ended", "pip install"),
    "te is slow": (but(GPU, transformer_engine=SILENT), "optional", "warn", "no answer within 8 s", "--timeout 60"),
    "no tensorboard": (
        package(CPU, "tensorboard", None),
        "optional",
        "warn",
        "tensorboard",
        "logging.tensorboard=false",
    ),
    "no wandb": (CPU, "optional", "info", "wandb is not installed", "pip install wandb"),
    "sglang inside": (package(CPU, "sglang", "0.5.20"), "optional", "warn", "sglang 0.5.20", "environment of its own"),
    "torchvision": (package(CPU, "torchvision", "0.25"), "optional", "warn", "torchvision", "uninstall torchvision"),
    "torchaudio": (package(CPU, "torchaudio", "2.9"), "optional", "warn", "torchaudio", "uninstall torchaudio"),
    "no driver": (CPU, "gpu", "info", "no NVIDIA driver (NVML Shared Library Not Found)", "nvidia-smi"),
    "no nvidia-ml-py": (but(GPU, driver=NO_PYNVML), "gpu", "warn", "nvidia-ml-py", "pip install nvidia-ml-py"),
    "updated driver": (but(CPU, driver=MISMATCH), "gpu", "fail", "mismatch", "reboot"),
    "driver hangs": (but(CPU, driver=SILENT), "gpu", "fail", "driver does not answer: no answer", "nvidia-smi"),
    "cpu torch": (CPU_BUILD, "gpu", "fail", "sees 2 GPUs, but torch 2.13.0+cpu", "install the CUDA build of torch"),
    "meant cpu torch": (variable(CPU_BUILD, VISIBLE, "-1"), "gpu", "info", "but torch", "the CUDA build"),
    "old driver": (OLD_DRIVER, "gpu", "fail", "but torch is built for CUDA 13.0", "torch built for CUDA 12"),
    "torch sees none": (UNKNOWN_ERROR, "gpu", "fail", "sees none: CUDA unknown error", "--gpus all"),
    "cuda hangs": (but(GPU, cuda=SILENT, platform=SKIPPED), "gpu", "fail", "CUDA: no answer", "nvidia-smi"),
    "no such gpu": (variable(ONE_SEEN, VISIBLE, "0,7"), "gpu", "warn", "names 2 GPUs, torch sees 1", "from 0 to 1"),
    "torch sees fewer": (ONE_SEEN, "gpu", "warn", "the driver sees 2 GPUs, torch sees 1", VISIBLE),
    "no kernels": (second_gpu(capability=(7, 0)), "gpu", "fail", "no kernels for GPU 1", "a torch built for it"),
    "no bfloat16": (second_gpu(capability=(7, 5)), "gpu", "warn", "GPU 1 has no bfloat16", "model.dtype=float32"),
    "lost gpu": (LOST, "gpu", "fail", "GPU 1 does not answer: GPU is lost", "reboot"),
    "lost gpu left out": (variable(LOST, VISIBLE, "0"), "gpu", "warn", "GPU is lost", "reboot"),
    "ecc errors": (second_gpu(ecc_errors=3), "gpu", "warn", "GPU 1 had 3 uncorrected ECC errors", "reboot"),
    "occupied gpu": (second_gpu(memory_free=8 * GIB), "gpu", "warn", "GPU 1 has only 8.0 GiB of 80.0 GiB", VISIBLE),
    "no compiler": (
        host(GPU, triton_lacks="Triton needs a C compiler, and there is neither gcc nor clang"),
        "optional",
        "warn",
        "neither gcc nor clang; model.head=auto takes plain PyTorch",
        "apt install gcc",
    ),
    "gloo for the host": (
        torch(GPU, backends=("nccl",)),
        "distributed",
        "fail",
        "without gloo (it has nccl)",
        "pip install",
    ),
    "no gloo": (torch(CPU, backends=("mpi",)), "distributed", "fail", "without gloo (it has mpi)", "pip install"),
    "no nccl": (torch(GPU, backends=("gloo",)), "distributed", "fail", "without nccl (it has gloo)", "pip install"),
    "closed loopback": (but(CPU, store=REFUSED), "distributed", "fail", "connection refused", "firewall"),
    "unknown name": (but(CPU, gloo=NO_NAME), "distributed", "fail", "unable to resolve", "/etc/hosts"),
    "unknown name, nccl": (but(GPU, gloo=NO_NAME), "distributed", "fail", "unable to resolve", "/etc/hosts"),
    "small /dev/shm": (host(CPU, shm_total=GIB // 2, shm_free=GIB // 2), "host", "warn", "0.5 GiB", "--shm-size"),
    "full /dev/shm": (host(CPU, shm_free=0), "host", "warn", "0.0 GiB of 16.0 GiB free", "dead processes"),
    "few open files": (host(CPU, open_files=1024), "host", "warn", "1024 files", "ulimit -n"),
    "full disk": (host(CPU, disk_free=GIB), "host", "warn", "1.0 GiB free in /data", "larger disk"),
    "removed folder": (host(CPU, folder="", disk_free=None), "host", "warn", "current folder", "exists"),
    "hidden gpus": (variable(UNUSED_GPUS, VISIBLE, ""), "environment", "warn", "hides 2 GPUs", f"unset {VISIBLE}"),
    "no connections": (variable(GPU, CONNECTIONS, None), "environment", "warn", "is not set", f"{CONNECTIONS}=1"),
    "8 connections": (variable(GPU, CONNECTIONS, "8"), "environment", "warn", f"{CONNECTIONS}=8", f"{CONNECTIONS}=1"),
    "cumem": (
        variable(GPU, CUMEM, "1"),
        "environment",
        "warn",
        f"{CUMEM}=1",
        f"unset it, or start each server with {CUMEM}=1",
    ),
    "threads not set": (variable(GPU, THREADS, None), "environment", "info", "is not set", f"{THREADS}=4 "),
    "threads wrong": (variable(CPU, THREADS, "all"), "environment", "warn", f"{THREADS}=all", f"{THREADS}=8 "),
    "threads too many": (variable(CPU, THREADS, "64"), "environment", "warn", "there are 8 cores", f"{THREADS}=8 "),
    "rank without gpu": (but(GPU, platform=NO_RANK), "will be used", "fail", "LOCAL_RANK=5", "unset LOCAL_RANK"),
}


@pytest.mark.parametrize(("facts", "area", "status", "what", "fix"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_named_with_its_status_and_its_fix(facts, area, status, what, fix):
    found = [finding for finding in diagnose(facts) if finding.area == area and what in finding.what]
    assert [finding.status for finding in found] == [status], found
    assert fix in found[0].fix


@pytest.mark.parametrize("facts", [fault[0] for fault in FAULTS.values()], ids=FAULTS.keys())
def test_every_warning_and_every_failure_has_a_fix(facts):
    for finding in diagnose(facts):
        assert finding.status in ("ok", "info", "warn", "fail")
        assert finding.fix or finding.status in ("ok", "info"), finding


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_sound_machine_has_neither_warnings_nor_failures(facts):
    assert [finding for finding in diagnose(facts) if finding.status in ("warn", "fail")] == []


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.6.0-mine", "ok"), ("2.7.0a0+79aa17489c.nv25.04", "ok"), ("2.10.1", "ok"), ("2.5.1_mine", "fail")],
)
def test_the_age_of_torch_is_read_from_any_version_that_starts_with_numbers(version, status):
    (found,) = [finding for finding in diagnose(torch(CPU, version=version)) if finding.area == "torch"]
    assert found.status == status


def test_what_was_not_tried_is_no_failure_of_its_own():
    fails = [finding for finding in diagnose(no_torch(NO_TORCH)) if finding.status == "fail"]
    assert [finding.area for finding in fails] == ["torch"]


def test_hidden_gpus_are_told_once_and_are_no_failure():
    found = [finding for finding in diagnose(variable(UNUSED_GPUS, VISIBLE, "")) if finding.status in ("warn", "fail")]
    assert [finding.area for finding in found] == ["environment"]


def test_blackwell_does_not_ask_for_one_connection():
    blackwell = but(H100, capability=(10, 0))
    facts = but(variable(GPU, CONNECTIONS, None), driver=but(GPU.driver, gpus=(blackwell, blackwell)))
    assert not [finding for finding in diagnose(facts) if CONNECTIONS in finding.what]


def test_a_chosen_gpu_is_not_held_against_the_number_of_gpus():
    assert not [finding for finding in diagnose(variable(ONE_SEEN, VISIBLE, "1")) if finding.status in ("warn", "fail")]


def test_mig_slices_are_not_held_against_the_number_of_gpus():
    facts = but(second_gpu(mig=True), cuda=but(GPU.cuda, count=3))
    assert not [finding for finding in diagnose(facts) if finding.status in ("warn", "fail")]


def test_a_gpu_that_tells_nothing_about_itself_is_listed_all_the_same():
    facts = but(GPU, driver=Driver("580", gpus=(Gpu(0, "NVIDIA GB10"), Gpu(1, "NVIDIA GB10"))))
    assert "GPU 0: NVIDIA GB10" in [finding.what for finding in diagnose(facts)]


def test_torchvision_next_to_a_cuda_torch_is_left_alone():
    assert not [finding for finding in diagnose(package(GPU, "torchvision", "0.25")) if "torchvision" in finding.what]


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
        ((10, 0), ("sm_80", "sm_100a", "sm_120"), True),
    ],
)
def test_kernels_run_where_cuda_says_they_run(capability, architectures, runs):
    assert has_kernels(capability, architectures) is runs


def used(facts: Facts) -> dict[str, str]:
    return dict(finding.what.split(": ", 1) for finding in diagnose(facts) if finding.area == "will be used")


def test_what_will_be_used_follows_from_the_gpu_transformer_engine_and_apex():
    assert used(GPU)["platform"] == "cuda with nccl"
    assert "Transformer Engine" in used(GPU)["layers"] and "Transformer Engine" in used(GPU)["optimizer"]
    assert "gave no answer" in used(but(GPU, transformer_engine=SILENT))["layers"]
    plain = but(GPU, transformer_engine=None)
    assert "local" in used(plain)["layers"] and "PyTorch" in used(plain)["optimizer"]
    apex = but(plain, apex=Apex("nvidia", "/env/apex"))
    assert "local" in used(apex)["layers"] and "Apex" in used(apex)["optimizer"]
    assert used(CPU)["platform"] == "cpu with gloo" and "local" in used(CPU)["layers"]


def test_the_rollout_engine_is_the_default_of_the_configuration():
    from dcpo_megatron.config.schema import RolloutSection

    assert used(CPU)["rollout engine"].split()[0] == RolloutSection().engine


# ---- the command


def run_doctor(*arguments: str, path: Path = ROOT, folder: Path = ROOT, first: str = "") -> subprocess.CompletedProcess:
    """Runs the code ``first``, then `dcpo doctor`, in ``folder``; what lies in ``path`` is imported before all else."""
    start = f"{first}\nimport sys\nfrom dcpo_megatron.cli.doctor import main\nsys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text, encoding="utf-8")


def test_the_report_on_this_machine_agrees_with_the_trainer_and_with_the_exit_status():
    from dcpo_megatron.mcore.platform import find_apex, select_platform

    done = run_doctor("--json", "--timeout", "60")
    report = json.loads(done.stdout)
    assert all(set(finding) == {"area", "status", "what", "fix"} for finding in report["findings"])
    fails = [finding for finding in report["findings"] if finding["status"] == "fail"]
    assert done.returncode == int(bool(fails)) and report["ready"] is not bool(fails)
    platform = select_platform()
    whats = [finding["what"] for finding in report["findings"]]
    assert f"platform: {platform.name} with {platform.backend}" in whats
    assert any("not NVIDIA Apex" in what for what in whats) is (find_apex() == "impostor")


def test_an_impostor_apex_fails_the_command_with_the_way_out(tmp_path):
    write_module(tmp_path, "apex", "")
    done = run_doctor("--json", "--timeout", "60", path=tmp_path)
    [finding] = [one for one in json.loads(done.stdout)["findings"] if "not NVIDIA Apex" in one["what"]]
    assert done.returncode == 1
    assert finding["status"] == "fail" and str(tmp_path) in finding["what"] and "pip uninstall apex" in finding["fix"]


def test_hanging_libraries_do_not_make_the_command_run_longer_than_ten_seconds(tmp_path):
    for name in ("torch", "pynvml"):
        write_module(tmp_path, name, "import time; time.sleep(600)")
    start = time.monotonic()
    done = run_doctor(path=tmp_path)
    assert time.monotonic() - start < 10
    assert done.returncode == 1 and done.stdout.count("no answer within 8 s") == 2


def test_the_command_runs_without_torch_and_rich_in_a_folder_that_is_gone(tmp_path):
    for name in ("torch", "rich"):
        write_module(tmp_path, name, "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)")
    gone = tmp_path / "gone"
    gone.mkdir()
    done = run_doctor("--timeout", "60", path=tmp_path, folder=gone, first="import os; os.rmdir(os.getcwd())")
    assert done.returncode == 1 and done.stderr == ""
    assert "torch is not installed" in done.stdout and "the current folder cannot be read" in done.stdout
    assert done.stdout.rstrip().endswith("not ready to train")


def test_the_table_shows_every_finding_with_its_fix_and_its_brackets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    fix = "pip install 'transformer-engine[pytorch]'"
    doctor.print_table([Finding("optional", "warn", "no engine", fix), Finding("gpu", "ok", "GPU 0")])
    shown = capsys.readouterr().out
    for words in ("optional", "warn", "no engine", f"fix: {fix}", "gpu", "GPU 0"):
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
