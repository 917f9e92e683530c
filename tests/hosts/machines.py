"""Several hosts on this machine, of Linux namespaces: what runs on one has its own network, names, processes,
`/dev/shm` and `/tmp`.

    h1 [ eth0 10.77.0.1, fd77::1 ] --+
    h2 [ eth0 10.77.0.2, fd77::2 ] --+-- bridge in a namespace of its own   a folder that all share: Hosts.shared
    h3 [ eth0 10.77.0.3, fd77::3 ] --+                              the checkout, the interpreter: as on this machine

This machine's own network is not touched. Each host hangs on a process that ends with its standard input: where the
tests end, by whatever way, the hosts, all that runs on them, their links and their folders are gone. Needs root and
iproute2 (Debian).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import debian

CHECKOUT = Path(__file__).resolve().parents[2]
NEEDED = ("ip", "unshare", "nsenter", "mount")
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")


class Unavailable(Exception):
    """This machine cannot have such hosts; says why."""


def install() -> None:
    """Raises :class:`Unavailable` where namespaces, or the programs that make them, cannot be had."""
    if os.geteuid() != 0:
        raise Unavailable("hosts of network namespaces need root")
    if reason := debian.install(NEEDED, ("iproute2", "util-linux", "mount")):
        raise Unavailable(reason)
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "ip", "link", "add", "br0", "type", "bridge"],
        capture_output=True, text=True, timeout=20, env=_env(),
    )  # fmt: skip
    if tried.returncode:
        raise Unavailable(f"no namespaces, or no bridge in one: {tried.stderr.strip()}")


class HostProcess(subprocess.Popen):
    """A process on a host. Signals reach it, not the `nsenter` in front of it, which ends as it ends."""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(OSError):
                inside = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
                os.kill(int(inside[0]) if inside else self.pid, number)
                if number in (signal.SIGKILL, signal.SIGCONT):
                    os.kill(self.pid, signal.SIGCONT)  # `nsenter` stops with what it waits for


class Host:
    """``name`` is its host name; ``number`` counts from 1; ``ipv4`` and ``ipv6`` its addresses on the network of all;
    ``alive`` until :meth:`disappear`."""

    def __init__(self, hosts: Hosts, number: int):
        self._hosts, self.number, self.name = hosts, number, f"h{number}"
        self.ipv4, self.ipv6 = f"10.77.0.{number}", f"fd77::{number}"
        self._port = f"port{number}"
        self.alive = False

    def start(self) -> None:
        """Boots: also again, after :meth:`disappear`. Its folders are empty then."""
        self._holder = _Namespaces()
        self.alive = True
        switch = self._hosts.switch
        switch.call(
            "ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._holder.pid)
        )
        self.plug_in()
        shared, stage = shlex.quote(str(self._hosts.shared)), shlex.quote(str(self._hosts.stage))
        binds = "\n".join(
            f"if [ -e {path} ]; then mkdir -p {stage}/{path.relative_to('/tmp')}; mount --bind {path}"
            f" {stage}/{path.relative_to('/tmp')}; fi"
            for path in map(Path, self._hosts.kept)
        )
        self.call("sh", "-ec", f"""
            hostname {self.name}
            mount -t tmpfs -o size=2g shm /dev/shm
            mount -t tmpfs -o size=2g tmp {stage}
            mkdir -m 700 {stage}/.shared
            mount --bind {shared} {stage}/.shared
            {binds}
            mkdir -p {stage}/{self._hosts.shared.relative_to("/tmp")}
            mount --rbind {stage} /tmp
            chmod 1777 /tmp
            mount --bind /tmp/.shared {shared}
            ip link set lo up
            ip address add {self.ipv4}/24 dev eth0
            ip -6 address add {self.ipv6}/64 dev eth0 nodad
            ip link set eth0 up
        """)  # fmt: skip
        self.names(self._hosts.names)

    def names(self, kind: str) -> None:
        """What this host's names resolve to: "routed", the network's addresses; "loopback", its own name to 127.0.1.1
        as Debian writes it; "none", only localhost."""
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
        for host in self._hosts.all if kind != "none" else ():
            own = kind == "loopback" and host is self
            lines += [f"{'127.0.1.1' if own else host.ipv4} {host.name}"] + (
                [] if own else [f"{host.ipv6} {host.name}-6"]
            )
        # Not bound from a folder of the tests: those are gone below this host's own /tmp.
        text = shlex.quote("\n".join(lines) + "\n")
        self.call("sh", "-ec", f"""
            printf %s {text} > /tmp/.hosts; : > /tmp/.resolv
            umount /etc/hosts 2> /dev/null || true; mount --bind /tmp/.hosts /etc/hosts
            umount /etc/resolv.conf 2> /dev/null || true; mount --bind /tmp/.resolv /etc/resolv.conf
        """)  # fmt: skip

    def add_interface(self, name: str, address: str) -> None:
        """Another interface, up, which leads nowhere: ``address`` like 172.17.0.1/16, the same on each host where
        docker made it."""
        self.call("ip", "link", "add", name, "type", "bridge")
        self.call("ip", "address", "add", address, "dev", name)
        self.call("ip", "link", "set", name, "up")

    def popen(
        self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, **options
    ) -> HostProcess:
        """Starts ``command`` on this host; ``options`` are those of :class:`subprocess.Popen`."""
        options.setdefault("stdin", subprocess.DEVNULL)
        into = ["nsenter", f"--target={self._holder.pid}", *_NAMESPACES, f"--wd={cwd or CHECKOUT}", "--"]
        return HostProcess(
            [*into, *map(str, command)], env=_env() | {"OMP_NUM_THREADS": "1"} | dict(env or {}), **options
        )

    def call(
        self, *command: str | Path, timeout: float = 30.0, check: bool = True, **options
    ) -> subprocess.CompletedProcess:
        """Runs ``command`` on this host to its end; output of both streams as text in ``stdout``. Raises RuntimeError:
        it failed, and ``check``; TimeoutError."""
        process = self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate(timeout=10)
            raise TimeoutError(
                f"{self.name}: {shlex.join(map(str, command))[:300]} took longer than {timeout:g} s:\n{output[-3000:]}"
            ) from None
        if check and process.returncode:
            raise RuntimeError(
                f"{self.name}: {shlex.join(map(str, command))[:300]} ended with {process.returncode}:\n{output[-3000:]}"
            )
        return subprocess.CompletedProcess(command, process.returncode, output)

    def python(self, *arguments: str | Path, **options) -> subprocess.CompletedProcess:
        """:meth:`call` of the tests' own interpreter."""
        return self.call(sys.executable, *arguments, **options)

    def pull_the_plug(self) -> None:
        """The link goes down: the host's interface has no carrier."""
        self._hosts.switch.call("ip", "link", "set", self._port, "down")

    def plug_in(self) -> None:
        """The link comes (back) up; after :meth:`fall_silent` too."""
        self._hosts.switch.call("ip", "link", "set", self._port, "master", "br0", "up")

    def fall_silent(self) -> None:
        """The network between drops what this host sends and gets, the link stays up: a dead switch behind it."""
        self._hosts.switch.call("ip", "link", "set", self._port, "nomaster")

    def unmount_shared(self) -> None:
        """The shared folder is gone on this host: an empty one is where it was. Open files stay open."""
        self.call("umount", "--lazy", self._hosts.shared)

    def mount_shared(self) -> None:
        """The shared folder is back."""
        self.call("mount", "--bind", "/tmp/.shared", self._hosts.shared)

    def disappear(self) -> None:
        """All its processes are killed at once, and its network with them."""
        if self.alive:
            self.alive = False
            self._holder.end()


class Hosts:
    """``count`` hosts, :attr:`all` or by index; ``folder`` (under /tmp) is for what they share. Use it as a context.

    Args:
        names: what host names resolve to, as in :meth:`Host.names`.
        kept: folders under /tmp which hosts see as they are here, beside the checkout and the interpreter.
    """

    def __init__(self, count: int, folder: Path, names: str = "routed", kept: Sequence[Path] = ()):
        self.names = names
        self.shared, self.stage = folder / "shared", folder / "stage"
        wanted = {CHECKOUT, Path(sys.prefix), Path(sys.base_prefix), *kept}
        self.kept = sorted(path for path in wanted if path.is_relative_to("/tmp"))
        self.all = [Host(self, number) for number in range(1, count + 1)]

    def __getitem__(self, index: int) -> Host:
        return self.all[index]

    def __iter__(self):
        return iter(self.all)

    def __enter__(self) -> Hosts:
        self.shared.mkdir(parents=True)
        self.stage.mkdir()
        self.switch = _Namespaces()
        try:
            self.switch.call("ip", "link", "add", "br0", "type", "bridge")
            self.switch.call("ip", "link", "set", "br0", "up")
            for host in self.all:
                host.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for host in self.all:
            host.disappear()
        self.switch.end()


class _Namespaces:
    """A set of namespaces, held by a process that ends with this one. ``pid`` is that of its first process, as seen
    from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_env(),
            start_new_session=True,
        )  # fmt: skip
        self._process.stdout.readline()  # it is there, /proc of its own included
        self.pid = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])

    def call(self, *command: str) -> None:
        into = ["nsenter", f"--target={self.pid}", "--net", "--"]
        done = subprocess.run([*into, *command], capture_output=True, text=True, timeout=20, env=_env())
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")

    def end(self) -> None:
        """Kills all in it; a network namespace, and its links, go with the last of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait(20)
        self._process.stdin.close()
        self._process.stdout.close()


def wait_until(condition, deadline: float, what: str):
    """The first true value of ``condition()``. Raises TimeoutError, which names ``what``, after ``deadline``
    seconds."""
    until = time.monotonic() + deadline
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come within {deadline:g} s")
        time.sleep(0.1)
    return value


def _env() -> dict[str, str]:
    # What the tests' own environment says of ranks, interfaces and proxies is not the hosts'.
    ours = ("MASTER_", "GLOO_", "NCCL_", "SLURM_", "SGLANG_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"PATH": debian.search_path()}
