"""The benchmark of packing: it counts the tokens that the trainer's micro-batches have, and its rows are what they
say."""

import importlib.util
import json
import math
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from dcpo_megatron.data.packing import PackingOptions

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_packing.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_packing", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("members", [[], [0], [0, 1, 2]])
def test_the_tokens_counted_are_those_of_the_trainers_micro_batch(bench, packed, members):
    from dcpo_megatron.mcore.platform import prepare, select_platform

    prepare(select_platform("cpu"))
    from dcpo_megatron.mcore.batch import TrainingSample, make_micro_batch

    lengths, options = [5, 9, 3], PackingOptions(64, packed=packed, align=2, row_align=8)
    sequences = [TrainingSample(i, [1], [2] * (lengths[i] - 1)) for i in members]
    batch = make_micro_batch(sequences, torch.device("cpu"), packed=packed, align=2, row_align=8)
    assert bench.tokens_computed(members, lengths, options) == batch.input_ids.numel()


@pytest.mark.parametrize("row", ["packed", "padded", "token-greedy", "arrival"])
def test_every_row_lays_out_each_response_once_within_the_budget_and_evenly_in_number(bench, row):
    lengths = bench.lognormal_lengths(61, 3, median=90, sigma=0.8, longest=300, prompt=10)
    options = PackingOptions(512, bench.IS_PACKED[row], 4)
    plan = bench.plan_row(row, lengths, 3, options)
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == list(range(61))
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert all(bench.tokens_computed(m, lengths, options) <= 512 for m in chain.from_iterable(plan))


def test_the_measures_of_a_plan_computed_by_hand(bench):
    options = PackingOptions(8, packed=False, align=2, attention_length=4)
    # Aligned 4, 2 and 2: costs 8, 3 and 3. Rank 0 pads its second row to 4 and costs 16; rank 1 costs 3 and an empty
    # micro-batch of 2 tokens.
    found = bench.measure([[[0, 1], []], [[2], []]], [3, 2, 2], options)
    assert found == pytest.approx(
        {
            "padding": (8 + 2 + 2 + 2) / 8 - 1,
            "alignment": 8 / 7 - 1,
            "busiest_rank": 16 / 8,
            "costliest_micro_batch": 2.0,
            "micro_batches": 2,
            "lower_bound": 1,
        }
    )


def test_the_lengths_follow_the_distribution_that_is_stated(bench, tmp_path):
    lengths = bench.lognormal_lengths(4000, 0, median=100, sigma=0.5, longest=400, prompt=7)
    assert max(lengths) == 407
    ordered = sorted(lengths)
    assert ordered[2000] == pytest.approx(107, rel=0.03)
    assert math.log((ordered[3365] - 7) / 100) == pytest.approx(0.5, rel=0.08)  # one sigma: 84.13 %
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(json.dumps({"question": "12345", "answer": "1234 #### 4"}) + "\n")
    assert bench.gsm8k_lengths(str(file), None) == [2 + 3]


def test_the_command_prints_and_writes_every_row_and_says_what_gsm8k_needs(bench, tmp_path, capsys):
    options = ("--responses", "64,512", "--draws", "2", "--json", str(tmp_path / "found.json"), "--align", "4")
    assert bench.main(list(options)) == 0
    printed = capsys.readouterr().out
    assert "gsm8k: not run" in printed and "--gsm8k FILE.jsonl" in printed
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    for count in (64, 512):
        rows = found[f"lognormal, {count}"]
        assert list(rows) == ["packed", "padded", "token-greedy", "arrival"]
        assert rows["packed"]["padding"] < 0.01 and rows["packed"]["busiest_rank"] < 1.03
        assert rows["arrival"]["padding"] > rows["padded"]["padding"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ranks", "0"), "--ranks is out of range"),
        (("--max", "0"), "--max is out of range"),
        (("--responses", "8,x"), "--responses is out of range"),
        (("--gsm8k", "/nowhere.jsonl"), "--gsm8k /nowhere.jsonl: FileNotFoundError"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(bench, capsys, options, message):
    assert bench.main(list(options)) == 2
    assert message in capsys.readouterr().err


def test_the_tool_runs_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, TOOL, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "--gsm8k" in done.stdout
