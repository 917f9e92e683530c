"""Heartbeats, who is behind, and the deadline of a phase, with real processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dcpo_megatron.monitor import reach
from dcpo_megatron.monitor.heartbeat import (
    Heartbeat,
    describe_standstill,
    health_folder,
    most_behind,
    read_heartbeats,
    write_heartbeat,
)
from dcpo_megatron.monitor.reach import Peer
from dcpo_megatron.monitor.standstill import Seen, broken, standing
from dcpo_megatron.monitor.watchdog import PHASE_OF_SPAN, Watchdog, WatchedTimeline, collective_timeout, explain_failure

ROOT = Path(__file__).resolve().parents[2]
NOW = 0.0


@pytest.fixture(autouse=True)
def now():
    """Heartbeats are told their age from the test's own start: the whole suite takes longer than one lasts."""
    global NOW
    NOW = time.time()


def beat(rank: int, phase: str, sequence: int, seconds: float, step: int = 12, **changes) -> Heartbeat:
    """Of a rank on another host, unless changed: its state is told by its file alone."""
    made = Heartbeat(rank, "x", 1, step, phase, NOW - seconds, sequence, NOW - seconds, NOW, 15.0)
    return replace(made, **changes)


def by_rank(*beats: Heartbeat) -> dict[int, Heartbeat]:
    return {found.rank: found for found in beats}


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield process
    process.kill()
    process.wait()


def here(pid: int) -> dict:
    import socket

    return {"host": socket.gethostname(), "pid": pid}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_rank_that_came_least_far_is_named_and_where_the_others_wait():
    beats = by_rank(beat(0, "update", 40, 61), beat(1, "reward", 38, 63), beat(2, "update", 40, 60))
    assert (
        describe_standstill(beats, 3, 60, NOW)
        == "rank 1 on host x has stood in phase reward of step 12 for 63 s (deadline 60 s); waiting: ranks 0, 2 in"
        " update of step 12"
    )


def test_in_one_phase_the_one_that_gives_no_sign_of_life_is_behind_else_the_one_longest_there():
    beats = by_rank(beat(0, "update", 40, 61), beat(1, "update", 40, 70), beat(2, "update", 40, 60, written=NOW - 90))
    assert most_behind(beats.values(), NOW).rank == 2
    assert "it gives no sign of life" in describe_standstill(beats, 3, 60, NOW)
    del beats[2]
    assert most_behind(beats.values(), NOW).rank == 1


def test_a_rank_without_a_heartbeat_is_named_first():
    assert describe_standstill(by_rank(beat(0, "save", 1, 61)), 2, 60, NOW).startswith("rank 1 of 2 never began")


def test_a_process_is_seen_alive_stopped_and_gone(sleeper):
    mine = beat(1, "reward", 41, 60, **here(sleeper.pid))
    assert mine.state(NOW) == "alive"
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: mine.state(NOW) == "stopped")
    beats = by_rank(beat(0, "update", 40, 61), mine)
    # It cannot go on, so it is the cause, though it came farther.
    assert most_behind(beats.values(), NOW).rank == 1
    sleeper.kill()  # not waited for: a zombie is gone too
    wait_until(lambda: mine.state(NOW) == "gone")
    assert "its process has ended" in describe_standstill(beats, 2, 60, NOW)


def test_what_is_no_heartbeat_is_left_out(tmp_path):
    write_heartbeat(tmp_path, beat(0, "save", 1, 0))
    (tmp_path / "rank-00001.json").write_text('{"rank": 1')
    (tmp_path / "rank-00002.json").write_text("[]")
    assert read_heartbeats(tmp_path) == {0: beat(0, "save", 1, 0)}


def test_phases_are_written_in_order_and_a_new_start_clears_what_an_earlier_run_left(tmp_path):
    health = health_folder(tmp_path)
    health.mkdir()
    write_heartbeat(health, beat(5, "update", 9, 0))
    for name in ("verdict", "rank-00000.stacks", "rank-00001.json"):
        (health / name).write_text("old")
    watchdog = Watchdog(tmp_path, 0, 2, 60)
    watchdog.start()
    assert sorted(file.name for file in health.iterdir()) == ["rank-00000.json", "rank-00001.json"]
    try:
        timeline = WatchedTimeline(watchdog)
        watchdog.enter("rollout", 7)
        with timeline.span("step"), timeline.span("forward_backward"):
            wait_until(lambda: read_heartbeats(health)[0].phase == "update")
        found = read_heartbeats(health)[0]
        assert (found.step, found.sequence, found.pid) == (7, 2, os.getpid())
        assert set(timeline.take()) == {"step", "forward_backward"}
    finally:
        watchdog.close("finished")
    assert read_heartbeats(health)[0].phase == "finished"
    watchdog.close()


def test_the_phases_are_spans_that_the_run_has():
    from dcpo_megatron.monitor.metrics import STEP_PARTS

    assert set(PHASE_OF_SPAN) <= set(STEP_PARTS)


def watched(folder: Path, body: str) -> subprocess.CompletedProcess:
    code = f"""
import time
from pathlib import Path
from dcpo_megatron.monitor.watchdog import Watchdog
watchdog = Watchdog(Path({str(folder)!r}), 0, 1, 0.6)
watchdog.start()
def sleep_here(): time.sleep(20)
{body}
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_phase_beyond_its_deadline_ends_the_process_with_one_sentence_and_its_stacks(tmp_path):
    done = watched(tmp_path, "watchdog.enter('reward', 3)\nsleep_here()")
    assert done.returncode == 70
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("dcpo: error: rank 0 on host")
    assert "has stood in phase reward of step 3 for 1 s (deadline 0.6 s): this run is stopped" in done.stderr
    assert "in sleep_here" in (tmp_path / "health" / "rank-00000.stacks").read_text()
    assert (tmp_path / "health" / "verdict").read_text() == done.stderr.removeprefix("dcpo: error: ")


def test_progress_a_new_phase_and_a_longer_deadline_keep_the_process(tmp_path):
    body = """
time.sleep(0.9)  # the start has no deadline
watchdog.enter("rollout", 1)
for _ in range(9):
    time.sleep(0.1)
    watchdog.progress()
for step in range(9):
    time.sleep(0.1)
    watchdog.enter("update", step)
watchdog.enter("save", timeout_seconds=60)
time.sleep(0.9)
watchdog.close("finished")
time.sleep(0.9)
"""
    done = watched(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    body = (
        "watchdog.health.rename(watchdog.health.with_name('away'))\nfor step in range(3):\n    watchdog.enter('update',"
        " step); time.sleep(0.2)\nwatchdog.close()"
    )
    done = watched(tmp_path, body)
    assert done.returncode == 0 and done.stderr.count("no heartbeats") == 1, done.stderr


CLOSED = RuntimeError(
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:27340"
)


def test_a_failed_collective_is_explained_by_the_rank_that_is_gone(tmp_path, sleeper):
    health = health_folder(tmp_path)
    health.mkdir()
    write_heartbeat(health, beat(0, "update", 40, 1))
    write_heartbeat(health, beat(1, "reward", 38, 3, **here(sleeper.pid)))
    assert explain_failure(CLOSED, tmp_path, 2, rank=0, patience=0.1) == ""
    sleeper.kill()
    found = explain_failure(CLOSED, tmp_path, 2, rank=0)
    assert "rank 1 on host" in found
    assert "is gone: its process has ended; it was last seen in phase reward of step 12: this run is stopped" in found


def test_a_collective_that_timed_out_is_explained_by_the_rank_that_is_behind(tmp_path):
    health = health_folder(tmp_path)
    health.mkdir()
    for rank, sequence in ((0, 40), (1, 38), (2, 40)):
        write_heartbeat(health, beat(rank, "reward", sequence, 63, written=time.time()))
    found = explain_failure(RuntimeError("Timed out waiting 60000ms for recv"), tmp_path, 3, rank=0, patience=0.1)
    assert found.startswith("rank 1 on host x is behind: it has stood in phase reward of step 12")


@pytest.mark.parametrize("error", [ValueError("timeout"), RuntimeError("shapes do not fit"), KeyError("x")])
def test_errors_of_another_kind_are_not_explained(tmp_path, error):
    health = health_folder(tmp_path)
    health.mkdir()
    write_heartbeat(health, beat(1, "reward", 38, 3, written=0.0))
    assert explain_failure(error, tmp_path, 2, rank=0) == ""


def test_collectives_give_the_watchdog_the_first_word():
    assert collective_timeout(1800) == 1803 and 6 < collective_timeout(6) < 8


def test_a_heartbeat_file_is_whole_at_any_time(tmp_path):
    write_heartbeat(tmp_path, beat(0, "update", 0, 0))
    stop = threading.Event()

    def write():
        while not stop.is_set():
            write_heartbeat(tmp_path, beat(0, "update", 0, 0))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(2000):
            json.loads((tmp_path / "rank-00000.json").read_text())
    finally:
        stop.set()
        thread.join()


# -- without the folder, and over the network ------------------------------------------------------


def test_a_rank_whose_folder_is_gone_still_speaks_and_ends(tmp_path):
    done = watched(
        tmp_path, "watchdog.enter('update', 3); watchdog.health.rename(watchdog.health.with_name('away'))\nsleep_here()"
    )
    assert done.returncode == 70
    assert "dcpo: error: rank 0 on host" in done.stderr and "has stood in phase update of step 3" in done.stderr


def test_a_rank_whose_folder_hangs_still_speaks_and_ends(tmp_path):
    """A pipe nobody reads stands for a network file system whose server is gone: opening it to write waits for ever."""
    body = """
import os
os.mkfifo(watchdog.health / "rank-00000.part")
os.mkfifo(watchdog.health / "rank-00000.stacks")
watchdog.enter('save', 3)
sleep_here()
"""
    began = time.monotonic()
    done = watched(tmp_path, body)
    assert done.returncode == 70 and "has stood in phase save of step 3" in done.stderr, done.stderr
    assert time.monotonic() - began < 19


def test_two_ranks_on_one_console_say_it_once_and_on_two_consoles_twice(tmp_path):
    health = health_folder(tmp_path)
    health.mkdir()
    watchdogs = [Watchdog(tmp_path, rank, 2, 60) for rank in range(2)]
    assert [one._leave_verdict("a sentence") for one in watchdogs] == [False, True]
    assert (health / "verdict").read_text() == "a sentence\n"
    for file in health.glob("said-*"):
        file.unlink()  # as if the other had another console
    assert watchdogs[1]._leave_verdict("another") is False
    assert (health / "verdict").read_text() == "a sentence\n"


PEERS = [
    Peer(0, "a", 10, (("10.0.0.1", 1),)),
    Peer(1, "b", 11, (("10.0.0.2", 2),)),
    Peer(2, "c", 12, (("10.0.0.3", 3),)),
]


def seen(reached: dict, beats: dict, rank: int = 0, **changes) -> Seen:
    world = len(reached) + 1
    return Seen(rank, PEERS[:world], reached, beats, **({"folder": None, "dead_link": None, "now": NOW} | changes))


def test_a_host_that_does_not_answer_is_named_though_its_heartbeats_are_fresh():
    beats = by_rank(beat(0, "exchange", 40, 8), beat(1, "exchange", 40, 9))
    said = standing(seen({1: "lost"}, beats), 2, 8)
    assert said.startswith(
        "rank 1 on host b cannot be reached over the network (no answer from 10.0.0.2); it was last seen in"
    )
    assert "rank 0 on host x has waited in phase exchange of step 12 since " in said and "(8 s, deadline 8 s)" in said
    assert said.endswith("see to host b and the network between, then start the same command again to resume")
    # Nobody is behind where both stand in the same phase and answer.
    assert "as all ranks have, and all that were asked answer: a connection" in standing(
        seen({1: "there"}, beats), 2, 8
    )
    beats[1] = beat(1, "reward", 39, 9)
    assert standing(seen({1: "there"}, beats), 2, 8).startswith("rank 1 on host x has stood in phase reward")


def test_the_host_that_reaches_none_of_several_is_the_one_that_is_cut_off():
    beats = by_rank(*(beat(rank, "exchange", 40, 8) for rank in range(3)))
    said = standing(seen({1: "lost", 2: "lost"}, beats), 3, 8)
    assert said.startswith(
        "rank 0 on host a is cut off from the network (no other host answers): rank 1 on host b, rank 2 on host c"
        " cannot"
    )
    said = standing(seen({1: "lost"}, beats, dead_link="eth0"), 2, 8)
    assert said.startswith("rank 0 on host a is cut off from the network (the link of eth0 is down): rank 1 on host b")
    assert "rank 1 on host b cannot be reached" in standing(seen({1: "lost", 2: "there"}, beats), 3, 8)


def test_of_several_that_are_gone_the_first_is_named():
    beats = by_rank(beat(0, "update", 40, 8), beat(1, "update", 40, 8), beat(2, "update", 40, 8, written=NOW - 5))
    said = broken(seen({1: "gone", 2: "gone"}, beats), timed_out=False)
    assert said.startswith(
        "rank 2 on host c is gone: its process has ended; it was last seen in phase update of step 12 (5 s ago)"
    )


def test_where_the_folder_cannot_be_read_nothing_is_made_up():
    own = by_rank(beat(0, "update", 40, 8))
    said = standing(seen({1: "there"}, own, folder="Stale file handle"), 2, 8)
    assert (
        "never began" not in said
        and "all other ranks that could be asked answer" in said
        and "(Stale file handle)" in said
    )


def test_a_closed_connection_among_ranks_that_all_answer_is_said_to_be_one():
    beats = by_rank(beat(0, "update", 40, 8), beat(1, "update", 40, 8))
    assert "lost its connection to another rank, and all ranks answer" in broken(
        seen({1: "there"}, beats), timed_out=False
    )
    # Nobody is behind where all stand in one phase.
    assert "waited too long for another rank, and all ranks answer" in broken(seen({1: "there"}, beats), timed_out=True)
    assert broken(seen({}, beats), timed_out=False) == ""


def test_a_process_is_found_by_its_door_and_not_found_when_it_has_ended(monkeypatch):
    monkeypatch.setattr(reach, "collective_addresses", lambda: ["127.0.0.1", "192.0.2.77"])  # one cannot be had
    door = reach.Door()
    ((address, port),) = door.places
    assert [reach._knock((address, port), 2.0) for _ in range(3)] == ["there"] * 3
    door.close()
    assert reach._knock((address, port), 2.0) == "gone"


def test_in_a_large_run_each_rank_asks_one_of_every_other_host():
    peers = [Peer(rank, f"h{rank // 4}", rank) for rank in range(12)]
    assert [peer.rank for peer in reach._one_a_host([p for p in peers if p.host != "h0"], 2)] == [6, 10]
