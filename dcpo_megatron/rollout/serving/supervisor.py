"""Several servers on this host: started together, waited for, restarted when they die, ended together.

    with start_servers(MODEL, servers=2) as servers:        healthy, or a ServingError that says which and why
        servers.urls                                        what the trainer is given
    ...                                                     none is left, also after kill -9 of this process

A restarted server holds the model's own weights again, under the tag "unpublished": the client does not use it until
the trainer has published to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from dcpo_megatron import network
from dcpo_megatron.rollout.addresses import LOOPBACK, in_url
from dcpo_megatron.rollout.protocol import RolloutError
from dcpo_megatron.rollout.serving.command import WIDE, ServerPlan, command_line, environment, uuids_of
from dcpo_megatron.rollout.serving.process import ServerProcess

POLL_SECONDS = 0.25
LINE_SECONDS = 10.0
ANSWER_EVERY = 10.0
# Deaths of one server within the window until it is left alone.
DEATHS, WINDOW_SECONDS = 3, 600.0


class ServingError(RolloutError):
    """Servers cannot be started or kept; the message says which, why, and what to do."""


class Servers:
    """The servers of one host; see :func:`dcpo_megatron.rollout.serving.start_servers`.

    Args:
        plan: what each of them is.
        ports: one a server.
        logs: folder for ``server-PORT.log``.
        start_seconds: each must be healthy that many seconds after a start.
        hung_seconds: a server whose HTTP process does not answer for so long counts as dead.
        advertise: the name under which other hosts reach this one (default: ``plan.host``, or this host's name where
            that is every interface).
        address_file: gets the JSON list of the servers once all are healthy (:func:`addresses`); removed on stopping.
        say: takes one line of progress.

    Raises:
        ServingError: a host other than loopback without a key, a name that is the loopback here, or a port in use.
    """

    def __init__(
        self,
        plan: ServerPlan,
        ports: Sequence[int],
        logs: Path,
        *,
        start_seconds: float = 600.0,
        hung_seconds: float = 120.0,
        advertise: str | None = None,
        address_file: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        if plan.host not in LOOPBACK and not plan.api_key:
            raise ServingError(
                f"--host {plan.host} lets other machines in: give a key with --api-key-file or DCPO_SGLANG_API_KEY, or"
                " listen on 127.0.0.1"
            )
        for port in ports:
            _refuse_taken(plan.host, port)
        _refuse_loopback(plan.host)
        name = advertise or (_own_name(plan.host) if plan.host in WIDE else plan.host)
        self.urls = [f"http://{in_url(name)}:{port}" for port in ports]
        self._addresses = addresses(plan, self.urls)
        self._start_seconds, self._hung_seconds = start_seconds, hung_seconds
        self._address_file, self._say = address_file, say
        env = environment(plan, len(ports))
        # Not by its name for others, which may be another address here, or none.
        here = in_url({"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(plan.host, plan.host))
        self._servers = [
            _Watched(
                ServerProcess(
                    command_line(plan, number, port), env, url, plan.api_key, logs / f"server-{port}.log",
                    f"http://{here}:{port}",
                )
            )
            for number, (port, url) in enumerate(zip(ports, self.urls))
        ]  # fmt: skip
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def processes(self) -> list[ServerProcess]:
        """In the order of ``urls``."""
        return [watched.process for watched in self._servers]

    @property
    def given_up(self) -> list[str]:
        """The URLs of servers that are not started any more."""
        return [watched.process.url for watched in self._servers if watched.given_up]

    def start(self) -> None:
        """Starts all and returns when all are healthy; watches them from then on. Raises ServingError, with none left,
        where one is not."""
        try:
            for watched in self._servers:
                watched.start()
            self._wait_for_all()
            if self._address_file is not None:
                _write(self._address_file, self._addresses)
        except OSError as error:
            self.stop()
            raise ServingError(f"servers cannot be started: {error}") from error
        except BaseException:
            self.stop()
            raise
        self._watcher = threading.Thread(target=self._watch, name="server-watch", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Ends all of them; returns when nothing is left of them. Harmless when called again."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        if self._address_file is not None:
            self._address_file.unlink(missing_ok=True)
        for watched in self._servers:
            watched.process.end()

    def __enter__(self) -> Servers:
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def _wait_for_all(self) -> None:
        started = said = time.monotonic()
        while waiting := [watched for watched in self._servers if not watched.healthy]:
            for watched in waiting:
                process = watched.process
                if (code := process.exit_code()) is not None:
                    raise ServingError(_story(process, f"ended with {_code(code)} while it started"))
                if watched.check_start():
                    self._say(f"{process.url} is ready after {time.monotonic() - started:.0f} s")
                elif time.monotonic() > watched.started + self._start_seconds:
                    raise ServingError(
                        _story(process, f"was not ready {self._start_seconds:g} s after its start (--start-timeout)")
                    )
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                names = ", ".join(watched.process.url for watched in waiting if not watched.healthy)
                if names:
                    self._say(f"waiting for {names}: {said - started:.0f} s of {self._start_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            for watched in self._servers:
                if not watched.given_up and not self._stopping.is_set() and (reason := self._trouble(watched)):
                    self._restart(watched, reason)

    def _trouble(self, watched: _Watched) -> str | None:
        now = time.monotonic()
        if (code := watched.process.exit_code()) is not None:
            return f"ended with {_code(code)}"
        if not watched.healthy:
            if watched.check_start():
                self._say(f"{watched.process.url} is ready again after {now - watched.started:.0f} s")
            elif now > watched.started + self._start_seconds:
                return f"was not ready {self._start_seconds:g} s after its restart"
        elif now >= watched.asked + min(ANSWER_EVERY, self._hung_seconds / 4):
            watched.asked = now
            if watched.process.answers():
                watched.answered = time.monotonic()
            elif time.monotonic() > watched.answered + self._hung_seconds:
                return f"has not answered for {self._hung_seconds:g} s"
        return None

    def _restart(self, watched: _Watched, reason: str) -> None:
        process = watched.process
        process.end()
        now = time.monotonic()
        watched.deaths.append(now)
        recent = [death for death in watched.deaths if death > now - WINDOW_SECONDS]
        if len(recent) >= DEATHS:
            watched.given_up = True
            self._say(
                _story(process, f"{reason}, for the {DEATHS}rd time within {WINDOW_SECONDS:g} s: not started again")
            )
            return
        self._say(_story(process, f"{reason}: started again"))
        try:
            watched.start()
        except OSError as error:
            watched.given_up = True
            self._say(f"{process.url} cannot be started again: {error}")


class _Watched:
    """A process with what its supervisor remembers of it. Times are of the monotonic clock, in seconds."""

    def __init__(self, process: ServerProcess):
        self.process = process
        self.deaths: deque[float] = deque(maxlen=DEATHS)
        self.given_up = self.healthy = False
        self.started = self.answered = self.asked = 0.0

    def start(self) -> None:
        self.healthy = False
        self.process.start()
        self.started = time.monotonic()

    def check_start(self) -> bool:
        # While a server loads it does not listen, and the question costs nothing.
        self.healthy = self.process.samples()
        self.answered = self.asked = time.monotonic()
        return self.healthy


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports of ``host`` that nobody listens on, below those that the kernel gives to outgoing connections: they are
    still free a little later."""
    return network.free_ports(count, lambda port: not _taken(host, port))


def _taken(host: str, port: int) -> bool:
    """Whether somebody listens there. Raises ServingError where nobody can."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ServingError(f"--host {host} does not resolve on this host: {error.strerror}") from error
    can, failure = False, None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
                can = True
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            failure = error
    if can:
        return False
    assert failure is not None  # getaddrinfo finds something, or raises
    raise ServingError(f"this host cannot listen on {in_url(host)}:{port}: {failure.strerror}") from failure


def _own_name(host: str) -> str:
    """This host's name, under which servers on all of its interfaces (``host``) are reached. Raises ServingError where
    it leads to none of them."""
    name = socket.gethostname()
    family = {"0.0.0.0": socket.AF_INET, "::": socket.AF_INET6}.get(host, socket.AF_UNSPEC)
    try:
        socket.getaddrinfo(name, None, family)
    except socket.gaierror as error:
        raise ServingError(
            f"--host {host}: this host's name {name} has no such address ({error.strerror}): give one that has, or an "
            "address, with --advertise"
        ) from error
    return name


def _refuse_taken(host: str, port: int) -> None:
    if _taken(host, port):
        raise ServingError(f"port {port} is in use on {host}: give another with --port")


def _refuse_loopback(host: str) -> None:
    """Raises ServingError where ``host`` is a name that leads to loopback addresses alone, such as Debian's 127.0.1.1
    for a host's own: nobody else would reach it."""
    if host in LOOPBACK or host in WIDE or ":" in host or host.replace(".", "").isdigit():
        return
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}  # it resolves: _taken() has tried
    if all(map(network.is_loopback, found)):
        raise ServingError(
            f"--host {host} is {', '.join(sorted(found))} on this host, which no other host reaches: give an address of"
            f" its network, or --host 0.0.0.0 --advertise {host}"
        )


def addresses(plan: ServerPlan, urls: Sequence[str]) -> list:
    """What an address file says: of each server its URL, or ``{"url": ..., "gpus": [uuid, ...]}`` where its GPUs are
    known."""
    found = [(url, uuids_of(plan, number)) for number, url in enumerate(urls)]
    return [url if gpus is None else {"url": url, "gpus": gpus} for url, gpus in found]


def _write(file: Path, servers: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")  # a reader of the folder takes *.json
    part.write_text(json.dumps(servers) + "\n", encoding="utf-8")
    os.replace(part, file)


def _code(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def _story(process: ServerProcess, what: str) -> str:
    lines = ""
    with contextlib.suppress(OSError):
        lines = f"; the end of its log {process.log}:\n{process.last_lines()}"
    return f"server {process.url} {what}{lines}"
