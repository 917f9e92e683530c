"""The benchmark of a step: its parts add up, on real ranks of the trainer, and the trace has a track a rank. No number
here is a claim about speed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcpo_megatron.files import write_jsonl
from dcpo_megatron.monitor.metrics import STEP_PARTS
from dcpo_megatron.toys.arithmetic import make_arithmetic

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_parts_are_those_of_the_trainers_metrics(bench):
    assert tuple(bench.PARTS) == (*STEP_PARTS[:1], "rollout_wait", "reward", *STEP_PARTS[3:], "rest", "logging")
    assert set(STEP_PARTS) <= set(bench.PARTS)


def test_means_are_over_steps_and_ranks_and_shares_add_up_to_one(bench):
    def step(**seconds):
        return dict.fromkeys(bench.PARTS, 0.0) | seconds

    ranks = [
        {"steps": [step(rollout=1.0, optimizer=2.0), step(rollout=3.0, optimizer=2.0)]},
        {"steps": [step(rollout_wait=1.0, optimizer=3.0), step(publish=1.0, optimizer=3.0)]},
    ]
    rows = bench.summary(ranks)
    assert rows["rollout"] == {"mean": 1.0, "share": 1.0 / 4.0, "slowest_rank": 2.0}
    assert rows["optimizer"] == {"mean": 2.5, "share": 2.5 / 4.0, "slowest_rank": 3.0}
    assert rows["step"] == {"mean": 4.0, "share": 1.0, "slowest_rank": 4.0}
    assert bench.shares(rows) == pytest.approx({"rollout": 1.25 / 4, "model": 2.5 / 4, "neither": 0.25 / 4})


def test_two_ranks_give_a_table_numbers_and_a_trace_of_the_measured_steps_alone(demo_start, tmp_path):
    write_jsonl(make_arithmetic(16, 0, 9), tmp_path / "train.jsonl")
    numbers, trace = tmp_path / "found.json", tmp_path / "trace.json"
    settings = [
        f"model.path={demo_start}", "model.dtype=float32", f"data.files=[{tmp_path / 'train.jsonl'}]",
        "data.template=plain",
        "data.max_prompt_tokens=8", "rollout.prompts_per_step=4", "rollout.group_size=4",
        "rollout.max_response_tokens=6",
        "training.minibatch_prompts=2", "training.micro_batch_tokens=64", "training.platform=cpu",
        "logging.tensorboard=false",
    ]  # fmt: skip
    options = ["--steps", "2", "--warm-up", "1", "--json", str(numbers), "--trace", str(trace)]
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, TOOL, *options, *settings],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_backward" in done.stdout and "neither" in done.stdout
    found = json.loads(numbers.read_text())
    assert math.fsum(found["shares"].values()) == pytest.approx(1.0)
    assert [len(steps) for steps in found["ranks"]] == [2, 2]
    for step in (step for steps in found["ranks"] for step in steps):
        assert min(step.values()) >= 0
        # The parts are what the outermost spans took; nothing but their bookkeeping lies between.
        assert sum(step[name] for name in found["parts"] if name != "step") <= step["wall"]
        assert min(step[name] for name in STEP_PARTS) > 0
    spans = [row for row in json.loads(trace.read_text())["traceEvents"] if row["ph"] == "X"]
    assert {row["tid"] for row in spans} == {0, 1}
    for rank in (0, 1):
        names = [row["name"] for row in spans if row["tid"] == rank]
        assert names.count("step") == names.count("rollout") == names.count("logging") == 2
        assert names.count("forward_backward") == names.count("optimizer") == 4  # two minibatches a step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps"),
        (["--ranks", "0"], "--ranks"),
        (["--shape", "tiny", "--demo", "x"], "--shape goes with neither"),
        (["--server-python", "x"], "--server-python with it"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, capsys, options, message):
    assert bench.main(options) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_that_cannot_run_gives_its_reason_and_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--ranks", "1", f"model.path={tmp_path}", "data.files=[x.jsonl]"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "dcpo: error" in done.stderr and "Traceback" not in done.stderr
