"""Can the other ranks be reached over the network? Asked where one of them is missing, and without a word on the wire.

    rank 1 on host h2: a socket that only listens   <-- connect -- rank 0 on host h1
        the kernel of h2 takes the connection             "there"      host and process are there
        it refuses                                        "gone"       the host is there, the process has ended
        nothing comes back within seconds, or no way      "lost"       the host is down, or the network between

Heartbeats tell where a rank stands, through the shared folder; this tells whether the network carries, and needs no
folder. Nobody takes the connections out of the queue: an answer is the kernel's, also where the process is busy.
Ranks of the same host are looked at as processes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dcpo_megatron import network
from dcpo_megatron.monitor.heartbeat import process_state

# Seconds until a host that says nothing counts as lost.
SECONDS = 2.0
_QUEUE = 1024
# Beyond so many ranks one of each other host is asked.
_ALL_ARE_ASKED = 256
_AT_ONCE = 128


@dataclass(frozen=True)
class Peer:
    """A rank as it introduced itself. ``doors``: addresses and ports where its process listens; ``stack``: the same
    for all on one host (a name may be that of several)."""

    rank: int
    host: str
    pid: int
    doors: tuple[tuple[str, int], ...] = ()
    stack: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}"


class Door:
    """Listens, for others to see that this process is there, on the addresses of the interface that gloo's
    collectives take. An address that cannot be had is left out."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        for address in collective_addresses():
            with contextlib.suppress(OSError):
                one = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
                self._sockets.append(one)
                one.bind((address, 0))
                one.listen(_QUEUE)

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        return tuple(one.getsockname()[:2] for one in self._sockets if one.getsockname()[1])

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def collective_addresses() -> list[str]:
    """Of the interface that GLOO_SOCKET_IFNAME names; where it does not, what this host's name resolves to: gloo
    takes the same."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        found = network.interfaces().get(name, [])
    else:
        with contextlib.suppress(OSError):
            found = [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
            return list(dict.fromkeys(map(str, found)))
        found = []
    return [address for address in found if not ipaddress.ip_address(address).is_link_local]


def dead_link(peer: Peer) -> str | None:
    """The interface of this host, ``peer``'s, whose link is down; None where all of them are up."""
    import psutil

    for address, _ in peer.doors:
        with contextlib.suppress(OSError, KeyError):
            name = network.interface_with(address)
            if not psutil.net_if_stats()[name].isup:
                return name
    return None


def look_around(peers: Sequence[Peer], rank: int, seconds: float = SECONDS) -> dict[int, str]:
    """For every other rank that can be asked "there", "stopped", "gone" or "lost". Takes ``seconds``, or a few times
    that among hundreds of hosts that are lost.

    ``peers`` are all ranks in their order, or none: then nobody is known.
    """
    if not peers:
        return {}
    here = (peers[rank].host, peers[rank].stack)
    found = {peer.rank: _here(peer) for peer in peers if (peer.host, peer.stack) == here and peer.rank != rank}
    asked = [peer for peer in peers if (peer.host, peer.stack) != here]
    if len(peers) > _ALL_ARE_ASKED:
        asked = _one_a_host(asked, sum((peer.host, peer.stack) == here for peer in peers[:rank]))
    pairs = [(peer.rank, door) for peer in asked for door in peer.doors if not network.is_loopback(door[0])]
    order = ("there", "gone", "lost")
    with ThreadPoolExecutor(min(_AT_ONCE, len(pairs) or 1)) as pool:
        for (number, _), state in zip(pairs, pool.map(lambda pair: _knock(pair[1], seconds), pairs), strict=True):
            # Of several addresses one that answers is enough.
            found[number] = min(found.get(number, "lost"), state, key=order.index)
    return found


def _one_a_host(peers: Iterable[Peer], place: int) -> list[Peer]:
    """The rank of each host at this rank's place among those of its own: no rank is asked by all."""
    hosts: dict[str, list[Peer]] = {}
    for peer in peers:
        hosts.setdefault(peer.host, []).append(peer)
    return [ranks[place % len(ranks)] for ranks in hosts.values()]


def _here(peer: Peer) -> str:
    state = process_state(peer.pid)
    return "there" if state == "alive" else state


def _knock(door: tuple[str, int], seconds: float) -> str:
    try:
        socket.create_connection(door, timeout=seconds).close()
    except ConnectionRefusedError:
        return "gone"
    except OSError:
        return "lost"
    return "there"
