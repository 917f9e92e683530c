"""What ranks compute does not depend on which of them share a host: metrics, checkpoint and weights of 2 hosts x 2
ranks are those of 4 ranks on one, bit for bit."""

import pytest

from dcpo_megatron.verification.resumption import compare, make_task
from tests.hosts.starts import Starter, places


def train(starters: list[Starter], master: str, arguments: list[str]) -> None:
    """Four ranks, as many on each of ``starters``' hosts."""
    local = 4 // len(starters)
    for rank, place in enumerate(places(4, master, local=local)):
        starters[rank // local].ask(place | {"OMP_NUM_THREADS": "1"}, train=arguments)
    codes = [starter.answer(240)["code"] for starter in starters for _ in range(local)]
    assert codes == [0] * 4


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence_parallel=true"],
        pytest.param(["parallel.pipeline=2"], marks=pytest.mark.thorough),
    ],
    ids=["tp2-dp2", "pp2-dp2"],
)
def test_two_hosts_compute_what_one_computes(make_hosts, layout):
    hosts = make_hosts(2, names="loopback")
    starters = [Starter(host, training=True) for host in hosts]
    task = make_task(hosts.shared / "task", steps=2)
    for starter in starters:
        starter.wait()
    outputs = [hosts.shared / "one", hosts.shared / "two"]
    train(starters[:1], "127.0.0.1", [*task, *layout, f"output={outputs[0]}"])
    train(starters, "h1", [*task, *layout, f"output={outputs[1]}"])  # 127.0.1.1 on h1 itself
    compare(*outputs)
