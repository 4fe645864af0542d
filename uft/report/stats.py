"""Is it more than seed noise? Means with intervals, differences of two configurations, and the price of many questions.

Pure functions of numbers. The t distribution comes from scipy.special, which loads in a third of the time that
scipy.stats takes; the tests hold every result against scipy.stats.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # an adjusted p below it is more than noise
ROUNDING = 1e-9  # a spread below this share of the values themselves is arithmetic, not noise
BOOTSTRAP_FROM = 5  # seeds; fewer say nothing about the shape of a distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """Some values: how many, their mean, standard deviation (n - 1) and the 95 % t interval of the mean.

    One value has no spread; values that are all the same have a spread of 0 and no interval, since they say nothing
    about noise. Where a value is not finite, neither is the mean, and there is no more than that.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """a - b. The interval is not adjusted for other comparisons. None: the numbers do not say."""

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
    half = quantile(n - 1) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def compare(a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, bootstrap: bool = False) -> Difference:
    """The difference of two configurations, given by seed; all values are finite, neither side is empty.

    Seeds that both have are compared pair by pair when there are at least two of them: a seed decides the order of the
    rows, so its luck is in both. Otherwise Welch's test is made, and none where a side has a single seed.
    """
    shared = [seed for seed in a if seed in b]
    if len(shared) > 1:
        scale = max(abs(value) for side in (a, b) for value in side.values())
        whole = len(shared) == len(a) == len(b)
        method = f"paired t, {len(shared)} seeds" if whole else f"paired t over the {len(shared)} seeds that both have"
        return paired([a[seed] - b[seed] for seed in shared], scale, method, bootstrap)
    return unpaired(list(a.values()), list(b.values()), bootstrap)


def paired(differences: Sequence[float], scale: float, method: str, bootstrap: bool = False) -> Difference:
    """The paired t test. `scale` is the size of the values that were subtracted."""
    found = np.asarray(differences, dtype=float)
    n, mean, sd = len(found), mean_of(found), deviation(found)
    if sd <= ROUNDING * scale:
        return same_everywhere(0.0 if abs(mean) <= ROUNDING * scale else mean, n, True)
    if not math.isfinite(sd):
        return Difference(mean, n, True, method)
    checked = resampled([found]) if bootstrap and n >= BOOTSTRAP_FROM else None
    return tested(mean, sd / math.sqrt(n), n - 1, Difference(mean, n, True, method, bootstrap=checked))


def unpaired(a: Sequence[float], b: Sequence[float], bootstrap: bool = False) -> Difference:
    """Welch's t test: the two sides may differ in their spread."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    mean, n = mean_of(x) - mean_of(y), min(len(x), len(y))
    if n < 2:
        return Difference(mean, n, False, "one seed")
    parts = [deviation(side) ** 2 / len(side) for side in (x, y)]
    variance = sum(parts)
    if variance == 0:
        scale = max(abs(x[0]), abs(y[0]))
        return same_everywhere(0.0 if abs(mean) <= ROUNDING * scale else mean, n, False)
    method = f"Welch t, {len(x)} and {len(y)} seeds"
    if not math.isfinite(variance):
        return Difference(mean, n, False, method)
    freedom = variance**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (x, y), strict=True))
    checked = resampled([x, y]) if bootstrap and n >= BOOTSTRAP_FROM else None
    return tested(mean, math.sqrt(variance), freedom, Difference(mean, n, False, method, bootstrap=checked))


def same_everywhere(difference: float, n: int, paired: bool) -> Difference:
    """Nothing varies over seeds: no difference at all, or one whose noise these seeds do not show."""
    if difference == 0:
        return Difference(0.0, n, paired, "identical", 0.0, 0.0, 1.0)
    return Difference(difference, n, paired, "the same on every seed")


def tested(mean: float, error: float, freedom: float, of: Difference) -> Difference:
    half = quantile(freedom) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Difference(of.difference, of.n, of.paired, of.method, mean - half, mean + half, p, of.bootstrap)


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


def resampled(samples: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """95 % BCa bootstrap interval of a mean, or of the difference of two.

    B. Efron, Better bootstrap confidence intervals, 1987; for several samples as scipy.stats.bootstrap has it.
    """
    random, signs = np.random.default_rng(0), (1.0, -1.0)
    sides = list(zip(signs, samples, strict=False))
    drawn = sum(sign * random.choice(side, (RESAMPLES, len(side))).mean(axis=1) for sign, side in sides)
    found = sum(sign * side.mean() for sign, side in sides)
    bias = ndtri(np.mean(drawn < found) + np.mean(drawn == found) / 2)
    pulls = [sign * (side - side.mean()) / len(side) for sign, side in sides]  # of each value on the mean
    cubes, squares = (sum(float((pull**power).sum()) for pull in pulls) for power in (3, 2))
    shifted = bias + ndtri(np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    low, high = np.quantile(drawn, ndtr(bias + shifted / (1 - cubes / (6 * squares**1.5) * shifted)))
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def mean_of(values: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def deviation(values: np.ndarray) -> float:
    """Standard deviation (n - 1); 0 where it is no more than rounding. Two or more finite values."""
    with np.errstate(all="ignore"):
        sd = float(np.std(values, ddof=1))
    return 0.0 if sd <= ROUNDING * float(np.max(np.abs(values))) else sd
