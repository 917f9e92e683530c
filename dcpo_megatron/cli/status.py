"""``dcpo status RUN``: how far a run is, how fast, and whether its ranks are well. It reads files only and disturbs
nothing.

Exit codes: 0 running, finished or stopped when asked to; 1 it ended before it was finished; 2 there is no run in the
folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from dcpo_megatron.monitor.server_health import ServerStatus
from dcpo_megatron.monitor.status import RankStatus, RunStatus, StatusError, read_status


def main(argv: list[str] | None = None) -> int:
    """Prints the status; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dcpo status", description="How far a run is, and whether it is well.")
    parser.add_argument("run", metavar="RUN", help="the run's folder, its output=")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines for people")
    args = parser.parse_args(argv)
    try:
        status = read_status(args.run)
    except StatusError as error:
        print(f"dcpo: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(status), indent=2) if args.json else "\n".join(lines(status)))
    return 1 if status.state == "ended" else 0


def lines(status: RunStatus) -> list[str]:
    """The status for people."""
    advice = {
        "stopped": "saved when it was asked to stop; the same command goes on",
        "ended": "it was killed or failed; the same command goes on from the checkpoint",
        "not started": "no step and no heartbeat yet",
    }
    remark = advice.get(status.state)
    if status.state == "ended" and status.checkpoint is None:
        remark = "it was killed or failed before its first checkpoint; the same command begins anew"
    found = [f"{status.folder}: {status.state}" + (f" ({remark})" if remark else "")]
    total = "?" if status.total_steps is None else status.total_steps
    progress = f"step {status.step} of {total}"
    if status.steps_per_hour is not None:
        progress += f", {status.steps_per_hour:.1f} steps an hour"
    if status.seconds_left and status.state == "running":
        progress += f", {duration(status.seconds_left)} left"
    found.append(progress)
    numbers = {"reward": status.reward, "accuracy": status.accuracy, "held-out accuracy": status.held_out_accuracy}
    shown = [f"{name} {value:.3f}" for name, value in numbers.items() if value is not None]
    if shown:
        found.append(", ".join(shown))
    found.append(f"last complete checkpoint: {status.checkpoint or 'none'}")
    if status.verdict:
        found.append(status.verdict)
    return found + [_line(rank) for rank in status.ranks] + [_server_line(server) for server in status.servers]


def _line(rank: RankStatus) -> str:
    text = f"rank {rank.rank} ({rank.host}, process {rank.pid}): {rank.state}"
    if rank.state != rank.phase:
        text += f", {rank.phase} of step {rank.step} for {duration(rank.seconds_in_phase)}"
    return f"{text}, heartbeat {duration(rank.seconds_since_heartbeat)} ago"


def _server_line(server: ServerStatus) -> str:
    text = f"server {server.url}: {server.state}"
    if server.version is not None:
        text += f", weights of step {server.version}"
    if server.reason:
        text += f" ({server.reason})"
    return f"{text}, as of {duration(server.seconds_since)} ago"


def duration(seconds: float) -> str:
    """Such as 7 s, 12 min, 3 h 5 min, 2 d 4 h."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
