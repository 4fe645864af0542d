"""Metrics of the evaluation: one function each, from one scored row to (sum, count).

Sums and counts add up over rows and sources; a metric whose count stays 0 is not reported. Log-probs are natural, of
whole sequences, in nats; the implicit reward is log pi(y|x) - log ref(y|x), that is with beta = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uft.data.rows import Row
from uft.objectives.terms import TIE
from uft.objectives.views import best_against_worst


@dataclass(frozen=True)
class Scored:
    """One completion under the policy and, if there is one, the reference: sums over its supervised tokens."""

    good: bool  # shown, chosen, labelled good, or scored at least 0.5
    tokens: int
    log_prob: float
    reward: float | None = None  # log pi - log ref


@dataclass(frozen=True)
class ScoredRow:
    completions: tuple[Scored, ...]
    pair: tuple[Scored, Scored] | None = None  # (better, worse)

    @property
    def margin(self) -> float | None:
        """Implicit reward of the better completion minus that of the worse, beta = 1."""
        if self.pair is None or self.pair[0].reward is None or self.pair[1].reward is None:
            return None
        return self.pair[0].reward - self.pair[1].reward


Sum = tuple[float, float]  # (sum, count)
NOTHING: Sum = (0.0, 0.0)


def pair_of(row: Row) -> tuple[int, int] | None:
    """(better, worse) completion: chosen and rejected, best and worst score, shown and first sampled; None: no pair."""
    parts = best_against_worst(row, 0)
    return None if parts is None else (parts[0].completion, parts[1].completion)


def nll(row: ScoredRow) -> Sum:
    """-log pi per token of good completions."""
    good = [c for c in row.completions if c.good]
    return -sum(c.log_prob for c in good), sum(c.tokens for c in good)


def log_prob(row: ScoredRow) -> Sum:
    """log pi of whole good completions."""
    good = [c.log_prob for c in row.completions if c.good]
    return sum(good), len(good)


def log_ratio(row: ScoredRow) -> Sum:
    """log pi - log ref per token of good completions: how much likelier they have become, or with a minus less likely.

    The other estimators of a divergence (r - 1 - log r with r = ref / pi) hold for samples of the policy. On rows that
    neither model has sampled a few tokens, which the policy made all but impossible, are all that such a mean shows.
    """
    found = [c for c in row.completions if c.good and c.reward is not None]
    return sum(c.reward or 0.0 for c in found), sum(c.tokens for c in found)


def _rewards(row: ScoredRow, good: bool) -> Sum:
    """Implicit reward of good completions (chosen, shown, labelled good, well scored), or of the others."""
    found = [c.reward for c in row.completions if c.good == good and c.reward is not None]
    return sum(found), len(found)


def _preferred(difference: float | None) -> Sum:
    """1 where the better side is ahead; a tie counts half. None: there is no pair."""
    if difference is None:
        return NOTHING
    return (0.5 if abs(difference) < TIE else float(difference > 0)), 1.0


MEASURES: dict[str, Callable[[ScoredRow], Sum]] = {
    "nll": nll,
    "log_prob": log_prob,
    "log_ratio": log_ratio,
    # how often the policy gives the better completion the higher log-prob (of whole sequences)
    "pair_accuracy": lambda row: _preferred(row.pair and row.pair[0].log_prob - row.pair[1].log_prob),
    # how often the better completion has the higher implicit reward; 0.5 before the first step
    "reward_accuracy": lambda row: _preferred(row.margin),
    "margin": lambda row: NOTHING if row.margin is None else (row.margin, 1.0),
    "chosen_reward": lambda row: _rewards(row, True),
    "rejected_reward": lambda row: _rewards(row, False),
}


class Tally(dict[str, Sum]):
    """Running sums and counts by name."""

    def add(self, found: Mapping[str, Sum]) -> None:
        for name, (value, number) in found.items():
            total, count = self.get(name, NOTHING)
            self[name] = (total + value, count + number)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.items() if count}


def measured(row: ScoredRow) -> dict[str, Sum]:
    """Every measure of one row."""
    return {name: measure(row) for name, measure in MEASURES.items()}


def mean_stderr(columns: Sequence[Sequence[Sum | None]], values: Sequence[float]) -> float | None:
    """The standard error of the mean of several metrics over the same rows; each metric is a ratio of sums over rows.

    Linearised: a row's share in the mean is (sum - value * count) / mean count. None where a metric is no such ratio.
    """
    shares = np.zeros(len(columns[0]))
    for column, value in zip(columns, values, strict=True):
        if any(one is None for one in column) or len(column) < 2:
            return None
        sums, counts = np.array(column, dtype=float).T
        if not math.isclose(sums.sum() / counts.sum(), value, rel_tol=1e-6, abs_tol=1e-9):
            return None
        shares += (sums - value * counts) / counts.mean() / len(columns)
    return float(shares.std(ddof=1) / math.sqrt(len(shares)))
