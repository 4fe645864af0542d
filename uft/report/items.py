"""Evidence by the row: two configurations on the same held-out rows, and the prompts that flipped between them.

A metric is a sum over rows divided by a count (items.jsonl), so the difference of two runs is a mean over rows. With
one seed it is tested over rows alone; with several the rows and the seeds are both drawn, and both are in the interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from uft.report.groups import Grouping
from uft.report.metrics import encodable, truncated
from uft.report.runs import LoadedRun

LEVEL = 0.95
FLIPPED = 40  # prompts that are listed, at most
LONGEST_EXCERPT = 400  # characters of a prompt or an answer

RowKey = tuple[str, str]  # source, row
Column = Mapping[RowKey, tuple[float, float]]  # (sum, count) of a metric


@dataclass(frozen=True, kw_only=True)
class RowEvidence:
    """a - b on the rows that every run of both has, over the seeds that both have. None: unknown."""

    rows: int
    seeds: int
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None  # two-sided, not adjusted
    method: str
    better: int | None = None  # rows that a alone has right (of several seeds: on most of them); None: no verdicts
    worse: int | None = None
    flipped: Sequence[Mapping[str, Any]] = ()
    lost: Sequence[str] = ()  # about rows that cannot be read, and are left out


def rows_between(runs: Sequence[LoadedRun], grouping: Grouping, metric: str, a: int, b: int) -> RowEvidence | None:
    """What the rows say of groups `a` and `b`; None where they share no seed, or fewer than two rows."""
    sides = [by_seed(runs, grouping, group) for group in (a, b)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    columns = [[column_of(side[seed].items, metric) for seed in seeds] for side in sides]
    keys = []
    for key in columns[0][0] if seeds else ():
        of_runs = {column.get(key, (0.0, math.nan))[1] for side in columns for column in side}
        if len(of_runs) == 1 and min(of_runs) > 0:
            keys.append(key)
    if len(keys) < 2:
        return None
    sums = np.array([[[column[key][0] for key in keys] for column in side] for side in columns])  # (2, S, R)
    counts = np.array([columns[0][0][key][1] for key in keys])
    if not np.isfinite(sums).all():
        return None
    verdicts = bool(np.isin(sums, (0.0, 1.0)).all() and (counts == 1).all())
    lost = [f"{side[seed].name}: {note}" for side in sides for seed in seeds for note in side[seed].items_read[1]]
    evidence = replace(over_rows((sums[0] - sums[1]) / counts.mean(), verdicts), lost=lost)
    if not verdicts:
        return evidence
    most = sums.mean(1) > 0.5  # (2, R): right on most seeds
    better, worse = most[0] & ~most[1], most[1] & ~most[0]
    listed = [*np.flatnonzero(better), *np.flatnonzero(worse)][:FLIPPED]
    answers = [[{key_of(item): item for item in side[seed].items} for seed in seeds] for side in sides]
    flipped = []
    for at in listed:
        sign = 1 if better[at] else -1
        seed = int((sign * (sums[0, :, at] - sums[1, :, at])).argmax())  # one at which it did flip
        flipped.append(flip(keys[at], "a" if sign > 0 else "b", [side[seed][keys[at]] for side in answers]))
    return replace(evidence, better=int(better.sum()), worse=int(worse.sum()), flipped=flipped)


def by_seed(runs: Sequence[LoadedRun], grouping: Grouping, group: int) -> dict[Any, LoadedRun]:
    """The first finished run of every seed of a group."""
    first: dict[Any, LoadedRun] = {}
    for number in grouping.groups[group].runs:
        if runs[number].finished:
            first.setdefault(grouping.seeds.get(number), runs[number])
    return first


def key_of(item: Mapping[str, Any]) -> RowKey:
    return str(item.get("source")), str(item.get("row"))


def column_of(items: Iterable[Mapping[str, Any]], metric: str) -> Column:
    """A metric by row: `eval/NAME` of all rows, `eval/SOURCE/NAME` of those of a source."""
    source, _, name = metric.removeprefix("eval/").rpartition("/")
    column = {}
    for item in items if metric.startswith("eval/") else ():
        measures = item.get("measures")
        pair = measures.get(name) if isinstance(measures, dict) else None
        if source in ("", item.get("source")) and isinstance(pair, list) and len(pair) == 2:
            column[key_of(item)] = (float(pair[0]), float(pair[1]))
    return column


def flip(key: RowKey, right: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A prompt that flipped, with the answers of both sides at one seed."""
    prompt, *replies = (
        truncated(encodable(str(text or "")), LONGEST_EXCERPT)
        for text in (items[0].get("prompt"), *(i.get("reply") for i in items))
    )
    return {"row": encodable(key[1]), "right": right, "prompt": prompt, "a": replies[0], "b": replies[1]}


def over_rows(differences: np.ndarray, verdicts: bool) -> RowEvidence:
    """(seeds, rows) differences -> the test that fits.

    One seed: McNemar's exact test of verdicts (Q. McNemar, 1947), else a paired t test over rows. Several: a two-way
    random-effects interval; V(mean) = V(seed means) + V(row means) - V(residual) / (S R), each of which holds the
    residual once, with Satterthwaite's degrees of freedom; never narrower than the interval of the seeds alone.
    """
    from scipy.stats import binomtest, t

    seeds, rows = differences.shape
    mean = float(differences.mean())
    known: dict[str, Any] = {"rows": rows, "seeds": seeds, "difference": mean}
    of_rows = differences.mean(0)
    row_part = float(of_rows.var(ddof=1)) / rows
    if seeds == 1:
        if verdicts:
            wins, losses = int((of_rows > 0).sum()), int((of_rows < 0).sum())
            p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
            return RowEvidence(**known, p=p, method="McNemar")
        parts, method = [(row_part, rows - 1.0)], "paired t over rows"
    else:
        of_seeds = differences.mean(1)
        seed_part = float(of_seeds.var(ddof=1)) / seeds
        residual = differences - of_rows - of_seeds[:, None] + mean
        shared = float((residual**2).sum()) / ((seeds - 1) * (rows - 1)) / (seeds * rows)
        total = max(seed_part + row_part - shared, seed_part, row_part)
        freedom = total**2 / max(seed_part**2 / (seeds - 1) + row_part**2 / (rows - 1), 1e-300)
        parts, method = [(total, freedom), (seed_part, seeds - 1.0)], "rows and seeds"
    parts = [(variance, freedom) for variance, freedom in parts if variance > 0]
    if not parts:
        return RowEvidence(**known, method="the same on every row")
    half = max(float(t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance) for variance, freedom in parts)
    p = max(2 * float(t.sf(abs(mean) / math.sqrt(variance), freedom)) for variance, freedom in parts)
    return RowEvidence(**known, low=mean - half, high=mean + half, p=p, method=method)
