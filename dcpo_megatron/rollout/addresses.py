"""Hosts and addresses: IPv6 in brackets where a port follows, and bare where a socket takes it.

    bare("[fd00::1]")           "fd00::1"      for sockets, and SGLang's --host
    in_url("fd00::1")           "[fd00::1]"    for http://HOST:PORT and tcp://HOST:PORT
    own_address("s1", 30000)                   this host's address on the way to s1, of whichever family leads there

Names and IPv4 addresses are the same in all of them.
"""

from __future__ import annotations

import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bare(host: str) -> str:
    """``host`` without brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def in_url(host: str) -> str:
    """``host`` as it stands in a URL."""
    host = bare(host)
    return f"[{host}]" if ":" in host else host


def own_address(host: str, port: int) -> str:
    """The address that this host has for one at ``host`` (a name or an address). Sends nothing.

    Raises:
        OSError: the name does not resolve, at this moment at least (``socket.gaierror``), or no way leads there.
    """
    host = bare(host)
    if host in LOOPBACK:
        return "::1" if host == "::1" else "127.0.0.1"
    failure: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0]
        except OSError as error:  # a family that this host does not have
            failure = error
    raise failure or OSError(f"{host} has no address")
