"""The sampler's order is a function of seed and epoch, and its state is exact."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpo_megatron.data import PromptSampler

_counts_and_batches = st.integers(1, 12).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.integers(1, count), min_size=1, max_size=12))
)


@settings(deadline=None)
@given(_counts_and_batches, st.integers())
def test_every_epoch_is_a_permutation_and_every_batch_is_distinct(counts_and_batches, seed):
    count, batches = counts_and_batches
    sampler = PromptSampler(count, seed)
    drawn = []
    for n in batches:
        batch = sampler.next(n)
        assert len(batch) == len(set(batch)) == n
        drawn += batch
    for start in range(0, len(drawn) - count + 1, count):
        assert sorted(drawn[start : start + count]) == list(range(count))
    assert sampler.epoch == len(drawn) // count


@settings(deadline=None)
@given(_counts_and_batches, st.integers(), st.data())
def test_a_restored_sampler_goes_on_exactly(counts_and_batches, seed, data):
    count, batches = counts_and_batches
    sampler = PromptSampler(count, seed)
    for n in batches:
        sampler.next(n)
    restored = PromptSampler(count, seed)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restored.state_dict() == sampler.state_dict()
    for n in data.draw(st.lists(st.integers(1, count), max_size=12)):
        assert restored.next(n) == sampler.next(n)


def test_epochs_and_seeds_give_different_orders():
    sampler = PromptSampler(100, 0)
    first, second = sampler.next(100), sampler.next(100)
    assert first != second
    assert PromptSampler(100, 1).next(100) != first
    assert PromptSampler(100, 0).next(100) == first


def test_the_order_is_the_same_for_ever():
    assert PromptSampler(8, 42).next(8) == [1, 2, 5, 7, 6, 0, 3, 4]


def test_more_prompts_a_step_than_there_are_is_refused():
    sampler = PromptSampler(3, 0)
    with pytest.raises(ValueError, match=r"prompts_per_step > prompts: 4 a step, but only 3 prompts"):
        sampler.next(4)
    with pytest.raises(ValueError, match="at least 1"):
        sampler.next(0)
    with pytest.raises(ValueError, match="at least 1 prompt"):
        PromptSampler(0, 0)


@pytest.mark.parametrize(("count", "seed", "name"), [(4, 0, "prompts_count"), (3, 1, "seed")])
def test_the_state_of_another_run_is_refused(count, seed, name):
    with pytest.raises(ValueError, match=f"saved with {name} = "):
        PromptSampler(count, seed).load_state_dict(PromptSampler(3, 0).state_dict())
