"""Which interface leads where, on this host; tests/hosts asks the same on several."""

import socket

import pytest

from dcpo_megatron import network


def test_the_loopback_leads_to_this_host():
    assert (
        network.interface_towards("127.0.0.1")
        == network.interface_towards("127.0.1.1")
        == network.interface_towards("localhost")
    )
    assert "127.0.0.1" in network.interfaces()[network.interface_towards("127.0.0.1")]


def test_an_own_address_leads_to_the_interface_that_has_it_and_not_to_the_loopback():
    for name, addresses in network.interfaces().items():
        for address in addresses:
            if not address.startswith("fe80:"):  # the same on several, perhaps
                assert network.interface_towards(address) == network.interface_with(address) == name


def test_what_leads_nowhere_is_an_error_of_the_network():
    with pytest.raises(socket.gaierror):
        network.interface_towards("no-such-host.invalid")
    with pytest.raises(OSError, match=r"no interface of this host has 192.0.2.77; it has .*127.0.0.1"):
        network.interface_with("192.0.2.77")
