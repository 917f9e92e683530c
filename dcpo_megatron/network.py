"""This host's network interfaces, which of them leads to another host, and telling it to gloo and nccl. Nothing is
sent.

interface_towards("10.0.0.1")    "eth0"   the interface whose address the kernel takes on the way there
interface_towards("fd00::1")     "eth0"   on the host that has this address: the interface that has it, not the loopback
interface_towards("127.0.0.1")   "lo"
interface_towards("h1")          "lo"     on h1 itself, where its own name resolves to 127.0.1.1: ask for the way to
                                          another host there
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_ours: dict[str, str] = {}  # what this process has set of them


def bare(host: str) -> str:
    """``host`` without the brackets that stand around IPv6 where a port follows."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def in_url(host: str) -> str:
    """``host`` as it stands in front of a port."""
    host = bare(host)
    return f"[{host}]" if ":" in host else host


def free_port() -> int:
    """A port of the loopback interface that nobody listens on, below those that the kernel gives to outgoing
    connections: it is still free a little later."""
    return free_ports(1)[0]


def free_ports(count: int, is_free: Callable[[int], bool] | None = None) -> list[int]:
    """``count`` of them, all different; ``is_free`` looks at one elsewhere than on the loopback interface. Raises
    OSError where there are not so many."""
    is_free = is_free or _free_on_loopback
    candidates = random.sample(range(20000, 30000), 500)
    found = list(itertools.islice(filter(is_free, candidates), count))
    if len(found) < count:
        raise OSError(f"{count} free ports were looked for between 20000 and 30000, {len(found)} found")
    return found


def _free_on_loopback(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def own_address(host: str, port: int = 9) -> str:
    """The address that this host has for one at ``host`` (a name or an address, of either family); see
    :func:`interface_towards` for errors."""
    return _source(host, port)[0]


def interface_towards(host: str) -> str:
    """The name of the interface on the way to ``host``: a name, or an address of IPv4 or IPv6, brackets or not.

    Raises:
        OSError: the name does not resolve (``socket.gaierror``), no way leads there, or no interface has the address.
        UnicodeError: what can be no name.
    """
    address, scope = _source(host, 9)
    if scope:  # link-local: the same address may be on several
        return socket.if_indextoname(scope)
    return interface_with(address)


def interface_with(address: str) -> str:
    """The interface that has ``address``; all of 127.0.0.0/8 is the loopback's. Raises OSError where none has it."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        wanted = ipaddress.ip_address("127.0.0.1" if wanted.version == 4 else "::1")
    found = interfaces()
    for name, addresses in found.items():
        if str(wanted) in addresses:
            return name
    raise OSError(f"no interface of this host has {address}; it has {text(found)}")


def loopback() -> str:
    """The loopback's interface. Raises OSError where there is none."""
    try:
        return interface_with("127.0.0.1")
    except OSError:
        return interface_with("::1")


def is_loopback(address: str) -> bool:
    """Whether ``address`` (of either family, a scope after it or not) leads to the host that asks. Raises
    ValueError."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_here(host: str) -> bool:
    """Whether ``host`` (a name or an address) is this host: only then can a socket be bound to it."""
    with contextlib.suppress(OSError, UnicodeError):  # a name that does not resolve, or can be none
        for family, kind, protocol, _, address in socket.getaddrinfo(bare(host), 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    return False


def stack() -> str:
    """What is the same for all processes that share this one's loopback: not a host's name, which containers share and
    lack."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    return socket.gethostname()


def use_interface(name: str, gloo: bool = True, nccl: bool = True) -> None:
    """Tells gloo and nccl to use this interface, where the user has not named another; before the first group of
    each."""
    chosen = {GLOO: name} if gloo else {}
    if nccl:  # "eth1" alone would be eth10 too
        chosen[NCCL] = f"={name.partition(':')[0]}"
    for variable, value in chosen.items():
        if not named_by_user(variable):
            os.environ[variable] = _ours[variable] = value


def named_by_user(variable: str) -> str | None:
    """The user's own value of :data:`GLOO` or :data:`NCCL`."""
    value = os.environ.get(variable)
    return value if value and value != _ours.get(variable) else None


def unknown_interface(variable: str) -> str | None:
    """What is wrong with the user's value of ``variable``, in a sentence; None where it names interfaces of this host,
    or nothing."""
    value, found = named_by_user(variable), interfaces()
    if not value:
        return None
    names = [name for name in value.lstrip("^=").split(",") if name]
    if variable == GLOO:
        missing = [name for name in names if name not in found]
    elif value.startswith("^"):  # all but these
        missing = []
    else:
        names = [name.partition(":")[0] for name in names]
        fits = str.__eq__ if value.startswith("=") else str.startswith
        missing = [] if any(fits(there, name) for there in found for name in names) else names
    if not missing:
        return None
    return (
        f"{variable}={value}, but host {socket.gethostname()} has no interface {', '.join(missing)} with an address: it"
        f" has {text(found)}"
    )


def interfaces() -> dict[str, list[str]]:
    """Name -> addresses of IPv4, then of IPv6, in the kernel's order: collectives take the first. Those without an
    address are left out."""
    import psutil

    kept: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        if addresses := [
            entry.address.partition("%")[0] for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]:
            kept[name] = addresses
    return kept


def text(found: dict[str, list[str]]) -> str:
    """What :func:`interfaces` gave, for a sentence: "eth0 (10.0.0.1, fd00::1), lo (127.0.0.1)"."""
    return ", ".join(f"{name} ({', '.join(addresses)})" for name, addresses in found.items())


def _source(host: str, port: int) -> tuple[str, int]:
    """Address and scope (of a link-local address, else 0) that the kernel takes towards ``host``."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(bare(host), port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                name = probe.getsockname()
                return name[0], name[3] if len(name) > 2 else 0
        except OSError as error:  # a family that this host does not have, or no way
            failure = error
    raise failure or OSError(f"{host} has no address")
