"""Checkpoints on disk: complete or not there, damage is seen, and only the right ones go."""

import pytest

from dcpo_megatron.checkpoint import folder as folders


def make(root, step: int, content: bytes = b"weights") -> None:
    work = root / (folders.checkpoint_name(step) + folders.INCOMPLETE)
    (work / "huggingface").mkdir(parents=True)
    (work / "__0_0.distcp").write_bytes(content)
    (work / "huggingface" / "config.json").write_text("{}")
    folders.write_manifest(work, {})
    folders.publish(work, root, step)


def test_latest_names_the_newest_and_it_is_whole(tmp_path):
    for step in (2, 10):
        make(tmp_path, step)
    assert (tmp_path / "latest").read_text() == "step-000010\n"
    assert folders.complete_steps(tmp_path) == [2, 10]
    assert folders.problem_of(tmp_path / "step-000010") is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "__0_0.distcp").write_bytes(b"weightz"), "contents of __0_0.distcp have changed"),
        (lambda f: (f / "__0_0.distcp").write_bytes(b"weigh"), "has 5 bytes instead of 7"),
        (lambda f: (f / "huggingface" / "config.json").unlink(), "huggingface/config.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is missing or cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing or cannot be read"),
    ],
    ids=["a byte", "a length", "a file", "half a manifest", "no manifest"],
)
def test_damage_is_seen_and_said(tmp_path, damage, words):
    make(tmp_path, 3)
    damage(tmp_path / "step-000003")
    assert words in folders.problem_of(tmp_path / "step-000003")


def test_a_rank_sums_up_its_own_files_and_looks_at_the_sizes_of_all(tmp_path):
    make(tmp_path, 3)
    folder = tmp_path / "step-000003"
    (folder / "__0_0.distcp").write_bytes(b"weightz")
    assert folders.problem_of(folder, ["huggingface/config.json"]) is None
    (folder / "__0_0.distcp").write_bytes(b"")
    assert "0 bytes" in folders.problem_of(folder, ["huggingface/config.json"])


def test_half_written_checkpoints_are_no_checkpoints_and_go(tmp_path):
    make(tmp_path, 1)
    (tmp_path / "step-000002.incomplete").mkdir()
    (tmp_path / "step-000001.removing").mkdir()
    (tmp_path / "latest.part").write_text("x")
    assert folders.complete_steps(tmp_path) == [1]
    folders.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_the_newest_and_every_nth_stay(tmp_path):
    for step in (5, 10, 15, 20, 25, 30):
        make(tmp_path, step)
    assert folders.prune(tmp_path, keep_last=2, keep_every=10) == [5, 15]
    assert folders.complete_steps(tmp_path) == [10, 20, 25, 30]
    assert folders.prune(tmp_path, keep_last=1, keep_every=0) == [10, 20, 25]


def test_a_damaged_one_is_kept_under_another_name(tmp_path):
    make(tmp_path, 4)
    aside = folders.set_aside(tmp_path / "step-000004")
    assert aside.name == "step-000004.damaged" and aside.is_dir()
    assert folders.complete_steps(tmp_path) == []
    make(tmp_path, 4)
    folders.set_aside(tmp_path / "step-000004")  # the second one replaces the first
    assert folders.complete_steps(tmp_path) == []


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    make(tmp_path, 4)
    make(tmp_path, 4, b"others")
    assert (tmp_path / "step-000004" / "__0_0.distcp").read_bytes() == b"others"
    assert folders.problem_of(tmp_path / "step-000004") is None
