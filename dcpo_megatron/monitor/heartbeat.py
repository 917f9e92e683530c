"""What every rank leaves in ``OUTPUT/health`` about itself, and what can be read from it: who is behind, who is gone.

    health/rank-00000.json       {"rank": 0, "host": "a", "pid": 123, "step": 12, "phase": "update",
                                  "since": 1732461108.1, "sequence": 85, "written": 1732461110.2, ...}
    health/rank-00000.stacks     the stacks of its threads, where a watchdog ended it
    health/rank-00000.traceback  where a collective of it failed for want of another rank
    health/verdict               the sentence with which a watchdog ended the run

All ranks go through the same phases in the same order, so the one with the lowest sequence number is the one the others
wait for. Pure file work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

VERDICT = "verdict"


@dataclass(frozen=True)
class Heartbeat:
    """One rank's last word. ``since`` (when the phase began), ``moved`` (its last progress) and ``written`` are Unix
    times in seconds; ``sequence`` counts phases; ``period`` is the longest time between two writings while the process
    lives."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    sequence: int
    moved: float
    written: float
    period: float

    def state(self, now: float) -> str:
        """``"gone"`` (its process has ended), ``"stopped"`` (SIGSTOP), ``"silent"`` (no sign of life for long) or
        ``"alive"``."""
        state = process_state(self.pid) if self.host == socket.gethostname() else "alive"
        return "silent" if state == "alive" and now - self.written > 4 * self.period else state

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}"


def health_folder(run: Path) -> Path:
    """The folder of heartbeats of the run in ``run``."""
    return Path(run) / "health"


def beat_file(health: Path, rank: int) -> Path:
    return health / f"rank-{rank:05d}.json"


def write_heartbeat(health: Path, beat: Heartbeat) -> None:
    """Replaces the rank's file in one move."""
    file = beat_file(health, beat.rank)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
    part.replace(file)


def read_heartbeats(health: Path) -> dict[int, Heartbeat]:
    """The heartbeats in a folder by rank; files that are no heartbeat are left out."""
    found = {}
    for file in sorted(health.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Heartbeat(**json.loads(file.read_text(encoding="utf-8")))
            found[beat.rank] = beat
    return found


def unreadable(health: Path) -> str | None:
    """Why nothing can be read of a folder that this rank has written to, in a few words; None where it can."""
    try:
        return None if os.listdir(health) else "it is empty"
    except OSError as error:
        return error.strerror or str(error)


def most_behind(beats: Iterable[Heartbeat], now: float) -> Heartbeat:
    """The rank that the others wait for: one that cannot run, else the one that came least far, else one that is
    silent, else the one longest there."""
    order = {"gone": 0, "stopped": 1, "silent": 2, "alive": 2}

    def key(beat: Heartbeat):
        state = beat.state(now)
        return order[state], beat.sequence, state != "silent", beat.moved

    return min(beats, key=key)


def describe_standstill(beats: dict[int, Heartbeat], world: int, deadline: float, now: float) -> str:
    """One sentence: which rank of ``world`` is behind, where it stands, and where the others wait. ``beats`` holds at
    least one."""
    missing = [rank for rank in range(world) if rank not in beats]
    if missing:
        return f"{ranks_in_words(missing)} of {world} never began its first phase (deadline {deadline:g} s)"
    worst = most_behind(beats.values(), now)
    state = {
        "gone": "; its process has ended",
        "stopped": "; its process is stopped",
        "silent": "; it gives no sign of life",
    }
    text = (
        f"{worst} has stood in phase {worst.phase} of step {worst.step} for {now - worst.moved:.0f} s (deadline"
        f" {deadline:g} s)"
    )
    text += state.get(worst.state(now), "")
    places: dict[tuple[str, int], list[int]] = {}
    for rank, beat in sorted(beats.items()):
        if rank != worst.rank:
            places.setdefault((beat.phase, beat.step), []).append(rank)
    if places:
        waits = [f"{ranks_in_words(ranks)} in {phase} of step {step}" for (phase, step), ranks in places.items()]
        text += f"; waiting: {', '.join(waits)}"
    return text


def ranks_in_words(ranks: list[int]) -> str:
    """ "rank 3", "ranks 1, 4", or "ranks 8 to 15" for some that follow one another."""
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def process_state(pid: int) -> str:
    """ "alive", "stopped" or "gone": a process of this host."""
    with contextlib.suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {"Z": "gone", "X": "gone", "T": "stopped"}.get(letter, "alive")
    try:  # no /proc, or no such process
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        return "alive"
    return "alive"
