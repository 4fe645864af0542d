"""The answer: which configuration is best in a metric, by how much, and whether that is more than seed noise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from uft.report import stats
from uft.report.groups import Grouping
from uft.report.metrics import Headline, jsonable, listed, plural
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
        table.append({name: {seed: stats.mean_of(v) for seed, v in seeds.items()} for name, seeds in found.items()})
    return table


def judge(
    headline: Headline, figures: Figures, names: Sequence[str], baselines: Sequence[int]
) -> dict[str, Any] | None:
    """The ranking of one metric, as in `compare.json`; None where no configuration has a finite figure for it.

    `names` are those of the groups, `baselines` the groups that count as one: each objective is taken at the best it
    can do. Compared is the best with the runner-up, the baseline, then the others; `words` begin with the answer.
    """
    metric, sign = headline.metric, headline.sign
    spreads = {group: stats.spread([*of[metric].values()]) for group, of in enumerate(figures) if metric in of}
    ranked = sorted(
        (group for group, spread in spreads.items() if math.isfinite(spread.mean)),
        key=lambda group: -sign * spreads[group].mean,
    )
    if not ranked:
        return None
    best, *behind = ranked
    runner_up = next(iter(behind), None)
    baseline = next((group for group in ranked if group in baselines), None)
    the_baseline = "the baseline" if len(baselines) == 1 else f"the best of {len(baselines)} baseline configurations"
    roles: dict[int, list[str]] = defaultdict(list)  # of the groups that are put into words
    for group, role in ((runner_up, "the runner-up"), (baseline, the_baseline)):
        if group is not None and group != best:
            roles[group].append(role)
    others = dict.fromkeys([*roles, *behind])
    values = {group: figures[group][metric] for group in ranked}
    compared = [stats.compare(values[best], values[other], bootstrap=other in roles) for other in others]
    found = {
        other: replace(difference, p_adjusted=p, inside_noise=None if p is None else p >= stats.ALPHA)
        for other, difference, p in zip(others, compared, stats.holm([each.p for each in compared]), strict=True)
    }

    words = [f"{names[best]} is best with {with_interval(spreads[best])}."]
    tests = sum(difference.p is not None for difference in compared)
    words += [lead(found[b], sign, f"{' and '.join(roles[b])}, {names[b]}", tests) for b in others if b in roles]
    if baseline == best and len(names) > 1:
        words.append(f"It is {the_baseline} itself.")
    if len(others) > 1:
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
    places = {"best": best, "runner_up": runner_up, "baseline": baseline}
    record = {
        "metric": metric,
        "direction": headline.direction,
        "words": words,
        **{role: None if group is None else f"g{group}" for role, group in places.items()},
        "comparisons": [{"a": f"g{best}", "b": f"g{other}", **vars(each)} for other, each in found.items()],
    }
    return jsonable(record)


def with_interval(found: stats.Spread) -> str:
    """`0.81 (95 % interval 0.79 to 0.83, 3 seeds)`"""
    seeds = plural(found.n, "seed")
    if found.low is not None and found.high is not None:
        return f"{found.mean:.4g} (95 % interval {found.low:.4g} to {found.high:.4g}, {seeds})"
    return f"{found.mean:.4g} ({seeds}{', all the same' if found.n > 1 else ''})"


def lead(found: stats.Difference, sign: int, other: str, tests: int) -> str:
    """The sentence on how far the best is ahead of `other`, and whether that is more than noise."""
    noise = {True: "inside seed noise", False: "more than seed noise", None: "its noise cannot be measured"}
    said = UNKNOWN_NOISE.get(found.method, noise[found.inside_noise])
    if found.method == "identical":
        return f"It equals {other}, on every seed: {said}."
    facing = sign if sign * found.difference > 0 else -sign
    way = "ahead of" if facing == sign else "behind"
    text = f"It is {abs(found.difference):.4g} {way} {other}" if found.difference else f"Its mean is that of {other}"
    if found.low is None or found.high is None or found.p is None:
        return f"{text}: {said}."
    low, high = sorted((facing * found.low, facing * found.high))
    p = f"p {probability(found.p)}"
    if tests > 1 and found.p_adjusted is not None:
        p += f", {probability(found.p_adjusted).removeprefix('= ')} after Holm's adjustment for {tests} comparisons"
    if found.bootstrap is not None:
        excludes, t_excludes = (not low <= 0 <= high for low, high in (found.bootstrap, (found.low, found.high)))
        disagrees = f"disagrees: its interval {'excludes' if excludes else 'includes'} zero"
        p += f"; a bootstrap {'agrees' if excludes == t_excludes else disagrees}"
    return f"{text} (95 % interval {low:.4g} to {high:.4g}, {found.method}, {p}): {said}."


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
