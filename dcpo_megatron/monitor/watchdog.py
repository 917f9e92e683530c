"""Nothing hangs for ever: every rank says where it is, and ends the run with one clear sentence when it has stood still
for too long.

    main thread:       enter("rollout", 12) -> enter("reward") -> enter("exchange") -> ...        sets a few fields
    heartbeat thread:  writes them to OUTPUT/health/rank-R.json; in a shared folder that has gone away that may hang
    watchdog thread:   is the phase older than its deadline? then: who is missing, one sentence, all stacks to a file,
                       exit code 70. It looks at files and network through threads that it does not wait for long

A collective has a deadline of its own, but raises on those that wait; network and files tell whom they wait for
(:mod:`~dcpo_megatron.monitor.standstill`). :meth:`Watchdog.explain` does the same for a collective that raised because
another rank is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from dcpo_megatron.launch.signals import STOOD_STILL
from dcpo_megatron.monitor.heartbeat import (
    VERDICT,
    Heartbeat,
    beat_file,
    health_folder,
    read_heartbeats,
    unreadable,
    write_heartbeat,
)
from dcpo_megatron.monitor.reach import Door, Peer, dead_link, look_around
from dcpo_megatron.monitor.standstill import RESUME, Seen, broken, standing
from dcpo_megatron.monitor.timeline import Timeline

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
TIMED_OUT = re.compile(r"[Tt]imed? ?out")
_BROKEN = re.compile(r"Connection (closed|reset|refused)|Broken pipe")
_LONGEST_PERIOD = 15.0
# What a watchdog that must speak gives files and network, in seconds.
_LOOKS_FOR, _WRITES_FOR = 4.0, 2.0


def collective_timeout(timeout_seconds: float) -> float:
    """The deadline of collectives beside a watchdog of ``timeout_seconds``: a little later, so that the watchdog, who
    can tell the reason, speaks first."""
    return timeout_seconds + 3 * _looks(timeout_seconds)


def _looks(timeout_seconds: float) -> float:
    """Seconds between two looks at the clock."""
    return min(1.0, timeout_seconds / 20)


def within(seconds: float, work: Callable, default: object = None):
    """What ``work()`` returns, or ``default`` where it takes longer than ``seconds`` or raises OSError. It may go on
    in its thread: files on a dead server do."""
    answer = []

    def run() -> None:
        with contextlib.suppress(OSError):
            answer.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else default


class Watchdog:
    """The heartbeat of this rank, and the deadline of its phases. Silent and harmless until :meth:`start`.

    Args:
        run: the run's folder.
        rank, world: this rank and how many there are.
        timeout_seconds: how long a phase may last without progress.

    ``peers``: all ranks, once they have introduced themselves; ``door``: where they find this one.
    """

    def __init__(self, run: Path, rank: int, world: int, timeout_seconds: float):
        self.health = health_folder(run)
        self.peers: Sequence[Peer] = ()
        self.door: Door | None = None
        self._rank, self._world, self._timeout = rank, world, timeout_seconds
        self._period = min(_LONGEST_PERIOD, timeout_seconds / 4)
        now = time.time()
        # Replaced as a whole, so that the other threads see one state: step, phase, since, sequence, deadline.
        self._place: tuple[int, str, float, int, float] = (0, "start", now, 0, math.inf)
        self._moved = now
        self._changed, self._over = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._started = self._complained = False
        self._host, self._pid = socket.gethostname(), os.getpid()

    def start(self) -> None:
        """Begins to write and to watch. What an earlier run left is removed: this rank's by this rank, the rest by rank
        0. Raises OSError."""
        self.health.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            kinds = ("rank-*", "said-*", "meeting-*")
            for file in [self.health / VERDICT, *(file for kind in kinds for file in self.health.glob(kind))]:
                number = file.name[5:10]
                if not file.name.startswith("rank-") or (number.isdigit() and int(number) >= self._world):
                    file.unlink(missing_ok=True)
        for kind in (".stacks", ".traceback"):
            self._file(kind).unlink(missing_ok=True)
        self._write()
        self._started = True
        for name, work in (("heartbeat", self._keep_writing), ("watchdog", self._watch)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def enter(self, phase: str, step: int | None = None, timeout_seconds: float | None = None) -> None:
        """This rank begins ``phase`` of ``step`` (None: the same step), which may last ``timeout_seconds`` (None: the
        run's). Costs a microsecond."""
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
        """Stops watching; ``phase`` is the last word that stays in the file, such as "finished". Safe to call twice.

        Where the watchdog is about to speak, it ends the process here.
        """
        threads, self._threads = self._threads, []
        if not threads:
            return
        self._over.set()
        self._changed.set()
        writing, watching = threads
        watching.join(_LOOKS_FOR + 4 * _WRITES_FOR)
        writing.join(_WRITES_FOR)
        if phase is not None:
            self.enter(phase)
        if not writing.is_alive():  # it may hang in a folder that is gone: the same file is not for two
            within(_WRITES_FOR, self._write)

    def explain(self, error: BaseException) -> str:
        """:func:`explain_failure` for this rank, after :meth:`close`."""
        if not self._started:  # heartbeats are an earlier run's
            return ""
        return explain_failure(
            error, self.health.parent, self._world, rank=self._rank, peers=self.peers, own=self._beat()
        )

    def keep(self, error: BaseException) -> Path | None:
        """Writes the traceback of ``error`` beside this rank's heartbeat, and returns the file; None where that
        cannot be."""

        def write() -> Path:
            file = self._file(".traceback")
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
            return file

        return within(_WRITES_FOR, write)

    # -- the other threads -------------------------------------------------------------------------

    def _file(self, kind: str) -> Path:
        return beat_file(self.health, self._rank).with_suffix(kind)

    def _beat(self) -> Heartbeat:
        step, phase, since, sequence, _ = self._place
        return Heartbeat(
            self._rank, self._host, self._pid, step, phase, since, sequence, self._moved, time.time(), self._period
        )

    def _write(self) -> None:
        try:
            write_heartbeat(self.health, self._beat())
            self._complained = False
        except OSError as error:
            # A full disk, or a shared folder that is gone, must not end the run; it is said once each time.
            if not self._complained:
                self._complained = True
                print(f"dcpo: {self.health} cannot be written ({error.strerror}): no heartbeats", file=sys.stderr)

    def _keep_writing(self) -> None:
        looks = _looks(self._timeout)
        while not self._over.is_set():
            self._changed.wait(self._period)
            self._changed.clear()
            self._write()
            time.sleep(min(0.05, looks))  # phases that follow at once share a writing

    def _watch(self) -> None:
        while not self._over.wait(_looks(self._timeout)):
            *_, deadline = self._place
            if time.time() - self._moved > deadline:
                self._stop_the_run(deadline)

    def _stop_the_run(self, deadline: float) -> None:
        try:
            own = self._beat()
            try:
                sentence = standing(see(self.health, self._rank, self.peers, own), self._world, deadline)
            except Exception as error:  # whatever it is, this rank ends with a word
                sentence = (
                    f"{own} has stood in phase {own.phase} of step {own.step} (deadline {deadline:g} s; {error!r}):"
                    f" {RESUME}"
                )
            within(_WRITES_FOR, self._leave_stacks)
            heard = within(_WRITES_FOR, lambda: self._leave_verdict(sentence), False)
            text = f"error: {sentence}"
            if heard:
                text = f"rank {self._rank} ends: the run has stood still, see {self.health / VERDICT}"
            within(_WRITES_FOR, lambda: os.write(2, f"dcpo: {text}\n".encode()))
        finally:
            os._exit(STOOD_STILL)

    def _leave_stacks(self) -> None:
        with open(self._file(".stacks"), "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _leave_verdict(self, sentence: str) -> bool:
        """Writes the first rank's sentence. Returns whether another rank has said its own on this console already:
        ranks of one host may share one."""
        with contextlib.suppress(FileExistsError), open(self.health / VERDICT, "x", encoding="utf-8") as file:
            file.write(sentence + "\n")
        console = os.fstat(2)
        try:
            (self.health / f"said-{self._host}-{console.st_dev}-{console.st_ino}").touch(exist_ok=False)
        except FileExistsError:
            return True
        return False


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


def see(health: Path, rank: int, peers: Sequence[Peer], own: Heartbeat | None = None) -> Seen:
    """What ``rank`` can learn of the others now, from the network and from the heartbeats in ``health``. Takes some
    seconds at most."""
    reached: dict[int, str] = {}
    asking = threading.Thread(target=lambda: reached.update(look_around(peers, rank)), daemon=True)
    asking.start()
    found = within(_WRITES_FOR, lambda: (read_heartbeats(health), unreadable(health)), ({}, "it does not answer"))
    asking.join(_LOOKS_FOR)
    beats, folder = found
    link = dead_link(peers[rank]) if peers else None
    return Seen(rank, peers, dict(reached), beats | ({} if own is None else {rank: own}), folder, link, time.time())


def explain_failure(
    error: BaseException,
    folder: Path,
    world: int,
    *,
    rank: int = -1,
    patience: float = 2.0,
    peers: Sequence[Peer] = (),
    own: Heartbeat | None = None,
) -> str:
    """Why a collective raised ``error`` on ``rank``: a sentence that names the rank that cannot be reached, is gone,
    stopped or behind.

    ``peers``: all ranks, to be looked for over the network; the rest is told by the heartbeats in the run's ``folder``;
    ``own``: this rank's, as of now. Empty where ``error`` is not about a collective, or nothing is found. Waits up to
    ``patience`` seconds for a rank to be seen gone: a connection closes a moment before its process has ended.
    """
    text = f"{type(error).__name__} {error}"
    if world < 2 or not isinstance(error, RuntimeError) or not _OF_A_COLLECTIVE.search(text):
        return ""
    until = time.monotonic() + patience
    while not (seen := see(health_folder(folder), rank, peers, own)).anybody_missing() and time.monotonic() < until:
        time.sleep(0.1)
    timed_out = bool(TIMED_OUT.search(text))
    if not timed_out and not _BROKEN.search(text) and not seen.anybody_missing():
        return ""  # a fault of another kind, of which the error itself tells more
    return broken(seen, timed_out)
