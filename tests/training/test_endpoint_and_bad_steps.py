"""The metrics endpoint scraped over a real socket, and the count of bad steps."""

import math
import socket
import urllib.error
import urllib.request

import pytest

from dcpo_megatron.config.loading import load_config
from dcpo_megatron.data import Response, decode_responses
from dcpo_megatron.mcore.step import UpdateResult
from dcpo_megatron.monitor import prometheus
from dcpo_megatron.monitor.bad_steps import BadSteps, BadStepsError
from dcpo_megatron.monitor.prometheus import MetricsEndpoint
from dcpo_megatron.monitor.sinks import Sinks


def scrape(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode().splitlines()


def test_what_is_scraped_is_what_was_given_last():
    endpoint = MetricsEndpoint(0)
    try:
        assert scrape(endpoint.port) == []
        endpoint.update({"reward": 0.25, "gradient_norm": math.nan, "loss": -math.inf})
        endpoint.update({"reward": 0.5})
        endpoint.update({"accuracy": 0.75}, "eval_")
        lines = scrape(endpoint.port)
        values = dict(line.split(" ") for line in lines if not line.startswith("#"))
        assert values == {
            "dcpo_reward": "0.5", "dcpo_gradient_norm": "NaN", "dcpo_loss": "-Inf", "dcpo_eval_accuracy": "0.75",
        }  # fmt: skip
        assert lines.count("# TYPE dcpo_reward gauge") == 1
        assert any(line.startswith("# HELP dcpo_reward reward before shaping") for line in lines)
    finally:
        endpoint.close()
    with pytest.raises(OSError):
        scrape(endpoint.port)
    endpoint.close()


def test_there_is_no_other_page_and_who_asks_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(prometheus._Handler, "timeout", prometheus._Handler.timeout / 50)
    endpoint = MetricsEndpoint(0)
    try:
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/", timeout=10)
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as silent:
            assert silent.recv(1) == b""  # closed by the other side
    finally:
        endpoint.close()


def test_a_port_that_is_taken_is_said_and_training_goes_on(tmp_path, capsys):
    taken = MetricsEndpoint(0)
    try:
        overrides = ["model.path=x", "data.files=[x]", "logging.tensorboard=false", "logging.console=false"]
        config = load_config([], [*overrides, f"logging.prometheus_port={taken.port}"])
        sinks = Sinks(config, tmp_path, True, 10)
        assert f"logging.prometheus_port={taken.port} cannot be had" in capsys.readouterr().out
        sinks.step(1, {"seconds": 1.0})
        sinks.close()
        assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 1')
    finally:
        taken.close()


def update(stepped: bool = True, loss: float = 0.5) -> UpdateResult:
    return UpdateResult({"loss": loss}, {}, 1.0, stepped, 1e-6)


RESPONSES = [Response("p", [1], "2", 0, [3, 4], [-0.5, -0.25], "stop", [0, 0], advantage=1e60)]
GOOD, LEFT_OUT, NO_LOSS = [update(), update()], [update(), update(False)], [update(loss=math.nan), update()]


def test_only_bad_steps_in_a_row_stop_the_run_and_its_batch_is_kept(tmp_path, alone):
    bad_steps = BadSteps(tmp_path, 3, True)
    for number, updates in enumerate([LEFT_OUT, NO_LOSS, GOOD, LEFT_OUT, [], NO_LOSS], start=1):
        bad_steps.note(number, RESPONSES, 1, updates)
    assert bad_steps.in_a_row == 2 and not list(tmp_path.iterdir())
    with pytest.raises(BadStepsError, match=r"step 7: 1 of 2 updates \(first: update 2\).* 3 steps in a row") as raised:
        bad_steps.note(7, RESPONSES, 1, LEFT_OUT)
    file = tmp_path / "bad-batch-step-7.responses"
    assert str(file) in str(raised.value)
    assert decode_responses(file.read_bytes()) == RESPONSES


def test_one_rank_writes_and_all_raise(tmp_path, alone):
    with pytest.raises(BadStepsError):
        BadSteps(tmp_path, 1, False).note(1, RESPONSES, 1, LEFT_OUT)
    assert not list(tmp_path.iterdir())


def test_a_limit_of_zero_never_stops(tmp_path):
    bad_steps = BadSteps(tmp_path, 0, True)
    for step in range(50):
        bad_steps.note(step, RESPONSES, 1, LEFT_OUT)
    assert bad_steps.in_a_row == 50


def test_a_batch_that_cannot_be_written_does_not_hide_the_reason(tmp_path, alone):
    with pytest.raises(BadStepsError, match="could not be written"):
        BadSteps(tmp_path / "nowhere", 1, True).note(1, RESPONSES, 1, NO_LOSS)
