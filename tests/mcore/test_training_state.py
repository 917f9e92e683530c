"""Weights and optimizer come back bit for bit, and in another layout up to rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpo_megatron.mcore.training_state import HostMemory
from dcpo_megatron.verification.cases import make_model
from dcpo_megatron.verification.ranks import RankPool
from tests.other_megatron import other_megatron


@pytest.fixture(scope="module", params=["installed", "other"])
def pool(request):
    with RankPool(4, python_path=[str(other_megatron())] if request.param == "other" else []) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "ranks", "parallel", "optimizer", "dtype"),
    [
        ("dense", 2, {}, "adam", "float32"),
        ("dense", 4, {}, "adam", "bfloat16"),
        ("tied", 4, dict(tensor=2, pipeline=2), "adam", "float32"),
        ("dense", 2, dict(pipeline=2, virtual_pipeline=2), "adam", "float32"),
        ("dense", 4, dict(tensor=2, sequence_parallel=True, context=2), "adam", "float32"),
        ("moe", 4, dict(expert=2, pipeline=2), "adam", "float32"),
        ("dense", 2, {}, "sgd", "float32"),
        ("dense", 2, {}, "sgd", "bfloat16"),
    ],
    ids=lambda value: "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_a_restored_optimizer_goes_on_bit_for_bit(pool, tmp_path, kind, ranks, parallel, optimizer, dtype):
    make_model(kind, str(tmp_path / "hf"))
    arguments = (str(tmp_path / "hf"), parallel, str(tmp_path / "saved"), optimizer, dtype)
    before = pool.run("tests.mcore.state_jobs:train_and_save", ranks, *arguments)
    after = pool.run("tests.mcore.state_jobs:restore_and_train", ranks, *arguments)
    for (norms, weights, _), (norms_again, weights_again) in zip(before, after, strict=True):
        assert norms == norms_again
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (4, dict(tensor=2)), (4, dict(tensor=2, pipeline=2))], ids=["1", "tp2-dp2", "tp2-pp2"]
)  # fmt: skip
def test_another_layout_takes_the_same_steps(pool, tmp_path, ranks, parallel):
    make_model("dense", str(tmp_path / "hf"))
    hf, saved = str(tmp_path / "hf"), str(tmp_path / "saved")
    before = pool.run("tests.mcore.state_jobs:train_and_save", 2, hf, {}, saved, "adam", "float32")
    after = pool.run("tests.mcore.state_jobs:restore_and_train", ranks, hf, parallel, saved, "adam", "float32")
    assert after[0][0] == pytest.approx(before[0][0], rel=1e-5)


def test_data_parallel_ranks_share_the_writing(pool, tmp_path):
    make_model("dense", str(tmp_path / "hf"))
    job = (
        "tests.mcore.state_jobs:train_and_save",
        4,
        str(tmp_path / "hf"),
        {},
        str(tmp_path / "saved"),
        "adam",
        "float32",
    )
    written = [size for _, _, size in pool.run(*job)]
    assert max(written) <= 1.1 * sum(written) / len(written)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_cover_a_stretch_once_and_in_order(shape, data):
    from dcpo_megatron.mcore.optimizer_shards import boxes

    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(start, whole.numel()))
    found = [
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes))].reshape(-1)
        for offsets, sizes in boxes(tuple(shape), start, end)
    ]
    assert torch.equal(torch.cat(found) if found else whole.reshape(-1)[:0], whole.reshape(-1)[start:end])


def test_the_next_snapshot_is_copied_into_the_memory_of_the_last():
    memory, tensors = HostMemory(), [torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)]
    first = [memory.copy(tensor) for tensor in tensors]
    places = [copy.data_ptr() for copy in first]
    memory.reset()
    again = [memory.copy(tensor + 1) for tensor in tensors]
    assert [copy.data_ptr() for copy in again] == places
    assert all(torch.equal(copy, tensor + 1) for copy, tensor in zip(again, tensors, strict=True))
    memory.reset()
    assert torch.equal(memory.copy(torch.zeros(2, 2, dtype=torch.int64)), torch.zeros(2, 2, dtype=torch.int64))
    # What is asked for within one snapshot never shares memory.
    assert memory.copy(tensors[1]).data_ptr() == places[1]
    assert memory.copy(tensors[1]).data_ptr() != places[1]
