"""Which interface leads where, on this host; tests/hosts asks the same on several."""

import os
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


def test_collectives_are_told_an_interface_where_the_user_has_not_named_one(monkeypatch):
    monkeypatch.setattr(network, "_ours", {})
    for variable in (network.GLOO, network.NCCL):
        monkeypatch.setenv(variable, "")
    network.use_interface("eth1:2")
    assert (os.environ[network.GLOO], os.environ[network.NCCL]) == ("eth1:2", "=eth1")
    network.use_interface("eth3", nccl=False)  # what was chosen here may be chosen anew
    assert (os.environ[network.GLOO], os.environ[network.NCCL]) == ("eth3", "=eth1")
    monkeypatch.setenv(network.NCCL, "ib")
    network.use_interface("eth4", gloo=False)
    assert (os.environ[network.GLOO], os.environ[network.NCCL]) == ("eth3", "ib")


@pytest.mark.parametrize(
    ("variable", "value", "missing"),
    [
        (network.GLOO, "lo", None), (network.GLOO, "lo,eth7", "eth7"), (network.GLOO, "l", "l"),
        (network.NCCL, "l", None), (network.NCCL, "=lo", None), (network.NCCL, "=l", "l"),
        (network.NCCL, "^eth7", None),
        (network.NCCL, "eth7,lo", None), (network.NCCL, "eth7,ib", "eth7, ib"),
    ],
)  # fmt: skip
def test_names_are_looked_for_as_gloo_and_nccl_look_for_them(monkeypatch, variable, value, missing):
    monkeypatch.setattr(network, "interfaces", lambda: {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"]})
    monkeypatch.setenv(variable, value)
    said = network.unknown_interface(variable)
    assert said is None if missing is None else f"{variable}={value}" in said and f"no interface {missing} with" in said
