"""A reward history through its file: bit for bit, whole or not at all."""

import json

import pytest
import torch

from dcpo_megatron.advantages import RewardHistory
from dcpo_megatron.advantages.sas_file import load_history, save_history, save_history_state

NAMES = ("visits", "counts", "means", "m2")


def history_of(ids, std_ddof=0):
    history = RewardHistory(std_ddof)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        history.observe(ids * 3, torch.rand(3 * len(ids), generator=generator, dtype=torch.float64) / 3)
    return history


def assert_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a["prompt_ids"] == b["prompt_ids"] and a["std_ddof"] == b["std_ddof"]
    assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in NAMES)


@pytest.mark.parametrize("ids", [["math/1", "b", "math/22"], ["ä/中", "x", "\U0001f600"], ["\ud800", "a\x00b\nc"]])
@pytest.mark.parametrize("std_ddof", [0, 1])
def test_a_history_comes_back_bit_for_bit_and_goes_on_alike(tmp_path, ids, std_ddof):
    history, restored = history_of(ids, std_ddof), RewardHistory(std_ddof)
    save_history(history, tmp_path / "history")
    load_history(tmp_path / "history", restored)
    assert_equal(history, restored)
    rewards = torch.rand(2 * len(ids) + 2, dtype=torch.float64)
    new = [*ids, "new", *ids, "new"]
    assert torch.equal(history.observe(new, rewards), restored.observe(new, rewards))
    assert_equal(history, restored)


def test_an_empty_history_comes_back_empty(tmp_path):
    save_history(RewardHistory(), tmp_path / "history")
    history = history_of(["a"])
    load_history(tmp_path / "history", history)
    assert len(history) == 0


def test_a_copy_made_earlier_is_written_as_it_was(tmp_path):
    history = history_of(["a", "b"])
    state = history.state_dict()
    history.observe(["a", "c", "c"], torch.tensor([1.0, 0.0, 1.0]))
    save_history_state(state, tmp_path / "history")
    restored = RewardHistory()
    load_history(tmp_path / "history", restored)
    assert_equal(restored, history_of(["a", "b"]))


def test_a_file_is_replaced_in_one_move_and_nothing_else_is_left(tmp_path):
    save_history(history_of(["a"]), tmp_path / "history")
    save_history(history_of(["a", "b"]), tmp_path / "history")
    assert [file.name for file in tmp_path.iterdir()] == ["history"]
    with pytest.raises(OSError):
        save_history(history_of(["a"]), tmp_path / "nowhere" / "history")


@pytest.mark.parametrize("kept", [0, 1, 20, 400, -1])
def test_a_file_that_was_cut_off_is_refused_by_name_and_changes_nothing(tmp_path, kept):
    save_history(history_of(["a", "b"]), tmp_path / "history")
    data = (tmp_path / "history").read_bytes()
    (tmp_path / "history").write_bytes(data[:kept])
    history = history_of(["kept"])
    with pytest.raises(ValueError, match=r"history.*cut off"):
        load_history(tmp_path / "history", history)
    assert history.state_dict()["prompt_ids"] == ["kept"]


def test_offsets_that_do_not_fit_the_ids_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_history(history_of(["aa", "b"]), tmp_path / "history")
    tensors = load_file(tmp_path / "history")
    metadata = {"format": "dcpo-reward-history", "version": "1", "std_ddof": "0"}
    for offsets in ([0, 2, 4], [1, 2, 3], [0, 5, 3], [0, 3]):
        save_file(tensors | {"id_offsets": torch.tensor(offsets)}, tmp_path / "bad", metadata)
        with pytest.raises(ValueError, match="bad"):
            load_history(tmp_path / "bad", RewardHistory())
    save_file(tensors, tmp_path / "other", metadata | {"version": "2"})
    with pytest.raises(ValueError, match="version '2'"):
        load_history(tmp_path / "other", RewardHistory())


def test_another_ddof_is_refused_and_a_missing_file_is_named(tmp_path):
    save_history(history_of(["a"], 1), tmp_path / "history")
    with pytest.raises(ValueError, match="std_ddof"):
        load_history(tmp_path / "history", RewardHistory(0))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_history(tmp_path / "nowhere", RewardHistory())


def test_the_file_holds_plain_tensors_and_a_prompt_takes_its_id_and_forty_bytes(tmp_path):
    ids = [f"{'i' * 14}{number:06d}" for number in range(1000)]
    save_history(history_of(ids), tmp_path / "history")
    data = (tmp_path / "history").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert set(header) == {"__metadata__", "ids", "id_offsets", *NAMES}
    assert len(data) == 8 + length + 1000 * (20 + 40) + 8
