"""The answer: which configuration is best in a metric, by how much, and whether that is more than seed noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from uft.report import stats
from uft.report.groups import Grouping
from uft.report.metrics import Headline, listed, plural
from uft.report.runs import LoadedRun

SELECTED = "was chosen on these same numbers"
ALONE = "There is only one configuration, so there is nothing to compare it with."
BETTER = {"max": "more is better", "min": "less is better"}
UNKNOWN_NOISE = {
    "one seed": "one seed: nothing can be said about noise",
    "the same on every seed": "the same on every seed, so these seeds show no noise to measure it by",
}

Figures = Sequence[Mapping[str, Mapping[Hashable, float]]]
"""For every group, the figures of its finished runs: metric -> seed -> value, the mean of several runs of a seed."""


def figures_of(runs: Sequence[LoadedRun], grouping: Grouping) -> Figures:
    table = []
    for group in grouping.groups:
        found: dict[str, dict[Hashable, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in group.runs:
            seed = grouping.seeds.get(number)
            key = ("run", number) if seed is None else seed  # a run without a seed is a draw of its own
            for metric, value in runs[number].figures.items() if runs[number].finished else ():
                found[metric][key].append(value)
        table.append(
            {
                metric: {seed: v[0] if len(v) == 1 else stats.spread(v).mean for seed, v in seeds.items()}
                for metric, seeds in found.items()
            }
        )
    return table


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
    """The ranking of one metric. Groups by their numbers."""

    headline: Headline
    best: int
    runner_up: int | None
    baseline: int | None  # the best of those that count as one: each objective is taken at the best it can do
    comparisons: tuple[Comparison, ...]  # of the best with the runner-up, the baseline, then the others
    words: tuple[str, ...]  # sentences, the answer first


def judge(headline: Headline, figures: Figures, names: Sequence[str], baselines: Sequence[int]) -> Verdict | None:
    """The verdict on one metric; None where no configuration has a finite figure for it. `names`: of the groups."""
    spreads = {
        group: stats.spread([*of[headline.metric].values()])
        for group, of in enumerate(figures)
        if headline.metric in of
    }
    finite = [group for group, spread in spreads.items() if math.isfinite(spread.mean)]
    if not finite:
        return None
    ranked = sorted(finite, key=lambda group: -headline.sign * spreads[group].mean)
    best, runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    baseline = next((group for group in ranked if group in baselines), None)
    # those that are put into words come first, and are checked by a bootstrap too
    told = [group for group in (runner_up, baseline) if group not in (None, best)]
    others = [group for group in dict.fromkeys([*told, *ranked]) if group is not None and group != best]
    values = {group: figures[group][headline.metric] for group in ranked}
    found = [stats.compare(values[best], values[other], bootstrap=other in told) for other in others]
    adjusted = stats.holm([difference.p for difference in found])
    comparisons = [Comparison(best, b, d, p) for b, d, p in zip(others, found, adjusted, strict=True)]

    words = [f"{names[best]} is best with {with_interval(spreads[best])}."]
    the_baseline = "the baseline" if len(baselines) == 1 else f"the best of {len(baselines)} baseline configurations"
    roles: dict[int | None, list[str]] = {runner_up: ["the runner-up"]}
    roles.setdefault(baseline, []).append(the_baseline)
    tests = sum(difference.p is not None for difference in found)
    for comparison in comparisons:
        if comparison.b in roles:
            other = f"{' and '.join(roles[comparison.b])}, {names[comparison.b]}"
            words.append(lead(comparison, headline.sign, other, tests))
    if baseline == best and len(names) > 1:
        words.append(f"It is {the_baseline} itself.")
    if len(comparisons) > 1:
        words.append(
            f"The best of {len(ranked)} {SELECTED}, so its lead is flattered; "
            "seeds that took no part in the choice would tell."
        )
    if len(names) == 1:
        words.append(ALONE)
    for why, left_out in (
        ("a seed ended at a figure that is not finite", [group for group in spreads if group not in ranked]),
        ("no finished run has this figure", [group for group in range(len(names)) if group not in spreads]),
    ):
        if left_out:
            words.append(f"Not ranked, because {why}: {listed([names[group] for group in left_out])}.")
    return Verdict(headline, best, runner_up, baseline, tuple(comparisons), tuple(words))


def with_interval(found: stats.Spread) -> str:
    """`0.81 (95 % interval 0.79 to 0.83, 3 seeds)`"""
    seeds = plural(found.n, "seed")
    if found.low is not None and found.high is not None:
        return f"{found.mean:.4g} (95 % interval {found.low:.4g} to {found.high:.4g}, {seeds})"
    return f"{found.mean:.4g} ({seeds}{', all the same' if found.n > 1 else ''})"


def lead(comparison: Comparison, sign: int, other: str, tests: int) -> str:
    """The sentence on how far the best is ahead of `other`, and whether that is more than noise."""
    found, inside = comparison.found, comparison.inside_noise
    if inside is None:
        noise = UNKNOWN_NOISE.get(found.method, "its noise cannot be measured")
    else:
        noise = "inside seed noise" if inside else "more than seed noise"
    if found.method == "identical":
        return f"It equals {other}, on every seed: {noise}."
    facing = sign if sign * found.difference > 0 else -sign
    way = "ahead of" if facing == sign else "behind"
    text = f"It is {abs(found.difference):.4g} {way} {other}" if found.difference else f"Its mean is that of {other}"
    if found.low is None or found.high is None or found.p is None:
        return f"{text}: {noise}."
    low, high = sorted((facing * found.low, facing * found.high))
    p = f"p {probability(found.p)}"
    if tests > 1 and comparison.adjusted is not None:
        p += f", {probability(comparison.adjusted).removeprefix('= ')} after Holm's adjustment for {tests} comparisons"
    if found.bootstrap is not None:
        excludes, t_excludes = (not low <= 0 <= high for low, high in (found.bootstrap, (found.low, found.high)))
        disagrees = f"disagrees: its interval {'excludes' if excludes else 'includes'} zero"
        p += f"; a bootstrap {'agrees' if excludes == t_excludes else disagrees}"
    return f"{text} (95 % interval {low:.4g} to {high:.4g}, {found.method}, {p}): {noise}."


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
