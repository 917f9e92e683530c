"""Hosts and addresses: IPv6 in brackets where a port follows, and bare where a socket takes it.

    bare("[fd00::1]")           "fd00::1"      for sockets, and SGLang's --host
    in_url("fd00::1")           "[fd00::1]"    for http://HOST:PORT and tcp://HOST:PORT
    own_address("s1", 30000)                   this host's address on the way to s1, of whichever family leads there

Names and IPv4 addresses are the same in all of them.
"""

from __future__ import annotations

from dcpo_megatron import network
from dcpo_megatron.network import bare, in_url

__all__ = ["LOOPBACK", "bare", "in_url", "own_address"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def own_address(host: str, port: int) -> str:
    """The address that this host has for one at ``host`` (a name or an address). Sends nothing.

    Raises:
        OSError: the name does not resolve, at this moment at least (``socket.gaierror``), or no way leads there.
    """
    host = bare(host)
    if host in LOOPBACK:
        return "::1" if host == "::1" else "127.0.0.1"
    return network.own_address(host, port)
