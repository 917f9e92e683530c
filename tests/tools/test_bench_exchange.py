"""The benchmark of the exchange: both ways end with the same tokens, and a rank's bytes follow its share."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import bench_exchange


def test_bytes_follow_the_share_and_both_ways_give_the_same_tokens(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert bench_exchange.main([
        "--responses", "256", "--tokens", "200", "--ranks", "2", "--json", str(file), "--timeout", "120",
    ]) == 0  # fmt: skip
    found = json.loads(file.read_text())["measurements"]["2"]
    assert found["share"]["checksums"] == found["everything"]["checksums"]
    assert found["share"]["received"] <= 1.3 * found["share"]["share"] + 300 * 256
    assert found["everything"]["received"] > 3 * found["share"]["received"]
    assert "everything" in capsys.readouterr().out


def test_the_planner_alone_is_timed_for_more_ranks_than_there_are_cores(capsys):
    assert bench_exchange.main(["--plan-only", "--responses", "640", "--tokens", "50", "--ranks", "64"]) == 0
    assert "plan for 64 data-parallel ranks" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--ranks", "0"], ["--ranks", "two"], ["--responses", "0"], ["--repeats", "0"]])
def test_sizes_that_cannot_be_are_refused(wrong, capsys):
    assert bench_exchange.main(wrong) == 2
    assert "whole numbers from 1 on" in capsys.readouterr().err
