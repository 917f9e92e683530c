"""Weights published to real SGLang servers: what they sample with afterwards, and what is left when something fails in
the middle."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dcpo_megatron.rollout import RolloutError
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankPool
from dcpo_megatron.weights.publish import PublishOptions, WeightPublisher, nccl
from tests.sglang_servers import serve
from tests.weights.publish_jobs import CPU, HfProbe

PROMPT, NEW_TOKENS = [1, 2, 3, 4, 5], 12
SMALL = {"bucket_bytes": 20_000, "timeout": 60.0, "bucket_timeout": 30.0}
pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of one model with different weights: 0 is what the servers start from."""
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        make_model("tied", str(root / f"m{seed}"), seed=seed)
    return [root / f"m{seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def probes(models):
    return [HfProbe(folder) for folder in models]


@pytest.fixture(scope="module")
def running(models, tmp_path_factory):
    with serve(models[0], 2, logs=tmp_path_factory.mktemp("logs")) as servers:
        yield servers


@pytest.fixture
def fleet(running, request):
    made = Fleet([Server(url) for url in running.urls], f"run-{request.node.name}")
    yield made
    for server in made.servers:
        server.close()


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


def sampled(server: Server) -> tuple[list[int], list[float], str]:
    """Greedy tokens, their log-probs, and the tag of the weights."""
    body = {
        "input_ids": PROMPT, "return_logprob": True,
        "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
    }  # fmt: skip
    meta = server.post("/generate", body, timeout=30)["meta_info"]
    rows = meta["output_token_logprobs"]
    return [row[1] for row in rows], [row[0] for row in rows], meta["weight_version"]


@torch.no_grad()
def greedy(probe: HfProbe) -> tuple[list[int], list[float]]:
    ids, logprobs = list(PROMPT), []
    for _ in range(NEW_TOKENS):
        row = probe.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return ids[len(PROMPT) :], logprobs


def assert_serves(server: Server, probe: HfProbe, tag: str) -> None:
    tokens, logprobs, version = sampled(server)
    expected, wanted = greedy(probe)
    assert version == tag and tokens == expected
    assert logprobs == pytest.approx(wanted, abs=1e-4)


@contextlib.contextmanager
def publisher(fleet: Fleet, probe, **changes):
    made = WeightPublisher(fleet, PublishOptions(**(SMALL | changes)), device=CPU, probe=probe)
    try:
        yield made
    finally:
        made.close()


def weights(folder, then=lambda: None, rename=None, reshape=None):
    """The folder's tensors; ``then`` is called in the middle of the walk."""
    found = load_file(folder / "model.safetensors")
    for number, (name, tensor) in enumerate(found.items()):
        if number == len(found) // 2:
            then()
        if name == reshape:
            tensor = torch.zeros(tensor.shape[0] + 8, *tensor.shape[1:])
        yield (f"{name}.renamed" if name == rename else name), tensor


def publish(fleet, models, probes, version, number=1, **changes):
    with publisher(fleet, probes[number], **changes) as one:
        return one.publish(weights(models[number]), version)


def processes(running, number: int) -> list[psutil.Process]:
    leader = psutil.Process(running.processes[number].pid)
    return [leader, *leader.children(recursive=True)]


def signal_all(found: list[psutil.Process], what: int) -> None:
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(what)


@pytest.mark.parametrize(
    ("mode", "parallel"),
    [
        ("distributed", {"tensor": 2}),
        ("distributed", {"pipeline": 2}),
        ("disk", {"tensor": 2}),
        ("ipc", {"pipeline": 2}),
    ],
    ids=["group-tp2", "group-pp2", "disk-tp2", "ipc-pp2"],
)
def test_servers_sample_as_the_training_model_does_after_every_update(
    running, pool, models, probes, tmp_path, mode, parallel
):
    options = SMALL | {"mode": mode, "folder": str(tmp_path)}
    run_id = f"{mode}-{'-'.join(parallel)}"
    for version in (1, 2):
        ranks = pool.run(
            "tests.weights.publish_jobs:publish",
            2,
            str(models[version]),
            parallel,
            running.urls,
            run_id,
            version,
            options,
        )
        assert (
            ranks[0]["error"] is None
            and ranks[0]["state"] == ranks[1]["state"]
            and ranks[0]["report"] == ranks[1]["report"]
        )
        report = ranks[0]["report"]
        assert report.servers == running.urls and not report.evicted and report.buckets > 3
        assert report.difference < 1e-5 and {"quiesce", "stream", "verify", "commit", "resume"} <= report.seconds.keys()
        for url in running.urls:
            assert_serves(Server(url), probes[version], f"{run_id}-{version}")


def test_a_server_tells_what_must_be_the_trainers_too(fleet):
    for server in fleet.servers:
        assert server.offers(nccl.ENVIRONMENT)
        assert server.get(nccl.ENVIRONMENT).keys() == {"torch", "nccl", nccl.CUMEM}
        assert server.get(nccl.ENVIRONMENT)[nccl.CUMEM] == "0"  # SGLang's own doing


def test_all_ranks_raise_the_same_error_when_no_server_is_left(pool, models):
    dead = "http://127.0.0.1:9"
    errors = [
        rank["error"]
        for rank in pool.run(
            "tests.weights.publish_jobs:publish", 2, str(models[1]), {"tensor": 2}, [dead], "dead", 1, dict(SMALL)
        )
    ]
    assert errors[0] == errors[1] and f"{dead} does not answer" in errors[0] and "dcpo serve" in errors[0]


def test_a_tensor_of_a_wrong_shape_is_refused_and_the_server_is_usable_again(fleet, models, probes):
    name = "model.layers.1.mlp.down_proj.weight"
    with (
        publisher(fleet, probes[1]) as one,
        pytest.raises(RolloutError, match=r"reached 0 of 2 .*phase stream, after") as caught,
    ):
        one.publish(weights(models[1], reshape=name), 1)
    assert "partially updated" in str(caught.value)
    assert not fleet.serving() and all(
        "phase stream" in why or why == "no weights yet" for why in fleet.evicted().values()
    )
    for server in fleet.servers:
        assert sampled(server)[2] == f"{fleet.tag(1)}.unverified"  # not paused any more, and its tokens are nobody's
    publish(fleet, models, probes, 1)
    for server in fleet.servers:
        assert_serves(server, probes[1], fleet.tag(1))


def test_a_name_that_the_server_does_not_know_is_found_out(fleet, models, probes):
    """It leaves such a tensor out without a word."""
    with publisher(fleet, probes[1]) as one, pytest.raises(RolloutError, match=r"phase verify.*(same model)"):
        one.publish(weights(models[1], rename="model.layers.0.self_attn.o_proj.weight"), 1)
    assert not fleet.serving()


def test_weights_that_are_not_the_training_models_are_never_committed(fleet, models, probes):
    publish(fleet, models, probes, 1)
    with (
        publisher(fleet, probes[2]) as one,
        pytest.raises(RolloutError, match="log-probs differ from the training model's"),
    ):
        one.publish(weights(models[1]), 2)
    assert not fleet.serving() and fleet.version == 1
    assert all(sampled(server)[2] == f"{fleet.tag(2)}.unverified" for server in fleet.servers)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_servers_what_they_had(fleet, models, probes, small_disk):
    publish(fleet, models, probes, 1)
    with (
        publisher(fleet, probes[2], mode="disk", folder=small_disk) as one,
        pytest.raises(RolloutError, match="No space left on device") as caught,
    ):
        one.publish(weights(models[2]), 2)
    assert "the servers keep the weights that they have" in str(caught.value)
    assert list(small_disk.iterdir()) == [] and len(fleet.serving()) == 2 and fleet.version == 1
    for server in fleet.servers:
        assert_serves(server, probes[1], fleet.tag(1))


def test_only_the_committed_version_stays_on_the_disk(fleet, models, probes, tmp_path):
    (tmp_path / ".incomplete-7").mkdir()
    for version in (1, 2):
        publish(fleet, models, probes, version, mode="disk", folder=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["version-2"]


def test_the_pause_is_undone_on_ctrl_c(fleet, models, probes):
    def interrupt():
        raise KeyboardInterrupt

    publish(fleet, models, probes, 1)
    with publisher(fleet, probes[2]) as one, pytest.raises(KeyboardInterrupt):
        one.publish(weights(models[2], then=interrupt), 2)
    assert not fleet.serving()
    for server in fleet.servers:
        assert sampled(server)[2] == f"{fleet.tag(2)}.unverified"


def test_a_trainer_killed_between_pause_and_resume_leaves_servers_that_the_next_run_can_use(fleet, models, probes):
    server = fleet.servers[0]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.weights.publish_jobs", models[2], server.url], timeout=60, capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with pytest.raises(RolloutError):  # it is paused: nothing is sampled
        server.post("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}}, timeout=2)
    assert server.weight_version() == "killed-1.unverified"
    publish(fleet, models, probes, 1)
    for server in fleet.servers:
        assert_serves(server, probes[1], fleet.tag(1))


def test_a_server_whose_name_does_not_resolve_for_a_moment_is_evicted_and_comes_back(
    running, models, probes, monkeypatch
):
    resolve, resolves = socket.getaddrinfo, True

    def names(host, *more, **options):
        if host == "second.test" and not resolves:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1" if host == "second.test" else host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", names)
    first, second = running.urls[0], running.urls[1].replace("127.0.0.1", "second.test")
    fleet = Fleet([Server(first), Server(second)], "names")
    with publisher(fleet, probes[1]) as one:
        assert one.publish(weights(models[1]), 1).servers == [first, second]
    # The connection is there still when the name is gone: the group's rendezvous asks for it anew.
    with publisher(fleet, probes[2]) as one:
        fleet.servers[1].alive()
        resolves = False
        report = one.publish(weights(models[2]), 2)
        assert report.servers == [first] and "Temporary failure" in report.evicted[second]
        assert [server.url for server in fleet.serving()] == [first]
        resolves = True
        assert one.publish(weights(models[2]), 3).servers == [first, second]
    assert_serves(fleet.servers[1], probes[2], fleet.tag(3))
    for server in fleet.servers:
        server.close()


def test_a_server_stopped_while_it_receives_is_evicted_in_time_and_comes_back(fleet, running, models, probes):
    stopped = processes(running, 1)
    try:
        began = time.monotonic()
        with publisher(fleet, probes[1], bucket_timeout=2.0) as one:
            report = one.publish(weights(models[1], then=lambda: signal_all(stopped, signal.SIGSTOP)), 1)
        assert time.monotonic() - began < 20
        assert report.servers == [running.urls[0]] and "phase stream" in report.evicted[running.urls[1]]
        assert [server.url for server in fleet.serving()] == [running.urls[0]]
        assert_serves(fleet.servers[0], probes[1], fleet.tag(1))
    finally:
        signal_all(stopped, signal.SIGCONT)
    publish(fleet, models, probes, 2, number=2)
    assert len(fleet.serving()) == 2
    for server in fleet.servers:
        assert_serves(server, probes[2], fleet.tag(2))


def test_a_server_killed_while_it_receives_does_not_hold_up_the_others_and_comes_back(fleet, running, models, probes):
    publish(fleet, models, probes, 1)
    first = running.processes[0].pid
    with publisher(fleet, probes[2]) as one:
        report = one.publish(weights(models[2], then=lambda: os.killpg(first, signal.SIGKILL)), 2)
    assert report.servers == [running.urls[1]] and "phase stream" in report.evicted[running.urls[0]]
    assert_serves(fleet.servers[1], probes[2], fleet.tag(2))
    # Its launcher starts it again, with the weights that it first had.
    deadline = time.monotonic() + 150
    while not fleet.servers[0].generates():
        assert time.monotonic() < deadline, "the server was not started again"
        time.sleep(0.5)
    assert fleet.servers[0].weight_version() == "unpublished"
    publish(fleet, models, probes, 3)
    for server in fleet.servers:
        assert_serves(server, probes[1], fleet.tag(3))
