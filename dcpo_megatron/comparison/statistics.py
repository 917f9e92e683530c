"""Intervals over seeds: Student's t, paired by seed wherever two methods are compared.

    mean        m +- t s / sqrt(n)                    of n seeds, t the quantile for n - 1 degrees of freedom
    difference  the same, of a_seed - b_seed          what a seed's start and prompts do to both methods cancels
    ratio       exp of the same, of log(a_seed / b_seed): a geometric mean, where all values are above 0

With five seeds t is 2.78, where a bootstrap of five values would act as if it were some 1.7: its intervals are too
narrow at such numbers. One seed gives no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate from ``n`` seeds; ``low`` and ``high`` are None where ``n`` is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int


@lru_cache
def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = ``confidence`` for ``degrees`` >= 1 degrees of freedom."""
    import mpmath

    # P(|T| > t) is the regularised incomplete beta function I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2).
    # It is convex in t, and the normal quantile is below the one sought: secants from there come to it without a swing.
    def excess(t: mpmath.mpf) -> mpmath.mpf:
        x = degrees / (degrees + t * t)
        return mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True) - (1 - confidence)

    return float(mpmath.findroot(excess, NormalDist().inv_cdf((1 + confidence) / 2)))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """The t interval of the mean; None without values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(confidence, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], confidence: float = CONFIDENCE
) -> Interval | None:
    """a - b over the seeds that both have; None without such a seed."""
    return mean_interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], confidence)


def paired_ratio(a: Mapping[int, float], b: Mapping[int, float], confidence: float = CONFIDENCE) -> Interval | None:
    """a / b over the seeds that both have, as a geometric mean; None without such a seed, or where a value is not above
    0."""
    seeds = sorted(a.keys() & b.keys())
    if any(values[seed] <= 0 for seed in seeds for values in (a, b)):
        return None
    logs = mean_interval([math.log(a[seed] / b[seed]) for seed in seeds], confidence)
    if logs is None:
        return None
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.mean), low, high, logs.n)
