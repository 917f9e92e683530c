"""Starts a run on several hosts by ssh, for clusters without a scheduler; the command is ``tools/launch_cluster.py``.

    launcher -- ssh host 1 --> ssh_node (torchrun) --> ranks 0 .. K-1          all meet at MASTER:PORT
             -- ssh host 2 --> ssh_node (torchrun) --> ranks K .. 2K-1
      SIGTERM, SIGINT, SIGUSR1 --> to every rank of every host, through ssh's standard input
      a host fails             --> it is named; the others are asked to end, and killed where they stay
      a line now and then      --> the launcher is there: hosts that hear nothing for long end their ranks

Needs on every host: the checkout in the same folder with its environment, a login without a password, and the folder of
the run on a shared file system.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from dcpo_megatron.launch.signals import BAD_INPUT, START_AGAIN
from dcpo_megatron.launch.ssh_node import READY, SIGN_OF_LIFE_SECONDS
from dcpo_megatron.network import is_loopback
from dcpo_megatron.processes import handling, signal_name

NO_CONNECTION = 255  # ssh's own exit code
AFTER_A_FAILURE = 30.0  # seconds for the other hosts to end
AFTER_A_KILL = 10.0
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def parser() -> argparse.ArgumentParser:
    """The command line of ``tools/launch_cluster.py``."""
    result = argparse.ArgumentParser(
        prog="tools/launch_cluster.py",
        allow_abbrev=False,
        usage="%(prog)s (--hosts A,B | --hosts-file FILE) [options] -- [what `dcpo train` takes]",
        description="Starts a run on several hosts by ssh and waits for it. Exit codes are those of `dcpo train`.",
    )
    hosts = result.add_mutually_exclusive_group(required=True)
    hosts.add_argument("--hosts", help="names, separated by commas; the first is host 0")
    hosts.add_argument("--hosts-file", type=Path, help="one name a line; # begins a comment")
    result.add_argument("--nproc-per-node", type=int, required=True, help="ranks on each host: its number of GPUs")
    result.add_argument(
        "--master-addr",
        help=(
            "where ranks meet (default: the first host, by its name, or by its address on hosts that do not know the"
            " name)"
        ),
    )
    result.add_argument("--master-port", type=int, default=29500)
    result.add_argument("--ssh", default="ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=30")
    result.add_argument("--directory", default=os.getcwd(), help="the checkout on every host (default: this folder)")
    result.add_argument("--python", default=sys.executable, help="the interpreter on every host (default: this one)")
    result.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the ranks; may be repeated"
    )
    result.add_argument("--start-deadline", type=float, default=120.0, help="seconds for every host to answer")
    result.add_argument("--grace", type=float, default=600.0, help="seconds to save and end after a signal")
    result.add_argument("--print", action="store_true", help="print the line for each host, start nothing")
    result.add_argument("train", nargs="*", help="what `dcpo train` takes, after --")
    return result


def read_hosts(names: str | None, file: Path | None) -> list[str]:
    """Host names in order. Raises ValueError: none, one named twice, or a name that ssh would take for an option."""
    lines = names.split(",") if names is not None else file.read_text(encoding="utf-8").splitlines()
    hosts = [host for line in lines if (host := line.partition("#")[0].strip())]
    if not hosts:
        raise ValueError(f"no host in {'--hosts' if names is not None else file}")
    for host in hosts:
        if host.startswith("-") or len(host.split()) > 1:
            raise ValueError(f"{host!r} is no host name: give one name a line, ranks a host with --nproc-per-node")
        if hosts.count(host) > 1:
            raise ValueError(f"host {host} is named {hosts.count(host)} times: ranks a host are --nproc-per-node")
    return hosts


def meeting_places(ssh: list[str], host: str) -> list[str]:
    """Names and addresses of ``host`` for the others to try in this order: as it was given, as ssh's configuration has
    it, and the address that it has here."""
    name = host.rpartition("@")[2]
    found = [name]
    if Path(ssh[0]).name == "ssh":  # what stands in for it may take other options
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                [*ssh, "-G", host], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10
            )
            found += [line.split()[1] for line in said.stdout.splitlines() if line.startswith("hostname ")]
    with contextlib.suppress(OSError, UnicodeError):
        addresses = [entry[4][0] for entry in socket.getaddrinfo(found[-1], None, type=socket.SOCK_STREAM)]
        found += [address for address in addresses if not is_loopback(address) and "%" not in address][:1]
    return list(dict.fromkeys(found))


def line_for(args: argparse.Namespace, places: list[str], hosts: list[str], number: int) -> str:
    """The shell line that host ``number`` runs; ``places``: where ranks may meet."""
    names = ",".join(host.rpartition("@")[2] for host in hosts)  # for the ranks to name one that does not come
    words = [
        "env", f"PYTHONPATH={args.directory}", f"DCPO_HOSTS={names}", *args.env,
        args.python, "-u", "-m", "dcpo_megatron.launch.ssh_node",
        "--nnodes", str(len(hosts)), "--node-rank", str(number), "--nproc-per-node", str(args.nproc_per_node),
        "--master-addr", ",".join(places), "--master-port", str(args.master_port), "--", *args.train,
    ]  # fmt: skip
    return f"cd {shlex.quote(args.directory)} && exec {shlex.join(words)}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, 2 for bad input, 75 where the run wants to be started again, or the code of the host
    that failed first."""
    args = parser().parse_args(argv)
    try:
        hosts = read_hosts(args.hosts, args.hosts_file)
        if wrong := [word for word in args.env if not word.partition("=")[0].isidentifier() or "=" not in word]:
            raise ValueError(f"--env {wrong[0]} must be NAME=VALUE")
    except (OSError, ValueError) as error:
        _say(f"error: {error}")
        return BAD_INPUT
    ssh = shlex.split(args.ssh)
    places = [args.master_addr] if args.master_addr else meeting_places(ssh, hosts[0])
    lines = [line_for(args, places, hosts, number) for number in range(len(hosts))]
    if args.print:
        for host, line in zip(hosts, lines):
            print(f"{host}: {line}")
        return 0
    nodes = [_Node(host, [*ssh, host, line]) for host, line in zip(hosts, lines)]
    return _Launch(nodes, args.start_deadline, args.grace).run()


def _say(text: str) -> None:
    print(f"dcpo: {text}", file=sys.stderr, flush=True)


@dataclass
class _Node:
    host: str
    command: list[str]
    process: subprocess.Popen | None = None
    ready: bool = False
    code: int | None = None
    reader: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # The terminal's interrupt is for the launcher alone: it passes it on.
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            if text == READY:
                self.ready = True
            else:
                print(f"{self.host}: {text}", flush=True)

    def order(self, name: str) -> None:
        with contextlib.suppress(OSError):  # the connection has ended: its exit code is on the way
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()


class _Launch:
    def __init__(self, nodes: list[_Node], start_deadline: float, grace: float):
        self._nodes, self._start_deadline, self._grace = nodes, start_deadline, grace
        self._arrived: list[int] = []
        self._passed_on: set[int] = set()
        self._failure: int | None = None
        self._deadline, self._killed = float("inf"), False
        self._next_sign = 0.0

    def run(self) -> int:
        with handling(PASSED_ON, lambda number, frame: self._arrived.append(number)):
            try:
                for node in self._nodes:
                    node.start()
                answer_by = time.monotonic() + self._start_deadline
                while running := self._running():
                    self._pass_on()
                    self._collect(running)
                    if time.monotonic() > self._next_sign:
                        self._next_sign = time.monotonic() + SIGN_OF_LIFE_SECONDS
                        for node in self._running():
                            node.order("")
                    silent = [node for node in self._running() if not node.ready]
                    if silent and time.monotonic() > answer_by and self._failure is None:
                        names = ", ".join(node.host for node in silent)
                        _say(
                            f"error: no answer within {self._start_deadline:g} s from {names}: does `ssh"
                            f" {silent[0].host} true` end?"
                        )
                        for node in silent:
                            node.process.kill()
                        self._fail(1)
                    if time.monotonic() > self._deadline:
                        self._kill()
                    time.sleep(0.05)
            finally:
                for node in self._running():
                    if node.process is not None:
                        node.process.kill()  # its host sees the end of standard input, and ends the ranks
        for node in self._nodes:
            node.reader.join(5)
        if self._failure is not None:
            return self._failure
        return START_AGAIN if any(node.code == START_AGAIN for node in self._nodes) else 0

    def _running(self) -> list[_Node]:
        return [node for node in self._nodes if node.code is None]

    def _pass_on(self) -> None:
        while self._arrived:
            number = self._arrived.pop(0)
            if number in self._passed_on:
                if number == signal.SIGINT:
                    self._deadline = 0.0
                continue
            self._passed_on.add(number)
            name = signal_name(number)
            _say(f"{name}: passed on to {len(self._running())} hosts, with {self._grace:g} s to end")
            self._order(name.removeprefix("SIG"), self._grace)

    def _order(self, name: str, seconds: float) -> None:
        for node in self._running():
            node.order(name)
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _collect(self, running: list[_Node]) -> None:
        for node in running:
            node.code = node.process.poll()
            if node.code is None or node.code in (0, START_AGAIN) or self._failure is not None:
                continue
            if node.code == NO_CONNECTION:
                _say(
                    f"error: host {node.host}: ssh could not connect, or lost the connection; its own message is above"
                )
            elif node.code != BAD_INPUT:
                _say(f"error: host {node.host} ended with exit code {node.code}; its own message is above")
            self._fail(1 if node.code == NO_CONNECTION else node.code if node.code > 0 else 128 - node.code)

    def _fail(self, code: int) -> None:
        self._failure = code
        self._order("TERM", AFTER_A_FAILURE)

    def _kill(self) -> None:
        names = ", ".join(node.host for node in self._running())
        if self._failure is None:
            self._failure = 128 + signal.SIGKILL
        if not self._killed:
            self._killed = True
            _say(f"error: the ranks of {names} did not end in time: they are killed")
            self._deadline = float("inf")
            self._order("KILL", AFTER_A_KILL)
            return
        _say(f"error: no end from {names}: look for processes there")
        for node in self._running():
            node.process.kill()
        self._deadline = float("inf")
