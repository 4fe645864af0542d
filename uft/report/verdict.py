"""The answer: which configuration is best in a metric, by how much, and whether that is more than seed noise.

Below it the statistics: means with intervals, differences of two configurations, Holm's adjustment. Tests and intervals
are scipy.stats'; this module decides which one applies, and when the seeds show no noise to test.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from uft.report.groups import Grouping
from uft.report.items import RowEvidence
from uft.report.metrics import Headline, is_share, jsonable, listed, plural
from uft.report.runs import LoadedRun

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # a difference with an adjusted p below it is more than noise
ROUNDING = 1e-9  # a spread below this share of the values themselves is arithmetic, not noise
BOOTSTRAP_FROM = 5  # seeds; fewer say nothing about the shape of a distribution
RESAMPLES = 10_000
POWER, MOST_SEEDS = 0.8, 1000

SELECTED = "was chosen on these same numbers"
ALONE = "There is only one configuration, so there is nothing to compare it with."
BETTER = {"max": "more is better", "min": "less is better"}
UNKNOWN_NOISE = {
    "one seed": "one seed: nothing can be said about noise",
    "the same on every seed": "the same on every seed, so these seeds show no noise to measure it by;"
    " it is not among the comparisons that are tested",
}

Figures = Sequence[Mapping[str, Mapping[Hashable, float]]]
"""For every group, the figures of its finished runs: metric -> seed -> value, the mean of several runs of a seed."""


def figures_of(runs: Sequence[LoadedRun], grouping: Grouping) -> Figures:
    table = []
    for group in grouping.groups:
        by_metric: dict[str, dict[Hashable, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in group.runs:
            seed = grouping.seeds.get(number)
            key = ("run", number) if seed is None else seed  # a run without a seed is a draw of its own
            for metric, value in runs[number].figures.items() if runs[number].finished else ():
                by_metric[metric][key].append(value)
        table.append({name: {seed: mean_of(v) for seed, v in seeds.items()} for name, seeds in by_metric.items()})
    return table


def judge(
    headline: Headline,
    figures: Figures,
    names: Sequence[str],
    baselines: Sequence[int],
    by_row: Callable[[str, int, int], RowEvidence | None] = lambda metric, a, b: None,
) -> dict[str, Any] | None:
    """The ranking of one metric, as in `compare.json`; None where no configuration has a finite figure for it.

    `names` are those of the groups, `baselines` the groups that count as one: each objective is taken at the best it
    can do. Compared is the best with the runner-up, the baseline, then the others; `words` begin with the answer.
    `leading` are the best and those that are not worse beyond seed noise; `beyond_noise`: the best is ahead of all.
    `by_row`: what the rows say of two groups, asked for the runner-up and the baseline.
    """
    metric, sign = headline.metric, headline.sign
    share = is_share(metric)
    spreads = {group: spread([*of[metric].values()], share) for group, of in enumerate(figures) if metric in of}
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
    differences = adjusted({b: difference_of(values[best], values[b], bootstrap=b in roles) for b in others})
    differences |= {b: replace(differences[b], rows=by_row(metric, best, b)) for b in roles}

    equal = [group for group in behind if spreads[group].mean == spreads[best].mean]
    beyond_noise = bool(behind) and all(each.inside_noise is False for each in differences.values())
    verb = "is best with" if beyond_noise else "has the best mean," if behind else "has"
    if equal:
        verb = f"has the same mean as {listed([names[group] for group in equal])},"
    words = [f"{'None is best alone: ' if equal else ''}{names[best]} {verb} {with_interval(spreads[best])}."]
    tests = sum(difference.p is not None for difference in differences.values())
    for b in (b for b in others if b in roles):
        words.append(lead(differences[b], sign, f"{' and '.join(roles[b])}, {names[b]}", tests))
        words += [*of_power(differences[b]), *of_rows(differences[b].rows, sign, names[b])]
    if baseline == best and len(names) > 1:
        words.append(f"This is {the_baseline}.")
    if len(others) > 1:
        words.append(f"The best of {len(ranked)} {SELECTED}, so the lead is optimistic: confirm it on new seeds.")
    words += [ALONE] if len(names) == 1 else []
    words += left_out(names, spreads, ranked)
    places = {"best": best, "runner_up": runner_up, "baseline": baseline}
    level = [b for b in behind if differences[b].inside_noise or b in equal]
    record = {
        "metric": metric,
        "direction": headline.direction,
        "words": words,
        **{role: None if group is None else f"g{group}" for role, group in places.items()},
        "leading": [f"g{group}" for group in (best, *level)],
        "beyond_noise": beyond_noise,
        "comparisons": [{"a": f"g{best}", "b": f"g{other}", **asdict(each)} for other, each in differences.items()],
        "against_baseline": [] if baseline is None else against(baseline, values),
    }
    return jsonable(record)


def left_out(names: Sequence[str], measured: Collection[int], ranked: Collection[int]) -> Iterator[str]:
    """Sentences on the groups that have no rank."""
    for why, without in (
        ("a seed ended at a figure that is not finite", [group for group in measured if group not in ranked]),
        ("no finished run has this figure", [group for group in range(len(names)) if group not in measured]),
    ):
        if without:
            yield f"Not ranked, because {why}: {listed([names[group] for group in without])}."


def against(baseline: int, values: Mapping[int, Mapping[Hashable, float]]) -> list[dict[str, Any]]:
    """Every other group minus the baseline, the p-values adjusted for these comparisons."""
    others = {group: difference_of(values[group], values[baseline]) for group in values if group != baseline}
    kept = ("difference", "low", "high", "p", "n", "paired", "method", "p_adjusted", "inside_noise")
    return [
        {"group": f"g{group}", **{name: getattr(difference, name) for name in kept}}
        for group, difference in adjusted(others).items()
    ]


def with_interval(spread: Spread) -> str:
    """`0.81 (95 % interval 0.79 to 0.83, 3 seeds)`"""
    seeds = plural(spread.n, "seed")
    if spread.low is not None and spread.high is not None:
        return f"{spread.mean:.4g} (95 % interval {spread.low:.4g} to {spread.high:.4g}, {seeds})"
    return f"{spread.mean:.4g} ({seeds}{', all the same' if spread.n > 1 else ''})"


def lead(gap: Difference, sign: int, other: str, tests: int) -> str:
    """The sentence on how far the best is ahead of `other`, and whether that is more than noise."""
    noise = {True: "inside seed noise", False: "more than seed noise", None: "its noise cannot be measured"}
    noise_text = UNKNOWN_NOISE.get(gap.method, noise[gap.inside_noise])
    if gap.method == "identical":
        return f"It equals {other}, on every seed: {noise_text}."
    facing = sign if sign * gap.difference > 0 else -sign
    way = "ahead of" if facing == sign else "behind"
    text = f"It is {abs(gap.difference):.4g} {way} {other}" if gap.difference else f"Its mean is that of {other}"
    if gap.low is None or gap.high is None or gap.p is None:
        return f"{text}: {noise_text}."
    low, high = sorted((facing * gap.low, facing * gap.high))
    p = f"p {probability(gap.p)}"
    if tests > 1 and gap.p_adjusted is not None:
        p += f", {probability(gap.p_adjusted).removeprefix('= ')} after Holm's adjustment for {tests} comparisons"
    if gap.bootstrap is not None:
        excludes, t_excludes = (not low <= 0 <= high for low, high in (gap.bootstrap, (gap.low, gap.high)))
        disagrees = f"disagrees: its interval {'excludes' if excludes else 'includes'} zero"
        p += f"; a bootstrap {'agrees' if excludes == t_excludes else disagrees}"
    return f"{text} (95 % interval {low:.4g} to {high:.4g}, {gap.method}, {p}): {noise_text}."


def of_power(gap: Difference) -> Iterator[str]:
    """What these seeds could have shown, where they showed nothing."""
    if not gap.inside_noise or gap.detectable is None:
        return
    enough = f"more than {MOST_SEEDS}" if gap.seeds_needed is None else f"about {gap.seeds_needed}"
    yield (
        f"A difference of {gap.detectable:.2g} would have been seen in four cases of five;"
        f" one of this size takes {enough} seeds."
    )


def of_rows(evidence: RowEvidence | None, sign: int, other: str) -> Iterator[str]:
    """The sentences on the same rows under both, and the prompts that flipped."""
    if evidence is None or evidence.p is None:
        return
    yield from (f"{note}." for note in evidence.lost)
    noise = f"{'inside' if evidence.p >= ALPHA else 'more than'} the noise of the rows"
    flips = f"right on {evidence.better} that {other} has wrong, wrong on {evidence.worse} that {other} has right"
    if evidence.method == "McNemar":
        p = probability(evidence.p)
        yield f"On the same {evidence.rows} rows it is {flips} (McNemar, p {p}): {noise}, for one seed."
        return
    facing = sign if sign * evidence.difference > 0 else -sign
    low, high = sorted((facing * (evidence.low or 0.0), facing * (evidence.high or 0.0)))
    interval = f"95 % interval {low:.4g} to {high:.4g}, p {probability(evidence.p)}"
    if evidence.seeds == 1:
        way = "ahead" if facing == sign else "behind"
        ahead = f"{abs(evidence.difference):.4g} {way}"
        yield f"On the same {evidence.rows} rows it is {ahead} ({interval}): {noise}, for one seed."
        return
    yield f"With the choice of the {evidence.rows} rows counted too: {interval}."
    if evidence.better is not None:
        yield f"On most seeds it is {flips}."


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


# --- Statistics


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
    detectable: float | None = None  # a true difference of this size gives p < 0.05 in four cases of five
    seeds_needed: int | None = None  # of each side, for the difference that was found; None: more than MOST_SEEDS
    rows: RowEvidence | None = None


def spread(values: Sequence[float], share: bool = False) -> Spread:
    """`share`: the values are shares, and so is the interval. It is Wilson's (E. B. Wilson, 1927) with t for z and, for
    n, the number of verdicts whose standard error would be that of the seeds: p (1 - p) / se^2."""
    from scipy.stats import t

    n, mean = len(values), mean_of(values)
    if n < 2 or not math.isfinite(mean):
        return Spread(n, mean)
    sd = deviation(values)
    if sd == 0 or not math.isfinite(sd):
        return Spread(n, mean, sd)
    quantile, error = float(t.ppf((1 + LEVEL) / 2, n - 1)), sd / math.sqrt(n)
    middle, half = mean, quantile * error
    if share and 0 < mean < 1:
        pull = (half**2) / (mean * (1 - mean))  # t^2 / n
        middle = (mean + pull / 2) / (1 + pull)
        half = math.sqrt(half**2 + pull**2 / 4) / (1 + pull)
    return Spread(n, mean, sd, middle - half, middle + half)


def difference_of(a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, bootstrap: bool = False) -> Difference:
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
    known = Difference(difference=mean, n=n, paired=paired, method=method)
    if n < 2:
        return replace(known, method="one seed")
    noise = max(map(deviation, samples))
    arithmetic = ROUNDING * max(abs(value) for side in (a, b) for value in side.values())
    if noise <= arithmetic and abs(mean) <= arithmetic:
        return replace(known, difference=0.0, method="identical", low=0.0, high=0.0, p=1.0)
    if noise <= arithmetic:
        return replace(known, method="the same on every seed")
    if not math.isfinite(noise):
        return known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples that hardly vary: their interval is as narrow, or nan
        test = ttest_1samp(samples[0], 0.0) if paired else ttest_ind(*samples, equal_var=False)
        low, high = test.confidence_interval(LEVEL)
        known = replace(known, low=float(low), high=float(high), p=float(test.pvalue))
        known = replace(known, **power(mean, [deviation(sample) for sample in samples], [*map(len, samples)], test.df))
        if not bootstrap or n < BOOTSTRAP_FROM:
            return known
        settings = {"n_resamples": RESAMPLES, "confidence_level": LEVEL, "rng": np.random.default_rng(0)}
        low, high = resample(samples, difference, **settings).confidence_interval
    return replace(known, bootstrap=(float(low), float(high))) if np.isfinite([low, high]).all() else known


def power(mean: float, deviations: Sequence[float], counts: Sequence[int], freedom: float) -> dict[str, Any]:
    """`detectable` and `seeds_needed` of a t test of one sample of differences, or of two: (t_0.975 + t_0.8) se.

    Not adjusted for other comparisons; both sides get the same number of seeds.
    """
    from scipy.stats import t

    def quantiles(freedom: Any) -> Any:
        return t.ppf((1 + LEVEL) / 2, freedom) + t.ppf(POWER, freedom)

    error = math.sqrt(sum(sd**2 / n for sd, n in zip(deviations, counts, strict=True)))
    n = np.arange(2, MOST_SEEDS + 1)
    detectable = quantiles(len(counts) * (n - 1)) * math.hypot(*deviations) / np.sqrt(n)
    enough = n[detectable <= abs(mean)]
    found = {"detectable": float(quantiles(freedom)) * error}
    return {**found, "seeds_needed": int(enough[0]) if len(enough) else None}


def adjusted(family: Mapping[int, Difference]) -> dict[int, Difference]:
    """Differences that are tested together, with their adjusted p-values and whether each is inside seed noise."""
    ps = holm([difference.p for difference in family.values()])
    return {
        group: replace(difference, p_adjusted=p, inside_noise=None if p is None else p >= ALPHA)
        for (group, difference), p in zip(family.items(), ps, strict=True)
    }


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
