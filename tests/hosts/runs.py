"""Runs of `dcpo train` on hosts, a rank each, started as `srun` starts them: by variables, each rank with a log of
its own."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dcpo_megatron.checkpoint.folder import complete_steps, problem_of
from dcpo_megatron.verification import resumption
from tests.hosts.machines import HostProcess, Hosts

# Until a rank has imported everything, on a machine that is busy with other work.
STARTS_WITHIN = 240.0


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, seconds since the fault until it had said why and until it was gone, and what
    it wrote."""

    code: int
    spoke: float | None
    ended: float
    log: str

    @property
    def sentences(self) -> list[str]:
        return [
            line.removeprefix("dcpo: error: ") for line in self.log.splitlines() if line.startswith("dcpo: error: ")
        ]


class Run:
    """One run in ``hosts.shared / name``, a rank on each of the first ``world`` hosts (None: on all); start it again
    with :meth:`start`.

    ``settings`` come after those of the task; ``master``: MASTER_ADDR, by default the first host's IPv4 address.
    """

    def __init__(self, hosts: Hosts, *settings: str, steps: int = 100_000, name: str = "run", port: int = 29500,
                 master: str | None = None, world: int | None = None):  # fmt: skip
        self.hosts, self.output, self.port = hosts, hosts.shared / name, port
        self.world = world or len(hosts.all)
        self.master = master or hosts[0].ipv4
        task = hosts.shared / "task"
        arguments = resumption.make_task(task, steps=steps) if not task.exists() else None
        if arguments is not None:
            (hosts.shared / "task.json").write_text(json.dumps(arguments))
        self.arguments = [
            *json.loads((hosts.shared / "task.json").read_text()), f"training.steps={steps}", f"output={self.output}",
            "logging.console=false", *settings,
        ]  # fmt: skip
        self.processes: list[HostProcess] = []
        self.logs: list[Path] = []
        self.starts = 0

    def start(
        self,
        ranks: Iterable[int] | None = None,
        more: Mapping[int, list[str]] | None = None,
        env: Mapping[int, Mapping[str, str]] | None = None,
        cwd: Mapping[int, Path] | None = None,
    ) -> Run:
        """Starts one rank on each host, or some ``ranks``; ``more`` settings, ``env`` and ``cwd`` by rank."""
        self.starts += 1
        self.processes, self.logs = [], []
        for rank in range(self.world) if ranks is None else ranks:
            log = self.output.with_name(f"{self.output.name}-{self.starts}-rank-{rank}.log")
            variables = {
                "RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": self.master, "MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": "eth0",
            }  # fmt: skip
            with log.open("w") as file:
                process = self.hosts[rank].popen(
                    sys.executable, "-u", "-m", "dcpo_megatron.cli", "train", *self.arguments,
                    *(more or {}).get(rank, []),
                    env=variables | dict((env or {}).get(rank, {})), stdout=file, stderr=file,
                    cwd=(cwd or {}).get(rank),
                )  # fmt: skip
            self.processes.append(process)
            self.logs.append(log)
        return self

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def _running(self) -> None:
        assert all(process.poll() is None for process in self.processes), self.said()

    def steps(self) -> int:
        """Steps done."""
        return resumption.steps_done(self.output)

    def phase(self) -> str | None:
        """Where rank 0 is."""
        return resumption.Watch(self.output).phase

    def wait_for_step(self, step: int, seconds: float = STARTS_WITHIN) -> None:
        """Until ``step`` has been done."""
        until, watch = time.monotonic() + seconds, resumption.Watch(self.output)
        while watch.steps < step:
            self._running()
            assert time.monotonic() < until, f"step {step} was not done within {seconds:g} s\n{self.said()}"
            time.sleep(0.02)

    def wait_for_phase(self, *phases: str, seconds: float = 60.0) -> str:
        """Until rank 0 is in one of ``phases``, or the checkpoint of "saving" is half-written."""
        until, watch = time.monotonic() + seconds, resumption.Watch(self.output)
        while True:
            if "saving" in phases and watch.saving:
                return "saving"
            if watch.phase in phases:
                return watch.phase
            self._running()
            assert time.monotonic() < until, f"no rank came to {phases} within {seconds:g} s\n{self.said()}"
            time.sleep(0.0005)

    def wait_for_line(self, place: int, words: str, seconds: float) -> None:
        """Until a process has written a line with ``words``."""
        until = time.monotonic() + seconds
        while not re.search(words, self.logs[place].read_text()):
            self._running()
            assert time.monotonic() < until, f"nothing like {words!r} was said within {seconds:g} s\n{self.said()}"
            time.sleep(0.05)

    def end(self, seconds: float) -> list[Ended]:
        """How each rank ended, counted from now; those that have not ended within ``seconds`` are killed, and fail
        the test."""
        began = time.monotonic()
        spoke: dict[int, float] = {}
        ended: dict[int, float] = {}
        while len(ended) < len(self.processes) and time.monotonic() < began + seconds:
            now = time.monotonic() - began
            for place, (process, log) in enumerate(zip(self.processes, self.logs, strict=True)):
                if place not in spoke and "dcpo: error: " in log.read_text():
                    spoke[place] = now
                if place not in ended and process.poll() is not None:
                    ended[place] = now
            time.sleep(0.05)
        late = [place for place in range(len(self.processes)) if place not in ended]
        for place in late:
            self.processes[place].kill()
        assert not late, f"ranks {late} did not end within {seconds:g} s\n{self.said()}"
        return [
            Ended(process.returncode, spoke.get(place), ended[place], log.read_text())
            for place, (process, log) in enumerate(zip(self.processes, self.logs, strict=True))
        ]

    def end_of(self, place: int, seconds: float) -> Ended:
        """:meth:`end` of one process, whatever the others do."""
        others = self.processes, self.logs
        self.processes, self.logs = [self.processes[place]], [self.logs[place]]
        try:
            return self.end(seconds)[0]
        finally:
            self.processes, self.logs = others

    def finish(self, seconds: float = STARTS_WITHIN) -> None:
        """To its end, with exit code 0 on every rank."""
        assert [rank.code for rank in self.end(seconds)] == [0] * len(self.processes), self.said()

    def whole(self) -> int:
        """The step of the last checkpoint, whose files are what its manifest says; 0: there is none."""
        root = self.output / "checkpoints"
        steps = complete_steps(root)
        for step in steps:
            assert problem_of(root / f"step-{step:06d}") is None
        return steps[-1] if steps else 0


def one_sentence(rank: Ended, *words: str) -> str:
    """The one sentence of a rank, which comes before any traceback and has all ``words``."""
    assert len(rank.sentences) == 1, rank.log
    (sentence,) = rank.sentences
    for word in words:
        assert re.search(word, sentence), (word, rank.log)
    first = rank.log.index("dcpo: error: ")
    assert "Traceback" not in rank.log[:first] and "[rank" not in rank.log[:first], rank.log
    return sentence


def report(what: str, deadline: float, ranks: list[Ended]) -> None:
    """One line for who runs the tests with -s: seconds to the sentence beside the deadline."""
    spoke = ", ".join("-" if rank.spoke is None else f"{rank.spoke:.1f} s" for rank in ranks)
    print(
        f"\n{what}: said after {spoke} (deadline {deadline:g} s), exit codes {[rank.code for rank in ranks]}",
        flush=True,
    )
