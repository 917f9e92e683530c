"""What `dcpo doctor --peers` thinks of what the hosts found: pure functions, one an area, each ``Record ->
[Finding]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcpo_megatron.doctor.findings import Finding, counted
from dcpo_megatron.network import is_loopback

# Heartbeats of other hosts are judged by their age: clocks should agree to within seconds.
CLOCK_SECONDS = 1.0
HOSTS_FILE = (
    "write the address of the network that the hosts share, and the name, into /etc/hosts (or the DNS) of every host"
)


@dataclass(frozen=True)
class Record:
    """Attributes:
    peers: as given, the first is where they met.
    port: of that host.
    hosts: name -> its facts and results (:mod:`doctor_peers`), of those who stayed to the end.
    missing: name -> why it is not in ``hosts``.
    clocks: name -> seconds ahead of the first host's, and how far that may be wrong.
    shared_given: whether the shared folder was named by the user.
    """

    peers: list[str]
    port: int
    hosts: dict[str, dict]
    missing: dict[str, str]
    clocks: dict[str, tuple[float, float]]
    shared_given: bool


def judge(record: Record) -> list[Finding]:
    """Every finding, in the order of the table."""
    checks = (check_meeting, check_names, check_routes, check_ports, check_clocks, check_versions, check_shared_folder)
    return [finding for check in checks for finding in check(record)]


def check_meeting(record: Record) -> list[Finding]:
    """Who is here."""
    first = record.peers[0]
    fix = (
        f"start the same command on it too; where it runs, see that its way to {first}, port {record.port}, is open: "
        "it says there what it waits for"
    )
    found = [Finding("meeting", "fail", f"{name} {why}", fix) for name, why in record.missing.items()]
    if not found:
        found.append(Finding("meeting", "ok", f"{_names(record.hosts)} met at {first}, port {record.port}"))
    return found


def check_names(record: Record) -> list[Finding]:
    """What each name resolves to, here and there."""
    found = []
    for name in dict.fromkeys([*record.peers, *(host["host"] for host in record.hosts.values())]):
        owner = next((peer for peer, host in record.hosts.items() if name in (peer, host["host"])), None)
        own = _own_addresses(record.hosts[owner]) if owner else None
        unknown, loopback, foreign = {}, [], {}
        for at, host in record.hosts.items():
            if name not in host["resolves"]:  # a host's own name, which nobody else was asked about
                continue
            addresses = host["resolves"][name]
            if isinstance(addresses, str):
                unknown.setdefault(addresses, []).append(at)
            elif all(is_loopback(address) for address in addresses):
                loopback.append((at, addresses[0]))
            elif own and not any(address in own for address in addresses):
                foreign.setdefault(", ".join(addresses), []).append(at)
        for why, places in unknown.items():
            what = f"{name} does not resolve on {_names(places)} ({why})"
            found.append(Finding("names", "warn", what, HOSTS_FILE))
        for at, address in loopback:
            what = f"{name} is {address} on {at}" + (" itself" if at == owner else ": connections end on that host")
            if at == owner:
                what += ": what listens or announces itself by this name cannot be reached from elsewhere"
            found.append(Finding("names", "warn" if at == owner else "fail", what, HOSTS_FILE))
        for addresses, places in foreign.items():
            what = f"{name} is {addresses} on {_names(places)}, and {owner} has {', '.join(own)}"
            found.append(Finding("names", "fail", what, HOSTS_FILE))
    return found or [Finding("names", "ok", "every name resolves to an address of its host, on each of them")]


def check_routes(record: Record) -> list[Finding]:
    """Which interface leads to the others, and whether both ends agree on the address."""
    found, ways = [], []
    for name, host in record.hosts.items():
        interfaces = dict.fromkeys(way["interface"] for way in host["reached"].values() if way["interface"])
        ways.append(f"{name}: {', '.join(interfaces) or 'unknown'} ({host['address']})")
        for peer, way in host["reached"].items():
            if "why" in way:
                what = f"{name} knows no way to {peer} ({record.hosts[peer]['address']}): {way['why']}"
                found.append(Finding("routes", "fail", what, "give both hosts an address on one network, or a route"))
            elif way["source"] and way["source"] not in _own_addresses(host):
                what = f"{peer} sees {name} come from {way['source']}, which is not among its addresses"
                fix = "hosts of a run reach each other by one network, without address translation: see `ip route get`"
                found.append(Finding("routes", "fail", what, fix))
        if len(interfaces) > 1:
            each = "; ".join(f"{way['interface']} to {peer}" for peer, way in host["reached"].items())
            fix = "collectives take one interface a host: name it with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            found.append(Finding("routes", "warn", f"{name} has several ways: {each}", fix))
        found += _check_variables(name, host, list(interfaces))
    return found or [Finding("routes", "ok", "; ".join(ways))]


def _check_variables(name: str, host: dict, routed: list[str]) -> list[Finding]:
    found = []
    for variable, value in host["variables"].items():
        if value[0] in "^=!" or not host["interfaces"] or not routed:
            continue
        wanted = value.split(",")
        # nccl takes what begins so.
        there = [one for one in host["interfaces"] if any(one.startswith(start) for start in wanted)]
        if not there:
            what = f"{variable}={value} on {name}, which has {', '.join(host['interfaces'])}"
        elif not set(there) & set(routed):
            what = f"{variable}={value} on {name}, and {', '.join(routed)} leads to the others"
        else:
            continue
        found.append(Finding("routes", "fail", what, f"unset {variable}: the interface that leads there is taken"))
    return found


def check_ports(record: Record) -> list[Finding]:
    """That each host reaches the ports of each, spread over those that a run takes."""
    found, tried = [], 0
    for peer, facts in record.hosts.items():
        failed: dict[tuple[str, str], list[str]] = {}
        for name, host in record.hosts.items():
            for port, why in host["reached"].get(peer, {}).get("ports", {}).items():
                tried += 1
                if why:
                    failed.setdefault((port, why), []).append(name)
        grouped: dict[tuple[str, str], list[str]] = {}
        for (port, why), names in failed.items():
            grouped.setdefault((_names(names), why), []).append(port)
        low, high = facts["range"]
        for (names, why), ports in grouped.items():
            of = f"{len(ports)} of {len(facts['ports'])} ports tried"
            what = f"{names} cannot reach {peer} ({facts['address']}) at {of}, {', '.join(ports)}: {why}"
            fix = (
                f"open {low} to {high} (net.ipv4.ip_local_port_range) from each host of the run to each: collectives"
                " and the group of the weights listen on any of them"
            )
            found.append(Finding("ports", "fail", what, fix))
    if not found and tried:
        each = counted(max(len(facts["ports"]) for facts in record.hosts.values()), "port")
        ranges = " and ".join(dict.fromkeys("{} to {}".format(*facts["range"]) for facts in record.hosts.values()))
        what = (
            f"port {record.port} of {record.peers[0]}, and {each} of each host, spread over {ranges}, from every other"
        )
        found.append(Finding("ports", "ok", what))
    return found


def check_clocks(record: Record) -> list[Finding]:
    """That they tell the same time."""
    first, found = record.peers[0], []
    for name, (ahead, error) in record.clocks.items():
        if abs(ahead) - error > CLOCK_SECONDS:
            what = f"the clock of {name} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of {first}"
            fix = "let NTP set them (chronyc tracking, timedatectl): heartbeats and locks are judged by their age"
            found.append(Finding("clocks", "warn", what, fix))
    if not found and len(record.clocks) > 1:
        most = max(abs(ahead) + error for ahead, error in record.clocks.values())
        found.append(Finding("clocks", "ok", f"at most {most:.3f} s from that of {first}"))
    return found


def check_versions(record: Record) -> list[Finding]:
    """That all hosts run the same."""
    found, same = [], []
    hosts = list(record.hosts.values())
    for what in dict.fromkeys(name for host in hosts for name in host["versions"]):
        places: dict[str, list[str]] = {}
        for name, host in record.hosts.items():
            places.setdefault(host["versions"].get(what, "none"), []).append(name)
        if len(places) == 1:
            same.append(f"{what} {next(iter(places))}")
        else:
            each = "; ".join(f"{version} on {_names(names)}" for version, names in places.items())
            fix = "start ranks from one environment and one checkout: a folder that all see, or the same installation"
            found.append(Finding("versions", "fail", f"{what}: {each}", fix))
    if same:
        found.append(Finding("versions", "ok", f"the same on all: {', '.join(same)}"))
    return found


def check_shared_folder(record: Record) -> list[Finding]:
    """That what one host writes all others see."""
    found, slowest = [], 0.0
    # Where it was not named, it is only where the command was started.
    status = "fail" if record.shared_given else "warn"
    area, fix = "shared folder", "name the folder of the run, as all hosts see it, with --shared"
    for name, host in record.hosts.items():
        folder, why = host["shared"]["folder"], host["shared"]["why"]
        if why:
            found.append(Finding(area, status, f"{name} cannot write into {folder}: {why}", fix))
    for writer in record.hosts:
        blind: dict[str, list[str]] = {}
        for name, host in record.hosts.items():
            seen = host["seen"].get(writer, 0.0)
            if isinstance(seen, str):
                blind.setdefault(seen, []).append(name)
            else:
                slowest = max(slowest, seen)
        for why, names in blind.items():
            folders = " and ".join(dict.fromkeys(record.hosts[one]["shared"]["folder"] for one in [writer, *names]))
            what = f"what {writer} writes into {folders}, {_names(names)} cannot see: {why}"
            found.append(Finding(area, status, what, fix))
    if not found and len(record.hosts) > 1:
        folders = " = ".join(dict.fromkeys(host["shared"]["folder"] for host in record.hosts.values()))
        found.append(Finding(area, "ok", f"{folders}: what one writes all see, within {slowest:.1f} s"))
    return found


def _own_addresses(host: dict) -> list[str]:
    """The addresses of a host at which others may reach it."""
    listed = [one for addresses in host["interfaces"].values() for one in addresses if not is_loopback(one)]
    return listed or ([host["address"]] if host["address"] else [])


def _names(names: Sequence[str] | dict) -> str:
    """ "h1", "h1 and h2", "h1, h2 and 7 more"."""
    names = list(names)
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
