"""The client on two real SGLang servers: its numbers are those of transformers, and real faults cost no finished
response."""

import json
import os
import signal
import subprocess
import threading
import time

import httpx
import pytest
import torch

from dcpo_megatron.rollout import EmbeddedEngine, GenerateRequest, RolloutError, SamplingParams
from dcpo_megatron.rollout.fleet import Fleet
from dcpo_megatron.rollout.server import Server, ServerError
from dcpo_megatron.rollout.server_client import NoServersLeft, ServerClient
from dcpo_megatron.rollout.serving.command import default_command
from dcpo_megatron.rollout.serving.supervisor import free_ports
from tests.sglang_servers import serve

pytestmark = pytest.mark.sglang
END = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two small models of one shape; their context is long enough to interrupt a response."""
    from dcpo_megatron.toys.warm_up import make_model, make_tokenizer, save

    tokenizer = make_tokenizer()
    found = []
    for seed in (0, 1):
        model = make_model(len(tokenizer), seed=seed, layers=2, hidden=32, positions=4096)
        for parameter in model.parameters():  # a distribution far from uniform
            parameter.data *= 6 if parameter.dim() > 1 else 1
        found.append(tmp_path_factory.mktemp(f"model-{seed}"))
        save(model, tokenizer, found[-1])
    return found


@pytest.fixture(scope="module")
def running(folders):
    with serve(folders[0], 2, arguments=("--context-length", "4096")) as servers:
        yield servers


@pytest.fixture
def fleet(running, folders, request):
    """Both servers with the first model's weights as version 1 of a run of their own."""
    fleet = Fleet([Server(url, timeout=60) for url in running.urls], f"run-of-{request.node.name}")
    for server in fleet.servers:
        publish(fleet, server, folders[0], 1)
    yield fleet
    for server in fleet.servers:
        server.close()


def publish(fleet: Fleet, server: Server, folder, version: int):
    server.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": fleet.tag(version)})
    fleet.admit(server, version)


def requests(prompts: int, samples: int) -> list[GenerateRequest]:
    return [
        GenerateRequest((3, 4, 5, 6 + prompt), 1000 * prompt + sample)
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def worst_difference(models: dict, asked, generations, temperature: float = 1.0) -> float:
    """The largest |log-prob difference| to transformers, each token under the weights of its version."""
    worst = 0.0
    for request, generation in zip(asked, generations, strict=True):
        ids = torch.tensor([[*request.prompt_token_ids, *generation.token_ids.tolist()]])
        first = len(request.prompt_token_ids) - 1
        versions = torch.tensor(generation.weight_versions.tolist())
        for version, engine in models.items():
            logp = (engine.model(input_ids=ids).logits[0, first:-1].float() / temperature).log_softmax(-1)
            ours = logp.gather(1, ids[0, first + 1 :, None])[:, 0]
            difference = (ours - torch.tensor(generation.logprobs.tolist())).abs()[versions == version]
            worst = max(worst, difference.max().item() if len(difference) else 0.0)
    return worst


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_logprobs_are_those_of_transformers_at_the_sampling_temperature(fleet, folders, temperature):
    engine = EmbeddedEngine(folders[0])
    asked = requests(4, 3)
    stops = (END, 9)  # the model's own end of text, and one that the servers know of by the request alone
    sampling = SamplingParams(24, temperature, top_p=0.9 if temperature == 0.7 else 1.0, stop_token_ids=stops)
    generations = ServerClient(fleet).generate(asked, sampling)
    assert worst_difference({1: engine}, asked, generations, temperature or 1.0) < 1e-5
    for generation in generations:
        stopped = generation.finish_reason == "stop"
        assert stopped == (generation.token_ids.tolist()[-1] in stops) and not {*stops} & {
            *generation.token_ids.tolist()[:-1]
        }
        assert stopped or len(generation.token_ids) == 24
        assert generation.weight_versions.tolist() == [1] * len(generation.token_ids)
    if temperature == 0:
        assert [g.token_ids.tolist() for g in generations] == [
            g.token_ids.tolist() for g in engine.generate(asked, sampling)
        ]
    else:
        assert {g.token_ids.tolist()[-1] for g in generations if g.finish_reason == "stop"} == {*stops}


def test_a_seed_gives_the_same_response_in_other_company_and_at_another_server(fleet):
    asked = requests(4, 4)
    sampling = SamplingParams(24, 1.0)
    first = ServerClient(fleet).generate(asked, sampling)
    again = ServerClient(fleet, rank=1, world=2).generate(asked[::-1][:7], sampling)
    assert [g.token_ids.tolist() for g in again] == [g.token_ids.tolist() for g in first[::-1][:7]]
    assert len({tuple(g.token_ids.tolist()) for g in first}) == len(asked)


def test_a_response_interrupted_by_new_weights_goes_on_under_them_token_by_token(fleet, folders):
    mode = "retract" if os.environ.get("DCPO_TEST_SGLANG") == "latest" else "abort"
    asked = requests(2, 3)
    pending = ServerClient(fleet).start(asked, SamplingParams(600))
    for server in fleet.servers:
        wait_for(lambda server=server: busy(server) != "idle")
    time.sleep(0.2)  # the first tokens
    for server in fleet.servers:
        server.pause(mode)
    for server in fleet.servers:
        publish(fleet, server, folders[1], 2)
        server.resume()
    generations = pending.finish()
    assert worst_difference({1: EmbeddedEngine(folders[0]), 2: EmbeddedEngine(folders[1])}, asked, generations) < 1e-4
    mixed = [g for g in generations if len(set(g.weight_versions.tolist())) == 2]
    assert mixed and all(g.weight_versions.tolist() == sorted(g.weight_versions.tolist()) for g in generations)
    assert all(len(g.token_ids) == 600 for g in generations)


def test_foreign_weights_are_thrown_away_and_their_server_is_not_asked_again(fleet):
    foreign = fleet.servers[0]
    foreign.post("/update_weight_version", {"new_version": "somebody-1", "abort_all_requests": True})
    generations = ServerClient(fleet).generate(requests(4, 2), SamplingParams(8))
    assert [g.weight_versions.tolist() for g in generations] == [[1] * 8] * 8
    assert fleet.serving() == [fleet.servers[1]] and "'somebody-1'" in fleet.evicted()[foreign.url]


def test_what_a_server_refuses_is_one_sentence(fleet):
    with pytest.raises(ServerError, match="5000 tokens") as caught:
        ServerClient(fleet).generate([GenerateRequest((3,) * 5000, 1)], SamplingParams(8))
    assert caught.value.status == 400 and len(fleet.serving()) == 2


def test_cancelling_leaves_no_thread_and_nothing_at_the_servers(fleet):
    before = threading.active_count()
    pending = ServerClient(fleet).start(requests(4, 2), SamplingParams(3000))
    time.sleep(1.0)
    pending.cancel()
    assert threading.active_count() == before
    with pytest.raises(RolloutError, match="cancelled"):
        pending.finish()
    for server in fleet.servers:
        deadline = time.monotonic() + 10
        while "idle" not in (state := busy(server)):
            assert time.monotonic() < deadline, f"{server.url} still samples: {state}"
            time.sleep(0.1)


def busy(server: Server) -> str:
    loads = server.get("/v1/loads")["loads"]
    return (
        "idle" if not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads) else json.dumps(loads)
    )


def test_a_server_that_hangs_is_evicted_at_the_deadline_and_found_again_when_it_answers(fleet, running):
    group = running.processes[0].pid
    client = ServerClient(fleet, request_timeout=8)
    pending = client.start(requests(4, 2), SamplingParams(60))
    os.killpg(group, signal.SIGSTOP)
    try:
        generations = pending.finish()
        assert [len(g.token_ids) for g in generations] == [60] * 8
        assert "request_timeout=8" in fleet.evicted()[fleet.servers[0].url]
        assert client.probe_evicted(timeout=1) == []
    finally:
        os.killpg(group, signal.SIGCONT)
    assert client.probe_evicted() == [fleet.servers[0]] and fleet.serving() == [fleet.servers[1]]


def test_through_the_stock_router_the_same_seeds_give_the_same_responses(fleet, running):
    port = free_ports(1)[0]
    command = [
        *default_command(), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--worker-urls", *running.urls,
    ]  # fmt: skip
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        asked, sampling, url = requests(4, 3), SamplingParams(24, stop_token_ids=(END,)), f"http://127.0.0.1:{port}"
        wait_for(lambda: router.poll() is None and answers(f"{url}/health"))
        client = ServerClient(fleet, router=url)
        through = client.generate(asked, sampling)
        assert [g.token_ids.tolist() for g in through] == [
            g.token_ids.tolist() for g in ServerClient(fleet).generate(asked, sampling)
        ]
        assert all(g.weight_versions.tolist() == [1] * len(g.token_ids) for g in through)
        for server in fleet.servers:  # not this run's any more: the router does not know, the client does
            server.post("/update_weight_version", {"new_version": "another-1", "abort_all_requests": False})
        with pytest.raises(NoServersLeft, match="not this run's"):
            client.generate(asked[:1], sampling)
        client.close()
    finally:
        os.killpg(router.pid, signal.SIGKILL)
        router.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_killed_servers_cost_no_finished_response(fleet, running):
    """Last: it kills both. Responses of very different lengths, so that some are finished and others are not."""
    asked = requests(4, 4)
    sampling = SamplingParams(1500, stop_token_ids=(END,))
    pending = ServerClient(fleet).start(asked, sampling)
    for place, process in enumerate(running.processes):
        wait_for(lambda place=place: len(pending.done_so_far()) >= 2 * (place + 1))
        os.killpg(process.pid, signal.SIGKILL)
        kept = pending.done_so_far()
    with pytest.raises(NoServersLeft, match="connection was lost") as caught:
        pending.finish()
    assert kept.items() <= caught.value.finished.items() and len(caught.value.finished) < len(asked)
    assert len(fleet.evicted()) == 2


def wait_for(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)
