"""A real sshd on each host, and what `ssh` of root needs to reach it without being asked: keys and configurations of
the tests' own, seen on the hosts alone.

h1 [ sshd :22 ] <-- ssh h2 --                   files in Hosts.shared/ssh; /etc/ssh/ssh_config, /run are the hosts' own
h2 [ sshd :22 ]
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from tests import debian
from tests.hosts.machines import Host, Hosts, Unavailable, wait_until


def install() -> None:
    """Raises :class:`Unavailable` where OpenSSH is not there and cannot be installed."""
    if reason := debian.install(("sshd", "ssh", "ssh-keygen"), ("openssh-server", "openssh-client")):
        raise Unavailable(reason)


def start_sshd(hosts: Hosts, only: Sequence[Host] | None = None, client: str = "") -> None:
    """Starts sshd on ``hosts`` (or on ``only`` some). ``client``: more lines of ssh's configuration, on all of them."""
    folder = hosts.shared / "ssh"
    folder.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True, timeout=30)
    (folder / "known_hosts").write_text(f"* {(folder / 'host.pub').read_text()}")
    (folder / "server").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\n"
    )
    (folder / "client").write_text(
        f"{client}\nHost *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n"
    )
    sshd = shutil.which("sshd", path=debian.search_path())
    for host in hosts:
        # /run is still this machine's there, and sshd wants a folder in it.
        host.call(
            "sh", "-ec", f"mount -t tmpfs run /run; mkdir /run/sshd; mount --bind {folder}/client /etc/ssh/ssh_config"
        )
        if only is None or host in only:
            log = folder / f"sshd-{host.name}.log"
            host.call(sshd, "-f", folder / "server", "-E", log)
            wait_until(lambda log=log: "listening" in log.read_text(), 10, f"sshd on {host.name}")
