#!/usr/bin/env python3
"""What needs a GPU, in parts of less than nine minutes on one H100: tests, the certificate over nccl, and the figures
that belong in docs/measurements.md.

    bash tools/gpu_check.sh --list                                         the parts; needs nothing
    bash tools/gpu_check.sh --output runs/gpu-check                        all that can run here, one after the other
    bash tools/gpu_check.sh --part tests-head --part step-0.5b --output F  some; results of earlier calls stay in F
    bash tools/gpu_check.sh --wheels WHEELS --output F                     no network: packages from a folder of wheels
    bash tools/gpu_check.sh --device cpu --tiny --output F                 every part's commands in small, without a GPU

    FOLDER/results.json, results.md        every part: verdict, seconds, commands, figures; written after each part
    FOLDER/PART/1.log, 2.log, ..., *.json  what its commands printed and measured

A part that fails does not keep the others from running. One that is not over after --deadline seconds is killed with
all of its children, and what it had written stays. What a part lacks (a package, GPUs, a C compiler, SGLang's
environment) is said before anything starts, and the part is left out.

Exit codes: 0 every part that ran passed; 1 one failed; 2 nothing was run. This file needs Python alone; PYTHON names
the interpreter whose packages are used.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 540.0
LOOK_SECONDS = 180.0
TAIL_LINES = 40
_PR_SET_CHILD_SUBREAPER = 36

# Modules, and the package that brings each where its name is another.
TRAINER = (
    "torch", "megatron.core", "transformers", "tokenizers", "safetensors", "numpy", "einops", "packaging", "httpx",
    "psutil", "pyarrow", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml", "rich",
    "math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath",
)  # fmt: skip
TESTS = (*TRAINER, "pytest", "pytest_timeout", "hypothesis")
PACKAGES = {"megatron.core": "megatron-core", "yaml": "PyYAML", "antlr4": "antlr4-python3-runtime"}
VERSIONS = (
    "torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn", "liger-kernel", "verl",
)  # fmt: skip
# Never installed from a folder of wheels: the image's own fit its driver.
NEVER = ("torch", "triton", "nvidia_", "cuda_")

# One rank first; of the others as many as there are GPUs. Experts in fp32 only: where two of them score all but alike,
# bf16's rounding decides between them.
LAYOUTS = (
    "dp1,dp1/padded,dp1/m1,dp1/padded/m16,dp1/tied,dp1/qwen3,dp1/llama,"
    "dp2,tp2-sp,pp2,pp2-vpp2,cp2,cp2/padded,tp2-sp-cp2,pp2-cp2,tp2-sp-pp2-dp2"
)
EXPERT_LAYOUTS = "dp1/moe,dp2-ep2/moe,tp2-sp-dp2-ep2-etp1/moe"


@dataclass(frozen=True)
class Settings:
    """What the commands are made from."""

    python: str
    folder: Path  # the part's own
    device: str = "cuda"
    tiny: bool = False
    gpus: int = 1
    server_python: str | None = None
    transformer_engine: bool = False

    def tool(self, name: str, *words) -> list[str]:
        """A command of ``tools/``."""
        return [self.python, f"tools/{name}.py", *map(str, words)]

    @property
    def ranks(self) -> int:
        """Training ranks of a part: a GPU each."""
        return max(1, self.gpus)


@dataclass(frozen=True)
class Part:
    """``commands`` run one after the other, all within the deadline; ``minutes`` is an estimate for one H100."""

    name: str
    what: str
    minutes: float
    commands: Callable[[Settings], list[list[str]]]
    packages: tuple[str, ...] = TRAINER
    gpus: int = 1
    compiler: bool = False  # Triton compiles a launcher at its first kernel
    server: bool = False


def _environment(s: Settings) -> list[list[str]]:
    return [
        [s.python, "tools/gpu_check.py", "--look", str(s.folder / "machine.json")],
        [s.python, "-m", "dcpo_megatron.cli", "doctor", "--json"],
    ]


def _tests(*files: str, tiny: str) -> Callable[[Settings], list[list[str]]]:
    def commands(s: Settings) -> list[list[str]]:
        junit = f"--junit-xml={s.folder / 'tests.xml'}"
        return [[s.python, "-m", "pytest", "-rfEs", junit, *([tiny] if s.tiny else files)]]

    return commands


def _certificate(dtype: str) -> Callable[[Settings], list[list[str]]]:
    def commands(s: Settings) -> list[list[str]]:
        layouts = LAYOUTS if dtype == "bfloat16" else f"{LAYOUTS},{EXPERT_LAYOUTS}"
        words = [
            "--device",
            s.device,
            "--dtype",
            dtype,
            "--max-ranks",
            s.ranks,
            "--layouts",
            "dp1" if s.tiny else layouts,
        ]
        words += ["--preset", "dcpo-paper"] if s.tiny else []
        engines = ("on", "off") if dtype == "bfloat16" and s.transformer_engine else ("off",)
        return [
            s.tool(
                "verify_parallelism",
                *(*words, "--transformer-engine", engine),
                *("--json", s.folder / f"transformer-engine-{engine}.json"),
                *("--markdown", s.folder / f"transformer-engine-{engine}.md"),
            )
            for engine in engines
        ]

    return commands


def _logprobs(hidden: int, rows: str) -> Callable[[Settings], list[list[str]]]:
    def commands(s: Settings) -> list[list[str]]:
        sizes = ["--tokens", 32768, "--hidden", hidden, "--vocab", 152064, "--repeats", 2, "--timeout", 120]
        if s.tiny:
            sizes = ["--tokens", 64, "--hidden", 16, "--vocab", 128, "--repeats", 1, "--threads", 1]
        words = ["--device", s.device, "--dtype", "bfloat16", "--rows", rows, "--json", s.folder / "logprobs.json"]
        return [s.tool("bench_logprobs", *words, *sizes)]

    return commands


_TINY_STEP = (
    "rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "training.minibatch_prompts=2",
    "model.dtype=float32",
)  # fmt: skip


def _step(shape: str, served: bool = False) -> Callable[[Settings], list[list[str]]]:
    def commands(s: Settings) -> list[list[str]]:
        words = ["--ranks", 1, "--steps", 1 if s.tiny else 3, "--warm-up", 1, "--shape", "tiny" if s.tiny else shape]
        words += ["--json", s.folder / "step.json", "--trace", s.folder / "trace.json", f"training.platform={s.device}"]
        words += _TINY_STEP if s.tiny else ()
        if served:
            words += ["--server-python", s.server_python, "publish.mode=ipc"]
            words += ["publish.colocated=true"] if s.device == "cuda" else []
        return [s.tool("bench_step", *words)]

    return commands


def _ipc(s: Settings) -> list[list[str]]:
    millions, server = (2 if s.tiny else 500), s.server_python
    return [
        s.tool("bench_publish", "--python", server, "--modes", "ipc", "--millions", millions, "--no-raw",
               "--dtype", "bfloat16" if s.device == "cuda" else "float32",
               "--repeats", 1 if s.tiny else 3, "--json", s.folder / "publish.json"),
        s.tool("check_publishing", "release", "--device", s.device, "--server-python", server, "--millions", millions,
               "--json", s.folder / "memory.json"),
    ]  # fmt: skip


def _nccl(s: Settings) -> list[list[str]]:
    millions = 2 if s.tiny else 1500
    words = ["broadcast", "--device", s.device, "--millions", millions, "--json", s.folder / "broadcast.json"]
    return [s.tool("check_publishing", *words)]


OURS, OTHERS = "full,ours,ours-fused,ours-triton,ours-fused-triton", "full,megatron,megatron-fused,liger,verl"
_SIZES = "32,768 tokens x {} x 152,064: full logits and {}"
_OUR_HEADS, _OTHER_HEADS = "this project's heads", "those of Megatron-Core, liger-kernel, verl"
_HEAD_TESTS = tuple(f"tests/mcore/test_head{name}.py" for name in ("", "_fused", "_triton", "_on_ranks"))
_REST = ("tests/mcore", *(f"--ignore={file}" for file in _HEAD_TESTS))
_TINY_TESTS = "tests/mcore/test_stage_layers.py"
PARTS = (
    Part("environment", "dcpo doctor, versions, cards", 1, _environment),
    Part("tests-objectives", "tests/objectives", 2, _tests("tests/objectives", tiny=_TINY_TESTS), TESTS),
    Part("tests-head", "the heads, Triton's kernels on the GPU", 4, _tests(*_HEAD_TESTS, tiny=_TINY_TESTS), TESTS,
         compiler=True),
    Part("tests-mcore", "the rest of tests/mcore: the CPU platform beside a GPU too", 5,
         _tests(*_REST, tiny=_TINY_TESTS), TESTS),
    Part("certificate-fp32", "local layers over nccl, fp32 products in fp32", 4, _certificate("float32"),
         compiler=True),
    Part("certificate-bf16", "Transformer Engine's layers where it imports, and the local ones", 5,
         _certificate("bfloat16"), compiler=True),
    Part("logprobs-3584-ours", _SIZES.format("3,584", _OUR_HEADS), 5, _logprobs(3584, OURS), compiler=True),
    Part("logprobs-3584-others", _SIZES.format("3,584", _OTHER_HEADS), 5, _logprobs(3584, OTHERS), compiler=True),
    Part("logprobs-1536-ours", _SIZES.format("1,536", _OUR_HEADS), 4, _logprobs(1536, OURS), compiler=True),
    Part("logprobs-1536-others", _SIZES.format("1,536", _OTHER_HEADS), 4, _logprobs(1536, OTHERS), compiler=True),
    Part("step-0.5b", "a step's table: Qwen2.5-0.5B's shape, random weights, embedded engine", 4,
         _step("qwen2.5-0.5b"), compiler=True),
    Part("step-1.5b", "the same: Qwen2.5-1.5B's shape", 6, _step("qwen2.5-1.5b"), compiler=True),
    Part("publish-ipc", "a SGLang server on the same GPU: weights by CUDA IPC, memory given back", 6, _ipc,
         compiler=True, server=True),
    Part("step-served", "a step of Qwen2.5-0.5B's shape, a SGLang server on the same GPU sampling", 6,
         _step("qwen2.5-0.5b", served=True), compiler=True, server=True),
    Part("publish-nccl", "weights over nccl to a process on a second GPU that plays a server", 2, _nccl, gpus=2),
)  # fmt: skip


# -- what is here ------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """What an interpreter sees. ``problem``: why its torch cannot be asked."""

    python: str = ""
    missing: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    transformer_engine: bool = False
    compiler: str | None = None
    headers: bool = False
    nvcc: str | None = None
    problem: str = ""

    def line(self) -> str:
        """One line for the results."""
        cards = f"{len(self.gpus)} x {self.gpus[0]}" if self.gpus else "no GPU"
        return ", ".join(
            [cards, f"Python {self.python}", *(f"{name} {value}" for name, value in self.versions.items())]
        )


def look() -> dict:
    """The fields of :class:`Machine`, of this interpreter."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    found = {
        "python": platform.python_version(),
        "missing": [module for module in TESTS if not _importable(module)],
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
        "compiler": compiler,
        "headers": Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
        "nvcc": shutil.which("nvcc") or next(iter(map(str, Path("/usr/local/cuda/bin").glob("nvcc"))), None),
    }
    if "torch" in found["missing"]:
        return found | {"problem": "torch is not installed"}
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    found["gpus"] = [f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards]
    if cards:
        found["versions"]["CUDA"] = str(torch.version.cuda)
        found["versions"]["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import transformer_engine.pytorch  # noqa: F401

            found["transformer_engine"] = True
    return found


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(python: str, env: dict[str, str]) -> Machine:
    """:func:`look` in a process of its own, which may hang in CUDA or die."""
    command = [python, str(ROOT / "tools" / "gpu_check.py"), "--look", "-"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LOOK_SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return Machine(problem=f"{python} did not say within {LOOK_SECONDS:.0f} s what it sees: CUDA hangs?")
    except OSError as error:
        return Machine(problem=f"{python} cannot be run: {error}")
    if done.returncode:
        return Machine(problem=f"{python} cannot be asked: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Machine(**json.loads(done.stdout.splitlines()[-1]))


def lacks(part: Part, machine: Machine, args: argparse.Namespace) -> str | None:
    """Why a part cannot run here; None where it can."""
    absent = [PACKAGES.get(module, module.replace("_", "-")) for module in machine.missing if module in part.packages]
    if absent:
        return f"{', '.join(absent)} not installed: give wheels with --wheels FOLDER"
    if part.server and not args.server_python:
        return "no SGLang environment: give its interpreter with --server-python"
    if args.device == "cpu":
        return None
    if len(machine.gpus) < part.gpus:
        return f"it needs {part.gpus} GPUs and {len(machine.gpus)} are visible"
    if part.compiler and not machine.compiler:
        return "no C compiler, which Triton needs: install gcc, or set CC"
    if part.compiler and not machine.headers:
        return f"no Python.h, which Triton needs: install the development package of Python {machine.python}"
    return None


# -- wheels ------------------------------------------------------------------------------------------------------------


def install(wheels: Path, python: str, into: Path) -> str | None:
    """Unpacks a folder's wheels into ``into``, without network or dependencies, torch left alone; what went wrong."""
    files = sorted(wheels.glob("*.whl"))
    chosen = [file for file in files if not file.name.lower().replace("-", "_").startswith(NEVER)]
    for file in set(files) - set(chosen):
        print(f"left alone: {file.name}")
    if not chosen:
        return f"{wheels} holds no wheel (*.whl) that could be installed"
    shutil.rmtree(into, ignore_errors=True)
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-index",
        "--no-deps",
        "--target",
        str(into),
    ]
    done = subprocess.run([*command, *map(str, chosen)], capture_output=True, text=True)
    if done.returncode:
        return f"pip could not install {wheels}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    print(f"installed from {wheels}: {', '.join(file.name.split('-')[0] for file in chosen)}")
    return None


# -- running -----------------------------------------------------------------------------------------------------------


def run_part(part: Part, settings: Settings, env: dict[str, str], deadline: float) -> dict:
    """Runs a part's commands; the row of its results. Everything that it started is gone afterwards."""
    shutil.rmtree(settings.folder, ignore_errors=True)
    settings.folder.mkdir(parents=True)
    began, commands, status = time.monotonic(), [], "passed"
    for number, command in enumerate(part.commands(settings), start=1):
        log = settings.folder / f"{number}.log"
        print(f"== {part.name}: {shlex.join(command)}", flush=True)
        started = time.monotonic()
        code = run_command(command, log, env, max(0.0, began + deadline - started))
        commands.append({"command": shlex.join(command), "code": code, "seconds": round(time.monotonic() - started, 1)})
        print("\n".join(_tail(log)), flush=True)
        if code is None:
            status = f"killed after {deadline:g} s"
            break
        if code:
            status = "failed"
    row = {"status": status, "seconds": round(time.monotonic() - began, 1), "commands": commands}
    return row | {"figures": _figures(settings.folder)}


def run_command(command: Sequence[str], log: Path, env: dict[str, str], seconds: float) -> int | None:
    """The exit code, or None where it was killed after ``seconds``. No descendant is left, in no session."""
    with open(log, "wb") as out:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        except OSError as error:
            out.write(f"{error}\n".encode())
            return 127
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_descendants()
            process.wait()


def adopt_orphans() -> None:
    """Processes whose parent has died become this process's children, so that :func:`run_command` finds them."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _kill_descendants() -> None:
    until = time.monotonic() + 20
    while (found := _descendants()) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in found:
            with contextlib.suppress(ChildProcessError):  # not ours yet: its own parent is to die first
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            rest = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(rest[1]), []).append(int(entry.name))
    found, waiting = [], [os.getpid()]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def _tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]


def _figures(folder: Path) -> dict:
    """What its commands wrote as JSON, by file; traces stay files."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError):
            if file.stem != "trace":
                found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def write_results(output: Path, results: dict[str, dict]) -> None:
    """``results.json`` and ``results.md`` of all parts that were ever run or left out in ``output``."""
    _write(output / "results.json", json.dumps(results, indent=1) + "\n")
    lines = ["# GPU check", "", "| part | verdict | seconds | when | on |", "|---|---|---|---|---|"]
    for name, row in results.items():
        lines.append(f"| {name} | {row['status']} | {row.get('seconds', '-')} | {row['when']} | {row['machine']} |")
    for name, row in results.items():
        lines += ["", f"## {name}"]
        for number, command in enumerate(row.get("commands", ()), start=1):
            lines += ["", "```bash", command["command"], "```", ""]
            lines += [
                f"exit code {command['code']}, {command['seconds']} s",
                "",
                "```",
                *_tail(output / name / f"{number}.log"),
                "```",
            ]
        for table in sorted((output / name).glob("*.md")):
            lines += ["", table.stem, "", table.read_text(encoding="utf-8").rstrip()]
    _write(output / "results.md", "\n".join(lines) + "\n")


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


# -- the command -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--list", action="store_true", help="list the parts, and stop")
    made.add_argument(
        "--part", action="append", default=[], metavar="NAME", help="run this part; may be repeated; default: all"
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        default=Path("runs/gpu-check"),
        help="where logs and results go (%(default)s)",
    )
    made.add_argument(
        "--wheels",
        type=Path,
        metavar="FOLDER",
        help="install what lies there into OUTPUT/packages first; no network, no torch",
    )
    made.add_argument(
        "--server-python", metavar="PATH", help="interpreter of SGLang's environment; without it two parts are left out"
    )
    made.add_argument(
        "--deadline", type=float, default=DEADLINE, metavar="S", help="seconds of a part (default: %(default)g)"
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same commands over gloo")
    made.add_argument("--tiny", action="store_true", help="sizes that show only that the commands run")
    made.add_argument("--look", metavar="FILE", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; returns the exit code."""
    args = parser().parse_args(argv)
    if args.look:
        text = json.dumps(look())
        print(text) if args.look == "-" else _write(Path(args.look), text)
        return 0
    if args.list:
        for part in PARTS:
            print(f"{part.name:21} about {part.minutes:g} min  {_needs(part):46} {part.what}")
        return 0
    try:
        return _run(args)
    except _Refused as refused:
        print(f"gpu_check: {refused}", file=sys.stderr)
        return 2


class _Refused(Exception):
    """Why nothing is run, in one sentence."""


def _needs(part: Part) -> str:
    words = [f"{part.gpus} GPU" + "s" * (part.gpus > 1)]
    words += ["pytest, hypothesis"] if part.packages == TESTS else []
    words += ["C compiler"] if part.compiler else []
    words += ["SGLang environment"] if part.server else []
    return "needs " + ", ".join(words)


def _run(args: argparse.Namespace) -> int:
    known = {part.name: part for part in PARTS}
    unknown = [name for name in args.part if name not in known]
    if unknown:
        raise _Refused(f"there is no part {unknown[0]!r}: the parts are {', '.join(known)}")
    if not args.deadline > 0:
        raise _Refused(f"--deadline {args.deadline:g} must be above 0")
    if args.server_python:
        found = shutil.which(args.server_python)
        if not found:
            raise _Refused(f"--server-python {args.server_python} is no program")
        args.server_python = os.path.abspath(found)
    output = args.output.absolute()
    env = dict(os.environ)
    packages = output / "packages"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _Refused(f"--output {args.output} cannot be made: {error.strerror}") from None
    if args.wheels and (problem := install(args.wheels, sys.executable, packages)):
        raise _Refused(problem)
    env["PYTHONPATH"] = os.pathsep.join(
        map(str, filter(None, (packages if packages.is_dir() else None, ROOT, env.get("PYTHONPATH"))))
    )
    machine = ask(sys.executable, env)
    if machine.problem:
        raise _Refused(f"{machine.problem}: nothing was run")
    if args.device == "cuda" and not machine.gpus:
        raise _Refused(f"no GPU is visible to {sys.executable}: nothing was run")
    print(machine.line())
    chosen = [known[name] for name in dict.fromkeys(args.part)] or list(PARTS)
    reasons = {part.name: reason for part in chosen if (reason := lacks(part, machine, args))}
    for line in _missing(machine, args):
        print(f"missing: {line}")
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}")
    if len(reasons) == len(chosen):
        raise _Refused(f"nothing can be run: {next(iter(reasons.values()))}")
    return _run_parts(chosen, reasons, machine, args, output, env)


def _missing(machine: Machine, args: argparse.Namespace) -> list[str]:
    """What would let more be run, or run faster."""
    absent = [PACKAGES.get(module, module.replace("_", "-")) for module in machine.missing]
    found = [f"package {name}" for name in absent]
    if args.device == "cuda":
        found += [] if len(machine.gpus) > 1 else ["a second GPU (publish-nccl)"]
        found += (
            [] if machine.transformer_engine else ["Transformer Engine (certificate-bf16 has the local layers alone)"]
        )
        found += [] if machine.compiler else ["a C compiler (Triton)"]
        found += [] if machine.headers else ["Python.h (Triton)"]
        found += (
            [] if machine.nvcc else ["nvcc (only to build Transformer Engine, and for kernels that SGLang compiles)"]
        )
    found += [] if args.server_python else ["a SGLang environment (--server-python)"]
    return found


def _run_parts(chosen, reasons, machine: Machine, args: argparse.Namespace, output: Path, env: dict[str, str]) -> int:
    adopt_orphans()
    file = output / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    failed = []
    for part in chosen:
        row = {"when": time.strftime("%Y-%m-%d %H:%M"), "machine": machine.line()}
        if part.name in reasons:
            row["status"] = f"left out: {reasons[part.name]}"
        else:
            settings = Settings(
                sys.executable, output / part.name, args.device, args.tiny, len(machine.gpus), args.server_python,
                machine.transformer_engine,
            )  # fmt: skip
            row |= run_part(part, settings, env, args.deadline)
            failed += [part.name] if row["status"] != "passed" else []
            print(f"== {part.name}: {row['status']}, {row['seconds']} s\n", flush=True)
        results[part.name] = row
        write_results(output, results)
    print(
        f"{len(chosen) - len(reasons)} parts run, {len(reasons)} left out; "
        + (f"FAILED: {', '.join(failed)}" if failed else "all passed")
    )
    print(f"results: {output / 'results.md'}, {file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
