"""Which servers a run has, and whose weights each of them holds. Bookkeeping only: nothing here talks to a server.

                 admit(server, 7)                       evict(server, "reason")
    evicted  ----------------------->  serving (7)  ----------------------------->  evicted
                                          |  another server is admitted with 8
                                          v
                                       outdated (7): not asked for samples until it is admitted with 8

A server is given its weights under a tag that names the run and the version, so that another run's weights, or a
restarted server's, are never taken for ours.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from dcpo_megatron.rollout.server import Server

# Behind a version's tag: weights whose check is not over. No server serves them yet.
UNVERIFIED = ".unverified"


class Fleet:
    """The servers of a run. Thread-safe. All are evicted ("no weights yet") until they are admitted.

    Args:
        servers: at least one, each with an address of its own.
        run_id: in every tag. Must differ between two starts whose weights of the same version could differ.

    Raises:
        ValueError: no server, one address twice, or an empty ``run_id``.
    """

    def __init__(self, servers: Sequence[Server], run_id: str):
        urls = [server.url for server in servers]
        if not urls:
            raise ValueError("a fleet needs at least one server: list the addresses of the running servers")
        for url in urls:
            if urls.count(url) > 1:
                raise ValueError(f"server address {url} is listed twice: list every server once")
        if not run_id:
            raise ValueError("a fleet needs a run_id: without one, another run's weights would pass for ours")
        self.servers = tuple(servers)
        self.run_id = run_id
        self._version: int | None = None
        self._held: dict[str, int | None] = dict.fromkeys(urls)
        self._reasons: dict[str, str] = dict.fromkeys(urls, "no weights yet")
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """The version that the serving servers hold; None before the first :meth:`admit`."""
        return self._version

    def tag(self, version: int) -> str:
        """What a server is given as ``weight_version`` together with the weights of ``version``."""
        return f"{self.run_id}-{version}"

    def version_of(self, tag: str) -> int | None:
        """The version whose :meth:`tag` is ``tag``; None where the weights are not this run's."""
        run, _, number = str(tag).rpartition("-")
        if run != self.run_id or not (number.isascii() and number.isdigit()) or str(int(number)) != number:
            return None
        return int(number)

    def unverified_version_of(self, tag: str) -> int | None:
        """The version whose weights a server with this tag was being given; None for every other tag."""
        return self.version_of(tag.removesuffix(UNVERIFIED)) if tag.endswith(UNVERIFIED) else None

    def serving(self) -> list[Server]:
        """The servers that hold the weights of :attr:`version`, in the order of ``servers``."""
        with self._lock:
            return [
                server
                for server in self.servers
                if self._version is not None and self._held[server.url] == self._version
            ]

    def evicted(self) -> dict[str, str]:
        """Address -> reason, of the servers that hold no weights which we trust."""
        with self._lock:
            return dict(self._reasons)

    def evict(self, server: Server, reason: str) -> None:
        """``server`` is not asked again until it is admitted. The first reason stays."""
        with self._lock:
            self._held[self._known(server)] = None
            self._reasons.setdefault(server.url, reason)

    def admit(self, server: Server, version: int) -> None:
        """``server`` holds the weights of ``version``, which becomes the version that is served: servers with another
        one are outdated."""
        with self._lock:
            self._held[self._known(server)] = version
            self._reasons.pop(server.url, None)
            self._version = version

    def state(self) -> dict:
        """JSON, for :meth:`adopt` on the other ranks."""
        with self._lock:
            return {"version": self._version, "held": dict(self._held), "reasons": dict(self._reasons)}

    def adopt(self, state: dict) -> None:
        """Takes over another rank's view. Raises ValueError where it speaks of other servers."""
        if set(state["held"]) != {server.url for server in self.servers}:
            raise ValueError(
                f"the ranks do not list the same servers: {sorted(state['held'])} and"
                f" {sorted(server.url for server in self.servers)}"
            )
        with self._lock:
            self._version = state["version"]
            self._held = dict(state["held"])
            self._reasons = dict(state["reasons"])

    def _known(self, server: Server) -> str:
        if server.url not in self._held:
            raise ValueError(f"{server.url} is not a server of this fleet")
        return server.url
