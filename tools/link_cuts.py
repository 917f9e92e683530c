"""Cuts the links of a run's hosts at random moments and holds what comes of it against an undisturbed run, bit for
bit: `tools/verify_resume.py --hosts 2 --cuts 10`.

    h1, h2, ...: hosts of network namespaces on this machine, one rank each, a folder that all share
    (tests/hosts/machines.py: root, and a checkout)

    cut N: host, way (the link is down; or up, and carries nothing) and length by chance: 5 s to a minute, or for ever
        shorter than the deadline leaves time for   -->  the run goes on by itself
        longer                                      -->  every rank says who is missing and ends; the link is mended,
                                                         the same command starts the run again

Every end is looked at: one sentence on each rank, before any traceback, within the deadline; and a checkpoint whose
files are what its manifest says.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dcpo_megatron.checkpoint.folder import checkpoint_name, complete_steps, problem_of
from dcpo_megatron.verification.resumption import MOMENTS, Difference, Watch, compare, make_task, wait_for
from tests.hosts.machines import Host, HostProcess, Hosts

# The ranks' own deadline, and what they may take beyond it until they have spoken and ended, on a busy machine.
DEADLINE, SLACK = 20.0, 30.0
SHORTEST, LONGEST = 5.0, 60.0
SHARE_FOR_EVER = 0.3
# A run that goes on after a cut: TCP sends again after pauses that have grown to the length of the cut.
GOES_ON_WITHIN = 2 * DEADLINE + SLACK
STARTS_WITHIN = 300.0


class Ranks:
    """The ranks of one run, one on each host; logs of all starts are kept."""

    def __init__(self, hosts: Hosts, arguments: list[str], output: Path):
        self.hosts, self.output, self.starts = hosts, output, 0
        self._arguments = [
            *arguments,
            f"output={output}",
            f"training.timeout_seconds={DEADLINE}",
            "logging.console=false",
        ]
        self.processes: list[HostProcess] = []

    def start(self) -> None:
        self.starts += 1
        self.processes = []
        for rank, host in enumerate(self.hosts):
            place = {
                "RANK": str(rank), "WORLD_SIZE": str(len(self.hosts.all)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": self.hosts[0].ipv4, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0",
            }  # fmt: skip
            with self.log(rank).open("w") as file:
                command = [sys.executable, "-u", "-m", "dcpo_megatron.cli", "train", *self._arguments]
                self.processes.append(host.popen(*command, env=place, stdout=file, stderr=file))

    def log(self, rank: int) -> Path:
        return self.output.with_name(f"{self.output.name}-{self.starts}-rank-{rank}.log")

    def poll(self) -> int | None:
        """As of a process: None while any rank runs; then the first exit code that is not 0, or 0."""
        codes = [process.poll() for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, seconds: float, what: str) -> int:
        """Raises RuntimeError after ``seconds``."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise RuntimeError(f"{what} did not end within {seconds:.0f} s:\n{self.said()}")
            time.sleep(0.05)
        return code

    def said(self) -> str:
        return "\n".join(
            f"--- {self.log(rank).name}\n{self.log(rank).read_text()[-2000:]}" for rank in range(len(self.processes))
        )


def verify(folder: Path, *, hosts: int, cuts: int, steps: int, seed: int, say: Callable[[str], None] = print) -> None:
    """Runs the whole comparison; logs and runs stay in ``folder / "hosts"``, under /tmp.

    Raises:
        Difference: the disturbed run is not the undisturbed one.
        RuntimeError: a run failed by itself, or a rank said nothing, too late, or too much.
    """
    chance = random.Random(seed)
    with Hosts(hosts, folder / "hosts") as machines:
        task = make_task(machines.shared, steps=steps)
        quiet = Ranks(machines, task, machines.shared / "undisturbed")
        quiet.start()
        if quiet.wait(STARTS_WITHIN * 3, "the undisturbed run"):
            raise RuntimeError(f"the undisturbed run failed:\n{quiet.said()}")
        say(f"undisturbed: {steps} steps on {hosts} hosts")
        run = Ranks(machines, task, machines.shared / "disturbed")
        _disturb(run, cuts, steps, chance, say)
        say(compare(quiet.output, run.output))


def _disturb(run: Ranks, cuts: int, steps: int, chance: random.Random, say) -> None:
    watch = Watch(run.output)
    run.start()
    for number in range(1, cuts + 1):
        moment = MOMENTS[(number - 1) % (len(MOMENTS) - 1)]  # a start has its own meeting
        last = watch.steps + max(2, (steps - 4 - watch.steps) // (cuts - number + 1))
        wait_for(moment, watch, run, last, chance, STARTS_WITHIN)
        if run.poll() is not None or watch.steps >= steps:
            raise RuntimeError(
                f"the run came to its end before cut {number} of {cuts}: give more --steps\n{run.said()}"
            )
        host: Host = chance.choice(run.hosts.all)
        way = chance.choice(("down", "silent"))
        seconds = math.inf if chance.random() < SHARE_FOR_EVER else SHORTEST * (LONGEST / SHORTEST) ** chance.random()
        met, at = watch.phase, watch.steps
        host.pull_the_plug() if way == "down" else host.fall_silent()
        what = (
            f"cut {number}: {host.name} {way} for {'ever' if seconds == math.inf else f'{seconds:.0f} s'} in {met}"
            f" after step {at}"
        )
        say(f"{what}: {_after(run, watch, host, seconds)}")
        if run.poll() is not None:
            run.start()
    if run.wait(STARTS_WITHIN * 3, "the last start"):
        raise RuntimeError(f"the last start failed:\n{run.said()}")


def _after(run: Ranks, watch: Watch, host: Host, seconds: float) -> str:
    """Mends the link after ``seconds``, or when the ranks have ended; what became of the run."""
    began, at, mended = time.monotonic(), watch.steps, False
    spoke: dict[int, float] = {}
    while True:
        took = time.monotonic() - began
        if not mended and took >= seconds:
            host.plug_in()
            mended = True
        for rank in range(len(run.processes)):
            if rank not in spoke and "dcpo: error: " in run.log(rank).read_text():
                spoke[rank] = took
        if run.poll() is not None:
            host.plug_in()
            break
        if mended and not spoke and watch.steps > at + 1:
            return f"the run went on after {took:.1f} s"
        if took > max(min(seconds, DEADLINE), 0) + GOES_ON_WITHIN:
            raise RuntimeError(f"{took:.0f} s after the cut the run had neither ended nor gone on:\n{run.said()}")
        time.sleep(0.02)
    if run.poll() == 0:
        return f"the run came to its end after {took:.1f} s"
    return f"{_looked_at(run, spoke)}; ended after {took:.1f} s, {_whole(run.output)}"


def _looked_at(run: Ranks, spoke: dict[int, float]) -> str:
    """What every rank said. Raises RuntimeError where one said nothing, too late, or a traceback first."""
    for rank in range(len(run.processes)):
        log = run.log(rank).read_text()
        sentences = [line for line in log.splitlines() if line.startswith("dcpo: error: ")]
        if len(sentences) != 1 or "Traceback" in log[: log.index("dcpo: error: ")]:
            raise RuntimeError(f"rank {rank} did not end with one sentence:\n{run.said()}")
        if spoke.get(rank, 0.0) > DEADLINE + SLACK:
            raise RuntimeError(
                f"rank {rank} spoke after {spoke[rank]:.1f} s, its deadline is {DEADLINE:g} s:\n{run.said()}"
            )
    times = ", ".join(f"{spoke[rank]:.1f} s" for rank in sorted(spoke))
    return f"said after {times} (deadline {DEADLINE:g} s), exit codes {[process.poll() for process in run.processes]}"


def _whole(output: Path) -> str:
    root = output / "checkpoints"
    for step in complete_steps(root):
        if problem := problem_of(root / checkpoint_name(step)):
            raise Difference(f"checkpoint {step} after a cut: {problem}")
    return f"last checkpoint step {max(complete_steps(root), default=None)}"
