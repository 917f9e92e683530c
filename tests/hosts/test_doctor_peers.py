"""`dcpo doctor --peers`: started on each host, it tells the same on all; whatever is wrong between them is named, and
nobody waits for ever."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import time

from tests.hosts.machines import CHECKOUT, Host, Hosts
from tests.other_megatron import other_megatron

RUN = ["-m", "dcpo_megatron.cli", "doctor", "--json", "--peers"]


def start(host: Host, peers: str, *options: str, python: list[str] = RUN, **where) -> subprocess.Popen:
    return host.popen(
        sys.executable, *python, peers, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **where
    )


def told(process: subprocess.Popen, seconds: float = 40) -> tuple[int, list[tuple[str, str, str]]]:
    """Exit code and findings: (area, status, what)."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert output, errors
    findings = json.loads(output)["findings"]
    assert all(finding["fix"] for finding in findings if finding["status"] in ("warn", "fail"))
    return process.returncode, [(finding["area"], finding["status"], finding["what"]) for finding in findings]


def everywhere(hosts: Hosts, peers: str, *options: str, **where) -> tuple[int, list[tuple[str, str, str]]]:
    """The same on all hosts."""
    (first, *others) = [told(process) for process in [start(host, peers, *options, **where) for host in hosts]]
    assert others == [first] * len(others)
    return first


def test_hosts_that_fit_say_so_by_names_and_by_addresses_of_ipv6(make_hosts):
    hosts = make_hosts(3)
    for host in hosts:
        host.add_interface("docker0", "172.17.0.1/16")
    code, findings = everywhere(hosts, "h1,h2,h3", "--shared", str(hosts.shared))
    assert code == 0 and [status for _, status, _ in findings] == ["ok"] * 7
    areas = ["meeting", "names", "routes", "ports", "clocks", "versions", "shared folder"]
    assert [area for area, _, _ in findings] == areas
    said = {area: what for area, _, what in findings}
    assert said["routes"] == "h1: eth0 (10.77.0.1); h2: eth0 (10.77.0.2); h3: eth0 (10.77.0.3)"
    assert "torch 2." in said["versions"] and "megatron-core 0." in said["versions"]
    assert str(hosts.shared) in said["shared folder"]
    assert list(hosts.shared.iterdir()) == []  # the doctors' files are gone
    for host in hosts:
        host.names("none")
        host.call("ip", "address", "del", f"{host.ipv4}/24", "dev", "eth0")
    code, findings = everywhere(hosts, "fd77::1,[fd77::2],fd77::3", "--port", "29777")
    warnings = [what for area, status, what in findings if (area, status) == ("names", "warn")]
    assert code == 0 and [what.partition(" (")[0] for what in warnings] == [
        f"h{n} does not resolve on fd77::{n}" for n in (1, 2, 3)
    ]
    assert ("routes", "ok", "fd77::1: eth0 (fd77::1); fd77::2: eth0 (fd77::2); fd77::3: eth0 (fd77::3)") in findings


LATER = """
import sys, time
now = time.time
time.time = lambda: now() + 7
from dcpo_megatron.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_each_thing_that_is_wrong_between_hosts_is_named(make_hosts):
    other, installed = other_megatron(), importlib.metadata.version("megatron-core")
    hosts = make_hosts(3, names="loopback")
    one, two, three = hosts
    one.call("sh", "-c", "sed 's/10.77.0.3 h3/10.77.0.33 h3/' /etc/hosts > /tmp/other; cat /tmp/other > /etc/hosts")
    # What a firewall does: of the ports that the kernel gives away, none above 50000 is reached from the first host.
    one.call("ip", "rule", "add", "pref", "1", "ipproto", "tcp", "dport", "50000-60999", "to", three.ipv4, "prohibit")
    two.unmount_shared()
    two.add_interface("docker0", "172.17.0.1/16")
    checkout = hosts.shared / "checkout"
    shutil.copytree(
        CHECKOUT / "dcpo_megatron", checkout / "dcpo_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (checkout / "dcpo_megatron" / "gpus.py").open("a") as file:
        file.write("# another revision\n")
    shared = ("--shared", str(hosts.shared))
    doctors = [
        start(one, "h1,h2,h3", *shared, env={"PYTHONPATH": str(other)}),
        start(two, "h1,h2,h3", *shared, env={"GLOO_SOCKET_IFNAME": "docker0", "NCCL_SOCKET_IFNAME": "ib"}),
        start(three, "h1,h2,h3", *shared, python=["-c", LATER, *RUN[2:]], cwd=checkout),
    ]
    (code, findings), *others = [told(process) for process in doctors]
    assert others == [(code, findings)] * 2 and code == 1
    said = "\n".join(map(" ".join, findings))
    for words in (
        "names warn h1 is 127.0.1.1 on h1 itself",
        "names warn h3 is 127.0.1.1 on h3 itself",
        "names fail h3 is 10.77.0.33 on h1, and h3 has 10.77.0.3, fd77::3",
        "routes fail GLOO_SOCKET_IFNAME=docker0 on h2, and eth0 leads to the others",
        "routes fail NCCL_SOCKET_IFNAME=ib on h2, which has ",
        "ports fail h1 cannot reach h3 (10.77.0.3) at 2 of 5 ports tried, ",
        "clocks warn the clock of h3 is 7.0 s ahead of that of h1",
        f"versions fail megatron-core: {other.name.removeprefix('megatron-core-')} on h1; {installed} on h2 and h3",
        "versions fail dcpo_megatron: ",
        "versions ok the same on all: Python 3.",
        f"shared folder fail what h1 writes into {hosts.shared}, h2 cannot see: not seen within ",
        f"shared folder fail what h2 writes into {hosts.shared}, h1 and h3 cannot see: ",
    ):
        assert words in said, (words, said)


def test_who_does_not_come_is_named_and_nobody_waits_longer_than_the_deadline(make_hosts):
    hosts = make_hosts(3)
    one, two, three = hosts
    listen = "import socket, time; s = socket.create_server(('', 29700)); print(flush=True); time.sleep(60)"
    listener = one.popen(sys.executable, "-c", listen, stdout=subprocess.PIPE)
    listener.stdout.readline()
    two.call("sh", "-c", "echo 127.0.1.1 h8 >> /etc/hosts")
    quick = ("--deadline", "1", "--port", "29600")
    began = time.monotonic()
    late = [start(host, "h1,h2,h3", "--deadline", "3") for host in (one, two)]
    # Nobody listens at the first; it is not there; another program is; this host is none of them.
    doctors = {
        "h1, port 29600: the host is there, and nobody listened for 1 s": start(two, "h1,h2", *quick),
        "the name of the first host, h9, does not resolve here": start(two, "h9,h2", *quick),
        "the name of the first host, h8, is 127.0.1.1 here": start(two, "h8,h2", *quick),
        "10.77.0.9, port 29600: not reached within 1 s": start(three, "10.77.0.9,h3", *quick),
        "port 29700 of h1 is in use": start(one, "h1,h2", *quick[:3], "29700"),
        "h1, port 29700: somebody else listens there, no doctor": start(two, "h1,h2", *quick[:3], "29700"),
        "this host, h3 (10.77.0.3, fd77::3": start(three, "h1,h2", *quick),
    }
    for code, findings in map(told, late):
        assert code == 1 and findings[0] == ("meeting", "fail", "h3 did not come within 3 s")
        # The two that are there are looked at all the same.
        assert ("ports", "ok") in [(area, status) for area, status, _ in findings]
    for words, process in doctors.items():
        code, findings = told(process)
        assert code == 1 and len(findings) == 1 and findings[0][2].startswith(words), findings
    assert time.monotonic() - began < 60
    listener.kill()


def test_lists_that_differ_and_a_second_doctor_on_a_host_are_said(make_hosts):
    hosts = make_hosts(2)
    first = start(hosts[0], "h1,h2", "--deadline", "6")
    other = told(start(hosts[1], "h1,h2,h3", "--deadline", "6"))
    assert other[0] == 1 and "h1 was started with --peers h1,h2" in other[1][0][2]
    second = start(hosts[1], "h1,h2", "--deadline", "6")
    assert told(first) == told(second) and second.returncode == 0


def test_a_list_of_one_or_a_port_that_is_none_is_refused():
    for words in (["--peers", "h1"], ["--peers", "h1,h1"], ["--peers", "h1,h2", "--port", "0"]):
        done = subprocess.run(
            [sys.executable, "-m", "dcpo_megatron.cli", "doctor", *words], capture_output=True, text=True, cwd=CHECKOUT
        )
        assert done.returncode == 2 and "is no" in done.stderr
