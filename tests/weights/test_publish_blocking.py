"""A group whose calls block in C++, as NCCL's do: every wait of a publication ends, and only the server at fault is
left out. Stand-ins, see blocking_group.py."""

import os
import threading
import time

import pytest
import torch

from dcpo_megatron.rollout import RolloutError
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher, nccl
from tests.weights.blocking_group import BACKEND, BlockingGroup, BlockingServer, register

CPU = torch.device("cpu")
# A publication here takes some hundredths of a second; one that hangs is not waited for any longer.
DEADLINE = 20.0


@pytest.fixture
def fleet_of():
    """``fleet_of(server, ...)``: a fleet of the stand-ins."""
    register()
    BlockingGroup.made.clear()
    made: list[BlockingServer] = []

    def make(*servers: BlockingServer) -> Fleet:
        made.extend(servers)
        return Fleet([one.server for one in servers], "run")

    yield make
    for group in BlockingGroup.made:
        group.abort()
    for one in made:
        one.close()


def publisher(fleet: Fleet, **changes) -> WeightPublisher:
    options = {"backend": BACKEND, "bucket_bytes": 16, "bucket_timeout": 1.0, "timeout": 10.0} | changes
    return WeightPublisher(fleet, PublishOptions(verify=False, scrub=False, **options), device=CPU)


def in_time(call):
    """``call()``'s result, in a thread that can be left behind where it never returns."""
    outcome = []

    def run():
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert outcome, f"still blocked after {DEADLINE} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def weights():
    return [(f"w{number}", torch.full((4,), float(number))) for number in range(3)]


def nobody_is_left_behind() -> bool:
    until = time.monotonic() + 5
    while any(thread.name == "weights" for thread in threading.enumerate()):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_a_server_that_makes_its_side_only_when_asked_gets_all_weights(fleet_of):
    fleet = fleet_of(BlockingServer(), BlockingServer())
    one = publisher(fleet)
    report = in_time(lambda: one.publish(iter(weights()), 1))
    assert len(report.servers) == 2 and report.buckets == 3
    for group in BlockingGroup.made:
        assert all(torch.equal(sent, own) for sent, (_, own) in zip(group.sent, weights(), strict=True))
    in_time(one.close)
    assert nobody_is_left_behind()


def refuses(body):
    return 400, {"success": False, "message": "no such tensor"}


def hangs(body):
    time.sleep(3)
    return 500, {}


@pytest.mark.parametrize(
    ("at_fault", "reason"), [(refuses, "no such tensor"), (hangs, "within 1 s")], ids=["refuses", "hangs"]
)
def test_a_server_that_never_calls_is_evicted_in_time_and_its_group_aborted(fleet_of, at_fault, reason):
    fleet = fleet_of(BlockingServer(), BlockingServer(at_fault))
    one = publisher(fleet)
    began = time.monotonic()
    report = in_time(lambda: one.publish(iter(weights()), 1))
    assert time.monotonic() - began < 8
    good, bad = fleet.servers
    assert report.servers == [good.url] and "phase stream" in report.evicted[bad.url]
    assert reason in report.evicted[bad.url]
    in_time(one.close)
    assert sorted(group.aborted for group in BlockingGroup.made) == [False, True]
    assert nobody_is_left_behind()


def test_an_evicted_server_is_given_a_new_group_by_the_next_publication(fleet_of):
    answers = [refuses]
    fleet = fleet_of(BlockingServer(), BlockingServer(lambda body: answers.pop()(body) if answers else None))
    one = publisher(fleet)
    assert len(in_time(lambda: one.publish(iter(weights()), 1)).servers) == 1
    assert len(in_time(lambda: one.publish(iter(weights()), 2)).servers) == 2
    assert len(BlockingGroup.made) == 3
    in_time(one.close)


def test_the_group_is_made_so_that_its_failures_do_not_end_the_trainer(fleet_of):
    before = {name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL")}
    one = publisher(fleet_of(BlockingServer()))
    with one.transport.connecting():
        one.transport.connect(one.fleet.servers[0], known=False, seconds=5.0)
    (group,) = BlockingGroup.made
    assert group.environment == before | {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
    assert {name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL")} == before
    # The deadline of a request is 1 s: ours is always first.
    assert group.timeout.total_seconds() > 60


@pytest.fixture
def trainers_nccl(monkeypatch):
    """The trainer's side, of which a CPU build of torch knows nothing."""
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 7))
    monkeypatch.setenv(nccl.CUMEM, "0")


@pytest.mark.parametrize(
    ("info", "told", "refused"),
    [
        ({}, {"nccl": [2, 29, 7], nccl.CUMEM: "0"}, None),
        ({}, {"nccl": [2, 30, 7], nccl.CUMEM: "0"}, r"runs NCCL 2\.30\.7, the trainer 2\.29\.7.*publish\.mode=disk"),
        ({}, {"nccl": [2, 29, 7], nccl.CUMEM: "1"}, r"NCCL_CUMEM_ENABLE=1, the trainer with NCCL_CUMEM_ENABLE=0"),
        ({"enable_symm_mem": True}, None, "NCCL_CUMEM_ENABLE=1"),
        ({"version": "0.5.20"}, None, None),
        # What it was sold with; it does not say what it runs. Its own NCCL will refuse, if it must.
        ({"version": "0.5.23"}, None, None),
    ],
)
def test_a_server_with_another_nccl_is_refused_before_the_group_is_made(fleet_of, trainers_nccl, info, told, refused):
    server = BlockingServer(info=info, environment=told)
    fleet_of(server)
    if refused is None:
        doubt = nccl.compare(server.server, info, 5.0)
        assert ("2.30.7" in doubt and "publish.mode=disk" in doubt) if info.get("version") == "0.5.23" else not doubt
        return
    with pytest.raises(RolloutError, match=refused):
        nccl.compare(server.server, info, 5.0)


def test_a_server_of_another_nccl_costs_no_group_and_no_wait(fleet_of, trainers_nccl):
    server = BlockingServer(environment={"nccl": [2, 30, 7]})
    with pytest.raises(RolloutError, match=r"phase quiesce.*NCCL 2\.30\.7"):
        publisher(fleet_of(server), backend="nccl").publish(iter(weights()), 1)
    assert "/init_weights_update_group" not in server.asked


def test_the_trainer_takes_sglangs_value_and_warns_of_the_users_other_one():
    environment = {}
    assert nccl.settle_cumem(environment) is None and environment == {nccl.CUMEM: "0"}
    assert nccl.settle_cumem(environment) is None
    environment = {nccl.CUMEM: "1"}
    assert "start the servers with NCCL_CUMEM_ENABLE=1" in nccl.settle_cumem(environment)
    assert environment == {nccl.CUMEM: "1"}


@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="this torch is built without NCCL")
def test_nccls_calls_do_not_block():
    from datetime import timedelta

    made = nccl.options(timedelta(seconds=7))
    assert made.config.blocking == 0 and made._timeout == timedelta(seconds=7)
