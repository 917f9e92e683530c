"""The benchmark of the reward history: what it measures and prints, on a history small enough for a test. No number
here is a claim about speed."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_history.py"


def bench(*options):
    return subprocess.run([sys.executable, TOOL, *options], capture_output=True, text=True, timeout=120)


def test_a_run_measures_the_file_and_two_real_ranks(tmp_path):
    file = tmp_path / "found.json"
    options = ("--prompts", "2000", "--batch", "8", "--group", "4", "--repeats", "2", "--json", str(file))
    done = bench(*options)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["measurements"]
    assert found["bytes"] > 2000 * 60
    assert len(found["observe"]) == len(found["all_reduce"]) == 2
    assert all(a - b == c for a, b, c in zip(found["observe"], found["all_reduce"], found["beside"], strict=True))
    assert "save 2,000 prompts" in done.stdout and "limit 100 MB" in done.stdout


def test_more_prompts_a_batch_than_the_history_holds_are_refused():
    done = bench("--prompts", "10", "--batch", "8")
    assert done.returncode == 2 and "--prompts" in done.stderr
