"""What the doctor reads is what is there, and nothing that it imports can hang or kill it; shown with real packages."""

import resource
import subprocess
import sys
import time

import pytest

from dcpo_megatron.doctor.facts import Apex, CudaView, Driver, Gpu, Problem
from dcpo_megatron.doctor.findings import GIB
from dcpo_megatron.doctor.probes import find_megatron, find_packages, look_at_host, read_answers, run_children
from dcpo_megatron.doctor.stages import STAGES

LIMIT = 60.0  # seconds; never reached where a child ends by itself

# Enough of torch for every stage but those of sockets, in no time.
TORCH = """
import sys, types
__version__ = "2.13.0+fake"
version = types.SimpleNamespace(cuda=None, hip=None)
cuda = types.SimpleNamespace(is_available=lambda: False, device_count=lambda: 0, get_arch_list=lambda: [])
device = lambda *arguments: arguments
distributed = sys.modules["torch.distributed"] = types.ModuleType("torch.distributed")
distributed.is_available = lambda: False
"""
TORCH_ON_GPU = (
    TORCH
    + """
version.cuda = "13.0"
cuda.is_available, cuda.device_count, cuda.get_arch_list = lambda: True, lambda: 1, lambda: ["sm_90"]
"""
)
NVML = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
class NVMLError_LibRmVersionMismatch(NVMLError): pass
class NVMLError_GpuIsLost(NVMLError): pass
class NVMLError_NotSupported(NVMLError): pass
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
class Memory: total, free = 80 << 30, 40 << 30
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


@pytest.fixture
def path_with(tmp_path):
    """``path_with(apex="text of its __init__")``: a path on which these modules come first."""

    def write(**modules: str) -> list[str]:
        for name, text in modules.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text(text, encoding="utf-8")
        return [str(tmp_path), *sys.path]

    return write


def test_an_impostor_apex_is_told_from_nvidia_apex(path_with, tmp_path):
    path = path_with(torch=TORCH, apex="")
    assert run_children(["torch"], LIMIT, path)["apex"] == Apex("impostor", str(tmp_path / "apex"))
    path = path_with(amp_C="")
    assert run_children(["torch"], LIMIT, path)["apex"] == Apex("nvidia", str(tmp_path / "apex"))


def test_a_stage_that_raises_does_not_keep_the_later_ones_from_answering(path_with):
    answers = run_children(["torch"], LIMIT, path_with(torch=TORCH))
    assert answers["store"].kind == "error" and "TCPStore" in answers["store"].text
    assert answers["platform"] == ("cpu", "gloo")


def test_an_import_that_kills_its_process_is_told_with_its_signal(path_with):
    answers = run_children(["torch"], LIMIT, path_with(torch="import os; os.abort()"))
    assert answers["torch"].kind == "died" and "SIGABRT" in answers["torch"].text
    assert {answers[stage].kind for stage in STAGES["torch"] if stage != "torch"} == {"skipped"}


def test_an_import_that_hangs_costs_the_limit_and_no_more(path_with):
    start = time.monotonic()
    answers = run_children(["torch", "nvml"], 3.0, path_with(torch="import time; time.sleep(600)", pynvml=NVML))
    assert time.monotonic() - start < 6
    assert answers["torch"] == Problem("silent", "no answer within 3 s")
    assert isinstance(answers["driver"], Driver)


def test_a_transformer_engine_that_kills_its_process_leaves_the_other_answers(path_with):
    answers = run_children(["torch"], LIMIT, path_with(torch=TORCH_ON_GPU, transformer_engine="import os; os._exit(3)"))
    assert answers["transformer_engine"] == Problem("died", "the process ended with exit status 3")
    assert answers["cuda"] == CudaView(available=True, count=1, architectures=("sm_90",))
    assert answers["platform"] == ("cuda", "nccl")


def test_transformer_engine_is_imported_on_gpus_only(path_with, tmp_path):
    path = path_with(torch=TORCH, transformer_engine="raise ImportError('undefined symbol')")
    assert run_children(["torch"], LIMIT, path)["transformer_engine"] is None
    (tmp_path / "torch" / "__init__.py").write_text(TORCH_ON_GPU)
    answer = run_children(["torch"], LIMIT, path)["transformer_engine"]
    assert answer == Problem("error", "ImportError: undefined symbol")


def test_what_a_library_prints_does_not_mix_with_the_answers(path_with):
    noise = 'import os\nprint(\'{"stage": "torch"}\', flush=True)\nos.system("echo noise")\n'
    assert run_children(["torch"], LIMIT, path_with(torch=noise + TORCH))["torch"].version == "2.13.0+fake"


def test_a_missing_module_is_told_by_name(path_with):
    text = "raise ModuleNotFoundError(\"No module named 'pynvml'\", name='pynvml')"
    answer = run_children(["nvml"], LIMIT, path_with(pynvml=text))["driver"]
    assert (answer.kind, answer.missing) == ("error", "pynvml")


@pytest.mark.parametrize("error", ["LibraryNotFound", "DriverNotLoaded"])
def test_no_driver_is_an_answer_and_not_an_error(path_with, error):
    text = NVML + f"def nvmlInit(): raise NVMLError_{error}('none')\n"
    assert run_children(["nvml"], LIMIT, path_with(pynvml=text))["driver"] == Driver(absent="none")


def test_a_driver_that_does_not_fit_its_library_is_an_error(path_with):
    text = NVML + "def nvmlInit(): raise NVMLError_LibRmVersionMismatch('mismatch')\n"
    answer = run_children(["nvml"], LIMIT, path_with(pynvml=text))["driver"]
    assert answer == Problem("error", "NVMLError_LibRmVersionMismatch: mismatch")


def test_a_lost_gpu_does_not_hide_the_others_and_unsupported_questions_stay_open(path_with):
    answer = run_children(["nvml"], LIMIT, path_with(pynvml=NVML))["driver"]
    first = Gpu(0, "NVIDIA H100", memory_total=80 * GIB, memory_free=40 * GIB, capability=(9, 0), ecc_errors=None)
    assert answer == Driver("580.65", cuda=(12, 8), gpus=(first, Gpu(1, problem="GPU is lost")))


def test_a_process_that_cannot_be_started_is_a_problem_of_its_stages(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    answer = run_children(["nvml"], LIMIT)["driver"]
    assert answer.kind == "error" and "no process could be started" in answer.text


def test_an_answer_cut_off_in_the_middle_counts_as_none():
    whole = b'{"stage": "torch", "value": {"version": "2.13.0", "cuda": null, "hip": null, "backends": []}}'
    answers = read_answers("torch", whole + b'\n{"stage": "st', Problem("died", "the process ended with SIGKILL"))
    assert answers["torch"].version == "2.13.0"
    assert answers["store"].kind == "died" and answers["gloo"].kind == "skipped"


def test_the_doctor_itself_imports_neither_torch_nor_nvml():
    code = f"import sys; sys.path[:] = {sys.path!r}; import dcpo_megatron.cli.doctor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert "dcpo_megatron.cli.doctor" in done.stdout.split()
    assert not {"torch", "pynvml", "megatron", "rich"} & set(done.stdout.split())


def test_a_checkout_of_megatron_on_the_path_hides_the_installed_wheel(tmp_path):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = 'rc1'\n")
    assert find_megatron([str(tmp_path), *sys.path]) == "0.20.0rc1"
    assert find_packages([str(tmp_path), *sys.path])["megatron-core"] == "0.20.0rc1"


def test_packages_are_found_by_metadata_or_by_module_and_never_by_a_bare_folder(tmp_path):
    (tmp_path / "math_verify-0.9.0.dist-info").mkdir()
    (tmp_path / "math_verify-0.9.0.dist-info" / "METADATA").write_text("Name: math-verify\nVersion: 0.9.0\n")
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    (tmp_path / "wandb").mkdir()  # as its runs leave it behind
    assert find_packages([str(tmp_path)]) == {"math-verify": "0.9.0", "sglang": ""}


def test_the_host_is_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    host = look_at_host()
    assert host.python == tuple(sys.version_info[:3]) and host.folder == str(tmp_path)
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert look_at_host().triton_lacks == "Triton needs a C compiler, and CC=/nowhere/cc is none"
    assert host.environment["CUDA_VISIBLE_DEVICES"] == "" and "OMP_NUM_THREADS" not in host.environment
    assert host.cores > 0 and host.disk_free > 0
    assert host.open_files in (resource.getrlimit(resource.RLIMIT_NOFILE)[0], sys.maxsize)
