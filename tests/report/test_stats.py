"""The statistics against numbers worked by hand, and where there is nothing to compute."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uft.report.verdict import Spread, difference_of, holm, spread

RANDOM = np.random.default_rng(7)


def by_seed(values, first=0):
    return {first + number: float(value) for number, value in enumerate(values)}


def test_by_hand():
    """1, 2, 3: mean 2, sd 1, and t(2 df) at 97.5 % is 4.303 in any table."""
    found = spread([1, 2, 3])
    assert found.sd == 1
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    # differences 1, 2, 3 again, now of pairs: t = 2 / (1 / sqrt 3) = 3.464, two-sided p on 2 df
    pairs = difference_of({1: 2.0, 2: 4.0, 3: 6.0}, {3: 3.0, 2: 2.0, 1: 1.0})
    assert (pairs.difference, pairs.n, pairs.paired, pairs.method) == (2, 3, True, "paired t, 3 seeds")
    assert pairs.p == pytest.approx(1 - 3.464 / math.sqrt(2 + 3.464**2), abs=1e-3)  # closed form of 2 df
    assert pairs.high - 2 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_other_seeds_are_compared_by_welch():
    """By hand: variances 0.01/3 and 0.04/3 of the means, t = 0.5 / 0.1291, Satterthwaite's 2.94 degrees of freedom."""
    found = difference_of(by_seed([0.9, 1.0, 1.1]), by_seed([0.3, 0.5, 0.7], first=100))
    assert (found.n, found.paired, found.method) == (3, False, "Welch t, 3 and 3 seeds")
    assert found.difference == pytest.approx(0.5)
    assert (found.high - found.low) / 2 == pytest.approx(3.2211 * 0.1291, rel=1e-3)
    still = difference_of(by_seed([0.5, 0.5, 0.5]), by_seed([0.1, 0.2, 0.3], 10))  # one side does not vary
    assert (still.low, still.p < 0.05) == (pytest.approx(0.3 - 4.303 * 0.1 / math.sqrt(3), abs=1e-3), True)


def test_only_the_seeds_that_both_have_are_paired():
    found = difference_of({1: 1.0, 2: 2.0, 3: 9.0}, {1: 0.5, 2: 1.0, 4: 7.0})
    assert (found.difference, found.n, found.paired) == (0.75, 2, True)
    assert found.method == "paired t over the 2 seeds that both have"
    one_shared = difference_of({1: 1.0, 2: 2.0}, {1: 0.5, 3: 1.0})
    assert (one_shared.paired, one_shared.method) == (False, "Welch t, 2 and 2 seeds")


def test_one_seed_says_nothing_about_noise():
    assert spread([0.7]) == Spread(1, 0.7)
    for other in ({1: 0.5}, {2: 0.5}, {2: 0.5, 3: 0.6}):
        found = difference_of({1: 0.7}, other)
        assert (found.low, found.high, found.p, found.method) == (None, None, None, "one seed")


def test_values_that_do_not_vary():
    assert spread([0.1, 0.1, 0.1]) == Spread(3, pytest.approx(0.1), 0.0)
    for a, b in (({1: 0.3, 2: 0.5}, {1: 0.3, 2: 0.5}), ({1: 0.5, 2: 0.5}, {3: 0.5, 4: 0.5}), ({1: 0.0, 2: 0.0},) * 2):
        same = difference_of(a, b)
        assert (same.difference, same.low, same.high, same.p, same.method) == (0, 0, 0, 1, "identical")
    # 0.3 - 0.1 and 0.5 - 0.3 differ in the last bit: that is no spread
    for a, b in (({1: 0.3, 2: 0.5}, {1: 0.1, 2: 0.3}), ({1: 1.0, 2: 1.0}, {3: 0.8, 4: 0.8})):
        shifted = difference_of(a, b)
        assert (shifted.difference, shifted.p) == (pytest.approx(0.2), None)
        assert shifted.method == "the same on every seed"


def test_values_that_are_not_finite_or_at_the_end_of_the_range():
    for values in ([math.nan, 1.0], [math.inf, 1.0], [1.0, -math.inf]):
        found = spread(values)
        assert not math.isfinite(found.mean)
        assert (found.n, found.sd, found.low, found.high) == (2, None, None, None)
    assert spread([1e308, 1.7e308]).low is None
    found = difference_of({1: 1e308, 2: -1e308}, {1: -1e308, 2: 1e307})
    assert (found.low, found.p) == (None, None)
    assert difference_of({1: 1e200, 2: 2e200}, {3: 1e200, 4: 5e200}).p is None


def test_holms_adjustment():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]), "by hand"
    assert holm([0.04, None, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.06)]
    assert (holm([0.9, 0.8]), holm([0.02]), holm([])) == ([1, 1], [0.02], [])
    for ps in RANDOM.uniform(0, 0.2, (50, 6)):
        adjusted = holm(list(ps))
        assert min(adjusted) == pytest.approx(min(1, 6 * ps.min())), "no more than Bonferroni permits of the smallest"
        assert all(p <= a <= min(1, 6 * p) + 1e-12 for p, a in zip(ps, adjusted, strict=True))


def test_a_bootstrap_of_either_kind_needs_five_seeds():
    a, b = RANDOM.gamma(0.5, 0.2, 12), RANDOM.normal(0.7, 0.05, 12)  # skewed: its interval is not symmetric
    for first in (0, 100):
        found = difference_of(by_seed(a), by_seed(b, first), bootstrap=True)
        low, high = found.bootstrap
        assert found.low < low < found.difference < high < found.high + 0.1
        assert found.difference - low < 0.9 * (high - found.difference)
    assert difference_of(by_seed(a[:4]), by_seed(b[:4]), bootstrap=True).bootstrap is None
    assert difference_of(by_seed(a), by_seed(b)).bootstrap is None
