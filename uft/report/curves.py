"""Curves for the page: thinned so that spikes stay, against steps, tokens and seconds of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from uft.report.load import AXES, EVAL, Line, Loaded, number, numbers
from uft.report.words import rounded

POINTS = 500  # of one curve, at most
BUDGET = 400_000  # points of all curves together: about 12 MB of JSON
MAIN = ("loss", "nll", "grad_norm")
LIMITS = ((POINTS, POINTS), (500, 100), (500, 40), (350, 40), (250, 30), (150, 20), (80, 10), (40, 0))
"""(points of a main curve, of another one), tried in this order until all curves fit the budget."""

Curve = dict[str, list[Any]]


@dataclass(frozen=True)
class Track:
    """The logged steps of a run with what had been spent by then; what was not written there is carried on."""

    axes: Mapping[str, Sequence[float | str | None]]
    lines: Sequence[Line]


def is_main(name: str) -> bool:
    """Training's own figures and the battery's over all rows; the rest is drawn with fewer points."""
    return name in MAIN or (name.startswith(EVAL) and name.count("/") == 1)


def curves(runs: Sequence[Loaded]) -> dict[str, dict[int, Curve]]:
    """By metric and number of the run. Metrics that are never more than one point have no curve."""
    where = [places(run.lines) for run in runs]
    names = dict.fromkeys(name for found in where for name in found)
    names = dict.fromkeys(name for name in names if any(len(found.get(name, ())) > 1 for found in where))
    limits = fitting([(is_main(name), len(found[name])) for found in where for name in found if name in names])
    tracks = [track(run.lines) for run in runs]
    drawn: dict[str, dict[int, Curve]] = {}
    for name in names:
        limit = limits[0] if is_main(name) else limits[1]
        for run, found in enumerate(where):
            if name in found and limit:
                drawn.setdefault(name, {})[run] = curve(tracks[run], name, found[name], limit)
    return drawn


def places(lines: Sequence[Line]) -> dict[str, list[int]]:
    """By metric, the lines that have it; spent budgets and text are no metrics."""
    found: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        for name in line:
            if name in found:
                found[name].append(place)
            elif name not in AXES:
                found[name] = [place]
    return {name: at for name, at in found.items() if numbers({name: lines[at[0]][name]})}


def fitting(lengths: Iterable[tuple[bool, int]]) -> tuple[int, int]:
    """The first of LIMITS under which the curves (whether main, points) fit the budget; else the last."""
    lengths = list(lengths)

    def total(limits: tuple[int, int]) -> int:
        return sum(min(count, limits[0] if main else limits[1]) for main, count in lengths)

    return next((limits for limits in LIMITS if total(limits) <= BUDGET), LIMITS[-1])


def track(lines: Sequence[Line]) -> Track:
    axes: dict[str, list[Any]] = {}
    for name in ("step", "tokens", "seconds"):
        last: float | None = None if name != "seconds" else 0
        axes[name] = [plain(last := number(line.get(name, last))) for line in lines]
    return Track(axes, lines)


def curve(of: Track, name: str, where: Sequence[int], limit: int) -> Curve:
    values = [(place, value) for place in where if (value := number(of.lines[place].get(name))) is not None]
    kept = [values[place] for place in thinned([value for _, value in values], limit)]
    places = [place for place, _ in kept]
    found: Curve = {axis: [column[place] for place in places] for axis, column in of.axes.items()}
    return {**found, "value": [plain(value) for _, value in kept]}


def plain(value: float | None) -> float | str | None:
    return rounded(value) if type(value) is float else value


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Places of at most `limit` values: the first, the last, and the lowest and highest of each stretch between.

    What is not finite counts as highest, so that a curve that broke shows it. `limit` is at least 4.
    """
    if len(values) <= limit:
        return list(range(len(values)))
    heights = np.asarray(values, dtype=float)
    heights = np.where(np.isfinite(heights), heights, np.inf)
    edges = np.linspace(1, len(values) - 1, (limit - 2) // 2 + 1).astype(int)
    found = {0, len(values) - 1}
    for start, end in pairwise(edges):
        found |= {int(start + heights[start:end].argmin()), int(start + heights[start:end].argmax())}
    return sorted(found)
