"""The pages say what works: every Python block runs, every shell block is bash, and the commands in it are taken by the
programs that they call."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_megatron.cli.main import main
from dcpo_megatron.config.loading import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Scripts that hand what follows (their own first words, how many) to `dcpo train`.
TRAIN_SCRIPTS = {"pretrain_dcpo.sh": 0, "train.sbatch": 1, "seeds.sbatch": 1, "launch_cluster.py": None}


def blocks(language: str) -> list:
    """``pytest.param(page, text)`` for each."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(page, match[1], id=f"{page.name}:{line}"))
    return found


# One process imports what they share; each block runs in a fork of it, with what its page says the reader has.
RUN_BLOCKS = """
import json, os, sys, traceback
from dcpo_megatron.mcore.platform import prepare, select_platform
prepare(select_platform("cpu"))
import dcpo_megatron.mcore
from types import SimpleNamespace
for name, text in json.load(sys.stdin):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            exec(compile(text, name, "exec"), {"__name__": "block", "config": SimpleNamespace(num_layers=2)})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        print("FAILED", name, file=sys.stderr)
        sys.exit(1)
"""


def test_every_python_block_runs(tmp_path):
    from dcpo_megatron.data import encode_responses
    from dcpo_megatron.network import free_port

    kept = tmp_path / "runs" / "dcpo" / "bad-batch-step-12.responses"  # docs/operations.md reads it
    kept.parent.mkdir(parents=True)
    kept.write_bytes(encode_responses([]))
    given = [(case.id, case.values[1]) for case in blocks("python")]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_BLOCKS],
        input=json.dumps(given),
        env=os.environ | place | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "PYTHONPATH": found},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(given) >= 8 and "update 2: loss" in done.stdout


@pytest.mark.parametrize("page, text", blocks("bash"))
def test_a_shell_block_is_bash_and_its_commands_are_taken(monkeypatch, page, text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(ROOT)
    for words in commands(text):
        try:
            check(words, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: refused with exit code {error.code}")


def test_every_configuration_of_the_paper_index_is_taken_and_every_file_is_there():
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/paper_index.md").read_text().splitlines() if "|" in line]
    configurations = 0
    for _, _, configuration, files in rows[2:]:
        for code in re.findall(r"`([^`]+)`", configuration):
            words = code.split()
            recipes = [words[at + 1] for at, word in enumerate(words) if word == "--config"]
            given = [word for word in words if "=" in word]
            if recipes or given:
                load_config(recipes, ["model.path=anywhere", "data.files=[any.jsonl]", *given]).make_objective()
                configurations += 1
        for name in re.findall(r"`(\S+\.py)`", files):
            assert (ROOT / "dcpo_megatron" / name).is_file(), name
    assert configurations > 15


def test_a_command_that_would_be_refused_is_noticed(monkeypatch, capsys):
    for line in ("dcpo serve", "dcpo train training.stesp=3", "python tools/bench_save.py --fast", "make nothing",
                 "ssh h 'cd x && python -m dcpo_megatron.cli eval'",
                 "sbatch examples/slurm/train.sbatch /run --cofnig x", "bash examples/pretrain.sh"):  # fmt: skip
        (words,) = commands(line)
        with pytest.raises((SystemExit, ValueError, AssertionError)):
            check(words, monkeypatch)


def commands(text: str) -> list[list[str]]:
    """The commands of ours in a shell block, those that stand inside a word (for ssh) included."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        for start, word in enumerate(words):
            if re.search(r"dcpo_megatron\.cli \w", word):
                found += commands(word.partition("&& ")[2])
            elif word in ("dcpo", "make", "torchrun", "sbatch", "bash", "pytest") or word.endswith("python"):
                found.append(_up_to_operator(words[start:]))
                break
    return [words for words in found if words[1:2] != ["-c"] and words[1:3] != ["-m", "venv"]]


def _up_to_operator(words: list[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if word in ("&", "&&", "|", "||", ";", "do"):
            break
        kept.append(word.rstrip(";"))
        if word.endswith(";"):
            break
    return kept


class _TakenError(Exception):
    """The command line was parsed."""


def check(words: list[str], monkeypatch) -> None:
    """Raises SystemExit, ValueError or AssertionError where the program refuses ``words``. Nothing is run."""
    name, *rest = words
    for script, own in TRAIN_SCRIPTS.items():
        at = next((place for place, word in enumerate(words) if word.endswith(script)), None)
        if at is not None:
            assert Path(words[at]).is_file(), f"there is no {words[at]}"
            rest = words[words.index("--") + 1 :] if own is None else words[at + 1 + own :]
            return _parsed("dcpo", ["train", *rest], monkeypatch)
    if name == "make":
        made = subprocess.run(["make", "--dry-run", "--silent", *rest], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    elif name == "dcpo":
        _parsed("dcpo", rest, monkeypatch)
    elif rest[:2] == ["-m", "dcpo_megatron.cli"]:
        _parsed("dcpo", rest[2:], monkeypatch)
    elif name == "pytest":
        assert Path(rest[0]).exists(), f"there is no {rest[0]}"
    elif rest:
        assert Path(rest[0]).is_file(), f"there is no {rest[0]}"
        if name != "bash":
            _parsed(rest[0], rest[1:], monkeypatch)


def _parsed(program: str, words: list[str], monkeypatch) -> None:
    words = [word for word in words if word != "..."]
    with monkeypatch.context() as patched:
        for parse in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, parse, _then_stop(getattr(argparse.ArgumentParser, parse)))
        patched.setattr(sys, "argv", [program, *words])
        with pytest.raises(_TakenError):
            main(words) if program == "dcpo" else runpy.run_path(program, run_name="__main__")
    if program == "dcpo" and words[0] == "train":
        given = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        load_config([], ["model.path=anywhere", "data.files=[any.jsonl]", *given])


def _then_stop(parse):
    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise _TakenError

    return parse_and_stop
