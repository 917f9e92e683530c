"""What the benchmark of checkpoints calls a delay."""

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_save.py"

FOUND = {
    # plain, before and after each save: synchronous, asynchronous, synchronous, ...
    "step": [2.0, 2.2, 2.0, 2.4, 2.0],
    "synchronous": [3.1, 3.2],
    "asynchronous": [2.3, 2.3],
    # Further steps until the save was complete, and then index and name.
    "further": [[2.1, 0.1], [0.2]],
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_save", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_delay_is_measured_against_the_steps_before_and_after(bench):
    delays = bench.delays_of(FOUND)
    assert delays["synchronous"] == pytest.approx([1.0, 1.0])
    assert delays["asynchronous"] == pytest.approx([0.2, 0.1])


def test_the_whole_delay_counts_every_step_beside_the_writing(bench):
    assert bench.all_delays_of(FOUND) == pytest.approx([0.2 + 0.1 + 0.1, 0.1 + 0.2])
