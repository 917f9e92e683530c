"""The invariants of the micro-batch plan, over random lengths."""

from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dcpo_megatron.data.packing import PackingOptions, cost, plan_micro_batches

packing = settings(deadline=None, database=None, max_examples=150)

lengths_of = st.lists(st.integers(1, 300), max_size=40)
options_of = st.builds(
    PackingOptions,
    max_tokens=st.integers(1, 600),
    packed=st.booleans(),
    align=st.sampled_from([1, 2, 4, 16]),
    attention_length=st.sampled_from([1, 64, 8192]),
)
plans = given(lengths_of, st.integers(1, 5), options_of, st.integers(1, 4))


def aligned(length, options):
    return -(-length // options.align) * options.align


def tokens_of(members, lengths, options):
    """What a micro-batch costs in tokens, by the documentation of PackingOptions."""
    sizes = [aligned(lengths[i], options) for i in members]
    return sum(sizes) if options.packed else len(sizes) * max(sizes, default=0)


@packing
@plans
@example([], 3, PackingOptions(8), 2)
@example([1], 4, PackingOptions(8), 3)
def test_every_index_appears_exactly_once(lengths, ranks, options, multiple_of):
    plan = plan_micro_batches(lengths, ranks, options, multiple_of)
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == list(range(len(lengths)))


@packing
@plans
@example([], 3, PackingOptions(8), 2)
@example([9, 9, 9, 1, 1], 2, PackingOptions(9), 4)
def test_every_rank_has_the_same_number_of_micro_batches_a_multiple_as_asked(lengths, ranks, options, multiple_of):
    plan = plan_micro_batches(lengths, ranks, options, multiple_of)
    assert len(plan) == ranks
    (count,) = {len(micro_batches) for micro_batches in plan}
    assert count >= 1 and count % multiple_of == 0


@packing
@plans
def test_only_a_single_long_response_exceeds_the_token_budget(lengths, ranks, options, multiple_of):
    for members in chain.from_iterable(plan_micro_batches(lengths, ranks, options, multiple_of)):
        assert len(members) <= 1 or tokens_of(members, lengths, options) <= options.max_tokens


@packing
@plans
def test_the_plan_depends_on_the_arguments_alone(lengths, ranks, options, multiple_of):
    first = plan_micro_batches(lengths, ranks, options, multiple_of)
    plan_micro_batches([5, 7], 2, PackingOptions(9))
    assert plan_micro_batches(tuple(lengths), ranks, options, multiple_of) == first


@packing
@plans
def test_no_rank_costs_more_than_the_mean_and_one_largest_sequence(lengths, ranks, options, multiple_of):
    costs = [cost(aligned(length, options), options) for length in lengths]
    plan = plan_micro_batches(lengths, ranks, options, multiple_of)
    loads = [sum(costs[i] for i in chain.from_iterable(micro_batches)) for micro_batches in plan]
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0.0) + 1e-6


@packing
@plans
def test_no_micro_batch_is_empty_while_another_of_the_rank_could_be_halved(lengths, ranks, options, multiple_of):
    for micro_batches in plan_micro_batches(lengths, ranks, options, multiple_of):
        sizes = [len(members) for members in micro_batches]
        assert min(sizes) > 0 or max(sizes) <= 1


@packing
@given(lengths_of, options_of)
def test_first_fit_leaves_no_two_micro_batches_of_one_rank_that_would_fit_together(lengths, options):
    (micro_batches,) = plan_micro_batches(lengths, 1, options)
    for number, first in enumerate(micro_batches):
        for second in micro_batches[number + 1 :]:
            assert tokens_of([*first, *second], lengths, options) > options.max_tokens


def test_packed_rows_cost_the_sum_of_lengths_and_padded_ones_rows_times_the_longest():
    lengths = [8, 2, 2, 2]
    assert plan_micro_batches(lengths, 1, PackingOptions(14)) == [[[0, 1, 2, 3]]]
    assert plan_micro_batches(lengths, 1, PackingOptions(14, packed=False)) == [[[0], [1, 2, 3]]]
    assert plan_micro_batches(lengths, 1, PackingOptions(32, packed=False)) == [[[0, 1, 2, 3]]]


def test_alignment_counts_against_the_budget():
    assert plan_micro_batches([5, 5], 1, PackingOptions(10)) == [[[0, 1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(10, align=4)) == [[[0], [1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(16, align=4)) == [[[0, 1]]]


def test_a_long_sequence_weighs_more_than_its_tokens_in_short_ones():
    options = PackingOptions(10_000, attention_length=100)
    assert cost(400, options) == 400 * 5
    # 400 tokens in one sequence cost as much as 1000 in ten of 100: the other rank takes all the short ones.
    long, short = plan_micro_batches([400, *[100] * 10], 2, options)
    assert long == [[0]]
    assert sorted(chain.from_iterable(short)) == list(range(1, 11))


@pytest.mark.parametrize("name", ["max_tokens", "align", "attention_length"])
@pytest.mark.parametrize("value", [0, -3])
def test_options_below_one_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least 1"):
        PackingOptions(**{"max_tokens": 8, name: value})


@pytest.mark.parametrize(
    ("lengths", "ranks", "multiple_of", "message"),
    [
        ([3, 0], 1, 1, "at least one token"),
        ([3, -2], 1, 1, "at least one token"),
        ([3], 0, 1, "data_parallel_size=0"),
        ([3], 1, 0, "multiple_of=0"),
    ],
)
def test_impossible_arguments_are_refused(lengths, ranks, multiple_of, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(lengths, ranks, PackingOptions(8), multiple_of)
