"""Who is missing, in one sentence: from what the network says, then from the heartbeats. Pure.

rank 1 on host h2 cannot be reached over the network (no answer from 10.77.0.2); rank 0 on host h1 has waited in
phase update of step 45 since 14:03:21 (8 s, deadline 8 s): this run is stopped; see to host h2 and the network
between, then start the same command again to resume
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dcpo_megatron.monitor.heartbeat import Heartbeat, describe_standstill, ranks_in_words
from dcpo_megatron.monitor.reach import Peer

RESUME = "this run is stopped; start the same command again to resume"
_HOSTS_SHOWN = 3


@dataclass(frozen=True)
class Seen:
    """What one rank knows of the others when one of them is missing.

    ``rank``: who looks. ``peers``: all ranks as they introduced themselves, or none. ``reached``: of
    :func:`~dcpo_megatron.monitor.reach.look_around`. ``beats``: the last heartbeats by rank, its own included.
    ``folder``: why those of the others cannot be read; None: they can. ``dead_link``: the interface of this host that
    is down.
    """

    rank: int
    peers: Sequence[Peer]
    reached: dict[int, str]
    beats: dict[int, Heartbeat]
    folder: str | None
    dead_link: str | None
    now: float

    def anybody_missing(self) -> bool:
        """Whether another rank cannot go on, as far as network and heartbeats tell."""
        states = [beat.state(self.now) for beat in self.beats.values() if beat.rank != self.rank]
        return any(state != "there" for state in self.reached.values()) or any(state != "alive" for state in states)


def missing(seen: Seen, deadline: float | None = None) -> str:
    """The sentence about ranks that the network does not reach, or whose process the network says has ended. "" where
    there is none.

    ``deadline``: of the phase in which this rank stands, in seconds, where that is what ended the wait.
    """
    # A host where one rank answers is no host that is lost; of a large run one rank of each host was asked.
    answer = {seen.peers[rank].host for rank, state in seen.reached.items() if state != "lost"}
    silent = {seen.peers[rank].host for rank, state in seen.reached.items() if state == "lost"} - answer
    if lost := [peer for peer in seen.peers if peer.host in silent]:
        return _lost(seen, lost, deadline)
    gone = [seen.peers[rank] for rank, state in sorted(seen.reached.items()) if state == "gone"]
    if gone:
        # The one whose last word is the oldest: others may have ended for want of it.
        first = min(gone, key=lambda peer: seen.beats[peer.rank].written if peer.rank in seen.beats else 0.0)
        return f"{first} is gone: its process has ended{_last_seen(seen, first)}{_waited(seen, deadline)}: {RESUME}"
    return ""


def _lost(seen: Seen, lost: list[Peer], deadline: float | None) -> str:
    here, hosts = seen.peers[seen.rank].host, _by_host(lost)
    others = {peer.host for peer in seen.peers} - {here}
    names = ", ".join(
        f"{ranks_in_words([p.rank for p in ranks])} on host {host}"
        for host, ranks in list(hosts.items())[:_HOSTS_SHOWN]
    )
    if len(hosts) > _HOSTS_SHOWN:
        names += f" and those on {len(hosts) - _HOSTS_SHOWN} more hosts"
    waited = _waited(seen, deadline)
    if seen.dead_link is not None or (len(others) > 1 and others == set(hosts)):
        own = ranks_in_words([peer.rank for peer in seen.peers if peer.host == here])
        why = f"the link of {seen.dead_link} is down" if seen.dead_link is not None else "no other host answers"
        return (
            f"{own} on host {here} is cut off from the network ({why}): {names} cannot be reached{waited}: "
            f"this run is stopped; see to the network of host {here}, then start the same command again to resume"
        )
    addresses = ", ".join(dict.fromkeys(address for peer in lost[:_HOSTS_SHOWN] for address, _ in peer.doors))
    seen_last = _last_seen(seen, lost[0]) if len(hosts) == 1 else ""
    which = f"host {next(iter(hosts))}" if len(hosts) == 1 else "those hosts"
    return (
        f"{names} cannot be reached over the network (no answer from {addresses}){seen_last}{waited}: "
        f"this run is stopped; see to {which} and the network between, then start the same command again to resume"
    )


def standing(seen: Seen, world: int, deadline: float) -> str:
    """The sentence of a rank whose phase has lasted longer than its ``deadline``, whatever there is to say."""
    if found := missing(seen, deadline):
        return found
    own = seen.beats[seen.rank]
    if seen.folder is not None and world > 1:
        answer = "all other ranks that could be asked answer" if seen.reached else "nothing is known of the others"
        return (
            f"{own} has stood in phase {own.phase} of step {own.step} since {_clock(own.moved)} (deadline "
            f"{deadline:g} s); {answer}, and which of them is behind "
            f"cannot be told, for the run's folder cannot be read on this host ({seen.folder}): see that it is "
            f"mounted; {RESUME}"
        )
    hosts = {peer.host for peer in seen.peers}
    alike = {(beat.sequence, beat.state(seen.now)) for beat in seen.beats.values()} == {(own.sequence, "alive")}
    if len(hosts) > 1 and len(seen.beats) == world and alike:
        return (
            f"{own} has stood in phase {own.phase} of step {own.step} since {_clock(own.moved)} (deadline "
            f"{deadline:g} s), as all ranks have, and all that were asked "
            "answer: a connection between two of them is stuck (a link that was down for a while, a closed port, a "
            f"firewall), or one is busy (its stacks are in the run's folder): {RESUME}"
        )
    return f"{describe_standstill(seen.beats, world, deadline, seen.now)}: {RESUME}"


def broken(seen: Seen, timed_out: bool) -> str:
    """The sentence of a rank whose collective failed, by its time or a closed connection. "" where nothing can be
    said that the error does not say."""
    if found := missing(seen):
        return found
    others = [beat for beat in seen.beats.values() if beat.rank != seen.rank]
    dead = [beat for beat in others if beat.state(seen.now) != "alive"]
    if dead:
        order = ["gone", "stopped", "silent"]
        worst = min(dead, key=lambda beat: (order.index(beat.state(seen.now)), beat.written))
        what = {"gone": "is gone: its process has ended", "stopped": "is stopped", "silent": "gives no sign of life"}
        return (
            f"{worst} {what[worst.state(seen.now)]}; it was last seen in phase {worst.phase} of step {worst.step}:"
            f" {RESUME}"
        )
    if others and timed_out:
        worst = min(seen.beats.values(), key=lambda beat: (beat.sequence, beat.since))
        behind = worst.sequence < max(beat.sequence for beat in seen.beats.values())
        if worst.rank != seen.rank and (behind or not seen.reached):
            return (
                f"{worst} is behind: it has stood in phase {worst.phase} of step {worst.step} for"
                f" {seen.now - worst.since:.0f} s: {RESUME}"
            )
    if not seen.reached:
        return ""
    what = "waited too long for another rank" if timed_out else "lost its connection to another rank"
    folder = f"; the run's folder cannot be read on this host ({seen.folder})" if seen.folder is not None else ""
    return (
        f"{seen.peers[seen.rank]} {what}, and all ranks answer over the network{folder}{_waited(seen, None)}: "
        "look at what they say themselves, and for a link that was down for a while, closed ports and firewalls on "
        f"the way; {RESUME}"
    )


def _by_host(peers: list[Peer]) -> dict[str, list[Peer]]:
    found: dict[str, list[Peer]] = {}
    for peer in peers:
        found.setdefault(peer.host, []).append(peer)
    return found


def _last_seen(seen: Seen, peer: Peer) -> str:
    beat = seen.beats.get(peer.rank)
    if beat is None or seen.folder is not None:
        return ""
    return (
        f"; it was last seen in phase {beat.phase} of step {beat.step} ({max(0.0, seen.now - beat.written):.0f} s ago)"
    )


def _waited(seen: Seen, deadline: float | None) -> str:
    own = seen.beats.get(seen.rank)
    if own is None:
        return ""
    limit = f", deadline {deadline:g} s" if deadline is not None else ""
    return (
        f"; {own} has waited in phase {own.phase} of step {own.step} since {_clock(own.moved)}"
        f" ({seen.now - own.moved:.0f} s{limit})"
    )


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(moment))
