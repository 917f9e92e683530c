"""What the files of a run tell: running, finished, killed, empty; people's lines and JSON."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dcpo_megatron.cli import status
from dcpo_megatron.cli.status import duration
from dcpo_megatron.monitor.heartbeat import Heartbeat, health_folder, write_heartbeat
from dcpo_megatron.monitor.status import StatusError, read_status

NOW = 0.0


@pytest.fixture(autouse=True)
def now():
    """Heartbeats are told their age from the test's own start: the whole suite takes longer than one lasts."""
    global NOW
    NOW = time.time()


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps that has done 30: 10 of 90 seconds, then 20 of 36; its ranks have not said anything."""
    (tmp_path / "config.yaml").write_text("training: {steps: 100}\n")
    rows = [
        {"step": step, "seconds": 90.0 if step <= 10 else 36.0, "reward": step / 100, "accuracy": 0.5}
        for step in range(1, 31)
    ]
    rows.insert(20, {"step": 20, "eval_accuracy": 0.25, "eval_greedy": 0.3})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 31, "sec')
    health_folder(tmp_path).mkdir()
    return tmp_path


def say(run, rank=0, phase="update", pid=None, host=None, age=1.0):
    pid, host = pid or os.getpid(), host or socket.gethostname()
    write_heartbeat(health_folder(run), Heartbeat(rank, host, pid, 31, phase, NOW - 70, 9, NOW - 70, NOW - age, 15.0))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_running_run_shows_its_rate_over_the_last_twenty_steps_and_the_time_left(run):
    say(run)
    found = read_status(run, NOW)
    assert (found.state, found.step, found.total_steps) == ("running", 30, 100)
    assert found.steps_per_hour == pytest.approx(100.0) and found.seconds_left == pytest.approx(70 * 36.0)
    assert (found.reward, found.accuracy, found.held_out_accuracy) == (0.3, 0.5, 0.25)
    assert found.checkpoint is None and found.verdict is None
    (rank,) = found.ranks
    assert (rank.state, rank.phase, rank.step) == ("alive", "update", 31)
    assert rank.seconds_in_phase == pytest.approx(70) and rank.seconds_since_heartbeat == pytest.approx(1)


def test_ranks_of_another_host_are_judged_by_the_age_of_their_heartbeat(run):
    say(run, host="elsewhere", age=30)
    assert read_status(run, NOW).state == "running"
    say(run, host="elsewhere", age=90)
    assert read_status(run, NOW).ranks[0].state == "silent" and read_status(run, NOW).state == "ended"


def test_a_killed_run_has_ended_and_shows_its_last_checkpoint_and_verdict(run, capsys):
    say(run, pid=dead_pid())
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step-000025\n")
    (health_folder(run) / "verdict").write_text("rank 1 on host x has stood\n")
    found = read_status(run)
    assert "goes on from the checkpoint" in "".join(status.lines(found))
    assert "begins anew" in "".join(status.lines(replace(found, checkpoint=None)))
    assert (found.state, found.checkpoint, found.verdict) == ("ended", "step-000025", "rank 1 on host x has stood")
    assert status.main([str(run)]) == 1
    shown = capsys.readouterr().out
    assert "ended (it was killed or failed" in shown and "step-000025" in shown and "rank 1 on host x" in shown
    assert " left" not in shown


def test_a_run_with_one_rank_killed_and_one_at_work_is_running_still(run):
    say(run, 0)
    say(run, 1, pid=dead_pid())
    found = read_status(run)
    assert found.state == "running" and [rank.state for rank in found.ranks] == ["alive", "gone"]


def test_a_run_that_was_asked_to_stop_is_stopped_and_a_whole_one_finished(run):
    say(run, phase="stopped", pid=dead_pid())
    assert read_status(run).state == "stopped"
    (run / "summary.json").write_text("{}")
    # The summary of a shorter run of the same folder.
    assert read_status(run).state == "stopped"
    (run / "config.yaml").write_text("training: {steps: 30}\n")
    assert read_status(run).state == "finished" and read_status(run).seconds_left == 0


def test_json_holds_what_the_lines_show(run, capsys):
    say(run)
    assert status.main([str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "running" and found["ranks"][0]["pid"] == os.getpid()
    assert found["steps_per_hour"] == pytest.approx(100.0)


def test_a_folder_without_steps_is_a_run_that_has_not_started(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("training: {steps: 5}\n")
    assert status.main([str(tmp_path)]) == 0
    assert "not started" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("training: [\n")
    assert read_status(tmp_path).total_steps is None


def test_what_is_no_run_is_refused_with_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder, reason in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "holds no run"),
    ):
        with pytest.raises(StatusError, match=reason):
            read_status(folder)
        assert status.main([str(folder)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (11_100, "3 h 5 min"), (187_200, "2 d 4 h")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_servers_of_a_run_are_told_from_its_files(tmp_path):
    from dcpo_megatron.monitor.server_health import ServerHealth
    from dcpo_megatron.rollout.fleet import Fleet
    from dcpo_megatron.rollout.server import Server

    (tmp_path / "health").mkdir()
    servers = [Server(f"http://host:{port}") for port in (1, 2, 3)]
    fleet = Fleet(servers, "run")
    health = ServerHealth(tmp_path / "health", fleet)
    for server in servers:
        fleet.admit(server, 4)
    for server in servers[:2]:
        fleet.admit(server, 5)
    fleet.evict(servers[1], "it hangs")
    health.note()
    found = [line.rpartition(", as of")[0] for line in status.lines(read_status(tmp_path)) if line.startswith("server")]
    assert found == [
        "server http://host:1: serving, weights of step 5",
        "server http://host:2: not used (it hangs)",
        "server http://host:3: outdated, weights of step 4",
    ]
    (tmp_path / "health" / "servers.json").write_text('{"written"')  # never a reason to fail
    assert read_status(tmp_path).servers == []
