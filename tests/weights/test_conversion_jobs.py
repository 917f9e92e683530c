"""A conversion that is interrupted, by whatever, goes on where it stopped and ends as the undisturbed one, byte for
byte."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcpo_megatron.mcore.layout import ParallelLayout
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.weights.conversion_jobs import run_job
from dcpo_megatron.weights.hf_folder import CheckpointError
from dcpo_megatron.weights.to_hf import MegatronToHf
from dcpo_megatron.weights.to_megatron import HfToMegatron

LAYERS = 4
UNITS = LAYERS + 1
TROUBLE = 2


@dataclass(frozen=True)
class Watched:
    """A real job that notes which units it ran, and has ``trouble`` in unit TROUBLE while the file ``switch``
    exists."""

    job: object
    notes: str
    switch: str = "/nowhere"
    trouble: str = "none"

    def identity(self):
        return self.job.identity()

    def units(self):
        return self.job.units()

    def run(self, number, folder, progress):
        with open(self.notes, "a") as file:
            file.write(f"{number}\n")
        if number == TROUBLE and os.path.exists(self.switch):
            if self.trouble == "raise":
                self.job.run(number, folder, progress)  # even a unit that was written counts only when it is noted
                raise ZeroDivisionError("a fault")
            if self.trouble == "interrupt":
                raise KeyboardInterrupt
            if self.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "disk full":
                fill(Path(self.switch))
        return self.job.run(number, folder, progress)

    def finish(self, folder, records):
        self.job.finish(folder, records)

    def ran(self) -> list[int]:
        """Units since the last call, in order."""
        notes = Path(self.notes)
        numbers = [int(word) for word in notes.read_text().split()] if notes.exists() else []
        notes.write_text("")
        return numbers


def fill(file: Path) -> None:
    """Writes into ``file`` until its disk is full but for a little."""
    with open(file, "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        ballast.truncate(ballast.tell() - 8192)


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hf")
    make_model("qwen2", str(folder), num_hidden_layers=LAYERS)
    return str(folder)


@pytest.fixture
def watched(hf, tmp_path):
    (tmp_path / "switch").touch()

    def make(trouble: str, layout=None) -> Watched:
        return Watched(
            HfToMegatron(hf, layout or ParallelLayout(tensor=2)),
            str(tmp_path / "notes"),
            str(tmp_path / "switch"),
            trouble,
        )

    return make


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("trouble", "error"), [("raise", ZeroDivisionError), ("interrupt", KeyboardInterrupt)])
def test_a_job_that_failed_in_a_unit_redoes_that_and_the_later_ones_and_ends_byte_for_byte_as_undisturbed(
    watched, tmp_path, trouble, error
):
    job = watched(trouble)
    with pytest.raises(error):
        run_job(job, tmp_path / "out")
    assert job.ran() == [0, 1, TROUBLE]
    assert not (tmp_path / "out").exists()
    (tmp_path / "switch").unlink()
    assert run_job(job, tmp_path / "out") == TROUBLE
    assert job.ran() == [2, 3, 4]
    run_job(job, tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert not (tmp_path / "out.incomplete").exists()


def test_a_killed_worker_process_is_reported_and_its_unit_done_again(watched, tmp_path):
    job = watched("killed")
    with pytest.raises(CheckpointError, match=r"a worker process died .* run the same command again"):
        run_job(job, tmp_path / "out", workers=2)
    assert TROUBLE in job.ran() and not (tmp_path / "out").exists()
    finished = {int(file.name.split(".")[0]) for file in (tmp_path / "out.incomplete").glob("*.done.json")}
    assert finished and TROUBLE not in finished
    (tmp_path / "switch").unlink()
    assert run_job(job, tmp_path / "out") == len(finished)
    assert sorted(job.ran()) == sorted(set(range(UNITS)) - finished)
    run_job(job, tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_an_interrupted_parent_stops_its_workers_and_keeps_what_they_finished(watched, tmp_path):
    job = watched("none")

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "out", workers=2, report=interrupt)
    finished = len(list((tmp_path / "out.incomplete").glob("*.done.json")))
    job.ran()
    assert run_job(job, tmp_path / "out") == finished
    assert len(job.ran()) == UNITS - finished
    run_job(job, tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_another_layout_or_another_source_starts_from_the_beginning(watched, hf, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_job(watched("raise"), tmp_path / "out")
    other = watched("raise", ParallelLayout(tensor=1))
    other.ran()
    with pytest.raises(ZeroDivisionError):
        run_job(other, tmp_path / "out")
    assert other.ran() == [0, 1, TROUBLE]
    shutil.copytree(hf, tmp_path / "changed")
    os.utime(tmp_path / "changed" / "model.safetensors", (1, 1))
    changed = Watched(HfToMegatron(str(tmp_path / "changed"), ParallelLayout(tensor=1)), other.notes)
    assert run_job(changed, tmp_path / "out") == 0
    assert changed.ran() == list(range(UNITS))
    run_job(HfToMegatron(hf, ParallelLayout(tensor=1)), tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_nothing_has_the_final_name_until_everything_is_written(hf, tmp_path):
    run_job(HfToMegatron(hf, ParallelLayout()), tmp_path / "checkpoint")
    seen = []

    def look(done: int, total: int) -> None:
        seen.append((done, total))
        assert not (tmp_path / "out").exists()

    run_job(MegatronToHf(str(tmp_path / "checkpoint"), shard_bytes=30_000), tmp_path / "out", report=look)
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    left = [name for name in content(tmp_path / "out") if "done" in name or "plan" in name or ".part" in name]
    assert not left and not (tmp_path / "out.incomplete").exists()


def test_a_disk_that_is_too_small_is_refused_before_any_work(watched, tmp_path, monkeypatch):
    stand_in = namedtuple("stand_in", "total used free")(10**12, 10**12, 100_000)
    job = watched("none")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: stand_in)
    with pytest.raises(CheckpointError, match=r"has 0.000 GB free, .* more are needed: free some space"):
        run_job(job, tmp_path / "out")
    assert job.ran() == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can make a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["to megatron", "to hf"])
def test_a_disk_that_fills_up_midway_is_reported_and_the_finished_parts_are_kept(hf, tmp_path, small_disk, kind):
    job = HfToMegatron(hf, ParallelLayout())
    if kind == "to hf":
        run_job(job, tmp_path / "checkpoint")
        job = MegatronToHf(str(tmp_path / "checkpoint"), shard_bytes=30_000)
    ballast = small_disk / "ballast"
    ballast.touch()
    job = Watched(job, str(tmp_path / "notes"), str(ballast), "disk full")
    with pytest.raises(
        CheckpointError, match=r"No space left on device after 2 of \d+ parts: .*run the same command again"
    ):
        run_job(job, small_disk / "out")
    assert job.ran() == [0, 1, TROUBLE] and not (small_disk / "out").exists()
    ballast.unlink()
    assert run_job(job, small_disk / "out") == TROUBLE
    assert job.ran()[0] == TROUBLE
    run_job(job, tmp_path / "undisturbed")
    assert content(small_disk / "out") == content(tmp_path / "undisturbed")


def test_a_folder_in_the_way_is_left_alone(watched, tmp_path):
    for name in ("out", "out.incomplete"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"is not empty|is in the way"):
            run_job(watched("none"), tmp_path / "out")
        assert (tmp_path / name / "precious.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)


def test_two_processes_do_not_work_on_one_folder(watched, tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    other = os.open(tmp_path / "out.incomplete", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another process works on"):
        run_job(watched("none"), tmp_path / "out")
    os.close(other)
    run_job(watched("none"), tmp_path / "out")
