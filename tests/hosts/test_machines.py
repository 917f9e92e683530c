"""The hosts themselves: what is apart on them, what they share, and that nothing of them stays."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts.machines import CHECKOUT, wait_until


def _pings(host, address: str) -> bool:
    return host.python("-c", f"""
import socket
try:
    socket.create_connection(("{address}", 9), timeout=1.5)
except ConnectionRefusedError:
    print("there")
except OSError:
    pass
""").stdout.strip() == "there"  # fmt: skip


def test_hosts_are_apart_and_reach_one_another(make_hosts):
    hosts = make_hosts(2)
    first, second = hosts
    assert [host.call("hostname").stdout.strip() for host in hosts] == ["h1", "h2"]
    for address in (second.ipv4, second.ipv6, "h2", "h2-6"):
        assert _pings(first, address)
    for folder in ("/dev/shm", "/tmp"):
        first.call("touch", f"{folder}/of-h1")
        assert "of-h1" not in second.call("ls", folder).stdout
        assert not Path(folder, "of-h1").exists()
    first.call("sh", "-c", f"echo hello > {hosts.shared}/word")
    assert second.call("cat", hosts.shared / "word").stdout == (hosts.shared / "word").read_text() == "hello\n"
    assert second.python("-c", "import dcpo_megatron; print(dcpo_megatron.__file__)", cwd=CHECKOUT).stdout.startswith(
        str(CHECKOUT)
    )
    assert first.call("ps", "ax").stdout.count("\n") < 6  # its own processes only


@pytest.mark.parametrize("kind", ["routed", "loopback", "none"])
def test_names(make_hosts, kind):
    hosts = make_hosts(2, names=kind)
    own, other = (hosts[0].call("getent", "ahostsv4", name, check=False).stdout.split(" ")[0] for name in ("h1", "h2"))
    assert (own, other) == {
        "routed": ("10.77.0.1", "10.77.0.2"), "loopback": ("127.0.1.1", "10.77.0.2"), "none": ("", ""),
    }[kind]  # fmt: skip


def test_links_and_the_shared_folder_go_and_come_back(make_hosts):
    hosts = make_hosts(2)
    for cut in (hosts[1].pull_the_plug, hosts[1].fall_silent):
        assert _pings(hosts[0], hosts[1].ipv4)
        cut()
        assert not _pings(hosts[0], hosts[1].ipv4)
        hosts[1].plug_in()
        wait_until(lambda: _pings(hosts[0], hosts[1].ipv4), 10, "the link")
    (hosts.shared / "kept").touch()
    hosts[1].unmount_shared()
    assert [host.call("ls", hosts.shared).stdout for host in hosts] == ["kept\n", ""]
    hosts[1].mount_shared()
    assert hosts[1].call("ls", hosts.shared).stdout == "kept\n"


def test_a_host_disappears_and_boots_again(make_hosts):
    hosts = make_hosts(2)
    sleeper = hosts[1].popen("sleep", "100")
    hosts[1].disappear()
    assert sleeper.wait(5) != 0
    assert not _pings(hosts[0], hosts[1].ipv4)
    hosts[1].start()
    assert _pings(hosts[0], hosts[1].ipv4)


def test_signals_reach_what_runs_on_a_host(make_hosts):
    script = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    process = make_hosts(1)[0].popen(sys.executable, "-c", script, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 7


def test_nothing_stays_when_the_tests_are_killed(namespaces, tmp_path):
    """The tests' own process dies of SIGKILL: no handler of it runs."""
    program = f"""
import tempfile, time
from pathlib import Path
from tests.hosts.machines import Hosts
with Hosts(1, Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))) as hosts:
    hosts[0].popen("sleep", "54321")
    hosts[0].popen("sh", "-c", "sleep 54322 & setsid sleep 54323 & wait")
    Path({str(tmp_path / "up")!r}).touch()
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=CHECKOUT)

    def sleepers() -> str:
        return subprocess.run(["pgrep", "-f", "sleep 5432[123]"], capture_output=True, text=True).stdout

    wait_until((tmp_path / "up").exists, 20, "the host")
    wait_until(lambda: len(sleepers().split()) >= 4, 10, "what runs on it")
    process.kill()
    process.wait(5)
    time.sleep(0.2)
    wait_until(lambda: not sleepers(), 10, "the end of what ran on it")
