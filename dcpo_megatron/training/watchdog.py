"""Nothing hangs for ever: every rank says where it is, and ends the run with one clear sentence when it has stood still for too long.

    main thread:  enter("rollout", 12) -> enter("reward") -> enter("exchange") -> enter("update") ...      sets a few fields
    own thread:   writes them to OUTPUT/health/rank-R.json; is the phase older than its deadline?
                  then: who is behind (from everybody's files), one sentence, all stacks to a file, exit code 70

A collective has a deadline of its own, but raises on those that wait; the files tell whom they wait for. :func:`explain_failure` does the same for a collective
that raised because another rank is gone.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

from dcpo_megatron.training.heartbeat import (
    VERDICT,
    Heartbeat,
    beat_file,
    describe_standstill,
    health_folder,
    read_heartbeats,
    wait_for_somebody_gone,
    write_heartbeat,
)
from dcpo_megatron.training.signals import STOOD_STILL
from dcpo_megatron.training.timeline import Timeline

RESUME = "this run is stopped; start the same command again to resume"
# Phases by the span that begins them.
PHASE_OF_SPAN = {
    "rollout": "rollout",
    "reward": "reward",
    "rollout_wait": "exchange",
    "old_logprobs": "old_logprobs",
    "forward_backward": "update",
    "publish": "publish",
}
_OF_A_COLLECTIVE = re.compile(
    r"Connection (closed|reset|refused)|[Tt]imed out|[Tt]imeout|Broken pipe|NCCL|gloo|ProcessGroup|TCPStore|Socket",
    re.DOTALL,
)
_LONGEST_PERIOD = 15.0


def collective_timeout(timeout_seconds: float) -> float:
    """The deadline of collectives beside a watchdog of ``timeout_seconds``: a little later, so that the watchdog, who can tell the reason, speaks first."""
    return timeout_seconds + 3 * _looks(timeout_seconds)


def _looks(timeout_seconds: float) -> float:
    """Seconds between two looks at the clock."""
    return min(1.0, timeout_seconds / 20)


class Watchdog:
    """The heartbeat of this rank, and the deadline of its phases. Silent and harmless until :meth:`start`.

    Args:
        run: the run's folder.
        rank, world: this rank and how many there are.
        timeout_seconds: how long a phase may last without progress.
    """

    def __init__(self, run: Path, rank: int, world: int, timeout_seconds: float):
        self.health = health_folder(run)
        self._rank, self._world, self._timeout = rank, world, timeout_seconds
        self._period = min(_LONGEST_PERIOD, timeout_seconds / 4)
        now = time.time()
        # Replaced as a whole, so that the other thread sees one state: step, phase, since, sequence, deadline.
        self._place: tuple[int, str, float, int, float] = (0, "start", now, 0, math.inf)
        self._moved = now
        self._changed = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._host, self._pid = socket.gethostname(), os.getpid()

    def start(self) -> None:
        """Begins to write and to watch. What an earlier run left is removed: this rank's by this rank, the rest by rank 0. Raises OSError."""
        self.health.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            for file in [self.health / VERDICT, *self.health.glob("rank-*")]:
                number = file.name[5:10]
                if file.name == VERDICT or (number.isdigit() and int(number) >= self._world):
                    file.unlink(missing_ok=True)
        beat_file(self.health, self._rank).with_suffix(".stacks").unlink(missing_ok=True)
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int | None = None, timeout_seconds: float | None = None) -> None:
        """This rank begins ``phase`` of ``step`` (None: the same step), which may last ``timeout_seconds`` (None: the run's). Costs a microsecond."""
        last, _, _, sequence, _ = self._place
        now = time.time()
        deadline = self._timeout if timeout_seconds is None else timeout_seconds
        self._moved = now
        self._place = (last if step is None else step, phase, now, sequence + 1, deadline)
        self._changed.set()

    def progress(self, *_: object) -> None:
        """The phase goes on: its deadline counts from now."""
        self._moved = time.time()

    def close(self, phase: str | None = None) -> None:
        """Stops watching; ``phase`` is the last word that stays in the file, such as "finished". Safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closed = True
        self._changed.set()
        thread.join(timeout=10)
        if phase is not None:
            self.enter(phase)
        self._write()

    # -- the other thread -------------------------------------------------------------------------------------------------------------------

    def _beat(self) -> Heartbeat:
        step, phase, since, sequence, _ = self._place
        return Heartbeat(
            self._rank, self._host, self._pid, step, phase, since, sequence, self._moved, time.time(), self._period
        )

    def _write(self) -> None:
        try:
            write_heartbeat(self.health, self._beat())
        except OSError as error:
            # A full disk must not end the run; it is said once.
            if not getattr(self, "_complained", False):
                self._complained = True
                print(f"dcpo: {self.health} cannot be written ({error.strerror}): no heartbeats", file=sys.stderr)

    def _watch(self) -> None:
        written = 0.0
        looks = _looks(self._timeout)
        while not self._closed:
            changed = self._changed.wait(looks)
            self._changed.clear()
            now = time.time()
            if changed or now - written > self._period:
                self._write()
                written = now
            if changed:
                time.sleep(min(0.05, looks))  # phases that follow at once share a writing
            *_, deadline = self._place
            if now - self._moved > deadline and not self._closed:
                self._stop_the_run(deadline)

    def _stop_the_run(self, deadline: float) -> None:
        self._write()
        with open(beat_file(self.health, self._rank).with_suffix(".stacks"), "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        beats = read_heartbeats(self.health) | {self._rank: self._beat()}
        sentence = f"{describe_standstill(beats, self._world, deadline, time.time())}: {RESUME}"
        try:
            # Several ranks reach their deadlines together; one speaks.
            with open(self.health / VERDICT, "x", encoding="utf-8") as file:
                file.write(sentence + "\n")
            os.write(2, f"dcpo: error: {sentence}\n".encode())
        except OSError:
            pass_on = f"dcpo: rank {self._rank} ends: the run has stood still, see {self.health / VERDICT}\n"
            os.write(2, pass_on.encode())
        os._exit(STOOD_STILL)


class WatchedTimeline(Timeline):
    """A timeline whose spans are the phases of a watchdog too."""

    def __init__(self, watchdog: Watchdog):
        super().__init__()
        self.watchdog = watchdog

    def span(self, name: str):
        phase = PHASE_OF_SPAN.get(name)
        if phase is not None:
            self.watchdog.enter(phase)
        return super().span(name)


def explain_failure(error: BaseException, folder: Path, world: int, *, rank: int = -1, patience: float = 2.0) -> str:
    """Why a collective raised ``error`` on ``rank``, from the heartbeats in the run's ``folder``: a sentence that names the rank that is gone, stopped or behind.

    Empty where ``error`` is not about a collective, or the heartbeats tell nothing. Waits up to ``patience`` seconds for a rank to be seen gone.
    """
    if (
        world < 2
        or not isinstance(error, RuntimeError)
        or not _OF_A_COLLECTIVE.search(f"{type(error).__name__} {error}")
    ):
        return ""
    beats = wait_for_somebody_gone(health_folder(folder), rank, patience)
    now = time.time()
    others = [beat for beat in beats.values() if beat.rank != rank]
    lost = [beat for beat in others if beat.state(now) != "alive"]
    if lost:
        worst = min(lost, key=lambda beat: (["gone", "stopped", "silent"].index(beat.state(now)), beat.written))
        what = {"gone": "is gone: its process has ended", "stopped": "is stopped", "silent": "gives no sign of life"}
        return (
            f"{worst} {what[worst.state(now)]}; it was last seen in phase {worst.phase} of step {worst.step}: {RESUME}"
        )
    if beats and re.search(r"[Tt]imed? ?out", str(error)):
        worst = min(beats.values(), key=lambda beat: (beat.sequence, beat.since))
        if worst.rank != rank:
            return f"{worst} is behind: it has stood in phase {worst.phase} of step {worst.step} for {now - worst.since:.0f} s: {RESUME}"
    return ""
