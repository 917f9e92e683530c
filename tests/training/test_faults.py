"""Whole runs on two real ranks that are killed, stopped, asked to stop, or fed what no gradient survives."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dcpo_megatron.cli import status
from dcpo_megatron.data import decode_responses
from dcpo_megatron.files import write_jsonl
from dcpo_megatron.monitor.heartbeat import read_heartbeats
from dcpo_megatron.monitor.status import read_status
from dcpo_megatron.network import free_port
from dcpo_megatron.toys.arithmetic import make_arithmetic

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """``dcpo train --ranks 2`` on a small model, in a process of its own."""

    def __init__(self, folder: Path, start: Path, *settings: str, steps: int = 100_000):
        write_jsonl(make_arithmetic(16, 0, 9), folder / "train.jsonl")
        self.output = folder / "run"
        command = [
            sys.executable, "-m", "dcpo_megatron.cli", "train", "--ranks", "2", f"model.path={start}",
            "model.dtype=float32",
            f"data.files=[{folder / 'train.jsonl'}]", "data.template=plain", "data.max_prompt_tokens=8",
            "rollout.prompts_per_step=4",
            "rollout.group_size=4", "rollout.max_response_tokens=6", "training.minibatch_prompts=2",
            "training.micro_batch_tokens=64",
            f"training.steps={steps}", "training.platform=cpu", "reward.function=tests.training.rewards:digits",
            "reward.correct_at=0.5",
            f"output={self.output}", "logging.tensorboard=false", "logging.report=false", "logging.console=false",
            *settings,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300  # a loaded machine imports slowly
        while not (self.output / "metrics.jsonl").is_file() or read_status(self.output).step < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.1)

    def pid(self, rank: int) -> int:
        return read_heartbeats(self.output / "health")[rank].pid

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        try:
            text = self.process.communicate(timeout=seconds)[0]
        finally:
            self.process.kill()
        return self.process.returncode, text


def test_when_a_rank_is_killed_the_launcher_and_the_others_name_it_and_end_within_seconds(tmp_path, demo_start):
    run = Run(tmp_path, demo_start)
    run.wait_for_step(2)
    assert read_status(run.output).state == "running"
    os.kill(run.pid(1), signal.SIGKILL)
    code, text = run.end(20)
    assert code == 128 + 9, text
    assert "dcpo: error: rank 1 of 2 was killed by signal 9 (SIGKILL)" in text
    assert "dcpo: error: rank 1 on host" in text and "is gone: its process has ended" in text, text
    found = read_status(run.output)
    assert found.state == "ended" and [rank.state for rank in found.ranks] == ["gone", "gone"]


def test_when_a_rank_stands_still_the_watchdog_of_another_names_it_and_ends_the_run_within_its_deadline(
    tmp_path, demo_start
):
    run = Run(tmp_path, demo_start, "training.timeout_seconds=6")
    run.wait_for_step(2)
    pid = run.pid(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        code, text = run.end(30)
    finally:
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert code == 70, text
    sentences = [line for line in text.splitlines() if line.startswith("dcpo: error: rank 1 on host")]
    assert len(sentences) == 1, text
    assert (
        "has stood in phase" in sentences[0]
        and "(deadline 6 s); its process is stopped; waiting: rank 0 in" in sentences[0]
    )
    assert "start the same command again to resume" in sentences[0]
    assert "distributed_c10d.py" in (run.output / "health" / "rank-00000.stacks").read_text()
    assert read_status(run.output).verdict == sentences[0].removeprefix("dcpo: error: ")


def test_a_running_run_is_scraped_and_described_and_sigterm_saves_it(tmp_path, demo_start, capsys):
    port = free_port()
    run = Run(
        tmp_path,
        demo_start,
        f"logging.prometheus_port={port}",
        "reward.function=tests.training.rewards:unreliable",
        "reward.timeout_seconds=0.3",
    )
    run.wait_for_step(2)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    values = dict(line.split(" ") for line in lines if not line.startswith("#"))
    assert float(values["dcpo_step"]) >= 2 and float(values["dcpo_steps_wanted"]) == 100_000
    assert 0 < float(values["dcpo_reward_failures"]) < 1  # the function raises or hangs on some, and the run lives
    assert "# TYPE dcpo_reward gauge" in lines and any(line.startswith("# HELP dcpo_reward ") for line in lines)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
    assert status.main([str(run.output)]) == 0
    shown = capsys.readouterr().out
    assert ": running\n" in shown and "of 100000" in shown and "rank 1 (" in shown and " left\n" in shown
    run.process.send_signal(signal.SIGTERM)
    code, text = run.end()
    assert code == 75, text
    assert "Traceback" not in text and "error" not in text
    found = read_status(run.output)
    assert found.state == "stopped" and found.checkpoint == f"step-{found.step:06d}"


def test_gradients_that_are_never_finite_stop_the_run_and_leave_the_batch_for_study(tmp_path, demo_start):
    settings = (
        "objective.preset=dr-grpo",
        "reward.function=tests.training.rewards:enormous",
        "training.max_bad_steps=2",
    )
    code, text = Run(tmp_path, demo_start, *settings, steps=5).end()
    assert code == 1 and "Traceback" not in text, text
    assert "dcpo: error: step 2: 2 of 2 updates (first: update 1) had a gradient or loss that is not finite" in text
    file = tmp_path / "run" / "bad-batch-step-2.responses"
    assert str(file) in text
    responses = decode_responses(file.read_bytes())
    assert len(responses) == 16 and max(response.reward for response in responses) == 1e60
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["updates_skipped"] == 2 and rows[0]["gradient_norm"] is None
