"""Calls of a reward function with a deadline that holds: each runs in a persistent subprocess that can be killed.

    caller --> Worker.call --(one JSON line)--> worker.py --> function(response, ground_truth)
                    |  no reply in time: SIGKILL, and the next call starts a new process

It works from any thread (no signals), from daemonic processes (subprocess, not multiprocessing), in processes that hold
a GPU (no fork of their memory), and after a fork: the child drops its copies of the pipes and starts a worker of its
own. A worker starts on its first call, and dies with the process that started it, even when that is killed.
"""

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from dcpo_megatron.rewards.function import RewardError

START_TIMEOUT = 60.0  # seconds; importing math-verify takes one, a user's module may take many
_START_ATTEMPTS = 2
_REPLY_LIMIT = 1 << 20  # bytes
# Asks a trainer to stop. A scheduler sends them to every process of a job, and the worker is needed until the step
# under way ends.
FOR_THE_TRAINER = (signal.SIGTERM, signal.SIGUSR1)


class Outcome(NamedTuple):
    """One call: its value, or why there is none.

    ``failure``: "timeout", "exception", "memory", "not a number", "not finite" or "died" (the process ended by itself).
    """

    value: float | None
    failure: str | None = None
    detail: str = ""


def check_lengths(responses: Sequence[str], ground_truths: Sequence[str]) -> None:
    """Raises ValueError unless there is one ground truth for each response."""
    if len(responses) != len(ground_truths):
        raise ValueError(f"{len(responses)} responses came with {len(ground_truths)} ground truths: give one for each")


class Worker:
    """One subprocess that runs ``function`` (a name for ``load_reward_function``), one call at a time; thread-safe.

    ``memory_bytes`` bounds its address space (None: no bound); ``start_timeout`` is in seconds.
    """

    def __init__(self, function: str, memory_bytes: int | None = None, start_timeout: float = START_TIMEOUT) -> None:
        self._settings = {"function": function, "memory_bytes": memory_bytes}
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._lifeline = -1
        _WORKERS.add(self)

    def call(self, response: str, ground_truth: str, timeout: float) -> Outcome:
        """The function's value, waited for at most ``timeout`` seconds once the process is ready.

        Raises RewardError if the process cannot be started or refuses the function; never on account of the arguments.
        """
        with self._lock:
            self._ensure_started()
            try:
                message = self._exchange({"response": response, "ground_truth": ground_truth}, timeout)
            except TimeoutError:
                self._stop()
                return Outcome(None, "timeout", f"no result within {timeout:g} s")
            except (OSError, EOFError):
                status = self._stop()
                return Outcome(None, "died", f"the worker process ended with status {status}")
            except BaseException:  # an interrupt: the reply that is still to come must not answer the next call
                self._stop()
                raise
            if message.get("failure") == "memory":  # a fresh process has the memory back
                self._stop()
        return Outcome(message.get("value"), message.get("failure"), message.get("detail", ""))

    def start(self) -> None:
        """Starts the process now, so that a missing function is known now. Raises RewardError."""
        with self._lock:
            self._ensure_started()

    def close(self) -> None:
        """Ends the process. A later call starts a new one."""
        with self._lock:
            self._stop()

    def __del__(self) -> None:
        self._stop()

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._stop()
            try:
                self._launch()
                message = self._exchange(self._settings, self._start_timeout)
            except TimeoutError:
                problem = f"was not ready within {self._start_timeout:g} s"
            except EOFError:
                problem = f"ended with status {self._stop()} before it was ready (its messages are on standard error)"
            except OSError as error:
                problem = f"could not be started: {error}"
            except BaseException:
                self._stop()
                raise
            else:
                if "refused" in message:
                    self._stop()
                    raise RewardError(message["refused"])
                return
            self._stop()
        raise RewardError(f"the worker for reward function {self._settings['function']!r} {problem}, {attempt} times")

    def _launch(self) -> None:
        # The worker sees the modules that this process sees. -P keeps its working directory from coming first.
        search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        lifeline_of_worker, self._lifeline = os.pipe()
        # The worker inherits the mask, so that no signal ends it before it can say that it leaves them to its client.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dcpo_megatron.rewards.worker", str(lifeline_of_worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=os.environ | {"PYTHONPATH": search_path},
                pass_fds=(lifeline_of_worker,),
                start_new_session=True,  # the terminal's interrupt is for the trainer; and a group of its own to kill
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(lifeline_of_worker)
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)

    def _exchange(self, message: dict, timeout: float) -> dict:
        """Sends one line and reads one line. Raises TimeoutError, or EOFError or OSError if the process is gone."""
        deadline = time.monotonic() + timeout
        to_worker, from_worker = self._process.stdin.fileno(), self._process.stdout.fileno()
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            _wait(to_worker, select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(to_worker, data) :]
        reply = b""
        while not reply.endswith(b"\n"):
            _wait(from_worker, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                chunk = os.read(from_worker, 1 << 16)
                reply += chunk
                if not chunk or len(reply) > _REPLY_LIMIT:
                    raise EOFError
        return json.loads(reply)

    def _stop(self) -> int | None:
        """Kills the process and whatever it started; returns the exit status it had."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if _ended_by_itself(process):
                    process.wait(0.5)
            if process.poll() is None:  # once it is waited for, its number may belong to another process
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        self._close_pipes(process)
        return None if process is None else process.returncode

    def _close_pipes(self, process: subprocess.Popen | None) -> None:
        if process is not None:
            process.stdin.close()
            process.stdout.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _forget_after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        process, self._process = self._process, None
        if process is not None:
            process.returncode = 0  # it is the parent's child: do not wait for it here
        self._close_pipes(process)


class WorkerPool:
    """``workers`` subprocesses for batches of calls. They start when there is work for them."""

    def __init__(
        self,
        function: str,
        workers: int = 1,
        memory_bytes: int | None = None,
        start_timeout: float = START_TIMEOUT,
    ) -> None:
        if workers < 1:
            raise ValueError(f"a pool needs at least 1 worker, not {workers}")
        self._workers = [Worker(function, memory_bytes, start_timeout) for _ in range(workers)]

    def run(self, jobs: Sequence[tuple[str, str]], timeout: float) -> list[Outcome]:
        """One outcome for each (response, ground truth), in order; ``timeout`` seconds for each. Raises RewardError."""
        if len(self._workers) == 1 or len(jobs) <= 1:
            return [self._workers[0].call(*job, timeout) for job in jobs]
        outcomes: list[Outcome | None] = [None] * len(jobs)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(jobs)):
            todo.put(index)

        def drain(worker: Worker) -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    index = todo.get_nowait()
                    outcomes[index] = worker.call(*jobs[index], timeout)

        busy = self._workers[: len(jobs)]
        with ThreadPoolExecutor(len(busy)) as threads:
            for finished in [threads.submit(drain, worker) for worker in busy]:
                finished.result()
        return outcomes

    def start(self) -> None:
        """Starts the first process, so that a missing function is known now. Raises RewardError."""
        self._workers[0].start()

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()


_WORKERS: "weakref.WeakSet[Worker]" = weakref.WeakSet()


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poller = select.poll()  # select.select fails on descriptors above 1023
    poller.register(descriptor, event)
    remaining = deadline - time.monotonic()
    if remaining <= 0 or not poller.poll(remaining * 1000):
        raise TimeoutError


def _ended_by_itself(process: subprocess.Popen) -> bool:
    poller = select.poll()
    poller.register(process.stdout.fileno(), select.POLLIN)
    return any(event & select.POLLHUP for _, event in poller.poll(0))


def _stop_all() -> None:
    for worker in list(_WORKERS):
        worker._stop()  # without the lock: at exit no call is waited for


def _forget_all() -> None:
    for worker in list(_WORKERS):
        worker._forget_after_fork()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget_all)
