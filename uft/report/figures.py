"""The figures of the finished runs, by configuration and seed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from uft.report import metrics, stats
from uft.report.groups import Group, Grouping
from uft.report.load import Loaded

Values = dict[Hashable, float]
"""A configuration's figures by seed."""


def of_run(run: Loaded) -> dict[str, float]:
    """The last metrics of a run, and what it took."""
    costs = ((name, run.total(name)) for name in metrics.COSTS)
    return {**run.final, **{name: value for name, value in costs if value is not None}}


@dataclass(frozen=True)
class Figures:
    """A group's values of a metric by seed. Several runs of one seed are their mean."""

    groups: Sequence[Group]
    values: Sequence[Mapping[str, Values]]

    def spread(self, group: int, metric: str) -> stats.Spread | None:
        found = self.values[group].get(metric)
        return stats.spread(list(found.values())) if found else None


def tabulate(runs: Sequence[Loaded], grouping: Grouping, figures: Sequence[Mapping[str, float]]) -> Figures:
    """`figures` are each run's own, by metric."""
    table = []
    for group in grouping.groups:
        found: dict[str, dict[Hashable, list[float]]] = {}
        for number in group.runs:
            seed = grouping.seeds.get(number)
            key = ("run", number) if seed is None else seed  # a run without a seed is a draw of its own
            for metric, value in figures[number].items() if runs[number].finished else ():
                found.setdefault(metric, {}).setdefault(key, []).append(value)
        table.append({metric: {seed: mean(v) for seed, v in seeds.items()} for metric, seeds in found.items()})
    return Figures(grouping.groups, table)


def mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else stats.spread(values).mean
