"""Advice from finished runs: which settings to try next, or that the runs do not say (experimental).

After Functional Graphical Models (arXiv 2401.05442): the metric is taken for a sum over cliques of settings, each a
table of its levels, and only configurations are proposed whose every clique assignment was seen. The paper finds the
cliques from data, which takes little noise and much of the grid; here they are declared, else all pairs, and what the
data say about structure is shown beside it. Levels are levels: nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import combinations, product
from statistics import fmean, variance
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from uft.config.compose import quoted
from uft.config.frozen import ABSENT
from uft.errors import Problem, raise_problems
from uft.report.groups import as_typed, grouping, hashable, rank
from uft.report.metrics import direction, listed, plural
from uft.report.runs import LoadedRun

Config = tuple[int, ...]  # a level of every factor
Cliques = Sequence[Sequence[int]]  # of factors
FEWEST, MOST = 12, 20_000  # configurations that were run; combinations of levels
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
EDGE = 2.0  # contrasts this many times beyond noise are an edge
NOT_SHARED = ("seed", "seeds.", "run.", "sweep.", "tracking")  # typed words that no advice repeats


@dataclass
class Question:
    """What is asked of the runs."""

    metric: str | None = Field(None, description="what is to be better, e.g. eval/exact_match; null: eval.best")
    mode: Literal["min", "max"] | None = Field(None, description="which way is better; null: known of the metric")
    cliques: str | None = Field(
        None, description="settings that act together, e.g. 'objective,optim.lr;data.ratio'; null: all pairs"
    )
    least: int = Field(2, ge=1, description="configurations in which every clique assignment must have been seen")
    noise: float | None = Field(None, gt=0, description="standard deviation over seeds; null: as measured")
    show: int = Field(5, ge=1, description="proposals")


# --- the surrogate: a sum of tables, linear in what was measured


def one_hot(configs: Sequence[Config], cliques: Cliques, levels: Sequence[int]) -> list[np.ndarray]:
    """Of each clique, which assignment each configuration has: (configurations, assignments) of 0 and 1."""
    rows = np.array(configs)
    shapes = [[levels[factor] for factor in clique] for clique in cliques]
    numbers = [np.ravel_multi_index(rows[:, list(c)].T, s) for c, s in zip(cliques, shapes, strict=True)]
    return [np.eye(math.prod(shape))[number] for shape, number in zip(shapes, numbers, strict=True)]


def smoother(
    configs: Sequence[Config], rows: Sequence[Config], cliques: Cliques, levels: Sequence[int], ridge: float
) -> np.ndarray:
    """(configs, rows): predictions are this matrix times what the rows gave. Ridge on deviations from the mean; the
    mean itself is not shrunk."""
    seen = np.concatenate(one_hot(rows, cliques, levels), 1)
    centre = seen.mean(0)
    centred = seen - centre
    inner = np.linalg.solve(centred.T @ centred + ridge * np.eye(seen.shape[1]), centred.T)
    return 1 / len(rows) + (np.concatenate(one_hot(configs, cliques, levels), 1) - centre) @ inner


def left_out(rows: Sequence[Config], y: np.ndarray, cliques: Cliques, levels: Sequence[int], ridge: float) -> float:
    """Root mean squared error at configurations that were left out, each once."""
    hat = smoother(rows, rows, cliques, levels, ridge)
    return float(np.sqrt(np.mean(((y - hat @ y) / np.maximum(1 - np.diag(hat), 1e-9)) ** 2)))


def covered(
    configs: Sequence[Config], rows: Sequence[Config], cliques: Cliques, levels: Sequence[int], least: int
) -> list[Config]:
    """The configurations whose every clique assignment stands in at least so many rows."""
    allowed = np.ones(len(configs), bool)
    for asked, seen in zip(one_hot(configs, cliques, levels), one_hot(rows, cliques, levels), strict=True):
        allowed &= asked @ seen.sum(0) >= least
    return [config for config, fine in zip(configs, allowed, strict=True) if fine]


# --- structure, as a diagnosis


def contrasts(rows: Sequence[Config], y: np.ndarray, i: int, j: int) -> list[float]:
    """f(11) - f(01) - f(10) + f(00) over all rectangles of levels of i and j that are complete, all else equal."""
    table, values = dict(zip(rows, y.tolist(), strict=True)), []
    for row in table:
        for a, b in product(sorted({r[i] for r in rows}), sorted({r[j] for r in rows})):
            if a < row[i] and b < row[j]:
                low_i, low_j = ((*row[:k], v, *row[k + 1 :]) for k, v in ((i, a), (j, b)))
                both = (*low_i[:j], b, *low_i[j + 1 :])
                if {low_i, low_j, both} <= table.keys():
                    values.append(table[row] - table[low_i] - table[low_j] + table[both])
    return values


def edges(rows: Sequence[Config], y: np.ndarray, noise: float) -> list[tuple[int, int]]:
    """Pairs of factors whose contrasts exceed what four errors of size `noise` give, and those of which nothing is
    known."""
    joined = []
    for i, j in combinations(range(len(rows[0])), 2):
        values = contrasts(rows, y, i, j)
        if not values or np.mean(np.square(values)) > EDGE**2 * 4 * noise**2:
            joined.append((i, j))
    return joined


def maximal_cliques(factors: int, joined: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
    """By Bron and Kerbosch; factors are a handful."""
    near = {i: {b if a == i else a for a, b in joined if i in (a, b)} for i in range(factors)}
    cliques = []

    def grow(chosen: tuple[int, ...], open_: set[int], closed: set[int]) -> None:
        if not open_ and not closed:
            cliques.append(tuple(sorted(chosen)))
        for factor in sorted(open_):
            grow((*chosen, factor), open_ & near[factor], closed & near[factor])
            open_, closed = open_ - {factor}, closed | {factor}

    grow((), set(range(factors)), set())
    return sorted(cliques)


# --- the runs


@plain_dataclass(frozen=True)
class Evidence:
    """What the finished runs say of one metric; a configuration's runs over seeds are one row."""

    metric: str
    sign: int  # 1: more is better; -1: less
    factors: Sequence[str]
    levels: Sequence[Sequence[Any]]  # of each factor, ABSENT among them where some configurations lack it
    rows: Sequence[Config]
    y: np.ndarray  # means
    seeds: np.ndarray  # how many
    noise: float  # pooled standard deviation over seeds
    common: Sequence[str]  # words that every run was asked for by

    def command(self, config: Config) -> str:
        chosen = [(key, of[level]) for key, of, level in zip(self.factors, self.levels, config, strict=True)]
        words = [f"{key.removesuffix('.name')}={as_typed(value)}" for key, value in chosen if value is not ABSENT]
        return " ".join(["uft train", *map(quoted, [*self.common, *words])])


def evidence(runs: Sequence[LoadedRun], question: Question) -> Evidence:
    """The finished runs as a table. UftError with every reason why nothing can be advised."""
    finished = [run for run in runs if run.finished]
    chosen = question.metric or next((str(run.config.get("eval.best")) for run in finished), "eval/nll")
    known = dict.fromkeys(name for run in finished for name in run.figures)
    metric = next((name for name in (chosen, f"eval/{chosen}") if name in known), chosen)
    finished = [run for run in finished if metric in run.figures]
    problems = []
    if not finished:
        problems.append(Problem(f"metric={chosen}", "no finished run has it", advice=(listed([*known], 12),)))
    better = question.mode or direction(metric)
    if better is None:
        why = "neither more nor less of it is better by itself"
        problems.append(Problem(f"metric={chosen}", why, advice=("say which:  mode=max   mode=min",)))
    grouped = grouping(finished)
    values = [[finished[number].figures[metric] for number in group.runs] for group in grouped.groups]
    if len(values) < FEWEST:
        why = f"fewer than {FEWEST} tell too little of how settings act together"
        problems.append(Problem(plural(len(values), "configuration"), why, advice=("see  uft compare",)))
    free = sum(len(of) - 1 for of in values)
    noise = math.sqrt(sum((len(of) - 1) * variance(of) for of in values if len(of) > 1) / free) if free else None
    if finished and noise is None and question.noise is None:
        advice = ("repeat some of them:  seed=1,2,3   or say how large it is:  noise=0.02",)
        problems.append(Problem("one seed each", "how much a seed does is not known", advice=advice))
    columns = [[group.config.get(axis.key, ABSENT) for group in grouped.groups] for axis in grouped.axes]
    levels = [sorted({hashable(value): value for value in column}.values(), key=rank) for column in columns]
    if math.prod(map(len, levels)) > MOST:
        why = f"more than {MOST:,} combinations of levels"
        problems.append(Problem(f"{math.prod(map(len, levels)):,}", why, advice=("compare fewer runs",)))
    raise_problems(problems, footer="Nothing is advised.")
    factors = [axis.key for axis in grouped.axes]
    places = [{hashable(value): n for n, value in enumerate(of)} for of in levels]
    rows = [tuple(of[hashable(v)] for of, v in zip(places, row, strict=True)) for row in zip(*columns, strict=True)]
    varying = {key.removesuffix(".name") for key in factors} | set(factors)
    words = [[word for word in run.overrides if not word.lstrip("+~").startswith(NOT_SHARED)] for run in finished]
    common = [w for w in words[0] if all(w in of for of in words) and w.partition("=")[0].lstrip("+~") not in varying]
    means, seeds = np.array([fmean(of) for of in values]), np.array([len(of) for of in values])
    sign = 1 if better == "max" else -1
    return Evidence(metric, sign, factors, levels, rows, means, seeds, question.noise or noise or 0.0, common)


def declared(text: str | None, factors: Sequence[str]) -> list[tuple[int, ...]]:
    """The cliques as numbers of factors; nothing declared: all pairs. A factor that is in none is one by itself."""
    if text is None:
        return list(combinations(range(len(factors)), 2)) or [(0,)]
    named, problems = list[tuple[int, ...]](), list[Problem]()
    for clique in text.split(";"):
        members = []
        for word in filter(None, map(str.strip, clique.split(","))):
            short = [n for n, key in enumerate(factors) if word in (key, key.removesuffix(".name"), key.split(".")[-1])]
            problems += [] if len(short) == 1 else [Problem(f"cliques: {word}", "is none of what varies")]
            members += short[:1]
        named.append(tuple(sorted(members)))
    raise_problems(problems, footer=f"What varies:  {', '.join(factors)}")
    return [*named, *((n,) for n in range(len(factors)) if not any(n in clique for clique in named))]


def advise(runs: Sequence[LoadedRun], question: Question) -> str:
    """What the runs say about what to try next."""
    said = evidence(runs, question)
    levels, cliques = [len(of) for of in said.levels], declared(question.cliques, said.factors)
    ridge = min(RIDGES, key=lambda one: left_out(said.rows, said.y, cliques, levels, one))
    error, spread = left_out(said.rows, said.y, cliques, levels, ridge), float(np.std(said.y))
    of_mean = said.noise / math.sqrt(float(said.seeds.mean()))

    def names(of: Sequence[Sequence[int]]) -> str:
        return "  ".join("{" + ", ".join(said.factors[n] for n in clique) + "}" for clique in of)

    best = int((said.sign * said.y).argmax())
    lines = [
        f"{said.metric}, {'more' if said.sign > 0 else 'less'} is better: {plural(len(said.rows), 'configuration')}, "
        f"{int(said.seeds.sum())} runs; standard deviation over seeds {said.noise:.4g}",
        f"taken for a sum over   {names(cliques)}" + ("   (all pairs)" if question.cliques is None else ""),
        f"found in these runs    {names(maximal_cliques(len(levels), edges(said.rows, said.y, of_mean)))}"
        "   (settings that nothing tells apart count as acting together)",
        f"left-out configurations are predicted to within {error:.4g}; they differ by {spread:.4g}",
        "",
        f"best so far  {said.y[best]:.4g} ± {said.noise / math.sqrt(said.seeds[best]):.2g}"
        f"  ({plural(int(said.seeds[best]), 'seed')})  {said.command(said.rows[best])}",
        "",
    ]
    if error >= spread:
        return "\n".join([*lines, "Nothing is advised: the sum predicts no better than the mean of all runs would."])
    has = {tuple(of[level] == ABSENT for of, level in zip(said.levels, row, strict=True)) for row in said.rows}
    every = covered(list(product(*map(range, levels))), said.rows, cliques, levels, question.least)
    every = [c for c in every if tuple(of[n] == ABSENT for of, n in zip(said.levels, c, strict=True)) in has]
    if not every:
        return "\n".join([*lines, f"Nothing is advised: no combination was seen {question.least} times in all parts."])
    weights = smoother(every, said.rows, cliques, levels, ridge)
    predictions, spreads = weights @ said.y, said.noise * np.sqrt((weights**2 / said.seeds).sum(1))
    order = sorted(range(len(every)), key=lambda n: (-said.sign * round(float(predictions[n]), 9), every[n]))
    first = order[0]
    gain, own = said.sign * (predictions[first] - said.y[best]), said.noise / math.sqrt(said.seeds[best])
    if every[first] == said.rows[best] or gain <= 2 * math.hypot(spreads[first], own):
        lines += ["Nothing better than the best run within its noise. More seeds of the best few would tell more."]
    lines += ["predicted, ± from seeds alone:"]
    for n in order[: question.show]:
        was = "was run" if every[n] in said.rows else "not run"
        lines.append(f"  {predictions[n]:.4g} ± {spreads[n]:.2g}  {was}  {said.command(every[n])}")
    return "\n".join([*lines, "", "The best of several is flattered by luck: confirm it with seeds that took no part."])
