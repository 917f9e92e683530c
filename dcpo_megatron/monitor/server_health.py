"""What rank 0 knows of the rollout servers, in ``OUTPUT/health/servers.json``: for those who only look at the run's
files.

    {"written": 1764000000.0, "version": 12, "servers": [{"url": "http://a:30000", "version": 12, "reason": null}, ...]}

``version``: of the weights that a server holds, null where it is not used, and then ``reason`` says why.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.rollout.fleet import Fleet

SERVERS_FILE = "servers.json"


@dataclass(frozen=True)
class ServerStatus:
    """One server as the run saw it last. ``state``: "serving", "outdated" (older weights) or "not used"."""

    url: str
    state: str
    version: int | None
    reason: str | None
    seconds_since: float


class ServerHealth:
    """Writes the file where the fleet has changed. A disk that takes it not costs the file, never the run."""

    def __init__(self, health: Path, fleet: Fleet):
        self._file, self._fleet = health / SERVERS_FILE, fleet
        self._last: dict | None = None

    def note(self) -> None:
        """Writes what the fleet knows now."""
        state = self._fleet.state()
        if state == self._last:
            return
        servers = [
            {"url": url, "version": version, "reason": state["reasons"].get(url)}
            for url, version in state["held"].items()
        ]
        part = self._file.with_suffix(".part")
        try:
            part.write_text(
                json.dumps({"written": time.time(), "version": state["version"], "servers": servers}) + "\n",
                encoding="utf-8",
            )
            os.replace(part, self._file)
        except OSError:
            return  # tried again at the next change
        self._last = state


def read_server_health(health: Path, now: float) -> list[ServerStatus]:
    """The servers of the run; none where it has none, or the file is not whole."""
    try:
        content = json.loads((health / SERVERS_FILE).read_text(encoding="utf-8"))
        return [
            ServerStatus(
                server["url"],
                "not used"
                if server["version"] is None
                else "serving"
                if server["version"] == content["version"]
                else "outdated",
                server["version"],
                server["reason"],
                max(0.0, now - content["written"]),
            )
            for server in content["servers"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []
