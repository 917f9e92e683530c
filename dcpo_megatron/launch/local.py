"""Starts the ranks of a run on this machine, all of them or this host's, waits for them, and gives back one exit code.

    terminal or scheduler -- SIGTERM, SIGINT, SIGUSR1 --> launcher -- the same, once --> rank 0 .. N-1, each a process
    group of its own
    a rank fails           --> it is named; the others get SIGTERM, and SIGKILL where they stay
    the launcher is killed --> the kernel kills the ranks (on Linux)

Ranks find each other through the variables that torchrun sets too: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT. On several hosts each has a launcher of its own; they do not speak to each other: ranks name
who is missing (:mod:`dcpo_megatron.mcore.meeting`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.launch.signals import BAD_INPUT, START_AGAIN, STOOD_STILL
from dcpo_megatron.network import free_port
from dcpo_megatron.processes import die_with_parent, handling, signal_name

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Seconds that ranks have to end by themselves.
AFTER_A_FAILURE = 10.0
AFTER_BAD_INPUT = 2.0  # less than ranks wait before they repeat the sentence
AFTER_A_VERDICT = 3.0  # a watchdog has spoken: what stands, stands
AFTER_AN_INTERRUPT = 30.0
GRACE_SECONDS = 600.0


@dataclass(frozen=True)
class Place:
    """This host among those of a run: it is number ``node`` of ``nodes``; ranks meet at ``master``:``port`` (None: a
    free one)."""

    nodes: int = 1
    node: int = 0
    master: str = "127.0.0.1"
    port: int | None = None


def run_ranks(
    count: int,
    command: list[str],
    environment: dict[str, str] | None = None,
    *,
    grace_seconds: float | None = None,
    place: Place | None = None,
) -> int:
    """Runs ``python COMMAND`` as ``count`` ranks, of ``place`` where several hosts have as many, and waits for all of
    them. Call it from the main thread.

    A rank that fails is named on standard error, but for bad input, whose sentence it has said itself. SIGTERM, SIGINT
    and SIGUSR1 are passed on to every rank, each once; the ranks then have ``grace_seconds`` (default:
    DCPO_GRACE_SECONDS, else 600; after SIGINT 30 at most) until they are killed. A second SIGINT kills them.

    Returns:
        0; the exit code of the first rank that failed, 128 + N where signal N ended it; 75 where ranks want to be
        started again and none failed; 2 where DCPO_GRACE_SECONDS is no number above 0.
    """
    if grace_seconds is None:
        try:
            grace_seconds = _grace()
        except ValueError as error:
            _say(f"error: {error}")
            return BAD_INPUT
    env = {**os.environ, **(environment or {})}
    # A checkout that is not installed must be found by the ranks too.
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
    place = place or Place()
    if count * place.nodes > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        env |= {"WORLD_SIZE": str(count * place.nodes), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": place.master}
        env["MASTER_PORT"] = str(place.port or free_port())
    return _Ranks(count, place, [sys.executable, "-u", *command], env, grace_seconds).run()


def _grace() -> float:
    text = os.environ.get("DCPO_GRACE_SECONDS", str(GRACE_SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise ValueError(f"DCPO_GRACE_SECONDS={text!r} must be a number of seconds above 0")


def _say(text: str) -> None:
    print(f"dcpo: {text}", file=sys.stderr, flush=True)


class _Ranks:
    def __init__(self, count: int, place: Place, command: list[str], env: dict[str, str], grace_seconds: float):
        self._command, self._env, self._grace_seconds = command, env, grace_seconds
        self._world, self._first = count * place.nodes, count * place.node
        self._here = range(self._first, self._first + count)
        self._processes: dict[int, subprocess.Popen] = {}
        self._codes: dict[int, int] = {}
        self._failure: int | None = None  # as the first one that failed gave it
        self._arrived: list[int] = []  # signals to pass on
        self._passed_on: set[int] = set()
        self._deadline, self._reason = float("inf"), ""

    def run(self) -> int:
        with handling(PASSED_ON, self._note):
            try:
                for rank in self._here:
                    self._processes[rank] = self._start(rank)
                while len(self._codes) < len(self._here):
                    self._pass_on()
                    self._collect()
                    if time.monotonic() > self._deadline:
                        self._kill()
                    time.sleep(0.05)
            finally:
                for process in self._processes.values():
                    if process.poll() is None:
                        process.kill()
                        process.wait()
        if self._failure is not None:
            return self._failure if self._failure >= 0 else 128 - self._failure
        return START_AGAIN if START_AGAIN in self._codes.values() else 0

    def _start(self, rank: int) -> subprocess.Popen:
        env = self._env | ({"RANK": str(rank), "LOCAL_RANK": str(rank - self._first)} if self._world > 1 else {})
        return subprocess.Popen(
            self._command,
            env=env,
            stdin=subprocess.DEVNULL,
            # The terminal's interrupt is for the launcher alone: it passes it on. Not a session each: Linux shares
            # processor time out among sessions first, and a thread of one rank that should give way would not give way
            # to the other ranks.
            process_group=0,
            preexec_fn=die_with_parent(os.getpid()),
        )

    def _note(self, number: int, frame) -> None:
        self._arrived.append(number)

    def _pass_on(self) -> None:
        while self._arrived:
            number = self._arrived.pop(0)
            name = signal_name(number)
            if number in self._passed_on:
                if number == signal.SIGINT:
                    self._deadline, self._reason = 0.0, "of a second SIGINT"
                continue
            self._passed_on.add(number)
            seconds = min(AFTER_AN_INTERRUPT, self._grace_seconds) if number == signal.SIGINT else self._grace_seconds
            _say(f"{name}: passed on to {_ranks(self._running())}, with {seconds:g} s to end")
            self._signal(number)
            self._end_within(seconds, f"it had not ended {seconds:g} s after {name}")

    def _collect(self) -> None:
        ended = {rank: code for rank in self._running() if (code := self._processes[rank].poll()) is not None}
        self._codes |= ended
        # Of ranks seen at once the killed one is the cause: the others then fail for want of it.
        for rank, code in sorted(ended.items(), key=lambda item: (item[1] >= 0, item[0])):
            if code == START_AGAIN:
                # The others have decided the same, and may still be writing.
                self._end_within(self._grace_seconds, f"it had not ended {self._grace_seconds:g} s after rank {rank}")
            elif code != 0 and self._failure is None:
                self._failed(rank, code)

    def _failed(self, rank: int, code: int) -> None:
        self._failure = code
        seconds = {BAD_INPUT: AFTER_BAD_INPUT, STOOD_STILL: AFTER_A_VERDICT}.get(code, AFTER_A_FAILURE)
        if code < 0 and -code not in self._passed_on:
            _say(f"error: rank {rank} of {self._world} was killed by signal {-code} ({signal_name(-code)})")
        elif code > 0 and code != BAD_INPUT and code - 128 not in self._passed_on:
            _say(f"error: rank {rank} of {self._world} ended with exit code {code}; its own message is above")
        if signal.SIGTERM not in self._passed_on:
            self._passed_on.add(signal.SIGTERM)
            self._signal(signal.SIGTERM)
        self._end_within(seconds, f"it had not ended {seconds:g} s after rank {rank}" if code != BAD_INPUT else "")

    def _running(self) -> list[int]:
        return [rank for rank in self._processes if rank not in self._codes]

    def _signal(self, number: int) -> None:
        for rank in self._running():
            with contextlib.suppress(ProcessLookupError):
                self._processes[rank].send_signal(number)

    def _end_within(self, seconds: float, reason: str) -> None:
        deadline = time.monotonic() + seconds
        if deadline < self._deadline:
            self._deadline, self._reason = deadline, reason

    def _kill(self) -> None:
        for rank in self._running():
            if self._reason:
                _say(f"error: rank {rank} of {self._world} was killed because {self._reason}")
            if self._failure is None:
                self._failure = -signal.SIGKILL
            self._processes[rank].kill()
        self._deadline = float("inf")


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
