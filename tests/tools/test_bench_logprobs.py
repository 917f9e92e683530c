"""The benchmark of heads: what it measures and prints, on a problem small enough for a test. No number here is a claim
about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_logprobs.py"


def bench(*options):
    return subprocess.run(
        [sys.executable, TOOL, *options],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_run_measures_every_row_that_can_run_says_why_others_cannot_and_their_gradients_agree(tmp_path):
    file = tmp_path / "found.json"
    done = bench(
        *("--tokens", "2048", "--hidden", "16", "--vocab", "16384", "--threads", "1", "--repeats", "1"),
        *("--json", str(file)),
        *("--chunk-tokens", "128", "--chunk-vocab", "4096", "--rows", "full,ours,ours-fused,liger", "--entropy"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["full", "ours", "ours-fused", "liger"]
    assert "not run: it has no entropy" in lines[5]
    found = json.loads(file.read_text())["measurements"]
    full, ours, fused = (found[row][0] for row in ("full", "ours", "ours-fused"))
    for row in (ours, fused):
        assert abs(row["loss"] / full["loss"] - 1) < 1e-5
        assert all(abs(a / b - 1) < 1e-5 for a, b in zip(row["norms"], full["norms"], strict=True))
        assert row["forward"] > 0 and row["backward"] > 0
        # One tensor of full logits is 128 MiB.
        assert row["extra"] < 128 * 2**20 < full["extra"]


def test_an_unknown_row_is_refused():
    done = bench("--rows", "ours,nobody")
    assert done.returncode == 2
    assert "unknown row 'nobody'" in done.stderr
