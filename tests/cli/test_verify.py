"""``dcpo verify`` from the command line: what it prints, writes and refuses, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_megatron.cli.verify import main

ROOT = Path(__file__).resolve().parents[2]


def verified(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/verify_parallelism.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True,
        timeout=300
    )  # fmt: skip


def test_a_layout_that_is_not_in_the_list_passes_and_is_written_down(tmp_path):
    table, verdicts = tmp_path / "table.md", tmp_path / "verdicts.json"
    done = verified(
        "--layouts",
        "tp2-sp/llama/padded/m4",
        "--preset",
        "dr-grpo,grpo+mis",
        "--seed",
        5,
        "--json",
        verdicts,
        "--markdown",
        table,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "1 of 1 layouts passed" in done.stdout and "gradient" in done.stdout
    found = json.loads(verdicts.read_text())
    assert [(row["layout"], row["objective"], row["passed"]) for row in found["verdicts"]] == [
        ("tp2-sp/llama/padded/m4", "dr-grpo", True),
        ("tp2-sp/llama/padded/m4", "grpo+mis", True),
    ]
    assert found["megatron-core"] and all(0 < row["gradient_error"] <= 2e-5 for row in found["verdicts"])
    assert "| tp2-sp/llama/padded/m4 | 2 | 2 |" in table.read_text()


def test_a_layout_that_fails_is_named_and_ends_with_exit_code_1(tmp_path):
    done = verified("--layouts", "dp2", "--preset", "grpo", "--timeout", 0.01, "--json", tmp_path / "verdicts.json")
    assert done.returncode == 1, done.stderr
    assert "FAIL" in done.stdout and "gave no answer within" in done.stdout and "failed: dp2" in done.stdout
    (row,) = json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]
    assert row["passed"] is False and row["gradient_error"] is None


def test_the_lists(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert "tp2-sp-pp2-vpp2-cp2" in printed and "dcpo-paper" in printed and "fast: " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--layouts", "tp3"], "layout 'tp3': "),
        (["--preset", "grop"], "unknown objective 'grop'"),
        (["--layouts", "tp2", "--max-ranks", "1"], "raise --max-ranks"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json cannot be written"),
        (["--megatron-path", "/no/such/folder"], "has no megatron/core"),
        (["--transformer-engine", "on", "--dtype", "bfloat16"], "it does not import here"),
        (["--device", "cuda", "--layouts", "pp4-dp16"], "these layouts need 64 GPUs"),
    ],
)
def test_what_would_fail_after_minutes_is_refused_at_once(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("dcpo: error: ") and message in said and said.count("\n") == 1
