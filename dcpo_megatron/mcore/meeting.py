"""The first meeting of the ranks, at a store beside rank 0, before any collective: so that who did not come can be
named.

    rank 0        opens the store at MASTER_PORT          (under torchrun its agent has)
    every rank    rank-R = its host, network, address     came += 1
    the last one  verdict = all are here, and what each needs to know to choose its interface
    or the first whose time is up:  verdict = who is missing      the same sentence on every rank that is there
    one rank of each host then knocks at the next host, where gloo will listen:  reached = who does not reach whom

What can block in C++ (a store behind a dead link) runs in a thread that nobody joins.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

import torch.distributed as dist

from dcpo_megatron import network
from dcpo_megatron.mcore.meeting_facts import (
    NAMED_HOSTS,
    choose_interface,
    family,
    named,
    present,
    rendezvous_host,
    settle,
    unreached,
    wrong_names,
)
from dcpo_megatron.threads import beside

FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 15.0, 60.0  # what the wait is for is said after so long, and then so often
_STORE_SECONDS = 30.0  # one answer of the store
_FAREWELL_SECONDS = 5.0  # for all to read why
_KNOCK_SECONDS = 6.0  # somebody listens there already
_OTHERS_SECONDS = 60.0  # for the rank of each host that knocks, once all are here


class MeetingError(RuntimeError):
    """The ranks did not meet; the message is the sentence to show."""


@dataclass(frozen=True)
class Meeting:
    """``store`` is everybody's, for process groups; ``interface`` leads to the other hosts, None where it is not known;
    ``one_network``: it is the loopback, which all share."""

    store: dist.Store
    rank: int
    world: int
    interface: str | None
    one_network: bool


def alone(variables: Sequence[str] = (network.GLOO,)) -> Meeting:
    """One rank by itself. Raises MeetingError as :func:`meet`."""
    verdict = settle([{"wrong": wrong_names(variables), "stack": "", "address": None}])
    if verdict["failed"]:
        raise MeetingError(verdict["failed"])
    return Meeting(dist.HashStore(), 0, 1, choose_interface(verdict, {}), True)


@contextmanager
def explained(met: Meeting) -> Iterator[None]:
    """Around the making of the first groups. Raises MeetingError where ranks that have met do not reach one another."""
    try:
        yield
    except RuntimeError as error:
        uses, found = os.environ.get(network.GLOO, ""), network.interfaces()
        mine = {name: found[name] for name in uses.split(",") if name in found}
        raise MeetingError(
            f"the run has not started: all {met.world} ranks have met, and could not connect to one another"
            f" ({_first_line(error)}): rank {met.rank} on {socket.gethostname()} listens on"
            f" {network.text(mine) or 'what its host name resolves to'}: can the others reach it there, at any port?"
            f" {network.GLOO} names another interface"
        ) from error


def meet(
    seconds: float, variables: Sequence[str] = (network.GLOO,), tick: Callable[[], None] = lambda: None
) -> Meeting:
    """Waits for all ranks of torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), ``seconds`` at most.

    ``variables``: those that name an interface and will be looked at, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
    ``tick`` is called while waiting; what it raises ends the wait.

    Raises:
        MeetingError: ranks that did not come, a store that is not found or was lost, a rank that is there twice, an
            interface that does not exist.
    """
    guest = _Guest(seconds, variables)
    over = beside(guest.meet, "meeting")
    while time.monotonic() < guest.until:
        tick()
        with suppress(TimeoutError):
            return over.result(0.2)
    raise MeetingError(
        f"the run has not started: the store beside rank 0, at {guest.place}, has stopped answering rank {guest.rank}"
        f" on {guest.host} ({seconds:g} s are over): look at that host and the network between"
    )


@dataclass
class _Guest:
    seconds: float
    variables: Sequence[str]
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise MeetingError(
                f"RANK is set and {', '.join(missing)} not: start ranks with `dcpo train --ranks`, torchrun or"
                " examples/slurm"
            )
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        self.master, self.port = network.bare(os.environ["MASTER_ADDR"]), int(os.environ["MASTER_PORT"])
        self.host, self.place = socket.gethostname(), f"{network.in_url(self.master)}:{self.port}"
        self.by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.spoke_by = self.began + FIRST_WORD_SECONDS
        self.until = self.began + self.seconds + 2 * _FAREWELL_SECONDS  # no word of the store by then: it hangs

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def meet(self) -> Meeting:
        found = self._open() if self.rank == 0 and not self.by_agent else self._reach()
        self.store = dist.PrefixStore(f"dcpo/meeting-{self.attempt}", found)
        mine = self._card()
        try:
            if self._register(mine) == self.world:
                self._decide([])
            verdict = self._wait("verdict")
            self.until = time.monotonic() + 3 * _OTHERS_SECONDS
            failed, interface = verdict["failed"], None
            if not failed:
                interface = choose_interface(verdict, mine)
                failed = None if verdict["alone"] else self._knock(verdict["leaders"], interface)
        except (dist.DistError, ConnectionError) as error:
            raise MeetingError(
                f"the run has not started: the store beside rank 0, at {self.place}, was there and is gone"
                f" ({_first_line(error)}): look at the output of rank 0, and at its host"
            ) from error
        if failed:
            self._leave_together()
            raise MeetingError(failed)
        groups = dist.PrefixStore(f"dcpo/groups-{self.attempt}", found)
        return Meeting(groups, self.rank, self.world, interface, verdict["alone"])

    def _open(self) -> dist.Store:
        try:  # this rank's own way to it is the loopback, whatever MASTER_ADDR resolves to here
            return dist.TCPStore(
                "127.0.0.1", self.port, is_master=True, wait_for_workers=False, multi_tenant=True,
                timeout=_span(_STORE_SECONDS)
            )  # fmt: skip
        except (dist.DistError, RuntimeError) as error:
            taken = "in use" in str(error)
            raise MeetingError(
                f"the run has not started: rank 0 on {self.host} cannot open its store at port {self.port} "
                + (
                    "(in use: another run, or what is left of one): set MASTER_PORT to another, the same for all ranks"
                    if taken
                    else f"({_first_line(error)})"
                )
            ) from error

    def _reach(self) -> dist.Store:
        pause, reason, more = 0.1, "", rendezvous_host() if self.by_agent else None
        while True:
            # torchrun's c10d takes the name that a host has for itself; where its agents met is known everywhere.
            for host in filter(None, (self.master, more)):
                try:
                    return self._connect(host)
                except (OSError, UnicodeError, dist.DistError) as error:
                    reason = self._reason(error) if host == self.master else reason
            if self.left() <= 0:
                raise MeetingError(
                    f"the run has not started: rank {self.rank} on {self.host} has not found rank 0 at {self.place}"
                    f" within {self.seconds:g} s: {reason}"
                )
            word = f"rank {self.rank} on {self.host} waits for rank 0 at {self.place}: {reason}"
            self._say(lambda word=word: word)
            time.sleep(max(0.0, min(pause, self.left())))
            pause = min(1.0, 1.5 * pause)

    def _connect(self, host: str) -> dist.Store:
        # By a socket of our own first: torch's retries, and says so, until its time is up.
        socket.create_connection((host, self.port), timeout=max(0.1, min(5.0, self.left()))).close()
        seconds = max(1.0, min(_STORE_SECONDS, self.left()))
        store = dist.TCPStore(host, self.port, is_master=False, wait_for_workers=False, timeout=_span(seconds))
        self.master = host
        return store

    def _reason(self, error: Exception) -> str:
        if isinstance(error, (socket.gaierror, UnicodeError)):
            elastic = self.by_agent and "TORCHELASTIC_RUN_ID" in os.environ
            return f"MASTER_ADDR={self.master} does not resolve on {self.host}: " + (
                "where torchrun chose it (c10d), it is that host's own name; give torchrun --local-addr ADDRESS on each"
                " host"
                if elastic
                else "give the address of rank 0's host, or let the name resolve"
            )
        if isinstance(error, ConnectionRefusedError):
            if network.is_here(self.master) and not self.by_agent:
                return (
                    f"nobody listens, and {self.master} is {self.host} itself: has rank 0 started here, and is it to be"
                    " here?"
                )
            return (
                "its host is up and nobody listens: start rank 0 there, or look at its output; are MASTER_ADDR and"
                " MASTER_PORT right, the port open?"
            )
        if isinstance(error, dist.DistError):
            return f"what listens there is no store of ranks ({_first_line(error)}): set MASTER_PORT to another"
        return (
            f"no way there ({error.strerror if isinstance(error, OSError) and error.strerror else error}): is its host"
            " up, MASTER_ADDR right, the port open?"
        )

    def _card(self) -> dict:
        """What this rank tells the others of itself."""
        card = {
            "host": self.host, "stack": network.stack(), "pid": os.getpid(), "local": self.local, "address": None,
            "interface": None,
            "wrong": wrong_names(self.variables),
            "away": self.rank == 0 and not self.by_agent and not network.is_here(self.master),
        }  # fmt: skip
        try:
            card["address"] = network.own_address(self.master)
            card["interface"] = network.interface_towards(self.master)
        except (OSError, UnicodeError):
            pass  # rank 0 need not know its own name
        return card

    def _register(self, card: dict) -> int:
        """Leaves the card; how many have. Raises MeetingError where this rank's place is taken."""
        key, mine = f"rank-{self.rank}", json.dumps(card)
        there = self.store.compare_set(key, "", mine).decode()
        if there == mine:
            return self.store.add("came", 1)
        other = json.loads(there)
        if other["host"] == self.host and not (other["stack"] == card["stack"] and _runs(other["pid"])):
            self.store.set(key, mine)  # it has died, and been started again
            return self.store.add("came", 0)
        raise MeetingError(
            f"the run has not started: rank {self.rank} is there twice at {self.place}, on {other['host']} (process"
            f" {other['pid']}) and on {self.host}: is NODE_RANK another on each host? Do two runs share MASTER_ADDR and"
            " MASTER_PORT?"
        )

    def _wait(self, key: str, seconds: float | None = None):
        """What ``key`` says, once it is there. The verdict's deadline is the meeting's; others' is ``seconds``. Raises
        MeetingError."""
        pause = min(0.5, max(0.02, self.world / 1000))
        until = None if seconds is None else time.monotonic() + seconds
        while not self.store.check([key]):
            if until is not None:
                if time.monotonic() > until:
                    raise MeetingError(
                        f"the run has not started: all {self.world} ranks have met at {self.place}, and after"
                        f" {seconds:g} s one of them has not said whether it reaches the others: look at the output of"
                        " the first rank on each host"
                    )
            elif self.left() <= 0:
                # One of them looks for who is missing: it asks for every rank. The others only if it has gone.
                first = self.store.add("late", 1) == 1
                if first or self.left() < -_FAREWELL_SECONDS:
                    self._decide(self._missing())
            elif self.rank == 0:
                self._say(lambda: f"waiting for {self._who(self._missing())} at {self.place}")
            time.sleep(pause)
        return json.loads(self.store.get(key))

    def _knock(self, leaders: list[int], interface: str | None) -> str | None:
        """Who does not reach whom where gloo will listen, in a sentence on every rank. Each of ``leaders``, a rank of
        each host, tries the next."""
        if self.rank in leaders:
            uses = (network.named_by_user(network.GLOO) or interface or "").split(",")[0]
            address = network.interfaces().get(uses, [None])[0]
            with socket.create_server((address, 0), family=family(address)) if address else nullcontext() as door:
                self.store.set(f"door-{self.rank}", json.dumps([address and door.getsockname()[:2], uses, self.host]))
                place, their, host = self._wait(
                    f"door-{leaders[(leaders.index(self.rank) + 1) % len(leaders)]}", _OTHERS_SECONDS
                )
                reason = unreached(*place, _KNOCK_SECONDS) if place else ""
                said = reason and f"{self.host} does not reach {host} at {place[0]} ({their}; {reason})"
                self.store.set(f"knock-{self.rank}", json.dumps(said))
                if self.store.add("knocked", 1) == len(leaders):
                    said = [json.loads(knock) for knock in self.store.multi_get([f"knock-{rank}" for rank in leaders])]
                    self.store.set("reached", json.dumps([sentence for sentence in said if sentence]))
                self._wait("reached", _OTHERS_SECONDS)
        if not (said := self._wait("reached", _OTHERS_SECONDS)):
            return None
        more = f" and {len(said) - NAMED_HOSTS} more" if len(said) > NAMED_HOSTS else ""
        return (
            f"the run has not started: all {self.world} ranks have met at {self.place}, but"
            f" {', '.join(said[:NAMED_HOSTS])}{more}: let hosts reach one another there, at any port, or name another"
            f" interface in {network.GLOO} (where it is not set, the one that leads to MASTER_ADDR is taken)"
        )

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.world) if not self.store.check([f"rank-{rank}"])]

    def _decide(self, missing: list[int]) -> None:
        """Writes the verdict, unless there is one."""
        here = sorted(set(range(self.world)) - set(missing))
        cards = dict(zip(here, map(json.loads, self.store.multi_get([f"rank-{rank}" for rank in here]))))
        verdict = {"failed": self._story(missing, cards)} if missing else settle(list(cards.values()))
        self.store.compare_set("verdict", "", json.dumps(verdict))

    def _story(self, missing: list[int], cards: dict[int, dict]) -> str:
        text = (
            f"the run has not started: {self._who(missing)} did not come to {self.place} within {self.seconds:g} s of"
            f" rank {self.rank}'s start (here: {present(cards)}): start them, or look at their output and hosts; more"
            " time: training.start_timeout_seconds"
        )
        if cards.get(0, {}).get("away"):
            text += f"; MASTER_ADDR={self.master} is no address of {cards[0]['host']}, where rank 0 is"
        return text

    def _who(self, ranks: list[int]) -> str:
        return named(ranks, self.world, self.local) if ranks else "a verdict"

    def _say(self, line: Callable[[], str]) -> None:
        """A word from time to time, on one rank of a host."""
        if time.monotonic() > self.spoke_by and os.environ.get("LOCAL_RANK", "0") == "0":
            self.spoke_by = time.monotonic() + NEXT_WORD_SECONDS
            print(f"dcpo: {line()}; {max(0.0, self.left()):.0f} s are left", file=sys.stderr, flush=True)

    def _leave_together(self) -> None:
        """The store goes with rank 0, or its agent: not before all have read the verdict."""
        until = time.monotonic() + _FAREWELL_SECONDS
        try:
            told = self.store.add("told", 1)
            while told < self.store.add("came", 0) and time.monotonic() < until:
                time.sleep(0.1)
                told = self.store.add("told", 0)
        except (dist.DistError, RuntimeError):
            pass  # it has gone: so all have


def _runs(pid: int) -> bool:
    if pid == os.getpid():  # another's, in a namespace that has ended
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]


def _span(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)
