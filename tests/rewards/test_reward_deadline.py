"""The time limit holds wherever the reward is called, and no worker process outlives the one that started it."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable

import pytest

from dcpo_megatron.rewards import MathJudge, Rewarder, RewardError, math_reward
from dcpo_megatron.rewards.worker_client import Worker

HANGS = r"\boxed{9^{9^{9^9}}}"
LIMIT = 1.0  # seconds
MATH = "dcpo_megatron.rewards.mathematics.algebra:judge"
_numbers = itertools.count(10)


def _judge_a_hang_and_a_right_answer() -> list[float]:
    number = next(_numbers)  # verdicts are kept: ask something new
    start = time.monotonic()
    rewards = [
        math_reward(f"\\boxed{{9^{{9^{{9^{number}}}}}}}", "5", timeout_seconds=LIMIT),
        math_reward(f"\\boxed{{{number}+x}}", f"x+{number}", timeout_seconds=20.0),
    ]
    assert LIMIT <= time.monotonic() - start < 40
    return rewards


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _is_running(pid)


def test_a_hang_costs_its_own_answer_in_the_main_thread():
    assert _judge_a_hang_and_a_right_answer() == [0.0, 1.0]


def test_a_hang_costs_its_own_answer_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(_judge_a_hang_and_a_right_answer()))
    thread.start()
    thread.join(60)
    assert found == [0.0, 1.0]


def _report(connection) -> None:
    connection.send(_judge_a_hang_and_a_right_answer())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_hang_costs_its_own_answer_in_a_daemonic_process(method):
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender,), daemon=True)
    process.start()
    assert receiver.poll(60)
    assert receiver.recv() == [0.0, 1.0]
    process.join(20)
    assert process.exitcode == 0


def _succeeds_in_a_forked_child(check: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that is locked for ever shall not stay
        succeeded = False
        try:
            succeeded = check()
        finally:
            os._exit(0 if succeeded else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_hang_costs_its_own_answer_after_a_fork_and_the_parent_keeps_its_worker():
    worker = Worker(MATH)
    assert worker.call("x+1", "1+x", 20.0).value == 1.0
    parents_worker = worker._process.pid
    assert math_reward(r"\boxed{1+y}", "y+1", timeout_seconds=20.0) == 1.0  # the shared worker runs, too

    def child() -> bool:
        right = _judge_a_hang_and_a_right_answer() == [0.0, 1.0] and worker.call("x+1", "1+x", 20.0).value == 1.0
        return right and worker._process.pid != parents_worker

    assert _succeeds_in_a_forked_child(child)
    assert worker.call("x+2", "2+x", 20.0).value == 1.0
    assert worker._process.pid == parents_worker
    worker.close()


def test_a_fork_while_another_thread_waits_for_an_answer_does_not_lock_the_child():
    worker = Worker(MATH)
    worker.start()
    thread = threading.Thread(target=worker.call, args=("9^{9^{9^9}}", "5", 3.0))
    thread.start()
    time.sleep(0.5)
    assert _succeeds_in_a_forked_child(lambda: worker.call("x+1", "1+x", 20.0).value == 1.0)
    thread.join(20)
    worker.close()


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_parent_takes_its_worker_along(busy):
    # A worker in 9**9**9 holds the interpreter for hours: no thread of its own could notice that the parent is gone.
    program = f"""
        import threading, time
        from dcpo_megatron.rewards.worker_client import Worker
        worker = Worker({MATH!r})
        worker.start()
        if {busy}:
            threading.Thread(target=worker.call, args=("9^{{9^{{9^9}}}}", "5", 600.0)).start()
            time.sleep(1.0)
        print(worker._process.pid, flush=True)
        time.sleep(600)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env=environment)
    pid = int(parent.stdout.readline())
    assert _is_running(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    assert _wait_until_gone(pid, 5)


def test_the_worker_is_gone_after_its_parent_ends_normally():
    program = f"""
        from dcpo_megatron.rewards.worker_client import Worker
        worker = Worker({MATH!r})
        print(worker.call("x+1", "1+x", 20.0).value, worker._process.pid, flush=True)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, env=environment, timeout=60, check=True
    )
    value, pid = done.stdout.split()
    assert float(value) == 1.0
    assert done.stderr == b""
    assert _wait_until_gone(int(pid), 5)


def test_a_worker_that_is_dropped_ends_its_process():
    worker = Worker(MATH)
    worker.start()
    pid = worker._process.pid
    del worker
    assert _wait_until_gone(pid, 5)


def test_a_worker_that_dies_is_replaced():
    worker = Worker(MATH)
    worker.start()
    os.kill(worker._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert worker.call("x+1", "1+x", 20.0).value == 1.0
    worker.close()


@pytest.mark.parametrize(
    "answer",
    [
        "{" * 900 + "x" + "}" * 900,
        "(" * 900 + "x" + ")" * 900,
        "+".join(["x^{2}"] * 300),
        r"\sum_{n=1}^{10^{10}} \frac{1}{n}",
    ],
)
def test_a_monstrous_answer_is_wrong_in_bounded_time(answer):
    start = time.monotonic()
    assert math_reward(f"\\boxed{{{answer}}}", "y+1", timeout_seconds=LIMIT) == 0.0
    assert time.monotonic() - start < LIMIT + 10


def test_a_repeated_answer_is_judged_once():
    judge = MathJudge()
    start = time.monotonic()
    outcomes = judge.judge([HANGS] * 50, ["5"] * 50, LIMIT) + judge.judge([HANGS] * 50, ["5"] * 50, LIMIT)
    assert {outcome.failure for outcome in outcomes} == {"timeout"}
    assert time.monotonic() - start < 15
    judge.close()


def test_threads_share_a_worker_without_mixing_answers():
    rewards: dict[int, float] = {}

    def judge(i: int) -> None:
        rewards[i] = math_reward(f"\\boxed{{x+{i}}}", f"{i % 3}+x")

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rewards == {i: float(i < 3) for i in range(12)}


def test_an_interrupted_call_does_not_answer_the_next_one():
    worker = Worker(MATH)
    worker.start()

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            worker.call("9^{9^{9^9}}", "5", 30.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert worker.call("x+1", "1+x", 20.0).value == 1.0
    worker.close()


def test_a_worker_that_cannot_start_says_so_instead_of_judging_everything_wrong(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RewardError, match="could not be started"):
        Rewarder("math")


def test_importing_the_rewards_imports_neither_torch_nor_sympy():
    program = (
        "import sys, dcpo_megatron.rewards; print([m for m in ('torch', 'sympy', 'transformers') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_asks_the_trainer_to_stop_ends_no_call_under_way_but_still_ends_what_the_function_started(
    tmp_path, number
):
    file = tmp_path / "slow.py"
    file.write_text(
        textwrap.dedent("""\
        import multiprocessing, os, subprocess, time

        def stand(ready):
            ready.set()
            time.sleep(60)

        def reward(response, ground_truth):
            with open(ground_truth, "w") as file:
                file.write(str(os.getpid()))
            time.sleep(0.5)
            program = subprocess.Popen(["sleep", "60"])
            ready = multiprocessing.get_context("fork").Event()
            forked = multiprocessing.get_context("fork").Process(target=stand, args=(ready,))
            forked.start()
            ready.wait(10)
            for process in (program, forked):
                os.kill(process.pid, int(response))
            forked.join(10)
            return float(program.wait(10) == forked.exitcode == -int(response))
        """)
    )
    note = tmp_path / "pid"
    worker, found = Worker(f"{file}:reward"), []
    # The first call starts the process: the signal may come at any time of it.
    call = threading.Thread(target=lambda: found.append(worker.call(str(int(number)), str(note), 30.0)))
    call.start()
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        if worker._process is not None:
            os.kill(worker._process.pid, number)
        time.sleep(0.005)
    os.kill(int(note.read_text()), number)
    call.join(60)
    assert [(outcome.failure, outcome.value) for outcome in found] == [(None, 1.0)], found
