"""What ranks agree on beside the GPU: through gloo, whatever the default group is; and which GPUs servers may be on."""

import json
from pathlib import Path

import pytest

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.config.schema import ConfigError
from dcpo_megatron.training.engines import listed_servers, publish_options
from dcpo_megatron.verification.ranks import RankPool
from tests.rollout.test_addresses import SGLANG, Whoever
from tests.sglang_servers import loopback_ipv6
from tests.standins.pynvml import uuid

ROOT = Path(__file__).resolve().parents[2]
RANKS = [uuid(0), uuid(1)]
HERE, THERE = "http://127.0.0.1:30000", "http://192.0.2.1:30000"


@pytest.fixture(scope="module")
def pool():
    with RankPool(2, python_path=[str(ROOT)]) as pool:
        yield pool


def test_a_batch_is_the_same_where_the_default_group_carries_nothing_from_rank_to_rank(pool, demo_start):
    job = "tests.training.host_jobs:a_batch"
    # The first job waits for the ranks' imports.
    wanted, found = (pool.run(job, 2, str(demo_start), fake, timeout=300.0) for fake in (False, True))
    assert found == wanted
    for batches, answer, (reports, stop), count, message, refusal in found:
        # Rewards of both ranks, and advantages from all of them, bit for bit those over gloo.
        assert [len(batch) for batch in batches] == [12, 12]
        assert any(response.advantage for batch in batches for response in batch)
        assert (answer, reports, stop, count) == ("a server", [], True, [0.2, 1.0])
        assert "differ by 0.3 nats" in message and "GPU-1 is rank 1's too" in refusal


def check(pool, servers: dict, ranks: list, shared: bool = False):
    first, second = pool.run("tests.training.host_jobs:servers_gpus", 2, servers, ranks, shared)
    assert first == second
    return first


def test_a_server_on_a_ranks_gpu_is_refused_on_every_rank_with_both_names(pool):
    said = check(pool, {HERE: [uuid(1), uuid(2)], THERE: [uuid(4)]}, RANKS)
    assert said.startswith(f"{HERE} is on GPUs of this run ({uuid(1)} is rank 1's too)")
    assert "dcpo serve --gpus" in said and "publish.colocated=true" in said and THERE not in said


def test_colocated_servers_on_other_gpus_are_refused(pool):
    said = check(pool, {HERE: [uuid(1), uuid(2)], THERE: [uuid(0)]}, RANKS, shared=True)
    assert f"{HERE} has GPUs that no rank has ({uuid(2)})" in said and "publish.mode=distributed" in said
    assert "\n" not in said


def test_gpus_of_their_own_and_shared_ones_on_purpose_are_as_they_should_be(pool):
    assert check(pool, {HERE: [uuid(4), uuid(5)], THERE: [uuid(6)]}, RANKS) == []
    assert check(pool, {HERE: [uuid(0)], THERE: [uuid(1)]}, RANKS, shared=True) == []


def test_a_server_beside_the_ranks_whose_gpus_nobody_told_is_named_and_one_elsewhere_is_not(pool):
    (said,) = check(pool, {HERE: None, THERE: None}, RANKS)
    assert said.startswith(f"which GPUs {HERE} has is not known: see that they are not the ranks'")
    # On the CPU there is nothing to know.
    assert check(pool, {HERE: None}, [None, None]) == []


def test_address_files_are_read_with_and_without_gpus(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"url": HERE, "gpus": RANKS}, THERE]))
    (tmp_path / "b.json").write_text(json.dumps([THERE, "http://c:1"]))
    assert listed_servers(tmp_path) == {HERE: RANKS, THERE: None, "http://c:1": None}
    assert listed_servers(tmp_path / "none.json") == {}
    for wrong in ("{}", '{"url": "a"}', '[{"url": "a"}]', "[1]", "nothing"):
        (tmp_path / "a.json").write_text(wrong)
        with pytest.raises(ConfigError, match=r"a.json is not a JSON list of addresses"):
            listed_servers(tmp_path / "a.json")


def test_a_servers_gpu_is_told_by_the_uuid_that_nvidia_smi_shows(monkeypatch):
    import torch

    from dcpo_megatron.mcore.platform import Platform
    from dcpo_megatron.training.shared_gpus import gpu_of

    properties = type("Properties", (), {"uuid": uuid(3).removeprefix("GPU-")})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpu_of(Platform("cuda", "nccl", torch.device("cuda", 0))) == uuid(3)
    assert gpu_of(Platform("cpu", "gloo", torch.device("cpu"))) is None


def test_a_publications_deadlines_and_limits_are_the_configurations():
    given = {
        "bucket_timeout_seconds": 7.0,
        "timeout_seconds": 70.0,
        "bucket_bytes": 1000,
        "address": "fd00::2",
        "tolerance": 0.5,
        "verify": False,
    }
    wanted = [f"publish.{key}={value}" for key, value in given.items()]
    config = load_config(
        [], ["model.path=m", "data.files=[d]", "data.template=plain", "servers.min_healthy=3", *wanted]
    )
    made = publish_options(config, is_cpu=True)
    assert (made.bucket_timeout, made.timeout, made.bucket_bytes, made.address) == (7.0, 70.0, 1000, "fd00::2")
    assert (made.tolerance, made.verify, made.min_servers, made.backend) == (0.5, False, 3, "gloo")


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_ipv6_addresses_can_be_typed_with_quotes_and_without(quote):
    urls = ["http://[::1]:30000", "http://[fd00::2]:30001"]
    typed = ", ".join(f"{quote}{url}{quote}" for url in urls)
    config = load_config(
        [], ["model.path=m", "data.files=[d]", f"servers.urls=[{typed}]", f"publish.address={quote}[fd00::2]{quote}"]
    )
    assert config.servers.urls == urls and config.publish.address in ("fd00::2", "[fd00::2]")


DOWN = "http://127.0.0.1:9"
WRONG_KEY, GATEWAY, LOADING = (
    (401, "application/json", '{"error": "Unauthorized"}'),
    (502, "text/html", "nginx"),
    (503, "text/plain", ""),
)


def wait_for_servers(pool, urls: list[str], seconds: float, *more):
    """(the same end on both ranks, what rank 0 announced, seconds)."""
    (found, said, took), (other, silent, _) = pool.run(
        "tests.training.host_jobs:servers_of_a_run", 2, urls, seconds, *more
    )
    assert found == other and len(silent) <= 1
    return found, said, took


@pytest.mark.parametrize(("answer", "status"), [(WRONG_KEY, 401), (GATEWAY, 502), ((404, "text/plain", ""), 404)])
def test_a_run_whose_only_server_refuses_ends_at_once_with_the_status_and_the_address(pool, answer, status):
    with Whoever(answer) as one:
        found, said, took = wait_for_servers(pool, [one.url], 600.0)
    assert found.startswith(f"RolloutError: GET {one.url}/model_info was refused with status {status}") and took < 20
    assert any(f"rollout server {one.url} refuses" in line for line in said)


def test_a_server_that_refuses_is_not_waited_for_where_enough_others_answer(pool):
    with Whoever(SGLANG, loopback_ipv6()) as good, Whoever(WRONG_KEY) as bad:
        found, said, took = wait_for_servers(pool, [good.url, bad.url], 600.0)
        assert list(found) == [good.url, bad.url] and took < 20
        assert sum("status 401" in line for line in said) == 1
        found, said, took = wait_for_servers(pool, [good.url, bad.url], 600.0, 2)
    assert "status 401" in found and took < 20


def test_what_may_pass_is_said_at_once_and_waited_for(pool):
    with Whoever(LOADING) as one:
        found, said, took = wait_for_servers(pool, [one.url, DOWN], 2.0)
    assert took >= 2.0 and sum(f"{one.url} refuses" in line and "not ready" in line for line in said) == 1
    assert found.startswith(f"RolloutError: {one.url} (status 503), {DOWN} did not answer within servers.start_timeout")


def test_a_run_that_is_asked_to_stop_while_it_waits_for_servers_stops_on_every_rank(pool):
    found, _, took = wait_for_servers(pool, [DOWN], 600.0, 1, 1)
    assert found == "Stopped: asked to stop" and took < 20
