"""A real Slurm, for tests: munged, one slurmctld and a slurmd a node, everything of theirs in one folder. Two nodes on
this machine, or one on each of `tests.hosts`.

    munged -- its own socket   slurmctld   slurmd n1   slurmd n2   each found again by the pid file that it wrote
    h1 [ munged slurmctld slurmd ]  h2 [ munged slurmd ] ...       a folder that all hosts see; they go with their hosts

Needs root, and Debian's `slurm-wlm` and `munge`, which :func:`install` installs where it may.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from dcpo_megatron.network import free_ports
from tests import debian
from tests.hosts.machines import Host

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged")
NODES = ("n1", "n2")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Unavailable(Exception):
    """This machine cannot run the cluster; says why."""


def install(deadline: float = 180.0) -> None:
    """Makes sure that the programs are there. Raises :class:`Unavailable` where they are not and cannot be
    installed."""
    if os.geteuid() != 0:
        raise Unavailable("a test cluster needs root (slurmd starts tasks)")
    reason = debian.install(NEEDED, ("slurm-wlm", "munge"), deadline)
    if reason:
        raise Unavailable(reason)


class Cluster:
    """Start it with :meth:`start`, and call :meth:`stop` whatever happened. ``hosts``: where nodes are, by default this
    machine; commands are the first one's."""

    def __init__(self, folder: Path, hosts: Sequence[Host] = ()):
        self.folder, self.hosts = folder, hosts
        self.nodes = [host.name for host in hosts] or list(NODES)
        # Under /tmp each host has its own.
        self.munge = Path("/tmp") if hosts else folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PATH": debian.search_path()}

    def start(self) -> None:
        """Raises :class:`Unavailable` where a daemon does not come up."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration())
        (self.folder / "state").mkdir()
        for host in self.hosts or [None]:
            self._daemon(
                "munged", "--force", f"--key-file={key}", f"--socket={self.munge}/munge.socket",
                f"--pid-file={self.munge}/munged.pid",
                f"--log-file={self.munge}/munged.log", f"--seed-file={self.munge}/munge.seed", host=host,
            )  # fmt: skip
        self._daemon("slurmctld", "-f", self.env["SLURM_CONF"], host=self._first)
        for node, host in zip(self.nodes, self.hosts or [None] * len(self.nodes)):
            self._daemon("slurmd", "-N", node, "-f", self.env["SLURM_CONF"], host=host)
        until = time.monotonic() + 40
        while self._ready() < len(self.nodes):
            if time.monotonic() > until:
                raise Unavailable(f"the nodes did not become idle:\n{self._logs()}")
            time.sleep(0.3)

    def _configuration(self) -> str:
        folder, ports = self.folder, free_ports(1 + len(self.nodes))
        places = [(host.name, host.ipv4) for host in self.hosts] or [(socket.gethostname(), "127.0.0.1")] * len(
            self.nodes
        )
        lines = [
            "ClusterName=test", f"SlurmctldHost={places[0][0]}({places[0][1]})", f"SlurmctldPort={ports[0]}",
            "AuthType=auth/munge", "CryptoType=crypto/munge",
            # The second: a job queued again may start after that many seconds (120 unless said).
            f"AuthInfo=socket={self.munge}/munge.socket,cred_expire=5",
            "SlurmUser=root", "SlurmdUser=root", f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n", f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "ReturnToService=2", "MpiDefault=none", "SwitchType=switch/none", "SchedulerParameters=sched_interval=1",
            # Ranks stand in for the two cores of a node; there may be fewer on this machine.
            "SlurmdParameters=config_overrides",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=500"
                for node, (host, address), port in zip(self.nodes, places, ports[1:])
            ),
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES State=UP",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    @property
    def _first(self) -> Host | None:
        return self.hosts[0] if self.hosts else None

    def _start(self, command: Sequence[str], host: Host | None, **options) -> subprocess.Popen:
        start = host.popen if host else lambda *words, **more: subprocess.Popen(words, stdin=subprocess.DEVNULL, **more)
        return start(*command, env=self.env, **options)

    def _daemon(self, *command: str, host: Host | None) -> None:
        # Daemons keep the pipes they inherit: their output goes to a file.
        with (self.folder / "daemons.log").open("ab") as log:
            try:
                code = self._start(command, host, stdout=log, stderr=log, cwd=self.folder).wait(30)
            except subprocess.TimeoutExpired:
                raise Unavailable(f"{command[0]} did not start within 30 s:\n{self._logs()}") from None
        if code:
            raise Unavailable(f"{command[0]} ended with {code}:\n{self._logs()}")

    def _ready(self) -> int:
        done = self.call("sinfo", "--noheader", "--Node", "--format=%T", check=False)
        return done.stdout.split().count("idle")

    def _logs(self) -> str:
        return "\n".join(
            f"{file.name}: {file.read_text(errors='replace')[-600:]}" for file in sorted(self.folder.glob("*.log"))
        )

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess:
        process = self._start(command, self._first, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            done = subprocess.CompletedProcess(command, None, *process.communicate(timeout=30))
        finally:
            process.kill()
        done.returncode = process.returncode
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = (), cwd: Path) -> str:
        """Submits a script from ``cwd``; returns the job id."""
        return self.call("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd).stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of one job."""
        words = self.call("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def cores(self, job: str) -> dict[str, int]:
        """The cores of each step of a running job, by the nodes it is on; the job's own shell is left out."""
        lines = self.call("scontrol", "show", "step", "-o", job).stdout.splitlines()
        steps = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
        return {step["NodeList"]: int(step["CPUs"]) for step in steps if not step["StepId"].endswith("batch")}

    def wait(self, job: str, condition, deadline: float, what: str) -> dict[str, str]:
        """Waits until ``condition(facts)``; raises TimeoutError, which names ``what``, after ``deadline`` seconds."""
        until = time.monotonic() + deadline
        while not condition(facts := self.facts(job)):
            if time.monotonic() > until:
                self.call(
                    "scancel", job, check=False
                )  # it has the nodes to itself: the next test's job would wait for it
                raise TimeoutError(
                    f"{what} did not come within {deadline:.0f} s; job {job} is {facts['JobState']}, {facts['Reason']}"
                )
            time.sleep(0.1)
        return facts

    def wait_for_the_end(self, job: str, deadline: float = 90.0) -> dict[str, str]:
        return self.wait(job, lambda facts: facts["JobState"] in _ENDED, deadline, "the end of the job")

    def stop(self) -> None:
        """Cancels every job and ends every daemon whose pid file is in the folder; SIGKILL for what stays 10 s."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.call("scancel", "--user=root", check=False)
            until = time.monotonic() + 45  # ranks may take KillWait, 30 s
            while self.call("squeue", "--noheader", check=False).stdout.strip() and time.monotonic() < until:
                time.sleep(0.2)
        if self.hosts:
            return
        # munged last: the others speak through it.
        for file in sorted(self.folder.glob("*.pid"), key=lambda file: file.name == "munged.pid"):
            with contextlib.suppress(OSError, ValueError):
                _end(int(file.read_text()))


def _end(pid: int, seconds: float = 10.0) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            os.kill(pid, 0)  # raises once it is gone
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
