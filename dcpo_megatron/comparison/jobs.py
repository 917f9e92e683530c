"""Processes side by side, a few at a time: each a job with a log file, some waiting for another one to succeed first.

jobs in order --> the first that is ready --> a free slot (an environment of its own) --> exit code
a job fails               --> it is named with the last line of its log; those that need it are not started; the rest
                              goes on
SIGTERM or SIGINT         --> the same to every running job, once, as SIGTERM: runs save and end; nothing new is started
this process is killed    --> the kernel ends the jobs (on Linux)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.launch.local import GRACE_SECONDS
from dcpo_megatron.processes import die_with_parent, handling, signal_name

LINE_SECONDS = 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StudyJob:
    """``command``: arguments of this Python. ``share``: how much of it is done, 0 to 1. ``needs``: the name of the job
    that must have succeeded."""

    name: str
    command: list[str]
    log: Path
    share: Callable[[], float]
    needs: str | None = None


@dataclass(frozen=True)
class StudyOutcome:
    """``failed``: job -> why; ``left``: jobs that were not done because the whole was stopped."""

    failed: dict[str, str]
    left: list[str]


class Jobs:
    """Runs ``jobs`` in ``slots``: one environment a place, on top of this process's."""

    def __init__(self, jobs: Sequence[StudyJob], slots: Sequence[dict[str, str]], quiet: bool = False):
        self._waiting, self._total = list(jobs), len(jobs)
        self._names = {job.name for job in jobs}
        self._slots = list(slots)
        self._running: dict[str, tuple[StudyJob, subprocess.Popen, dict[str, str], float]] = {}
        self._failed: dict[str, str] = {}
        self._done: list[str] = []
        self._stop: str | None = None
        self._board = _Board(self._total, quiet)

    def run(self) -> StudyOutcome:
        """All of them; returns when none is left. Call it from the main thread."""
        stopped_at = None
        with handling((signal.SIGTERM, signal.SIGINT), self._note):
            try:
                with self._board:
                    while self._running or (self._waiting and self._stop is None):
                        if self._stop is None:
                            self._start_what_is_ready()
                        elif stopped_at is None:
                            stopped_at = time.monotonic()
                            self._board.say(f"{self._stop}: {len(self._running)} running jobs save and end")
                            self._signal(signal.SIGTERM)
                        elif time.monotonic() - stopped_at > GRACE_SECONDS:
                            self._signal(signal.SIGKILL)
                        time.sleep(_POLL_SECONDS)
                        self._collect()
                        self._board.show(len(self._done), {n: j.share() for n, (j, *_) in self._running.items()})
            finally:
                self._signal(signal.SIGKILL)
                for _, process, *_ in self._running.values():
                    process.wait()
        return StudyOutcome(self._failed, [job.name for job in self._waiting])

    def _note(self, number: int, frame) -> None:
        self._stop = self._stop or signal_name(number)

    def _signal(self, number: int) -> None:
        for _, process, *_ in self._running.values():
            if process.poll() is None:
                process.send_signal(number)

    def _start_what_is_ready(self) -> None:
        for job in list(self._waiting):
            if not self._slots:
                return
            if job.needs in self._failed:
                self._waiting.remove(job)
                self._fail(job, f"{job.needs} failed before it")
            elif job.needs not in self._names or job.needs in self._done:
                self._waiting.remove(job)
                slot = self._slots.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with job.log.open("ab") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-u", *job.command],
                        env=os.environ | slot,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # The terminal's interrupt is for this process alone: it passes it on.
                        start_new_session=True,
                        preexec_fn=die_with_parent(os.getpid()),
                    )
                self._running[job.name] = (job, process, slot, time.monotonic())

    def _collect(self) -> None:
        for name, (job, process, slot, started) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            self._slots.append(slot)
            seconds = time.monotonic() - started
            if code == 0:
                self._done.append(name)
                self._board.say(f"{name}: done in {seconds:.0f} s ({len(self._done)} of {self._total})")
            elif self._stop is not None:
                self._waiting.insert(0, job)
            else:
                self._fail(job, f"exit code {code} after {seconds:.0f} s: {last_line(job.log)} ({job.log})")

    def _fail(self, job: StudyJob, why: str) -> None:
        self._failed[job.name] = why
        self._board.say(f"{job.name}: FAILED, {why}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


class _Board:
    """How far the jobs are: bars on a terminal, a line now and then elsewhere, on standard error."""

    def __init__(self, total: int, quiet: bool):
        self._total, self._quiet, self._bars = total, quiet, None
        self._said = self._started = time.monotonic()
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> _Board:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
            self._whole = self._bars.add_task("all", total=self._total)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            print(f"dcpo compare: {text}", file=sys.stderr, flush=True)

    def show(self, done: int, running: dict[str, float]) -> None:
        share = done + sum(running.values())
        if self._bars is not None:
            self._bars.update(self._whole, completed=share)
            for name in self._tasks.keys() - running.keys():
                self._bars.remove_task(self._tasks.pop(name))
            for name, part in running.items():
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=1.0)
                self._bars.update(self._tasks[name], completed=part)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            left = (self._said - self._started) / share * (self._total - share) if share else None
            parts = ", ".join(f"{name} {part:.0%}" for name, part in running.items())
            self.say(
                f"{share:.1f} of {self._total} jobs" + (f", {left:.0f} s left" if left else "") + f"; running: {parts}"
            )
