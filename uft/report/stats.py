"""Seed noise: means with intervals, differences of two configurations, and Holm's adjustment for many comparisons.

Pure functions of numbers. The distributions come from scipy.special: scipy.stats takes a second to load and a
millisecond for each of a thousand comparisons. The tests hold every result against scipy.stats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # a difference with an adjusted p below it is more than noise
ROUNDING = 1e-9  # a spread below this share of the values themselves is arithmetic, not noise
BOOTSTRAP_FROM = 5  # seeds; fewer say nothing about the shape of a distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Number, mean, standard deviation (n - 1) and 95 % t interval of the mean of some values.

    One value has no deviation; equal values have a deviation of 0 and no interval, since they say nothing about noise.
    Values that are not all finite have a mean that is not finite and nothing else.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """a - b. The interval is not adjusted for other comparisons. None: unknown."""

    difference: float
    n: int  # pairs, or the values of the smaller side
    paired: bool
    method: str
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided
    bootstrap: tuple[float, float] | None = None  # BCa, as a check of the t interval


def spread(values: Sequence[float]) -> Spread:
    found = np.asarray(values, dtype=float)
    n, mean = len(found), mean_of(found)
    if n < 2 or not math.isfinite(mean):
        return Spread(n, mean)
    sd = deviation(found)
    if sd == 0 or not math.isfinite(sd):
        return Spread(n, mean, sd)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def compare(a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, bootstrap: bool = False) -> Difference:
    """The difference of two configurations, given by seed; all values are finite, neither side is empty.

    Seeds that both have are compared pair by pair when there are at least two of them: a seed decides the order of the
    rows, so its luck is in both. Otherwise Welch's test is made, and none where a side has a single seed.
    """
    shared = [seed for seed in a if seed in b]
    if len(shared) < 2:
        return unpaired(list(a.values()), list(b.values()), bootstrap)
    scale = max(abs(value) for side in (a, b) for value in side.values())
    every = len(shared) == len(a) == len(b)
    method = f"paired t, {len(shared)} seeds" if every else f"paired t over the {len(shared)} seeds that both have"
    return paired([a[seed] - b[seed] for seed in shared], scale, method, bootstrap)


def paired(differences: Sequence[float], scale: float, method: str, bootstrap: bool = False) -> Difference:
    """The paired t test. `scale` is the size of the values that were subtracted."""
    found = np.asarray(differences, dtype=float)
    n, sd = len(found), deviation(found)
    difference = Difference(mean_of(found), n, True, method)
    if sd <= ROUNDING * scale:
        return without_noise(difference, scale)
    return t_test(difference, sd / math.sqrt(n), n - 1, [found] if bootstrap else None)


def unpaired(a: Sequence[float], b: Sequence[float], bootstrap: bool = False) -> Difference:
    """Welch's t test: the two sides may differ in their spread."""
    sides = [np.asarray(a, dtype=float), np.asarray(b, dtype=float)]
    counts = [len(side) for side in sides]
    difference = Difference(mean_of(sides[0]) - mean_of(sides[1]), min(counts), False, "one seed")
    if min(counts) < 2:
        return difference
    variances = [deviation(side) ** 2 / n for side, n in zip(sides, counts, strict=True)]
    total = sum(variances)
    if total == 0:
        return without_noise(difference, max(abs(sides[0][0]), abs(sides[1][0])))
    difference = replace(difference, method=f"Welch t, {counts[0]} and {counts[1]} seeds")
    if not math.isfinite(total):
        return difference
    freedom = total**2 / sum(variance**2 / (n - 1) for variance, n in zip(variances, counts, strict=True))
    return t_test(difference, math.sqrt(total), freedom, sides if bootstrap else None)


def without_noise(of: Difference, scale: float) -> Difference:
    """Nothing varies over seeds: no difference at all, or one whose noise these seeds do not show."""
    if abs(of.difference) <= ROUNDING * scale:
        return replace(of, difference=0.0, method="identical", low=0.0, high=0.0, p=1.0)
    return replace(of, method="the same on every seed")


def t_test(of: Difference, error: float, freedom: float, samples: Sequence[np.ndarray] | None) -> Difference:
    """Interval and p by the t distribution; the bootstrap's interval of `samples` where they are enough."""
    if not math.isfinite(error):
        return of
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(of.difference) / error))
    checked = bootstrap_interval(samples) if samples and of.n >= BOOTSTRAP_FROM else None
    return replace(of, low=of.difference - half, high=of.difference + half, p=p, bootstrap=checked)


def bootstrap_interval(samples: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """95 % BCa bootstrap interval of a mean, or of the difference of two.

    B. Efron, Better bootstrap confidence intervals, 1987; for several samples as scipy.stats.bootstrap has it.
    """
    random = np.random.default_rng(0)
    sides = list(zip((1.0, -1.0), samples, strict=False))
    drawn = sum(sign * random.choice(side, (RESAMPLES, len(side))).mean(axis=1) for sign, side in sides)
    found = sum(sign * side.mean() for sign, side in sides)
    bias = ndtri(np.mean(drawn < found) + np.mean(drawn == found) / 2)
    pulls = [sign * (side - side.mean()) / len(side) for sign, side in sides]  # of each value on the mean
    cubes, squares = (sum(float((pull**power).sum()) for pull in pulls) for power in (3, 2))
    shifted = bias + ndtri(np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    low, high = np.quantile(drawn, ndtr(bias + shifted / (1 - cubes / (6 * squares**1.5) * shifted)))
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values of one family: the chance of a single false alarm among all of them stays below alpha.

    Comparisons without a p are no members. S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    members = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for done, (p, place) in enumerate(members):
        largest = max(largest, min(1.0, (len(members) - done) * p))
        adjusted[place] = largest
    return adjusted


def mean_of(values: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def deviation(values: np.ndarray) -> float:
    """Standard deviation (n - 1); 0 where it is no more than rounding. Two or more finite values."""
    with np.errstate(all="ignore"):
        sd = float(np.std(values, ddof=1))
    return 0.0 if sd <= ROUNDING * float(np.max(np.abs(values))) else sd
