"""Old checkpoints and copies that cannot be removed cost a warning: the new ones count, and half of an old one is never
taken for a whole."""

import pytest
import torch

from dcpo_megatron.checkpoint import folder as folders
from dcpo_megatron.files import move_aside, remove
from dcpo_megatron.weights.hf_folder import SafetensorsFolder
from dcpo_megatron.weights.hf_writing import write_hf_folder
from dcpo_megatron.weights.publish.disk import DiskTransport
from tests.training.test_checkpoint_folder import make
from tests.unremovable import unremovable


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_old_checkpoint_with_a_file_that_stays_is_no_checkpoint_any_more_and_costs_a_warning(tmp_path):
    make(tmp_path, 7)
    make(tmp_path, 8)
    said = []
    with unremovable(tmp_path / "step-000007" / "huggingface" / "config.json"):
        assert folders.prune(tmp_path, keep_last=1, keep_every=0, warn=said.append) == [7]
        (warning,) = said
        assert "step-000007.removing could not be removed: Operation not permitted (config.json)" in warning
        assert folders.complete_steps(tmp_path) == [8] and folders.problem_of(tmp_path / "step-000008") is None
        assert names(tmp_path) == ["latest", "step-000007.removing", "step-000008"]
        assert not (tmp_path / "step-000007.removing" / "__0_0.distcp").exists()  # what can go has gone
        # At every later start once more; a second one of the same step has a name of its own.
        assert folders.remove_leftovers(tmp_path) == [warning]
        make(tmp_path, 7)
        assert folders.prune(tmp_path, keep_last=1, keep_every=0, warn=said.append) == [7]
        assert len(said) == 1 and folders.complete_steps(tmp_path) == [8]
    assert folders.remove_leftovers(tmp_path) == []
    assert "step-000007.removing" not in names(tmp_path)


def test_one_that_cannot_even_be_renamed_stays_whole(tmp_path):
    for step in (1, 2):
        make(tmp_path, step)
    said = []
    with unremovable(tmp_path / "step-000001"):
        assert folders.prune(tmp_path, keep_last=1, keep_every=0, warn=said.append) == []
        assert "step-000001 could not be moved away: Operation not permitted; it stays as it is" in said[0]
        assert folders.problem_of(tmp_path / "step-000001") is None
        # Nor does it hinder the next one of the same step from failing with the reason.
        with pytest.raises(OSError, match="not permitted"):
            make(tmp_path, 1, b"others")
    assert folders.problem_of(tmp_path / "step-000001") is None


def test_a_step_that_is_saved_again_counts_though_the_old_one_stays(tmp_path):
    make(tmp_path, 4)
    said = []
    with unremovable(tmp_path / "step-000004" / "__0_0.distcp"):
        work = tmp_path / "step-000004.incomplete"
        work.mkdir()
        (work / "__0_0.distcp").write_bytes(b"others")
        folders.write_manifest(work, {})
        folders.publish(work, tmp_path, 4, said.append)
        assert folders.problem_of(tmp_path / "step-000004") is None and len(said) == 1
        assert (tmp_path / "step-000004" / "__0_0.distcp").read_bytes() == b"others"


@pytest.mark.parametrize("name", ["step-000003.incomplete", "step-000003.removing", "step-000003.2.removing"])
def test_what_a_killed_run_left_is_said_at_each_start_until_it_goes(tmp_path, name):
    make(tmp_path, 1)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / name / "run.json").write_text("{}")
    with unremovable(tmp_path / name / "__0_0.distcp"):
        for _ in range(2):
            (problem,) = folders.remove_leftovers(tmp_path)
            assert "could not be removed" in problem and len(names(tmp_path)) == 3
        assert folders.complete_steps(tmp_path) == [1]
        make(tmp_path, 3)
    assert folders.remove_leftovers(tmp_path) == []
    assert names(tmp_path) == ["latest", "step-000001", "step-000003"]


def test_damaged_ones_are_set_aside_beside_one_that_stays(tmp_path):
    make(tmp_path, 4)
    aside = folders.set_aside(tmp_path / "step-000004")
    with unremovable(aside):
        make(tmp_path, 4)
        assert folders.set_aside(tmp_path / "step-000004").name == "step-000004.2.damaged"
        assert folders.complete_steps(tmp_path) == []


def test_a_later_checkpoint_that_could_not_be_set_aside_does_not_push_out_the_one_just_written(tmp_path):
    for step in (3, 4, 9):
        make(tmp_path, step)
    assert folders.prune(tmp_path, keep_last=1, keep_every=0, upto=4) == [3]
    assert folders.complete_steps(tmp_path) == [4, 9]


def test_latest_that_cannot_be_written_costs_a_warning(tmp_path):
    make(tmp_path, 1)
    said = []
    with unremovable(tmp_path / "latest"):
        work = tmp_path / "step-000002.incomplete"
        work.mkdir()
        folders.write_manifest(work, {})
        folders.publish(work, tmp_path, 2, said.append)
    assert folders.complete_steps(tmp_path) == [1, 2] and "step-000002 is complete all the same" in said[0]


# -- copies of the model ---------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    return tmp_path / "source"


def write(target, value: float, source, said):
    write_hf_folder(target, [("weight", torch.full((2,), value))], source, warn=said.append)
    assert SafetensorsFolder(target).read("weight").tolist() == [value, value]


def test_an_earlier_model_with_a_file_that_stays_is_replaced(tmp_path, source):
    target, said = tmp_path / "model", []
    write(target, 1.0, source, said)
    with unremovable(target / "config.json"):
        write(target, 2.0, source, said)
        assert len(said) == 1 and "model.removing could not be removed" in said[0]
        write(target, 3.0, source, said)  # and again, with what is left of the first beside it
        assert names(tmp_path) == ["model", "model.removing", "source"]
    write(target, 4.0, source, said)
    assert names(tmp_path) == ["model", "source"]


def test_a_half_written_model_of_an_earlier_crash_that_stays_is_in_nobodys_way(tmp_path, source):
    target, said = tmp_path / "model", []
    half = tmp_path / "model.incomplete"
    half.mkdir()
    (half / "part-0.safetensors").write_bytes(b"half")
    with unremovable(half / "part-0.safetensors"):
        write(target, 1.0, source, said)
        assert len(said) == 1 and "model.incomplete.removing could not be removed" in said[0]
    write(target, 2.0, source, said)
    assert names(tmp_path) == ["model", "source"]


def test_a_model_that_cannot_be_moved_stays_and_the_new_one_is_refused(tmp_path, source):
    target = tmp_path / "model"
    write(target, 1.0, source, [])
    with unremovable(target):
        with pytest.raises(OSError, match="not permitted"):
            write(target, 2.0, source, [])
        assert SafetensorsFolder(target).read("weight").tolist() == [1.0, 1.0]
        assert names(tmp_path) == ["model", "source"]


def test_a_published_version_that_stays_hinders_no_later_one(tmp_path):
    transport = DiskTransport(tmp_path)
    for version in (1, 2):
        (tmp_path / f".incomplete-{version}").mkdir()  # of a run that was killed
    (tmp_path / ".incomplete-1" / "part-0").write_bytes(b"half")
    with unremovable(tmp_path / ".incomplete-1" / "part-0"):
        for version in (1, 2, 3):
            transport.begin(version)
            (tmp_path / f".incomplete-{version}" / "file").write_bytes(b"weights")
            transport.seal()
            if version == 1:
                held = unremovable(tmp_path / "version-1" / "file")
                held.__enter__()
            transport.committed()
        assert names(tmp_path) == [".incomplete-1.removing", "version-1.removing", "version-3"]
        held.__exit__(None, None, None)
    transport.begin(4)
    transport.seal()
    transport.committed()
    assert names(tmp_path) == ["version-4"]


def test_a_name_that_is_moved_aside_twice_has_two_places(tmp_path):
    for number in (1, 2):
        (tmp_path / "file").write_text(str(number))
        move_aside(tmp_path / "file")
    assert names(tmp_path) == ["file.2.removing", "file.removing"]
    assert remove(tmp_path / "file.removing") is None and remove(tmp_path / "file.removing") is None
    assert move_aside(tmp_path / "file.2.removing") == tmp_path / "file.2.removing"
