"""Weights and optimizer come back bit for bit, and in another layout up to rounding."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcpo_megatron.checkpoint.snapshot import HostMemory
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
def test_a_restored_optimizer_goes_on_bit_for_bit_and_so_does_one_that_was_on_the_host(
    pool, tmp_path, kind, ranks, parallel, optimizer, dtype
):
    make_model(kind, str(tmp_path / "hf"))
    arguments = (str(tmp_path / "hf"), parallel, str(tmp_path / "saved"), optimizer, dtype)
    before = pool.run("tests.mcore.state_jobs:train_and_save", ranks, *arguments)
    after = pool.run("tests.mcore.state_jobs:restore_and_train", ranks, *arguments)
    for (norms, weights, _), (norms_again, weights_again) in zip(before, after, strict=True):
        assert norms == norms_again
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_numbers_that_were_changed_are_in_effect_and_what_was_counted_stays(pool, tmp_path, kind, optimizer):
    make_model(kind, str(tmp_path / "hf"))
    job = str(tmp_path / "hf"), {}, str(tmp_path / "saved"), optimizer
    pool.run("tests.mcore.state_jobs:train_and_save", 2, *job, "float32")
    changed = (
        dict(lr=3e-3, weight_decay=0.25, betas=(0.8, 0.9)) if optimizer == "adam" else dict(lr=3e-3, weight_decay=0.25)
    )
    for groups in pool.run("tests.mcore.state_jobs:settings_after_restoring", 2, *job, **changed):
        assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
        assert {group["lr"] for group in groups} == {3e-3}
        if optimizer == "adam":
            assert {group["betas"] for group in groups} == {(0.8, 0.9)}
            assert all(group["steps"] == {2.0} for group in groups)


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (4, dict(tensor=2)), (4, dict(tensor=2, pipeline=2))],
    ids=["1", "tp2-dp2", "tp2-pp2"]
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


@pytest.mark.parametrize(
    ("kind", "ranks", "parallel"),
    [
        ("dense", 2, {}),
        ("dense", 4, dict(tensor=2, sequence_parallel=True)),
        ("tied", 4, dict(pipeline=2)),
        ("moe", 2, dict(expert=2)),
    ],
    ids=["dp2", "tp2-sp-dp2", "pp2-dp2-tied", "dp2-ep2-moe"],  # two replicas: a sum of two has no order
)
def test_weights_and_gradients_that_travel_beside_the_computation_are_the_same_ones(
    pool, tmp_path, kind, ranks, parallel
):
    make_model(kind, str(tmp_path / "hf"))
    job = "tests.mcore.overlap_jobs:train", ranks, str(tmp_path / "hf"), parallel
    beside, after = pool.run(*job, "on"), pool.run(*job, "off")
    assert beside[0][1] > after[0][1]  # buckets of the first stage
    for (*_, found), (*_, wanted) in zip(beside, after, strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            assert len(ours) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_tokens_that_are_gathered_reach_the_experts_that_tokens_sent_one_by_one_reach(pool, tmp_path):
    make_model("moe", str(tmp_path / "hf"))
    job = "tests.mcore.overlap_jobs:train", 2, str(tmp_path / "hf"), dict(context=2, expert=2), "off", "float32"
    for (*_, found), (*_, wanted) in zip(pool.run(*job, token_dispatcher="allgather"), pool.run(*job), strict=True):
        for ours, theirs in zip(chain.from_iterable(found), chain.from_iterable(wanted), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5, equal_nan=True)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_cover_a_stretch_once_and_in_order(shape, data):
    from dcpo_megatron.checkpoint.optimizer_shards import boxes

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


class GpuCalls:
    """Notes, in order, what is asked of a GPU: pinned memory, copies that do not wait, the wait for them. Tensors stay
    where they are."""

    def __init__(self, monkeypatch):
        self.made = []
        empty, copy = torch.empty, torch.Tensor.copy_

        def note_empty(*args, **kwargs):
            if kwargs.pop("pin_memory", False):
                self.made.append("pinned")
            return empty(*args, **kwargs)

        def note_copy(into, data, non_blocking=False):
            self.made.append("copy" if non_blocking else "copy and wait")
            return copy(into, data)

        monkeypatch.setattr(torch, "empty", note_empty)
        monkeypatch.setattr(torch.Tensor, "copy_", note_copy)
        stream = SimpleNamespace(synchronize=lambda: self.made.append("wait"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)


@pytest.mark.parametrize(("device", "first", "again"), [
    ("cuda", ["pinned", "copy", "pinned", "copy", "wait"], ["copy", "copy", "wait"]),
    ("cpu", ["copy and wait"] * 2, ["copy and wait"] * 2),
])  # fmt: skip
def test_from_a_gpu_a_snapshot_goes_to_pinned_memory_and_is_waited_for_once(monkeypatch, device, first, again):
    memory, tensors = HostMemory(torch.device(device)), [torch.ones(2, 3), torch.ones(4)]
    calls = GpuCalls(monkeypatch)
    for wanted in (first, again):
        calls.made.clear()
        memory.reset()
        copies = [memory.copy(tensor) for tensor in tensors]
        memory.wait()
        assert calls.made == wanted
        assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
