"""The answer: which configuration is best in what, by how much, and whether that is more than seed noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from uft.report import stats
from uft.report.figures import Figures
from uft.report.headlines import Headline


@dataclass(frozen=True)
class Comparison:
    """The best group `a` against `b`, by their numbers; `adjusted` is p over all comparisons of the metric."""

    a: int
    b: int
    found: stats.Difference
    adjusted: float | None

    @property
    def inside_noise(self) -> bool | None:
        return None if self.adjusted is None else self.adjusted >= stats.ALPHA


@dataclass(frozen=True)
class Verdict:
    """What the figures say about one metric. Groups by their numbers."""

    headline: Headline
    ranked: tuple[int, ...]  # best first
    missing: tuple[int, ...]  # no finished run has the figure
    left_out: tuple[int, ...]  # a seed ended at a figure that is not finite
    baselines: tuple[int, ...]  # all that count as one
    comparisons: tuple[Comparison, ...]  # with the runner-up, the baseline, then the others

    @property
    def best(self) -> int:
        return self.ranked[0]

    @property
    def runner_up(self) -> int | None:
        return self.ranked[1] if len(self.ranked) > 1 else None

    @property
    def baseline(self) -> int | None:
        """The best of the baselines: each objective is taken at the best it can do."""
        return next((group for group in self.ranked if group in self.baselines), None)


def judge(headline: Headline, figures: Figures, baselines: Sequence[int]) -> Verdict | None:
    """The verdict on one metric; None where no configuration has a finite figure for it."""
    spreads = {group: figures.spread(group, headline.metric) for group in range(len(figures.groups))}
    means = {group: headline.sign * found.mean for group, found in spreads.items() if found is not None}
    ranked = sorted((group for group in means if math.isfinite(means[group])), key=lambda group: -means[group])
    if not ranked:
        return None
    missing = tuple(group for group in spreads if group not in means)
    left_out = tuple(group for group in means if group not in ranked)
    verdict = Verdict(headline, tuple(ranked), missing, left_out, tuple(baselines), ())
    return replace(verdict, comparisons=compare_all(verdict, figures))


def compare_all(verdict: Verdict, figures: Figures) -> tuple[Comparison, ...]:
    """The best against every other configuration. Those that are put into words are checked by a bootstrap too."""
    best = verdict.best
    told = [group for group in (verdict.runner_up, verdict.baseline) if group not in (None, best)]
    others = [group for group in dict.fromkeys([*told, *verdict.ranked]) if group is not None and group != best]
    values = {group: figures.values[group][verdict.headline.metric] for group in verdict.ranked}
    found = [stats.compare(values[best], values[other], bootstrap=other in told) for other in others]
    adjusted = stats.holm([difference.p for difference in found])
    return tuple(Comparison(best, b, d, p) for b, d, p in zip(others, found, adjusted, strict=True))
