"""The check of what needs a GPU: what it says and leaves where there is none, and that a part neither hangs nor leaves
anything running."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*words, **variables) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        ["bash", "tools/gpu_check.sh", *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )


def test_the_list_needs_no_package_and_every_part_is_below_nine_minutes(check):
    bare = subprocess.run([sys.executable, "-I", "-S", TOOL, "--list"], capture_output=True, text=True, check=True)
    lines = bare.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in check.PARTS]
    for line in lines:
        assert float(re.search(r"about (\S+) min", line)[1]) < 9 and re.search(r"needs [12] GPU", line)
    assert check.DEADLINE == 540


def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path):
    done = run("--output", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"gpu_check: no GPU is visible to {sys.executable}: nothing was run\n"
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "nothing", "--output", "x"], "there is no part 'nothing'"),
        (["--server-python", "/no/python", "--output", "x"], "/no/python is no program"),
        (["--deadline", "0", "--output", "x"], "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(check, capsys, words, message):
    assert check.main(words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def lacking(check, part: str, device: str = "cuda", server: str | None = "python", **here) -> str | None:
    whole = dict(python="3.12.3", gpus=["H100", "H100"], compiler="/usr/bin/cc", headers=True)
    machine = check.Machine(**whole | here)
    (found,) = (one for one in check.PARTS if one.name == part)
    return check.lacks(found, machine, Namespace(device=device, server_python=server))


def test_what_a_part_lacks_is_named_and_nothing_else_keeps_it_from_running(check):
    assert not any(lacking(check, part.name) for part in check.PARTS)
    assert "2 GPUs and 1 are" in lacking(check, "publish-nccl", gpus=["H100"])
    assert "--server-python" in lacking(check, "publish-ipc", server=None)
    assert "C compiler" in lacking(check, "tests-head", compiler=None)
    assert "Python.h" in lacking(check, "logprobs-1536-ours", headers=False)
    missing = ["megatron.core", "yaml", "pytest_timeout"]
    assert lacking(check, "step-0.5b", missing=missing).startswith("megatron-core, PyYAML not installed")
    assert "pytest-timeout" in lacking(check, "tests-mcore", missing=missing)
    assert lacking(check, "step-0.5b", missing=["pytest"], headers=True, nvcc=None) is None
    assert lacking(check, "publish-nccl", device="cpu", gpus=[]) is None


def test_what_is_missing_on_the_machine_is_said_before_anything_starts(check):
    bare = check.Machine(python="3.12.3", missing=["pydantic_core"], gpus=["H100"])
    said = "\n".join(check._missing(bare, Namespace(device="cuda", server_python=None)))
    for word in ("pydantic-core", "second GPU", "Transformer Engine", "C compiler", "Python.h", "nvcc", "SGLang"):
        assert word in said


# Children in sessions of their own, as servers are; one survives its parent.
HANGS = """
import gpu_check as g, json, subprocess, sys
from pathlib import Path
g.adopt_orphans()
wrote = [sys.executable, "-c", f"open(r'{sys.argv[1]}/part/first.json', 'w').write('[1]'); print('first is done')"]
hangs = ["bash", "-c", "echo on its way; (setsid sleep 4711 &) ; setsid sleep 4712"]
part = g.Part("part", "", 1, lambda s: [wrote, hangs, wrote])
row = g.run_part(part, g.Settings(sys.executable, Path(sys.argv[1]) / "part"), {}, 1.5)
g.write_results(Path(sys.argv[1]), {"part": row | {"when": "now", "machine": "here"}})
def words(entry):
    try:
        return entry.read_bytes().split(bytes(1))
    except OSError:  # it has just ended
        return []
left = [entry for entry in Path("/proc").glob("[0-9]*/cmdline")
        if words(entry)[:2] in ([b"sleep", b"4711"], [b"sleep", b"4712"])]
print(json.dumps([str(entry) for entry in left]))
"""


def test_a_part_that_hangs_is_killed_with_its_children_and_what_it_had_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path], cwd=ROOT / "tools", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    row = json.loads((tmp_path / "results.json").read_text())["part"]
    assert row["status"] == "killed after 1.5 s" and 1.5 <= row["seconds"] < 25
    assert [command["code"] for command in row["commands"]] == [0, None] and row["figures"] == {"first": [1]}
    told = (tmp_path / "results.md").read_text()
    assert "| part | killed after 1.5 s |" in told and "first is done" in told and "on its way" in told


def test_wheels_are_installed_without_network_and_torch_is_left_alone(check, tmp_path, capsys):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("thing", "torch", "nvidia_nccl_cu13"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            info = f"{name}-1.0.dist-info"
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: no-such\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    into = tmp_path / "packages"
    assert check.install(wheels, sys.executable, into) is None
    assert {file.name for file in into.glob("*.py")} == {"thing.py"}
    assert "left alone: torch-1.0" in capsys.readouterr().out
    assert "holds no wheel" in check.install(tmp_path, sys.executable, into)


def test_parts_run_on_a_cpu_in_small_and_one_that_fails_does_not_keep_the_others_from_running(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps({"old": {"status": "passed", "when": "then", "machine": "there"}})
    )
    parts = ["--part", "tests-mcore", "--part", "publish-nccl", "--part", "publish-ipc"]
    done = run("--device", "cpu", "--tiny", "--output", tmp_path, *parts, PYTEST_ADDOPTS="--no-such-option")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "left out: publish-ipc: no SGLang environment" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["old", "tests-mcore", "publish-nccl", "publish-ipc"]
    assert results["tests-mcore"]["status"] == "failed" and results["publish-nccl"]["status"] == "passed"
    assert results["publish-nccl"]["figures"]["broadcast"]["bytes"] > 2e6
    told = (tmp_path / "results.md").read_text()
    assert "| publish-nccl | passed |" in told and "3 publications bit for bit" in told
