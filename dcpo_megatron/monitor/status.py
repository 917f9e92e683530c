"""How far a run is and whether it is well, from the files in its folder alone: while it runs, after it ended, after it
was killed.

config.yaml      how many steps it wants         checkpoints/latest  the newest complete checkpoint
metrics.jsonl    steps done, seconds, reward     health/             heartbeats of the ranks, rollout servers, a
                                                                     watchdog's verdict
summary.json     written when it is finished
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from dcpo_megatron.files import read_rows
from dcpo_megatron.monitor.heartbeat import VERDICT, Heartbeat, health_folder, read_heartbeats
from dcpo_megatron.monitor.server_health import ServerStatus, read_server_health

RATE_STEPS = 20
_AT_REST = ("finished", "stopped")


class StatusError(ValueError):
    """The folder holds no run; the message says what is missing."""


@dataclass(frozen=True)
class RankStatus:
    """One rank: ``state`` is alive, silent, stopped, gone, or the last word it left ("finished", "stopped"); times in
    seconds."""

    rank: int
    host: str
    pid: int
    state: str
    phase: str
    step: int
    seconds_in_phase: float
    seconds_since_heartbeat: float


@dataclass(frozen=True)
class RunStatus:
    """``state``: "running", "finished", "stopped" (saved and ended when asked to), "ended" (it runs no more and is not
    finished) or "not started"."""

    folder: str
    state: str
    step: int
    total_steps: int | None
    steps_per_hour: float | None
    seconds_left: float | None
    reward: float | None
    accuracy: float | None
    held_out_accuracy: float | None
    checkpoint: str | None
    verdict: str | None
    ranks: list[RankStatus]
    servers: list[ServerStatus]


def read_status(run: str | Path, now: float | None = None) -> RunStatus:
    """The status of the run in folder ``run`` at Unix time ``now``. Raises StatusError where there is no run."""
    run, now = Path(run), time.time() if now is None else now
    if not run.is_dir():
        raise StatusError(
            f"{run} " + ("is a file" if run.exists() else "does not exist") + ": name the folder of a run (its output=)"
        )
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl", "health")):
        raise StatusError(
            f"{run} holds no run: it has no config.yaml, metrics.jsonl or health (name the folder that output= gave)"
        )
    rows = read_rows(run / "metrics.jsonl")
    steps = [row for row in rows if isinstance(row.get("seconds"), (int, float))]
    evaluations = [row["eval_accuracy"] for row in rows if "eval_accuracy" in row]
    step = steps[-1]["step"] if steps else 0
    total = _total_steps(run / "config.yaml")
    recent = [row["seconds"] for row in steps[-RATE_STEPS:]]
    mean = sum(recent) / len(recent) if recent else None
    beats = read_heartbeats(health_folder(run))
    ranks = [_rank_status(beat, now) for beat in beats.values()]
    verdict = _text(health_folder(run) / VERDICT)
    return RunStatus(
        folder=str(run),
        state=_state(run, step, total, ranks, verdict),
        step=step,
        total_steps=total,
        steps_per_hour=3600 / mean if mean else None,
        seconds_left=mean * max(0, total - step) if mean and total is not None else None,
        reward=steps[-1].get("reward") if steps else None,
        accuracy=steps[-1].get("accuracy") if steps else None,
        held_out_accuracy=evaluations[-1] if evaluations else None,
        checkpoint=_text(run / "checkpoints" / "latest"),
        verdict=verdict,
        ranks=ranks,
        servers=read_server_health(health_folder(run), now),
    )


def _state(run: Path, step: int, total: int | None, ranks: list[RankStatus], verdict: str | None) -> str:
    at_rest = [rank.state for rank in ranks if rank.state in _AT_REST and rank.phase == rank.state]
    if any(rank.state == "alive" or (rank.state == "stopped" and rank.phase != "stopped") for rank in ranks):
        return "running"
    if verdict is None and (run / "summary.json").is_file() and (total is None or step >= total):
        return "finished"
    if ranks and len(at_rest) == len(ranks):
        return "stopped"
    return "ended" if ranks or step else "not started"


def _rank_status(beat: Heartbeat, now: float) -> RankStatus:
    state = beat.phase if beat.phase in _AT_REST else beat.state(now)
    return RankStatus(
        beat.rank,
        beat.host,
        beat.pid,
        state,
        beat.phase,
        beat.step,
        max(0.0, now - beat.since),
        max(0.0, now - beat.written),
    )


def _total_steps(file: Path) -> int | None:
    try:
        return int(yaml.safe_load(file.read_text(encoding="utf-8"))["training"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
