"""Seed noise: means with intervals, differences of two configurations, and Holm's adjustment for many comparisons.

Tests and intervals are scipy.stats'. This module decides which one applies, and when the seeds show no noise to test.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """a - b, in the order of `compare.json`. The interval is not adjusted for other comparisons. None: unknown."""

    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided
    p_adjusted: float | None = None  # over all comparisons of the metric
    n: int  # pairs, or the values of the smaller side
    paired: bool
    method: str
    inside_noise: bool | None = None
    bootstrap: tuple[float, float] | None = None  # BCa, as a check of the t interval


def spread(values: Sequence[float]) -> Spread:
    from scipy.stats import t

    n, mean = len(values), mean_of(values)
    if n < 2 or not math.isfinite(mean):
        return Spread(n, mean)
    sd = deviation(values)
    if sd == 0 or not math.isfinite(sd):
        return Spread(n, mean, sd)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def compare(a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, bootstrap: bool = False) -> Difference:
    """The difference of two configurations, given by seed; all values are finite, neither side is empty.

    Seeds that both have are compared pair by pair when there are at least two of them: a seed decides the order of the
    rows, so its luck is in both. Otherwise Welch's test is made (the two sides may differ in their spread), and none
    where a side has a single seed.
    """
    from scipy.stats import bootstrap as resample
    from scipy.stats import ttest_1samp, ttest_ind

    shared = [seed for seed in a if seed in b]
    paired = len(shared) > 1
    if paired:
        samples = [[a[seed] - b[seed] for seed in shared]]
        every = len(shared) == len(a) == len(b)
        count = len(shared)
        method = f"paired t, {count} seeds" if every else f"paired t over the {count} seeds that both have"
    else:
        samples = [[*a.values()], [*b.values()]]
        method = f"Welch t, {len(a)} and {len(b)} seeds"

    def difference(first: Any, *second: Any, axis: int = -1) -> Any:
        return np.mean(first, axis) - sum(np.mean(sample, axis) for sample in second)

    with np.errstate(all="ignore"):
        mean = float(difference(*samples))
    n = min(map(len, samples))
    found = Difference(difference=mean, n=n, paired=paired, method=method)
    if n < 2:
        return replace(found, method="one seed")
    noise = max(map(deviation, samples))
    arithmetic = ROUNDING * max(abs(value) for side in (a, b) for value in side.values())
    if noise <= arithmetic and abs(mean) <= arithmetic:
        return replace(found, difference=0.0, method="identical", low=0.0, high=0.0, p=1.0)
    if noise <= arithmetic:
        return replace(found, method="the same on every seed")
    if not math.isfinite(noise):
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples that hardly vary: their interval is as narrow, or nan
        test = ttest_1samp(samples[0], 0.0) if paired else ttest_ind(*samples, equal_var=False)
        low, high = test.confidence_interval(LEVEL)
        found = replace(found, low=float(low), high=float(high), p=float(test.pvalue))
        if not bootstrap or n < BOOTSTRAP_FROM:
            return found
        settings = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "rng": np.random.default_rng(0)}
        low, high = resample(samples, difference, **settings).confidence_interval
    return replace(found, bootstrap=(float(low), float(high))) if np.isfinite([low, high]).all() else found


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


def mean_of(values: Sequence[float]) -> float:
    with np.errstate(all="ignore"):
        return float(np.mean(values))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); 0 where it is no more than rounding. Two or more finite values."""
    with np.errstate(all="ignore"):
        sd = float(np.std(values, ddof=1))
    return 0.0 if sd <= ROUNDING * float(np.max(np.abs(values))) else sd
