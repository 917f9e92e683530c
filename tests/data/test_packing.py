"""The invariants of the micro-batch plan, over random lengths."""

import math
import random
from dataclasses import replace
from itertools import chain, combinations, pairwise

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
).flatmap(lambda made: st.sampled_from([1, 2, 8]).map(lambda factor: replace(made, row_align=factor * made.align)))
plans = given(lengths_of, st.integers(1, 5), options_of, st.integers(1, 4))


def aligned(length, options):
    return -(-length // options.align) * options.align


def tokens_of(members, lengths, options):
    """What a micro-batch costs in tokens, by the documentation of PackingOptions."""
    sizes = [aligned(lengths[i], options) for i in members]
    row = sum(sizes) if options.packed else max(sizes, default=0)
    return -(-row // options.row_align) * options.row_align * (1 if options.packed else len(sizes))


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
@given(lengths_of, st.integers(1, 5), options_of.map(lambda options: replace(options, packed=True)), st.integers(1, 4))
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


def cost_of(members, lengths, options):
    """What a micro-batch computes, padding included, in units of :func:`cost`."""
    costs = [cost(aligned(lengths[i], options), options) for i in members]
    if options.packed:
        return sum(costs)
    return len(members) * cost(tokens_of(members, lengths, options) // max(1, len(members)), options)


@packing
@plans
def test_a_ranks_micro_batches_come_costliest_first(lengths, ranks, options, multiple_of):
    for micro_batches in plan_micro_batches(lengths, ranks, options, multiple_of):
        costs = [cost_of(members, lengths, options) for members in micro_batches]
        assert all(first >= second - 1e-6 for first, second in pairwise(costs))


@packing
@given(lengths_of, options_of.map(lambda options: replace(options, packed=True)))
def test_the_number_of_packed_micro_batches_is_within_twice_the_lower_bound(lengths, options):
    (micro_batches,) = plan_micro_batches(lengths, 1, options)
    tokens = sum(aligned(length, options) for length in lengths)
    assert (len(micro_batches) - 1) * options.capacity < 2 * tokens or len(micro_batches) == 1


@packing
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 150))
def test_padded_micro_batches_are_as_few_and_their_peak_as_cheap_as_any_cut_of_the_sorted_lengths_allows(
    lengths, ranks, budget
):
    options = PackingOptions(budget, packed=False, attention_length=64)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = []
    for ends in chain.from_iterable(combinations(range(1, len(order)), n) for n in range(len(order))):
        runs = [order[start:end] for start, end in pairwise((0, *ends, len(order)))]
        if all(len(run) == 1 or tokens_of(run, lengths, options) <= budget for run in runs):
            cuts.append(runs)
    plan = plan_micro_batches(lengths, ranks, options)
    count = -(-min(map(len, cuts)) // ranks)
    assert len(plan[0]) == count
    peaks = [max(cost_of(run, lengths, options) for run in runs) for runs in cuts if len(runs) <= ranks * count]
    mine = max(cost_of(members, lengths, options) for members in chain.from_iterable(plan))
    assert mine == pytest.approx(min(peaks), rel=1e-12)


def possible(lengths, ranks, options):
    """The least cost that the busiest rank can have: the mean over ranks, or the largest single response."""
    costs = [cost(aligned(length, options), options) for length in lengths]
    return max(sum(costs) / ranks, max(costs))


def busiest(plan, lengths, options):
    return max(sum(cost_of(members, lengths, options) for members in micro_batches) for micro_batches in plan)


@pytest.mark.parametrize("count", [64, 128, 512, 8192])
@pytest.mark.parametrize(("median", "spread"), [(1200, 0.8), (130, 0.45)])
def test_the_busiest_of_eight_ranks_is_within_three_per_cent_of_what_is_possible(count, median, spread):
    for seed in range(1 if count > 1000 else 10):
        draw = random.Random(seed)
        lengths = [min(8192, max(1, round(draw.lognormvariate(math.log(median), spread)))) for _ in range(count)]
        options = PackingOptions(16384, align=4, attention_length=9216)
        plan = plan_micro_batches(lengths, 8, options)
        assert busiest(plan, lengths, options) <= 1.03 * possible(lengths, 8, options)
        bound = math.ceil(sum(aligned(length, options) for length in lengths) / 8 / 16384)
        assert len(plan[0]) <= bound + 1


def test_responses_change_places_where_longest_first_alone_is_far_off():
    # Longest first alone gives 5 + 4 and 5 + 3 + 3.
    options = PackingOptions(100, attention_length=10**9)
    plan = plan_micro_batches([5, 5, 4, 3, 3], 2, options)
    assert sorted(sum([5, 5, 4, 3, 3][i] for i in chain.from_iterable(rank)) for rank in plan) == [10, 10]


def test_micro_batches_of_a_rank_are_balanced_without_raising_their_number():
    options = PackingOptions(100, attention_length=10**9)
    ((first, second, third),) = plan_micro_batches([60, *[10] * 15], 1, options)
    assert [tokens_of(members, [60, *[10] * 15], options) for members in (first, second, third)] == [70, 70, 70]


def test_micro_batches_change_members_where_longest_first_alone_is_uneven():
    # Longest first to the lighter of two gives 11 and 9.
    lengths = [5, 5, 4, 3, 3]
    (plan,) = plan_micro_batches(lengths, 1, PackingOptions(12, attention_length=10**9))
    assert [tokens_of(members, lengths, PackingOptions(12)) for members in plan] == [10, 10]


def test_padded_micro_batches_change_ranks_where_costliest_first_alone_is_uneven():
    # One row each, three a rank: costliest first to the lighter rank gives 20 and 17.
    lengths = [9, 6, 6, 6, 5, 5]
    options = PackingOptions(9, packed=False, attention_length=10**9)
    plan = plan_micro_batches(lengths, 2, options)
    assert sorted(sum(lengths[i] for i in chain.from_iterable(rank)) for rank in plan) == [18, 19]


def test_one_huge_response_has_a_rank_of_its_own_and_the_others_share_the_rest_evenly():
    lengths = [5000, *[10] * 70]
    plan = plan_micro_batches(lengths, 8, PackingOptions(1000))
    shares = [sorted(chain.from_iterable(micro_batches)) for micro_batches in plan]
    assert [0] in shares
    assert sorted(map(len, shares)) == [1, *[10] * 7]


@pytest.mark.parametrize("packed", [True, False])
def test_equal_responses_are_dealt_evenly(packed):
    plan = plan_micro_batches([7] * 96, 8, PackingOptions(28, packed=packed))
    assert [[len(members) for members in micro_batches] for micro_batches in plan] == [[4, 4, 4]] * 8


@pytest.mark.parametrize("packed", [True, False])
def test_fewer_responses_than_ranks_leave_ranks_with_empty_micro_batches(packed):
    plan = plan_micro_batches([5, 3], 4, PackingOptions(8, packed=packed), 2)
    assert sorted(chain.from_iterable(chain.from_iterable(plan))) == [0, 1]
    assert all(len(micro_batches) == 2 for micro_batches in plan)
    assert max(len(list(chain.from_iterable(micro_batches))) for micro_batches in plan) == 1
    assert plan_micro_batches([], 3, PackingOptions(8, packed=packed)) == [[[]]] * 3


def test_padded_rows_of_alike_lengths_meet_even_where_they_came_far_apart():
    lengths = [100, 2] * 32
    plan = plan_micro_batches(lengths, 2, PackingOptions(3200, packed=False))
    computed = sum(tokens_of(members, lengths, PackingOptions(1, packed=False)) for rank in plan for members in rank)
    assert computed <= 1.05 * sum(lengths)


def test_packed_rows_cost_the_sum_of_lengths_and_padded_ones_rows_times_the_longest():
    lengths = [8, 2, 2, 2]
    assert plan_micro_batches(lengths, 1, PackingOptions(14)) == [[[0, 1, 2, 3]]]
    assert plan_micro_batches(lengths, 1, PackingOptions(14, packed=False)) == [[[0], [1, 2, 3]]]
    assert plan_micro_batches(lengths, 1, PackingOptions(32, packed=False)) == [[[0, 1, 2, 3]]]


def test_alignment_counts_against_the_budget():
    assert plan_micro_batches([5, 5], 1, PackingOptions(10)) == [[[0, 1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(10, align=4)) == [[[0], [1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(16, align=4)) == [[[0, 1]]]


def test_the_rounding_of_a_whole_row_counts_against_the_budget_once():
    assert plan_micro_batches([5, 5], 1, PackingOptions(12, row_align=4)) == [[[0, 1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(11, row_align=4)) == [[[0], [1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(16, row_align=8, packed=False)) == [[[0, 1]]]
    assert plan_micro_batches([5, 5], 1, PackingOptions(15, row_align=8, packed=False)) == [[[0], [1]]]


def test_a_long_sequence_weighs_more_than_its_tokens_in_short_ones():
    options = PackingOptions(10_000, attention_length=100)
    assert cost(400, options) == 400 * 5
    # 400 tokens in one sequence cost as much as 1000 in ten of 100: the other rank takes all the short ones.
    long, short = plan_micro_batches([400, *[100] * 10], 2, options)
    assert long == [[0]]
    assert sorted(chain.from_iterable(short)) == list(range(1, 11))


@pytest.mark.parametrize("name", ["max_tokens", "align", "attention_length", "row_align"])
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
