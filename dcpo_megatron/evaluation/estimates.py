r"""What an evaluation says, from which answers were right. Pure functions, no torch.

    Avg@1    share of problems whose greedy response is right
    Avg@k    right responses / (problems x k), k samples a problem
    pass@m   mean over problems of 1 - C(k - c, m) / C(k, m), with c of the problem's k samples right: the unbiased
             estimate of "at least one of m is right" (Chen et al., arXiv 2107.03374, eq. 1)

Intervals are percentile bootstraps over problems: problems are drawn with replacement, each with all its samples. The
average over sets is the plain mean of the sets' values, and its interval draws within every set. They say how much the
problems matter, not how much a training run's seed does.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; no interval where there is one problem only."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Answers:
    """One problem: whether its greedy response is right (None: there is none) and whether each of its samples is."""

    greedy: bool | None
    samples: tuple[bool, ...]


def pass_at(right: int, samples: int, m: int) -> float:
    """The unbiased estimate for one problem. Raises ValueError unless 0 <= right <= samples and 1 <= m <= samples."""
    if not (0 <= right <= samples and 1 <= m <= samples):
        raise ValueError(f"pass@{m} of {right} right among {samples} samples is not defined")
    return 1.0 - math.comb(samples - right, m) / math.comb(samples, m)


def measures(problems: Sequence[Answers]) -> dict[str, list[float]]:
    """The value of each measure for each problem: "avg@1", "avg@k" and "pass@m" for m = 2, 4, 8, ... and k. All
    problems must have the same number of samples.

    Raises ValueError where they do not.
    """
    counts = {len(problem.samples) for problem in problems}
    if len(counts) > 1:
        raise ValueError(f"problems have different numbers of samples: {sorted(counts)}")
    found: dict[str, list[float]] = {}
    if all(problem.greedy is not None for problem in problems):
        found["avg@1"] = [float(problem.greedy) for problem in problems]
    k = counts.pop() if counts else 0
    if k:
        # With one sample, "avg@1" would name two things.
        found[f"avg@{k}" if k > 1 else "sampled@1"] = [sum(problem.samples) / k for problem in problems]
        for m in sorted({2**power for power in range(1, k.bit_length()) if 2**power <= k} | ({k} if k > 1 else set())):
            found[f"pass@{m}"] = [pass_at(sum(problem.samples), k, m) for problem in problems]
    return found


def estimate(values: Sequence[float], name: str, seed: int = 0) -> Estimate:
    """The mean over problems with its interval; the same numbers give the same interval."""
    return _interval([np.asarray(values, dtype=np.float64)], [name], seed)


def average(sets: Sequence[Sequence[float]], names: Sequence[str], seed: int = 0) -> Estimate:
    """The mean of the sets' means with its interval."""
    return _interval([np.asarray(values, dtype=np.float64) for values in sets], names, seed)


def _interval(sets: list[np.ndarray], names: Sequence[str], seed: int) -> Estimate:
    value = float(np.mean([values.mean() for values in sets]))
    if all(len(values) < 2 for values in sets):
        return Estimate(value)
    total = np.zeros(RESAMPLES)
    for values, name in zip(sets, names, strict=True):
        draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
        total += values[draw.integers(0, len(values), (RESAMPLES, len(values)))].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(total / len(sets), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def lengths(tokens: Sequence[int], truncated: Sequence[bool]) -> dict[str, float]:
    """Tokens of responses: mean, median, 95th percentile, longest; and the share cut at the limit. Empty for none."""
    if not tokens:
        return {}
    return {
        "mean": float(np.mean(tokens)),
        "median": float(np.median(tokens)),
        "p95": float(np.percentile(tokens, 95)),
        "longest": float(max(tokens)),
        "truncated": sum(truncated) / len(truncated),
    }
