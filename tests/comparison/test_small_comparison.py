"""The study in small, end to end: starts, runs, a stop in the middle, the same command again, the report with its
verdicts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
METHODS, SEEDS = ("grpo", "dcpo-paper"), (0, 1)
STEPS = 30  # a step takes a tenth of a second: the stop comes in the middle of a run


@pytest.fixture
def plan(tmp_path) -> Path:
    """The plan of the study, cut down: a narrow model that saw ten steps of warm-up, few steps, and a reward that such
    a model earns about half of the time."""
    plan = yaml.safe_load((ROOT / "examples" / "configs" / "compare.yaml").read_text())
    plan |= {"output": str(tmp_path / "out"), "seeds": list(SEEDS), "methods": dict.fromkeys(METHODS)}
    plan["task"] |= {
        "terms": [2, 2],
        "train": 16,
        "held_out": 8,
        "supervised": 32,
        "checks": 8,
        "target": 0.0,
        "model": {"layers": 1, "hidden": 32, "positions": 64},
    }
    train = plan["train"]
    train["reward"]["function"] = "tests.comparison.synthetic:even_length"
    train["rollout"] |= {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 24}
    train["training"] |= {"steps": STEPS, "minibatch_prompts": 2}
    train["evaluation"] |= {"every": 15, "samples": 2}
    train["checkpoint"]["every"] = 2
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


def start(plan: Path) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "dcpo_megatron.cli", "compare", str(plan), "--parallel", "2"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for(there: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the comparison did not come so far"
        time.sleep(0.05)


def test_the_study_in_small(plan):
    out = plan.parent / "out"
    first = start(plan)
    try:
        wait_for(lambda: (out / ".lock").exists(), first)
        # Two comparisons in one folder would spoil each other.
        second = start(plan)
        assert second.wait(60) == 2 and "in use by another" in second.stderr.read()
        wait_for(lambda: list(out.glob("runs/*/seed-0/checkpoints/latest")), first)
        first.send_signal(signal.SIGTERM)
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 75, errors
    assert "the same command goes on" in errors

    again = start(plan)
    try:
        printed, errors = again.communicate(timeout=200)
    finally:
        again.kill()
    assert again.returncode == 0, errors

    runs = {(m, s): out / "runs" / m / f"seed-{s}" for m in METHODS for s in SEEDS}
    for (method, seed), run in runs.items():
        steps = [row["step"] for row in rows(run) if "reward" in row]
        assert steps == list(range(1, STEPS + 1)), (method, seed)
    assert any("resumed from" in (run / "log.txt").read_text() for run in runs.values())
    for seed in SEEDS:
        # The same start, prompts, order and random streams: all methods sample the same first batch and are equally
        # right before they learn.
        a, b = (rows(runs[method, seed]) for method in METHODS)
        assert a[0]["eval_accuracy"] == b[0]["eval_accuracy"]
        for name in ("reward", "response_length", "responses_generated"):
            assert a[1][name] == b[1][name], name
        assert a[-2]["loss"] != b[-2]["loss"]
    assert rows(runs["grpo", 0])[1]["response_length"] != rows(runs["grpo", 1])[1]["response_length"]

    assert "report:" in printed and "undecided" in printed + (out / "report" / "report.md").read_text()
    text = (out / "report" / "report.md").read_text()
    assert "4 of 4 runs" in text and "RUR, dcpo-paper less grpo: " in text and "n = 2" in text
    assert (out / "report" / "report.html").stat().st_size > 50_000

    # Nothing is left to do, and another recipe in the same folder is refused by name.
    done = start(plan)
    assert done.wait(100) == 0 and "4 of them done before" in done.stderr.read()
    changed = yaml.safe_load(plan.read_text())
    changed["train"]["optimizer"]["lr"] = 1e-3
    plan.write_text(yaml.safe_dump(changed))
    refused = start(plan)
    assert refused.wait(100) == 2 and "optimizer.lr" in refused.stderr.read()
