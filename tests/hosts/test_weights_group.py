"""Weights by a process group between hosts, whatever their names resolve to and whichever family leads to the server.
SGLang itself: test_servers.py."""

import subprocess
import sys

import pytest

from tests.hosts.machines import CHECKOUT

PORT = 30000


@pytest.fixture
def two(make_hosts):
    """The trainer's host, and the server's: own names that are 127.0.1.1, docker's interface, and a second network
    whose addresses sort behind the loopback's."""
    hosts = make_hosts(2, names="loopback")
    for host in hosts:
        host.add_interface("docker0", "172.17.0.1/16")
        host.call("ip", "address", "add", f"192.168.77.{host.number}/24", "dev", "eth0")
    return hosts


def start(host, *words: str) -> subprocess.Popen:
    return host.popen(
        sys.executable, "-m", "tests.hosts.weights_group", *words, cwd=CHECKOUT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def test_weights_reach_a_server_by_name_ipv4_and_ipv6_where_own_names_are_the_loopbacks(two):
    server, trainer = start(two[1], "server", str(PORT)), start(two[0], "trainer")
    assert [process.stdout.readline() for process in (server, trainer)] == ["ready\n", "ready\n"]

    def publish(url: str) -> str:
        trainer.stdin.write(f"{url}\n")
        trainer.stdin.flush()
        return trainer.stdout.readline().strip()

    for place in ("h2", two[1].ipv4, f"[{two[1].ipv6}]", "192.168.77.2"):
        assert publish(f"http://{place}:{PORT}") == "arrived =eth0", place
    # The trainer's host has IPv6 alone now, the server's has both.
    for address in (f"{two[0].ipv4}/24", "192.168.77.1/24"):
        two[0].call("ip", "address", "del", address, "dev", "eth0")
    assert publish(f"http://h2-6:{PORT}") == "arrived =eth0"
