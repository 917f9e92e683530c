"""Ranks find the network between their hosts by themselves: whatever names resolve to, whatever else is plugged in,
IPv6 too."""

import time

import pytest

from tests.hosts.starts import places, start_ranks, started


@pytest.fixture(scope="module")
def three(namespaces):
    """Hosts with docker's interface, the same on each, and a management network that is cut off."""
    with started(3) as (hosts, starters):
        for host in hosts:
            host.add_interface("docker0", "172.17.0.1/16")
            host.add_interface("amgmt", f"192.168.7.{host.number}/24")
        yield hosts, starters


def names(hosts, kind: str) -> None:
    for host in hosts:
        host.names(kind)


def test_ranks_on_three_hosts_use_the_interface_that_leads_to_the_master(three):
    hosts, starters = three
    trained = [{"sum": 3, "interface": "eth0"}] * 3
    # By address, by a name that is 127.0.1.1 on the master itself, and where no name resolves at all.
    for kind, master in (
        ("loopback", hosts[0].ipv4), ("loopback", "h1"), ("none", hosts[0].ipv4), ("none", hosts[0].ipv6)
    ):  # fmt: skip
        names(hosts, kind)
        assert start_ranks(starters, master) == trained, (kind, master)
    # What the user names stays.
    assert start_ranks(starters, hosts[0].ipv4, [{"GLOO_SOCKET_IFNAME": "eth0"}] * 3) == trained


def test_where_torchrun_took_a_name_that_only_its_host_knows_the_ranks_go_where_its_agents_have_met(three):
    hosts, starters = three
    names(hosts, "none")
    for host in hosts:
        host.call("sh", "-c", f"echo 127.0.1.1 {host.name} >> /etc/hosts")
    agent = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "JOB",
        "PET_RDZV_ENDPOINT": f"[{hosts[0].ipv6}]:29400",
    }
    assert start_ranks(starters, "h1", [agent] * 3) == [{"sum": 3, "interface": "eth0"}] * 3
    agent.pop("PET_RDZV_ENDPOINT")
    starters[1].ask(places(2, "h1")[1] | agent, meeting=1.0)
    said = starters[1].answer()["failed"]
    assert (
        "MASTER_ADDR=h1 does not resolve on h2: where torchrun chose it" in said
        and "--local-addr ADDRESS on each host" in said
    )


def test_ranks_of_one_host_stay_on_its_loopback(three):
    hosts, starters = three
    names(hosts, "loopback")
    first = [starters[0]] * 2
    for master in ("127.0.0.1", "localhost", "h1", hosts[0].ipv4):
        assert start_ranks(first, master) == [{"sum": 2, "interface": "lo"}] * 2, master
    assert start_ranks(first[:1], "127.0.0.1") == [{"sum": 1, "interface": "lo"}]


def test_interfaces_that_are_not_there_or_lead_nowhere_are_said(three):
    _, starters = three
    said = start_ranks(starters, "10.77.0.1", [{}, {"GLOO_SOCKET_IFNAME": "eth9"}, {}])
    assert said[0] == said[1] == said[2]
    assert "GLOO_SOCKET_IFNAME=eth9, but host h2 has no interface eth9 with an address: it has " in said[0]["failed"]
    assert "eth0 (10.77.0.2" in said[0]["failed"] and "Traceback" not in said[0]["failed"]
    began = time.monotonic()
    said = start_ranks(starters, "10.77.0.1", [{"GLOO_SOCKET_IFNAME": "amgmt"}] * 3, collective=600.0)
    assert said[0] == said[1] == said[2] and time.monotonic() - began < 30
    assert "all 3 ranks have met at 10.77.0.1:" in said[0]["failed"]
    for host, other in (1, 2), (2, 3), (3, 1):
        assert f"h{host} does not reach h{other} at 192.168.7.{other} (amgmt; " in said[0]["failed"]


def test_hosts_without_ipv4_and_with_a_long_name_of_an_interface(three):
    """The last one: the hosts are other ones afterwards."""
    hosts, starters = three
    for host in hosts:
        host.call("sh", "-ec", f"""
            ip address flush dev eth0; ip link set eth0 down
            ip link set eth0 name bond0.1234-data; ip link set bond0.1234-data up
            ip -6 address add {host.ipv6}/64 dev bond0.1234-data nodad
        """)  # fmt: skip
    for kind, master in ("none", hosts[0].ipv6), ("loopback", f"[{hosts[0].ipv6}]"), ("loopback", "h1-6"):
        names(hosts, kind)
        if master == "h1-6":
            hosts[0].call("sh", "-c", "echo ::1 h1-6 >> /etc/hosts")
        assert start_ranks(starters, master) == [{"sum": 3, "interface": "bond0.1234-data"}] * 3, (kind, master)
