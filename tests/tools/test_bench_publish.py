"""The benchmark of publishing, on a real server of a tiny model: every number that it shows is there. No number here is
a claim about speed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dcpo_megatron.rollout.server import Server

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_publish.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_publish", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_medians_are_over_the_turns_and_the_rate_is_of_the_stream(bench):
    def turn(stream: float) -> dict:
        return dict.fromkeys(bench.PHASES, 0.5) | {"stream": stream}

    row = {"bytes": 600, "first": 9.0, "whole": [4.0, 5.0, 9.0], "phases": [turn(2.0), turn(3.0), turn(8.0)], "peak": 7}
    found = bench.summary({"raw": {"existing": [1.0, 1.5, 2.0], "new": [1.0, 2.4, 9.0]}, "modes": {"disk": row}})[
        "disk"
    ]
    assert (found["stream"], found["rate"], found["whole"], found["first"], found["peak"]) == (3.0, 200.0, 5.0, 9.0, 7)
    assert found["of_raw"] == pytest.approx({"existing": 0.5, "new": 0.8})
    assert found["phases"]["verify"] == 0.5


@pytest.mark.parametrize("millions", [1, 50, 220])
def test_the_models_have_about_the_size_asked_for(bench, millions):
    from transformers import Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(bench.model_config(millions))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.1)


@pytest.mark.sglang
def test_every_mode_is_measured_beside_the_raw_broadcast_of_the_same_bytes(
    bench, sglang_server, demo_start, tmp_path, capsys
):
    words = [
        "--model",
        str(demo_start),
        "--url",
        sglang_server,
        "--repeats",
        "2",
        "--json",
        str(tmp_path / "found.json"),
    ]
    assert bench.main([*words, "--folder", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert list(found["modes"]) == ["distributed", "disk", "ipc"]
    assert {kind: len(taken) for kind, taken in found["raw"].items()} == {"existing": 2, "new": 2, "loaded": 2}
    for mode, row in found["modes"].items():
        assert row["bytes"] == 4 * found["parameters"] and row["buckets"] == 1 and row["difference"] < 1e-3
        numbers = found["summary"][mode]
        assert numbers["rate"] == pytest.approx(row["bytes"] / numbers["stream"])
        assert numbers["whole"] >= numbers["stream"] > 0 and numbers["peak"] >= 0
        assert all(sum(phases.values()) <= whole for phases, whole in zip(row["phases"], row["whole"], strict=True))
    # The last of nine publications is what the server serves; nothing of the files and processes is left.
    assert Server(sglang_server).weight_version().endswith("-9")
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]
    assert "raw, loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modes", "smoke"], "the modes are"),
        (["--millions", "many"], "give numbers"),
        (["--repeats", "0"], "must be above 0"),
        (["--url", "http://127.0.0.1:9"], "--model"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        bench.main(options)
    assert ended.value.code == 2 and message in capsys.readouterr().err
