"""Intervals over seeds are as wide as they say, and pairing by seed takes away what a seed does to both methods."""

import random

import pytest

from dcpo_megatron.comparison.statistics import mean_interval, paired_difference, paired_ratio, t_quantile


@pytest.mark.parametrize(
    ("confidence", "degrees", "t"),
    [
        (0.95, 1, 12.70620),
        (0.95, 4, 2.776445),
        (0.95, 30, 2.042272),
        (0.99, 9, 3.249836),
        (0.95, 100000, 1.959988),
        (0.999, 1, 636.6192),
    ],
)
def test_quantiles_are_those_of_the_tables(confidence, degrees, t):
    assert t_quantile(confidence, degrees) == pytest.approx(t, rel=1e-5)


def test_95_of_100_intervals_of_five_seeds_hold_the_truth():
    draw = random.Random(0)
    hits = 0
    for _ in range(4000):
        found = mean_interval([draw.gauss(3.0, 2.0) for _ in range(5)])
        hits += found.low <= 3.0 <= found.high
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)  # three standard errors are 0.0103


def test_a_known_interval():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * (2.5 / 5) ** 0.5
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), rel=1e-6)


def test_one_seed_gives_no_interval_and_none_gives_nothing():
    assert mean_interval([0.5]).low is None
    assert mean_interval([]) is None
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


def test_pairing_takes_away_what_a_seed_does_to_both():
    draw = random.Random(1)
    seeds = {seed: draw.gauss(0.0, 1.0) for seed in range(5)}
    a = {seed: effect + 0.1 + draw.gauss(0, 0.01) for seed, effect in seeds.items()}
    paired = paired_difference(a, seeds)
    assert paired.low > 0 and paired.high < 0.2
    apart = mean_interval(list(a.values()))
    assert apart.high - apart.low > 10 * (paired.high - paired.low)


def test_only_seeds_that_both_have_count():
    assert paired_difference({0: 1.0, 1: 2.0, 9: 100.0}, {0: 0.0, 1: 0.0, 7: 5.0}).mean == 1.5


def test_a_ratio_is_a_geometric_mean_and_its_inverse_mirrors_it():
    a, b = {0: 2.0, 1: 8.0}, {0: 1.0, 1: 1.0}
    ratio, inverse = paired_ratio(a, b), paired_ratio(b, a)
    assert ratio.mean == pytest.approx(4.0)
    assert (inverse.low, inverse.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))


def test_there_is_no_ratio_where_a_value_is_not_above_zero():
    assert paired_ratio({0: 1.0, 1: 1.0}, {0: 1.0, 1: 0.0}) is None
