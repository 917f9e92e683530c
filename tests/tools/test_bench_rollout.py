"""The benchmark of the client: both ways ask a real server for the same work. No number here is a claim about speed."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_rollout.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_rollout", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ratio_is_the_median_of_the_turns_and_above_one_where_the_client_is_faster(bench):
    found = bench.summary({"tokens": 120, "seconds": {"straight": [2.0, 3.0, 4.0], "client": [4.0, 3.0, 2.0]}})
    assert found == {"straight": 40.0, "client": 40.0, "ratio": 1.0, "least": 0.5, "most": 2.0}


@pytest.mark.sglang
def test_both_ways_sample_the_same_number_of_tokens_in_turns(bench, sglang_server, tmp_path, capsys):
    words = ["--url", sglang_server, "--prompts", "3", "--samples", "2", "--prompt-tokens", "4", "--tokens", "5"]
    assert bench.main([*words, "--repeats", "2", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["requests"] == 6 and found["tokens"] == 30
    assert [len(found["seconds"][kind]) for kind in bench.KINDS] == [2, 2] and found["ratio"] > 0
    assert "client / straight" in capsys.readouterr().out


def test_a_server_that_is_not_there_gives_one_sentence(bench, capsys):
    assert bench.main(["--url", "http://127.0.0.1:9", "--repeats", "1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bench_rollout: error: ") and "http://127.0.0.1:9" in said and said.count("\n") == 1


def test_what_cannot_be_measured_is_refused(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--tokens", "0"])
    assert ended.value.code == 2 and "--tokens must be at least 1" in capsys.readouterr().err
