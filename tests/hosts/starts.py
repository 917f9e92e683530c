"""Ranks of several hosts without their imports: one process on each host has imported everything, and forks a rank for
each question.

starter = Starter(host);  starter.ask({"RANK": "0", ...}, meeting=20)
starter.answer()                                                                         {"sum": 1, "interface": "eth0"}
starter = Starter(host, training=True);  starter.ask({"RANK": "0", ...}, train=[...])    {"code": 0}: `dcpo train ...`
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.machines import CHECKOUT, Host, Hosts


class Starter:
    """Takes questions on ``host``; ``training``: whole runs too."""

    def __init__(self, host: Host, training: bool = False):
        self.host, self._said = host, b""
        self._process = host.popen(
            sys.executable, "-m", "tests.hosts.starts", *["training"] * training, cwd=CHECKOUT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it has imported everything."""
        assert self._line(120) == "ready"

    def ask(
        self,
        environment: Mapping[str, str],
        meeting: float = 30.0,
        collective: float = 10.0,
        late: float = 0.0,
        killed: float | None = None,
        train: Sequence[str] = (),
    ) -> None:
        """Starts a rank of ``environment``, ``late`` seconds later, killed after ``killed`` seconds; deadlines in
        seconds. ``train``: what `dcpo train` takes."""
        question = {
            "environment": dict(environment), "meeting": meeting, "collective": collective, "late": late,
            "killed": killed, "train": list(train),
        }  # fmt: skip
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def answer(self, seconds: float = 60.0) -> dict:
        return json.loads(self._line(seconds))

    def _line(self, seconds: float) -> str:
        while b"\n" not in self._said:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                raise TimeoutError(f"no word from {self.host.name} within {seconds:g} s")
            part = os.read(self._process.stdout.fileno(), 65536)
            assert part, f"the starter on {self.host.name} has ended"
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()


@contextmanager
def started(count: int, **options) -> Iterator[tuple[Hosts, list[Starter]]]:
    """Hosts, ``options`` as they take them, with a starter on each: for all tests of a file, which leave the hosts as
    they found them."""
    with (
        tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp") as folder,
        Hosts(count, Path(folder), **options) as hosts,
    ):
        starters = [Starter(host) for host in hosts]
        for starter in starters:
            starter.wait()
        yield hosts, starters


def places(world: int, master: str, port: int | None = None, local: int = 1) -> list[dict[str, str]]:
    """The variables of each rank, ``local`` on a host."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": master, "MASTER_PORT": str(port or 29000 + next(_ports))}
    return [
        common | {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local)}
        for rank in range(world)
    ]


def start_ranks(
    starters: Sequence[Starter], master: str, each: Sequence[Mapping[str, str]] = (), **deadlines
) -> list[dict]:
    """One rank on each host, all at once; ``each``: more variables of each rank's."""
    for rank, (starter, place) in enumerate(zip(starters, places(len(starters), master))):
        starter.ask(place | dict(each[rank] if each else {}), **deadlines)
    return [starter.answer() for starter in starters]


_ports = iter(range(1, 900))


def run(question: dict) -> dict:
    """One rank's start and first all-reduce, or a whole run."""
    os.environ.update(question["environment"])
    if question["killed"]:
        threading.Timer(question["killed"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    time.sleep(question["late"])
    if question["train"]:
        from dcpo_megatron.cli.train import main

        return {"code": main(question["train"])}
    import torch
    import torch.distributed as dist

    from dcpo_megatron.mcore import platform as platforms
    from dcpo_megatron.mcore.meeting import MeetingError

    platforms.prepare, store = lambda platform: None, None
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["RANK"] == "0"
    ):  # torchrun's agent beside rank 0 has one
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    try:
        platforms.start(platforms.select_platform("cpu"), question["collective"], question["meeting"])
    except MeetingError as error:
        return {"failed": str(error)}
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.barrier()
    del store
    return {"sum": int(total), "interface": os.environ.get("GLOO_SOCKET_IFNAME")}


def main() -> None:
    from dcpo_megatron.mcore import platform

    if sys.argv[1:]:
        platform.prepare(platform.select_platform("cpu"))
        from dcpo_megatron.training import build  # noqa: F401 -- once, for all ranks

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a rank that was killed is gone
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            said = os.dup(1)
            os.dup2(2, 1)  # what a run prints
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.write(said, (json.dumps(run(json.loads(line))) + "\n").encode())  # whole, beside another rank's
            os._exit(0)


if __name__ == "__main__":
    main()
