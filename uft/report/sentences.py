"""A verdict in sentences, the answer first."""

from __future__ import annotations

from collections.abc import Sequence

from uft.report import stats
from uft.report.figures import Figures
from uft.report.headlines import Headline
from uft.report.summary import Comparison, Verdict
from uft.report.words import figure, listed, many

SELECTED = "was chosen on these same numbers"
ALONE = "There is only one configuration, so there is nothing to compare it with."
INSIDE, OUTSIDE = "inside seed noise", "more than seed noise"
UNKNOWN = {
    "one seed": "one seed: nothing can be said about noise",
    "the same on every seed": "the same on every seed, so these seeds show no noise to measure it by",
}
NOT_FINITE, MISSING = "a seed ended at a figure that is not finite", "no finished run has this figure"
BETTER = {"max": "more is better", "min": "less is better"}


def sentences(verdict: Verdict, figures: Figures) -> list[str]:
    """What is best, how far ahead of the runner-up and the baseline, and what to keep in mind."""
    names = [group.name for group in figures.groups]
    found = figures.spread(verdict.best, verdict.headline.metric)
    assert found is not None, "the best has figures"
    said = [f"{names[verdict.best]} is best with {told(found)}."]
    said += leads(verdict, names)
    if len(verdict.comparisons) > 1:
        count = len(verdict.ranked)
        said.append(
            f"The best of {count} {SELECTED}, so its lead is flattered; "
            "seeds that took no part in the choice would tell."
        )
    if len(names) == 1:
        said.append(ALONE)
    for why, who in ((NOT_FINITE, verdict.left_out), (MISSING, verdict.missing)):
        said += [f"Not ranked, because {why}: {listed([names[group] for group in who])}."] if who else []
    return said


def leads(verdict: Verdict, names: Sequence[str]) -> list[str]:
    """A sentence on the runner-up and one on the baseline, or one on both."""
    tests = sum(comparison.found.p is not None for comparison in verdict.comparisons)
    count = len(verdict.baselines)
    baseline = "the baseline" if count == 1 else f"the best of {count} baseline configurations"
    roles: dict[int | None, list[str]] = {verdict.runner_up: ["the runner-up"]}
    roles.setdefault(verdict.baseline, []).append(baseline)
    said = [
        ahead(comparison, verdict.headline, f"{' and '.join(roles[comparison.b])}, {names[comparison.b]}", tests)
        for comparison in verdict.comparisons
        if comparison.b in roles
    ]
    itself = verdict.baseline == verdict.best and len(names) > 1
    return [*said, f"It is {baseline} itself."] if itself else said


def told(found: stats.Spread) -> str:
    """`0.81 (95 % interval 0.79 to 0.83, 3 seeds)`"""
    seeds = many(found.n, "seed")
    if found.low is not None and found.high is not None:
        return f"{figure(found.mean)} (95 % interval {figure(found.low)} to {figure(found.high)}, {seeds})"
    return f"{figure(found.mean)} ({seeds}{', all the same' if found.n > 1 else ''})"


def ahead(comparison: Comparison, headline: Headline, other: str, tests: int) -> str:
    """How far the best is ahead of another one, and whether that is more than noise."""
    found = comparison.found
    if found.method == "identical":
        return f"It equals {other}, on every seed: {verdict_on(comparison)}."
    facing = headline.sign if headline.sign * found.difference > 0 else -headline.sign
    way = "ahead of" if facing == headline.sign else "behind"
    text = (
        f"It is {figure(abs(found.difference))} {way} {other}" if found.difference else f"Its mean is that of {other}"
    )
    if found.low is None or found.high is None or found.p is None:
        return f"{text}: {verdict_on(comparison)}."
    low, high = sorted((facing * found.low, facing * found.high))
    p = f"p {probability(found.p)}"
    if tests > 1 and comparison.adjusted is not None:
        p += f", {probability(comparison.adjusted).removeprefix('= ')} after Holm's adjustment for {tests} comparisons"
    inner = f"95 % interval {figure(low)} to {figure(high)}, {found.method}, {p}{checked(found)}"
    return f"{text} ({inner}): {verdict_on(comparison)}."


def verdict_on(comparison: Comparison) -> str:
    inside = comparison.inside_noise
    if inside is not None:
        return INSIDE if inside else OUTSIDE
    return UNKNOWN.get(comparison.found.method, "its noise cannot be measured")


def checked(found: stats.Difference) -> str:
    """Whether the bootstrap says of zero what the t interval says."""
    if found.bootstrap is None or found.low is None or found.high is None:
        return ""
    excludes, t_excludes = (not low <= 0 <= high for low, high in (found.bootstrap, (found.low, found.high)))
    if excludes == t_excludes:
        return "; a bootstrap agrees"
    return f"; a bootstrap disagrees: its interval {'excludes' if excludes else 'includes'} zero"


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
