"""Metrics' files on a disk that is full for a while: nothing is cut in half, nothing is lost, and TensorBoard reads
them."""

import contextlib
import os
import resource

import pytest

from dcpo_megatron.monitor.growing_file import BoardFile, GrowingFile


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may become larger meanwhile: writing fails as on a full disk, in the middle of a
    record."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_wait_in_memory_and_come_whole_and_in_order(tmp_path):
    said = []
    file = GrowingFile(tmp_path / "rows", said.append)
    file.append(b"first\n")
    with largest_file(9):
        for row in (b"second\n", b"third\n"):
            file.append(row)
            assert (tmp_path / "rows").read_bytes() == b"first\n"
    file.append(b"fourth\n")
    assert (tmp_path / "rows").read_bytes() == b"first\nsecond\nthird\nfourth\n"
    with largest_file(9):
        file.append(b"fifth\n")
        file.close()
        file.close()
    assert [sentence.split(" (")[0] for sentence in said] == [
        "rows cannot be written", "rows cannot be written",
        "1 rows of rows are lost: they could not be written to the end",
    ]  # fmt: skip


def test_a_handle_that_has_outlived_its_file_system_is_opened_anew(tmp_path):
    said = []
    file = GrowingFile(tmp_path / "rows", said.append)
    file.append(b"first\n")
    with open("/dev/full", "wb") as dead:  # what it is open on takes nothing any more
        os.dup2(dead.fileno(), file._file.fileno())
    file.append(b"second\n")
    assert len(said) == 1 and (tmp_path / "rows").read_bytes() == b"first\n"
    file.append(b"third\n")
    file.close()
    assert len(said) == 1 and (tmp_path / "rows").read_bytes() == b"first\nsecond\nthird\n"


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_every_step_and_forgets_those_that_a_resumed_run_does_again(tmp_path):
    said = []
    board = BoardFile(tmp_path / "board", said.append)
    board.scalars(1, {"reward": 0.5, "loss": float("nan")})
    with largest_file(100):
        board.scalars(2, {"reward": 0.25})
    board.scalars(3, {"reward": 0.75, "eval/accuracy": 1.0})
    board.close()
    found = scalars(tmp_path / "board")
    assert found["reward"] == [(1, 0.5), (2, 0.25), (3, 0.75)] and found["eval/accuracy"] == [(3, 1.0)]
    assert len(said) == 1 and "its rows wait in memory" in said[0]
    again = BoardFile(tmp_path / "board", said.append, purge_step=3)
    again.scalars(3, {"reward": -1.0})
    again.close()
    assert scalars(tmp_path / "board")["reward"] == [(1, 0.5), (2, 0.25), (3, -1.0)]
