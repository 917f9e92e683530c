"""Where the doctors of several hosts meet: all run the same command, at the first host they exchange what they found.

    h1   listens                 <- hello ----  h2     h3 ...        they come in any order, until a deadline
         asks each for its time  ---------->                         clocks: the nearest of some answers
         exchange(mine)          -> everyone's, the same on all      in rounds; who falls silent is named

Lines of JSON over TCP, standard library only. Nothing of it is executed, nobody is trusted with more than a line of the
table.
"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import threading
import time
from collections.abc import Sequence

from dcpo_megatron import network

PROTOCOL = "dcpo doctor"
LONGEST_LINE = 1 << 22
ANSWER_SECONDS = 5.0
# How much longer a host waits for the first one than that waits for the others.
LEEWAY_SECONDS = 10.0
PINGS = 5


class NoMeeting(Exception):
    """The first host cannot be met, or nobody can be met there; says why. ``fix``: what to do."""

    def __init__(self, what: str, fix: str):
        super().__init__(what)
        self.fix = fix


class Line:
    """A connection that carries one JSON value a line, each way with a deadline. Raises OSError, ValueError."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._left = b""

    def send(self, value: object, seconds: float = ANSWER_SECONDS) -> None:
        self.connection.settimeout(seconds)
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, seconds: float = ANSWER_SECONDS) -> object:
        until = time.monotonic() + seconds
        while b"\n" not in self._left:
            self.connection.settimeout(max(0.01, until - time.monotonic()))
            got = self.connection.recv(1 << 16)
            if not got or len(self._left) > LONGEST_LINE:
                raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
            self._left += got
        line, _, self._left = self._left.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self.connection.close()


class First:
    """The meeting as the first host holds it, at ``port`` of every interface.

    Attributes:
        missing: who did not come, or fell silent -> why.
        clocks: who came -> (seconds that its clock is ahead of this one, half of the way there and back).
        address: this host's, at which the others came; None where nobody did.
    """

    def __init__(self, name: str, peers: Sequence[str], port: int, seconds: float):
        self.name, self.peers, self.token = name, list(peers), secrets.token_hex(4)
        self.missing: dict[str, str] = {}
        self.clocks: dict[str, tuple[float, float]] = {name: (0.0, 0.0)}
        self.address: str | None = None
        self._lines: dict[str, Line] = {}
        self._lock, self._over = threading.Lock(), False
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        try:
            self._listener = listen(port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise NoMeeting(
                f"port {port} of {name} " + ("is in use" if taken else f"cannot be listened on ({error.strerror})"),
                "end what listens there (`ss -ltnp` names it; another run?), or give another port to this command and "
                "to the run: --port, MASTER_PORT",
            ) from error

    def gather(self) -> None:
        """Waits for the others until all are here, or the deadline."""
        with self._listener:
            while (left := self._until - time.monotonic()) > 0 and not self._complete():
                self._listener.settimeout(min(left, 0.2))
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=self._admit, args=[Line(connection)], daemon=True).start()
        with self._lock:
            self._over = True
            for peer in self.peers:
                if peer != self.name and peer not in self._lines:
                    self.missing[peer] = f"did not come within {self._seconds:g} s"

    def _complete(self) -> bool:
        with self._lock:
            return len(self._lines) == len(self.peers) - 1

    def _admit(self, line: Line) -> None:
        try:
            line.send({"protocol": PROTOCOL, "token": self.token, "seconds": self._until - time.monotonic()})
            hello = line.receive()
            name = hello["name"]
            refused = None
            if hello["peers"] != self.peers:
                refused = f"{self.name} was started with --peers {','.join(self.peers)}: give the same on all hosts"
            elif name not in self.peers or name == self.name or name in self._lines:
                refused = f"another one is here as {name}: start the command once on each host"
            line.send({"refused": refused})
            if refused:
                line.close()
                return
            clock = min((_ahead(line) for _ in range(PINGS)), key=lambda found: found[1])
            with self._lock:
                if self._over or name in self._lines:
                    raise ConnectionResetError
                self._lines[name], self.clocks[name] = line, clock
                self.address = self.address or plain(line.connection.getsockname()[0])
        except (OSError, ValueError, KeyError, TypeError):
            line.close()  # a stranger, or gone

    def exchange(self, mine: object, seconds: float) -> dict[str, object]:
        """Everyone's value by name; without those who fall silent for ``seconds``."""
        until = time.monotonic() + seconds
        values = {self.name: mine}
        for name, line in list(self._lines.items()):
            try:
                if "value" not in (got := line.receive(max(0.1, until - time.monotonic()))):
                    raise ValueError("not a line of this protocol")
                values[name] = got["value"]
            except (OSError, ValueError, TypeError) as error:
                self._lost(name, error, seconds)
        ordered = {name: values[name] for name in self.peers if name in values}
        for name, line in list(self._lines.items()):
            try:
                line.send({"values": ordered, "missing": self.missing, "clocks": self.clocks})
            except OSError as error:
                self._lost(name, error, seconds)
        return ordered

    def _lost(self, name: str, error: Exception, seconds: float) -> None:
        self._lines.pop(name).close()
        silent = isinstance(error, TimeoutError)
        self.missing[name] = f"came, and then said nothing for {seconds:g} s" if silent else "came, and went away"

    def close(self) -> None:
        self._listener.close()
        for line in self._lines.values():
            line.close()


class Other:
    """The same as any other host sees it. Raises NoMeeting, here and in :meth:`exchange`."""

    def __init__(self, name: str, peers: Sequence[str], port: int, seconds: float):
        self.name, self.peers, self.first = name, list(peers), peers[0]
        self.missing: dict[str, str] = {}
        self.clocks: dict[str, tuple[float, float]] = {}
        self._where = f"{self.first}, port {port}"
        self._line = self._connect(port, time.monotonic() + seconds, seconds)
        self.address: str = plain(self._line.connection.getsockname()[0])

    def _connect(self, port: int, until: float, seconds: float) -> Line:
        while True:
            reason: Exception
            try:
                patience = max(0.1, min(ANSWER_SECONDS, until - time.monotonic()))
                line = Line(socket.create_connection((self.first, port), timeout=patience))
                try:
                    greeting = line.receive()
                    if greeting.get("protocol") != PROTOCOL:
                        raise ValueError
                    self.token, self._left = greeting["token"], greeting["seconds"]
                    line.send({"name": self.name, "peers": self.peers})
                    if refused := line.receive()["refused"]:
                        raise NoMeeting(refused, "start the same command once on each host of --peers")
                    for _ in range(PINGS):
                        line.receive(self._left + LEEWAY_SECONDS)
                        line.send({"time": time.time()})
                    return line
                except (OSError, ValueError, KeyError, AttributeError, TypeError):
                    line.close()
                    reason = ValueError("somebody else listens there")
                except BaseException:
                    line.close()
                    raise
            except (OSError, UnicodeError) as error:
                reason = error
            if time.monotonic() > until:
                raise _not_met(self.first, port, reason, seconds)
            time.sleep(0.2)

    def gather(self) -> None:
        """Nothing: the first host waits for the others."""

    def exchange(self, mine: object, seconds: float) -> dict[str, object]:
        """As at the first host, which may wait for the others first."""
        try:
            self._line.send({"value": mine})
            got = self._line.receive(self._left + 2 * seconds + LEEWAY_SECONDS)
            self._left = 0.0
            self.missing, self.clocks = got["missing"], {name: tuple(clock) for name, clock in got["clocks"].items()}
            return got["values"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = "closed the connection" if isinstance(error, ConnectionError) else f"fell silent ({error})"
            raise NoMeeting(f"{self._where}: {said} before all was exchanged", "see what it says there") from error

    def close(self) -> None:
        self._line.close()


def _not_met(first: str, port: int, reason: Exception, seconds: float) -> NoMeeting:
    where = f"{first}, port {port}"
    if isinstance(reason, (socket.gaierror, UnicodeError)):
        what = f"the name of the first host, {first}, does not resolve here"
        return NoMeeting(what, "write it into /etc/hosts, or give addresses: --peers 10.0.0.1,10.0.0.2")
    found = sorted({plain(entry[4][0]) for entry in socket.getaddrinfo(first, port)})
    if all(map(network.is_loopback, found)):
        what = f"the name of the first host, {first}, is {', '.join(found)} here, which is this host itself"
        return NoMeeting(what, "write its address into /etc/hosts, or give addresses: --peers 10.0.0.1,10.0.0.2")
    if isinstance(reason, ConnectionRefusedError):
        what = f"{where}: the host is there, and nobody listened for {seconds:g} s"
        return NoMeeting(what, f"start the same command on {first} too; else a firewall refuses: open the port")
    if isinstance(reason, ValueError):
        what = f"{where}: somebody else listens there, no doctor"
        return NoMeeting(what, f"another run? `ss -ltnp` on {first} names it; or give another --port")
    what = f"{where}: not reached within {seconds:g} s ({getattr(reason, 'strerror', None) or reason})"
    return NoMeeting(what, f"see that {first} is up, that a route leads there, and that no firewall drops the port")


def _ahead(line: Line) -> tuple[float, float]:
    """How far the clock at the other end is ahead of ours, and how far that may be wrong, in seconds."""
    sent, began = time.time(), time.monotonic()
    line.send({})
    there = float(line.receive()["time"])
    half = (time.monotonic() - began) / 2
    return there - (sent + half), half


def listen(port: int) -> socket.socket:
    """At ``port`` of every interface, for both families where this host has both. Raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def plain(address: str) -> str:
    """An IPv4 address that a socket of both families writes as ::ffff:10.0.0.1, as such; and no scope."""
    return address.removeprefix("::ffff:").partition("%")[0]
