"""Whole runs on two real SGLang servers: two training ranks, weights published after every step, servers and trainers
that die."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dcpo_megatron.monitor.heartbeat import read_heartbeats
from dcpo_megatron.monitor.status import read_status
from dcpo_megatron.verification import resumption
from tests.sglang_servers import loopback_ipv6, serve

pytestmark = pytest.mark.sglang


def wait(process, log: Path, seconds: float = 200) -> tuple[int, str]:
    try:
        code = process.wait(seconds)
    finally:
        resumption.kill_all(process)
    return code, log.read_text()


def run(arguments: list[str], log: Path, ranks: int = 2) -> tuple[int, str]:
    return wait(resumption.start(arguments, ranks, log), log)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def servers(demo_start, tmp_path_factory):
    """Two servers of the tasks' architecture, on IPv6."""
    with serve(demo_start, 2, host=loopback_ipv6(), logs=tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="module")
def task(tmp_path_factory, servers) -> list[str]:
    folder = tmp_path_factory.mktemp("task")
    return [
        *resumption.make_task(folder, steps=3), "rollout.engine=sglang", f"servers.urls={json.dumps(servers.urls)}",
        "optimizer.warmup_steps=0",
    ]  # fmt: skip


def until(condition, process, log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def test_rollout_and_training_engine_agree_after_every_update(task, tmp_path):
    code, said = run([*task, "parallel.tensor=2", f"output={tmp_path / 'run'}"], tmp_path / "log")
    assert code == 0, said
    steps = rows(tmp_path / "run")
    assert len(steps) == 3 and all(row["updates"] == 2 for row in steps)
    # The third batch was sampled after two publications: weights that had not arrived would show.
    assert max(row["mismatch_abs_max"] for row in steps) < 1e-4
    assert max(row["first_update_ratio_deviation"] for row in steps) < 1e-5
    assert all(row["stale_tokens"] == 0 for row in steps)
    servers = json.loads((tmp_path / "run" / "health" / "servers.json").read_text())
    assert [server["version"] for server in servers["servers"]] == [3, 3]


def test_on_policy_two_runs_are_one_also_where_servers_and_optimizer_take_turns(task, tmp_path):
    """Seeds decide the tokens (on a CPU), so the runs agree in everything but the clock and the last bits of the
    servers' own log-probs. In the second one the servers release their memory while training goes on (on a CPU they
    have none to release), and optimizer and gradients leave while they sample.
    """
    found = []
    for name, options in (("one", []), ("other", ["publish.colocated=true", "publish.mode=ipc", "checkpoint.every=1"])):
        code, said = run([*task, *options, "training.steps=2", f"output={tmp_path / name}"], tmp_path / "log")
        assert code == 0, said
        found.append([
            {key: value for key, value in row.items()
             if not key.startswith(("seconds", "tokens_per_second", "mismatch"))}
            for row in rows(tmp_path / name)
        ])  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 2


def begin_off_policy(task: list[str], folder: Path, log: Path) -> tuple[list[str], subprocess.Popen]:
    """A run that samples one batch ahead, two steps of it done: its arguments and its launcher."""
    arguments = [*task, "rollout.max_staleness=1", "rollout.max_response_tokens=24", f"output={folder}"]
    process = resumption.start(arguments, 2, log)
    until(lambda: resumption.steps_done(folder) >= 2, process, log)
    return arguments, process


def test_off_policy_by_one_a_lost_server_and_a_killed_trainer(task, servers, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    arguments, process = begin_off_policy([*task, "training.steps=40", "checkpoint.every=1"], folder, log)
    os.killpg(servers.processes[1].pid, signal.SIGKILL)  # the supervisor starts it again
    at = resumption.steps_done(folder)
    until(lambda: resumption.steps_done(folder) >= at + 2, process, log)
    until(lambda: (folder / "checkpoints" / "latest").is_file(), process, log)
    resumption.kill_all(process)
    done = int((folder / "checkpoints" / "latest").read_text().removeprefix("step-"))
    code, said = run([*arguments, f"training.steps={done + 3}"], log)
    assert code == 0, said
    # A checkpoint may have been complete, and "latest" not yet said so.
    resumed = int(re.search(r"resumed from \S+step-(\d+): ", said)[1])
    assert resumed in (done, done + 1)
    assert f"responses of step {resumed + 1} were sampled before: they are kept" in said
    steps = rows(folder)
    assert [row["step"] for row in steps] == list(range(1, done + 4))
    assert all(row["responses_trained"] == 64 for row in steps)
    assert any(row["stale_tokens"] > 0 for row in steps)
    # Tokens of older weights differ by one small update at most.
    assert max(row["mismatch_abs"] for row in steps) < 0.1


def test_servers_that_are_not_there_end_the_run_with_one_sentence_in_time(task, tmp_path):
    started = time.monotonic()
    code, said = run(
        [*task, 'servers.urls=["http://127.0.0.1:9"]', "servers.start_timeout_seconds=2", f"output={tmp_path / 'run'}"],
        tmp_path / "log",
    )
    assert code == 1 and time.monotonic() - started < 60
    sentence = next(line for line in said.splitlines() if line.startswith("dcpo: error:"))
    assert (
        "http://127.0.0.1:9" in sentence and "servers.start_timeout_seconds=2" in sentence and "dcpo serve" in sentence
    )
    assert "Traceback" not in said


def test_a_mismatch_beyond_the_limit_stops_the_run_before_it_trains(task, tmp_path):
    code, said = run([*task, "rollout.max_mismatch=1e-12", f"output={tmp_path / 'run'}"], tmp_path / "log")
    assert code == 1
    assert "step 1: training and rollout log-probs differ by" in said and "rollout.max_mismatch=1e-12" in said
    assert "Traceback" not in said and not rows(tmp_path / "run")


def test_a_run_that_waits_for_lost_servers_saves_and_ends_when_it_is_asked_to(task, servers, tmp_path):
    """The last one: it ends the servers for good."""
    folder, log = tmp_path / "run", tmp_path / "log"
    _, process = begin_off_policy([*task, "training.steps=1000", "checkpoint.every=900"], folder, log)
    # Lost in a publication they would end the run.
    until(lambda: read_heartbeats(folder / "health")[0].phase == "rollout", process, log)
    for server in servers.processes:
        os.killpg(server.pid, signal.SIGKILL)
    servers.stop()
    until(lambda: "no rollout server is left" in log.read_text(), process, log)
    process.send_signal(signal.SIGUSR1)
    asked = time.monotonic()
    code, said = wait(process, log, 60)
    assert code == 75 and time.monotonic() - asked < 30, said
    assert "Traceback" not in said and "asked to stop while it waits for rollout servers" in said
    done = len(rows(folder))
    saved = folder / "checkpoints" / f"step-{done:06d}"
    assert (folder / "checkpoints" / "latest").read_text().strip() == saved.name
    # The batch that was being sampled is in it, with what was finished, and the sampler stands behind its prompts: as
    # at any boundary.
    pending, state = json.loads((saved / "pending.json").read_text()), json.loads((saved / "run.json").read_text())
    assert pending["step"] == done + 1 and len(pending["prompts"]) == 8 and state["step"] == done
    assert (16 * state["sampler"]["epoch"] + state["sampler"]["position"]) == 8 * (done + 1)
    assert read_status(folder).state == "stopped"
