"""A real Slurm of two nodes on this machine, for tests: munged, one slurmctld and two slurmd, everything of theirs in one folder.

    munged -- its own socket        slurmctld        slurmd n1   slurmd n2        each found again by the pid file that it wrote

Needs root, and Debian's `slurm-wlm` and `munge`, which :func:`install` installs where it may.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests import debian

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "munged")
NODES = ("n1", "n2")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Unavailable(Exception):
    """This machine cannot run the cluster; says why."""


def install(deadline: float = 180.0) -> None:
    """Makes sure that the programs are there. Raises :class:`Unavailable` where they are not and cannot be installed."""
    if os.geteuid() != 0:
        raise Unavailable("a test cluster needs root (slurmd starts tasks)")
    reason = debian.install(NEEDED, ("slurm-wlm", "munge"), deadline)
    if reason:
        raise Unavailable(reason)


class Cluster:
    """Start it with :meth:`start`, and call :meth:`stop` whatever happened."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1", "PATH": debian.search_path()}

    def start(self) -> None:
        """Raises :class:`Unavailable` where a daemon does not come up."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration())
        (self.folder / "state").mkdir()
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        self._daemon("slurmctld", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            self._daemon("slurmd", "-N", node, "-f", self.env["SLURM_CONF"])
        until = time.monotonic() + 40
        while self._ready() < len(NODES):
            if time.monotonic() > until:
                raise Unavailable(f"the nodes did not become idle:\n{self._logs()}")
            time.sleep(0.3)

    def _configuration(self) -> str:
        host, folder = socket.gethostname(), self.folder
        ports = _free_ports(1 + len(NODES))
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}",
            "AuthType=auth/munge", "CryptoType=crypto/munge",
            # The second: a job queued again may start after that many seconds (120 unless said).
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",
            "SlurmUser=root", "SlurmdUser=root", f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n", f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd.%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
            "ReturnToService=2", "MpiDefault=none", "SwitchType=switch/none", "SchedulerParameters=sched_interval=1",
            # Ranks stand in for the two cores of a node; there may be fewer on this machine.
            "SlurmdParameters=config_overrides",
            *(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=500" for node, port in zip(NODES, ports[1:])),
            f"PartitionName=main Nodes={','.join(NODES)} Default=YES State=UP",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"

    def _daemon(self, *command: str) -> None:
        # Daemons keep the pipes they inherit: their output goes to a file.
        with (self.folder / "daemons.log").open("ab") as log:
            try:
                code = subprocess.run(
                    command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=30, cwd=self.folder
                ).returncode
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
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=30)
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


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
