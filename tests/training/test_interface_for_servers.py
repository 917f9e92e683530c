"""Ranks of one host, servers on another, weights over nccl: nccl is told the way there before its first call. No GPU
needed: it is only told."""

import os
from types import SimpleNamespace

import pytest

from dcpo_megatron import network
from dcpo_megatron.training.engines import settle_interface


def config(*urls: str, mode: str = "distributed") -> SimpleNamespace:
    return SimpleNamespace(
        rollout=SimpleNamespace(engine="sglang"), publish=SimpleNamespace(mode=mode),
        servers=SimpleNamespace(urls=urls, file=None)
    )  # fmt: skip


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    def interface_towards(host: str) -> str:
        if host != "s1":
            raise OSError("no way")
        return "ib0"

    monkeypatch.setattr(network, "interface_towards", interface_towards)
    monkeypatch.setattr(network, "_ours", {})
    monkeypatch.setenv(network.NCCL, "")
    monkeypatch.delenv(network.NCCL)


def test_nccl_takes_the_way_to_the_first_server_elsewhere(monkeypatch):
    settle_interface(config("http://127.0.0.1:30000", "http://nowhere.invalid:1", "http://s1:30000"), is_cpu=False)
    assert os.environ[network.NCCL] == "=ib0"


@pytest.mark.parametrize("why", ["one host", "cpu", "disk", "named"])
def test_otherwise_nccl_is_left_alone(monkeypatch, why):
    if why == "named":
        monkeypatch.setenv(network.NCCL, "eth9")
    urls = ["http://127.0.0.1:30000"] if why == "one host" else ["http://s1:30000"]
    settle_interface(config(*urls, mode="disk" if why == "disk" else "distributed"), is_cpu=why == "cpu")
    assert os.environ.get(network.NCCL) == ("eth9" if why == "named" else None)
