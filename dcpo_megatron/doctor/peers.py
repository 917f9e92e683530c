"""`dcpo doctor --peers h1,h2,h3`: what a run on these hosts needs between them. The same command on each of them; all
print the same table.

    every host     looks at its names, interfaces, versions; listens on some ports; writes a file into the shared folder
    the meeting    everyone's facts to all                                                     doctor_meeting
    every host     tries each other's ports; looks for each other's files
    the meeting    everyone's results to all  ->  judge(record) -> [Finding]                   doctor_between

Nothing needs torch, or a shell on another host: srun, ssh or a hand starts it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dcpo_megatron import __version__, network
from dcpo_megatron.doctor.between import Record, judge
from dcpo_megatron.doctor.findings import Finding
from dcpo_megatron.doctor.peer_meeting import First, NoMeeting, Other, listen, plain
from dcpo_megatron.doctor.probes import find_megatron
from dcpo_megatron.files import digest_of_sources

# Seconds: a name resolved or a file written; one connection; a file of another host seen.
ANSWER, CONNECT, SEE = 10.0, 3.0, 5.0
EXCHANGE = 60.0
PORTS = 5
AT_A_TIME = 64
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def check_peers(
    peers: Sequence[str], *, port: int, seconds: float, shared: Path | None = None, say: Callable[[str], None] = print
) -> list[Finding]:
    """Every finding between ``peers``, this host among them; the same on all of them.

    Args:
        peers: names or addresses, the same list on each host; they meet at the first.
        port: of the first host, where a run's ranks would meet: MASTER_PORT.
        seconds: how long the others are waited for.
        shared: the folder that all should see (default: the current one).
        say: takes a line of progress.
    """
    peers = [network.bare(peer) for peer in peers]
    me, why = find_myself(peers)
    if me is None:
        return [Finding("meeting", "fail", why, "start it on the hosts of --peers, each by its host name or address")]
    first = me == peers[0]
    others = "the others" if first else peers[0]
    say(f"this host is {me}: waiting for {others} at port {port}, at most {seconds:g} s")
    try:
        with contextlib.closing((First if first else Other)(me, peers, port, seconds)) as meeting:
            record = _meet(meeting, me, peers, port, shared)
    except NoMeeting as error:
        return [Finding("meeting", "fail", str(error), error.fix)]
    return judge(record)


def _meet(meeting: First | Other, me: str, peers: list[str], port: int, shared: Path | None) -> Record:
    with contextlib.ExitStack() as stack:
        folder = SharedFolder(shared or Path.cwd(), meeting.token)
        stack.callback(folder.remove)
        listening = stack.enter_context(Listening(PORTS))
        facts = look(peers) | {"ports": listening.ports, "range": list(port_range()), "shared": folder.write(me)}
        meeting.gather()
        facts["address"] = meeting.address
        everyone = meeting.exchange(facts, EXCHANGE)
        seen = side_by_side({"": lambda: folder.see(everyone)}, SEE + 5)[""]
        results = {
            "reached": reach(me, everyone),
            "seen": seen if isinstance(seen, dict) else dict.fromkeys(everyone, seen),
        }
        found = meeting.exchange(results, EXCHANGE)
    hosts = {name: everyone[name] | found[name] for name in found}
    return Record(peers, port, hosts, meeting.missing, meeting.clocks, shared is not None)


def find_myself(peers: Sequence[str]) -> tuple[str | None, str]:
    """Which of ``peers`` this host is: by its name, else by an address that is its own. None, and why, where it is
    none."""
    name = socket.gethostname()
    mine = {address for addresses in _interfaces().values() for address in addresses}
    resolved = side_by_side({peer: lambda peer=peer: resolve(peer) for peer in peers}, ANSWER)
    for same in (
        lambda peer: peer == name,
        lambda peer: peer.partition(".")[0] == name.partition(".")[0] and not peer[0].isdigit(),
        lambda peer: peer in mine,
        lambda peer: isinstance(resolved[peer], list) and mine & set(resolved[peer]),
    ):
        if matches := [peer for peer in peers if same(peer)]:
            return matches[0], ""
    addresses = ", ".join(sorted(address for address in mine if address not in ("127.0.0.1", "::1")))
    return None, f"this host, {name} ({addresses}), is none of --peers {','.join(peers)}"


def look(peers: Sequence[str]) -> dict:
    """What this host says of itself; what cannot be had is its reason, as text."""
    name = socket.gethostname()
    calls = {peer: lambda peer=peer: resolve(peer) for peer in dict.fromkeys([*peers, name])}
    return {
        "host": name,
        "resolves": side_by_side(calls, ANSWER),
        "interfaces": _interfaces(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "versions": versions(),
    }


def resolve(name: str) -> list[str]:
    """The addresses of ``name``. Raises OSError."""
    return list(dict.fromkeys(plain(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)))


def _interfaces() -> dict[str, list[str]]:
    try:
        return network.interfaces()
    except (ImportError, OSError):  # without psutil: the addresses on the way are known all the same
        return {}


def versions() -> dict[str, str]:
    """What must be the same on all hosts. Imports nothing of it."""
    found = {"Python": ".".join(map(str, sys.version_info[:2]))}
    try:
        found["torch"] = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        found["torch"] = "none"
    found["megatron-core"] = find_megatron(sys.path) or "none"
    found["dcpo_megatron"] = f"{__version__} (sources {digest_of_sources()[:8]})"
    return found


def port_range() -> tuple[int, int]:
    """The ports that the kernel gives to who asks for any: collectives, and the group of the weights, listen there."""
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999


class Listening:
    """Listens on ``count`` ports spread over the kernel's range; says to each caller from which address it came."""

    def __init__(self, count: int):
        low, high = port_range()
        self._sockets: list[socket.socket] = []
        for number in range(count):
            start = low + (high - low) * number // max(count - 1, 1)
            for port in range(start, start + 100) if number < count - 1 else range(start, start - 100, -1):
                with contextlib.suppress(OSError):
                    self._sockets.append(listen(port))
                    break
        self.ports = [one.getsockname()[1] for one in self._sockets]

    def __enter__(self) -> Listening:
        for one in self._sockets:
            threading.Thread(target=self._answer, args=[one], daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes its thread
            one.close()

    @staticmethod
    def _answer(listener: socket.socket) -> None:
        while True:
            try:
                connection, caller = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(CONNECT)
                connection.sendall(f"{plain(caller[0])}\n".encode())


def reach(me: str, everyone: Mapping[str, dict]) -> dict[str, dict]:
    """Peer -> the way there: ``interface`` (or "" and ``why``), ``source`` as the peer saw it, ``ports`` -> "" or why
    not."""
    calls = {
        (peer, port): lambda at=facts["address"], port=port: _call(at, port)
        for peer, facts in everyone.items()
        if peer != me and facts["address"]
        for port in facts["ports"]
    }
    answers = side_by_side(calls, EXCHANGE / 2)
    found = {}
    for peer, facts in everyone.items():
        if peer == me or not facts["address"]:
            continue
        mine = {port: answers[peer, port] for port in facts["ports"]}
        sources = [answer[0] for answer in mine.values() if isinstance(answer, list)]
        way = {
            "interface": "",
            "source": sources[0] if sources else "",
            "ports": {str(port): "" if isinstance(answer, list) else answer for port, answer in mine.items()},
        }
        try:
            way["interface"] = network.interface_towards(facts["address"])
        except ImportError:  # without psutil nobody knows
            pass
        except (OSError, UnicodeError) as error:
            way["why"] = str(error)
        found[peer] = way
    return found


def _call(address: str, port: int) -> list[str]:
    with socket.create_connection((address, port), timeout=CONNECT) as connection:
        return [connection.makefile().readline().strip()]


class SharedFolder:
    """A file of each host in a folder; its content is who wrote it."""

    def __init__(self, folder: Path, token: str):
        self._folder, self._token = folder, token
        self._mine: Path | None = None

    def write(self, me: str) -> dict:
        """``{"folder", "why"}``: why this host cannot write there, else ""."""
        self._mine = self._of(me)

        def put() -> str:
            if not self._folder.is_dir():
                return "is no folder there"
            self._mine.write_text(me, encoding="utf-8")
            return ""

        return {"folder": str(self._folder.absolute()), "why": side_by_side({"": put}, ANSWER)[""]}

    def see(self, everyone: Mapping[str, dict]) -> dict[str, float | str]:
        """Writer -> seconds until its file was seen here, or why it was not. All were there before anybody asks for a
        name: NFS has no old answer."""
        began, found = time.monotonic(), {}
        wanted = [name for name, facts in everyone.items() if not facts["shared"]["why"]]
        while True:
            for name in wanted:
                with contextlib.suppress(OSError):
                    if name not in found and self._of(name).read_text(encoding="utf-8") == name:
                        found[name] = time.monotonic() - began
            if len(found) == len(wanted) or time.monotonic() - began > SEE:
                return {name: found.get(name, f"not seen within {SEE:g} s") for name in wanted}
            time.sleep(0.1)

    def _of(self, name: str) -> Path:
        return self._folder / f".dcpo-doctor-{self._token}-{name}"

    def remove(self) -> None:
        """Takes this host's file away."""
        if self._mine is not None:
            side_by_side({"": lambda: self._mine.unlink(missing_ok=True)}, ANSWER)


def side_by_side(calls: Mapping, seconds: float) -> dict:
    """The results of ``calls``, side by side; the reason, as text, where one fails or has none within ``seconds``.
    Whatever hangs is left behind."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in calls.items():
        waiting.put(item)
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                key, call = waiting.get_nowait()
                try:
                    answers.put((key, call()))
                except (OSError, UnicodeError) as error:
                    answers.put((key, _reason(error)))

    for _ in range(min(AT_A_TIME, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    found, until = {}, time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
        while len(found) < len(calls):
            key, answer = answers.get(timeout=max(0.0, until - time.monotonic()))
            found[key] = answer
    return {key: found.get(key, f"no answer within {seconds:g} s") for key in calls}


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not error.strerror:
        return "no answer"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
