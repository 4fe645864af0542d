"""The comparison as one plain object, format 1 of `compare.json`: the page, the terminal and W&B draw nothing else.

Figures have six significant digits; those that are not finite are the strings "nan", "inf" and "-inf", as in
`metrics.jsonl`. All text is as it was found, and untrusted.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from uft import __version__
from uft.config.messages import as_typed
from uft.report import metrics
from uft.report.cautions import Case, cautions
from uft.report.groups import Grouping, baselines, differences, grouping
from uft.report.items import rows_between
from uft.report.metrics import config_value, encodable, jsonable, truncated
from uft.report.runs import COSTS, Line, LoadedRun, Selection, load, number, numbers
from uft.report.verdict import figures_of, judge, spread
from uft.runs import planned, shown, write_atomically

FORMAT = 1
LONGEST_ERROR = 4000  # characters; the run's folder has the rest
AXES = ("step", "rows", "tokens", "supervised_tokens", "seconds", "epoch")  # of metrics.jsonl: no metrics
MAIN_CURVES = ("loss", "nll", "grad_norm")
CURVE_BUDGET = 400_000  # points of all curves together: about 12 MB of JSON
CURVE_LIMITS = ((500, 500), (500, 100), (500, 40), (350, 40), (250, 30), (150, 20), (80, 10), (40, 0))
"""(points of a main curve, of another one), tried in this order until all curves fit the budget."""
PROMPTS, FEWEST_PROMPTS = 24, 4  # sample prompts: at most, and however many runs there are
LONGEST_SAMPLE, SHORTEST_SAMPLE = 4000, 300  # characters of one text
SAMPLE_BUDGET = 2_000_000  # characters of all answers together

WEB = re.compile(r"https?://")
CAPTIONS = {
    "summary": (
        "Means are over seeds, intervals are 95 % t intervals, of shares within 0 and 1. Configurations that share "
        "seeds are compared seed by seed (a paired t test: the luck of a seed cancels out), others by Welch's t "
        "test. p-values are adjusted by Holm's method for all comparisons of a metric with the best, and for those "
        "with the baseline; a difference counts as more than seed noise when the adjusted p is below 0.05. The "
        "intervals themselves are not adjusted. The best of several configurations was chosen on these same numbers, "
        "so the lead is optimistic: confirm it on new seeds. Only finished runs count."
    ),
    "curves": (
        "Training losses of different objectives are different quantities on different scales: a lower one is not a "
        "better model. Compare objectives by the evaluation (eval/...), which is the same for all. A reward of chosen "
        "answers may fall while the margin rises: the objective sees the difference only. Bands are over the seeds "
        "of a configuration. Long curves are thinned, keeping the lowest and highest value of every stretch."
    ),
    "scatter": (
        "One point per configuration with its 95 % intervals, or per run: any figure against any other. A new skill "
        "against a kept style shows what each objective trades away. Limits follow what is possible and common; "
        "triangles stand for what lies outside."
    ),
    "heatmap": (
        "Mean over seeds for two swept settings. Smaller differences between neighbours than within a cell are noise."
    ),
    "parallel": (
        "One line per run through what was swept and what came of it. Many settings and few runs always show some "
        "pattern: take it as a question for the next sweep."
    ),
    "runs": (
        "Every run that was found, also those that failed, were stopped or cannot be read. Figures are the last of "
        "each run, not its best: choosing the best step on the same held-out rows would flatter it."
    ),
    "differences": (
        "Configuration keys and circumstances that are not the same in all runs, seeds apart. Anything "
        "here that you did not mean to vary weakens the comparison."
    ),
    "samples": (
        "Greedy answers to the same held-out prompts, at each run's last evaluation, with what the checker says."
    ),
}

Object = dict[str, Any]
Curve = dict[str, list[Any]]


@dataclass(frozen=True)
class Options:
    """Options of a comparison."""

    metrics: Sequence[str] = ()  # headlines before the usual ones: NAME or NAME:min or NAME:max
    baseline: str | None = None  # a configuration's name, or key=value ...
    seed_keys: Sequence[str] = ()  # keys that are seeds; none: seed and seeds.*


def compare(selection: Selection, options: Options = Options()) -> Object:
    """Read the runs and compare them. Raises UftError for options that mean nothing here."""
    return compare_loaded([load(path) for path in selection.runs], selection, options)


def compare_loaded(runs: Sequence[LoadedRun], selection: Selection, options: Options) -> Object:
    grouped = grouping(runs, options.seed_keys)
    figures = figures_of(runs, grouped)
    comparable = not any(key.startswith("objective.") for key in grouped.varying)
    known = dict.fromkeys(name for run in runs for name in run.figures)
    heads = metrics.headlines(runs, known, options.metrics, comparable)
    base = baselines(grouped.groups, options.baseline)
    drawn = curves(runs)
    directions = {head.metric: head.direction for head in heads}
    names, by_row = [group.name for group in grouped.groups], partial(rows_between, runs, grouped)
    jobs, chosen = planned(selection.folder), {path.resolve() for path in selection.runs}
    waiting = [job.name for job in jobs if not job.exists]  # told where all started jobs of a sweep are compared
    everything = chosen.issuperset(job.path.resolve() for job in jobs if job.exists)
    return {
        "format": FORMAT,
        "title": jsonable(selection.title),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "uft": __version__,
        "headline": [{"metric": head.metric, "direction": head.direction} for head in heads],
        "metrics": [
            {
                "name": jsonable(name),
                "direction": directions.get(name) or metrics.direction(name),
                "kind": metrics.kind(name),
                "curve": name in drawn,
                "possible": metrics.possible(name),
                "caption": metrics.caption(name),
                "comparable": comparable or not metrics.of_objective(name),
            }
            for name in metrics.ordered([*known, *drawn], list(directions))
        ],
        "axes": [
            {"key": jsonable(axis.key), "values": [*map(config_value, axis.values)], "numeric": axis.numeric}
            for axis in grouped.axes
        ],
        "runs": [run_record(n, run, grouped) for n, run in enumerate(runs)],
        "groups": [
            {
                "id": f"g{n}",
                "name": jsonable(group.name),
                "config": {jsonable(key): config_value(value) for key, value in group.config.items()},
                "runs": ids(group.runs),
                "baseline": n in base,
                "metrics": jsonable(
                    {name: vars(spread([*of.values()], metrics.is_share(name))) for name, of in figures[n].items()}
                ),
            }
            for n, group in enumerate(grouped.groups)
        ],
        "curves": {jsonable(name): {f"r{n}": curve for n, curve in of.items()} for name, of in drawn.items()},
        "summary": [found for head in heads if (found := judge(head, figures, names, base, by_row))],
        "warnings": [
            {"what": jsonable(caution.what), "why": jsonable(caution.why), "runs": ids(caution.runs)}
            for caution in cautions(Case(runs, grouped, heads, waiting if everything else ()))
        ],
        "differences": [
            {"key": jsonable(key), "values": [{"value": jsonable(value), "runs": ids(of)} for value, of in values]}
            for key, values in differences(runs, options.seed_keys)
        ],
        "samples": samples(runs),
        "captions": CAPTIONS,
    }


def as_json(comparison: Object) -> str:
    """`compare.json`: a line per part, strictly JSON."""
    parts = (
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}"
        for key, value in comparison.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write(comparison: Object, folder: Path) -> list[Path]:
    """compare.json, compare.html and compare.md in `folder`, which is made; their paths."""
    from uft.report.page import render
    from uft.report.table import as_report

    folder.mkdir(parents=True, exist_ok=True)
    page = partial(render, folder=folder)
    texts: dict[str, Callable[[Object], str]] = {"compare.json": as_json, "compare.html": page, "compare.md": as_report}
    for name, make in texts.items():
        write_atomically(folder / name, make(comparison))
    return [folder / name for name in texts]


def ids(runs: Iterable[int]) -> list[str]:
    return [f"r{n}" for n in runs]


def run_record(n: int, run: LoadedRun, grouped: Grouping) -> Object:
    def integer(value: Any) -> int | None:
        return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    group = next((place for place, group in enumerate(grouped.groups) if n in group.runs), None)
    figures, best = run.figures, run.result.get("best")
    address = noted.get("url") if isinstance(noted := run.info.get("wandb"), dict) else None
    own = ("run.", "sweep.name=")  # its name and folder, which another run of the same configuration has not
    words = [word for word in run.overrides if not word.lstrip("+").startswith(own)]
    return {
        "id": f"r{n}",
        "name": jsonable(run.name),
        "path": jsonable(shown(run.path.resolve())),
        "group": None if group is None else f"g{group}",
        "color": len(grouped.groups) if group is None else group,
        "status": run.status,
        "error": None if run.error is None else truncated(jsonable(run.error), LONGEST_ERROR),
        "seed": config_value(grouped.seeds.get(n)),
        "config": {jsonable(axis.key): config_value(axis.column[n]) for axis in grouped.axes if n in axis.column},
        "final": jsonable({name: value for name, value in figures.items() if name not in COSTS}),
        "best": jsonable(best) if isinstance(best, dict) else {},
        "steps": integer(run.total("steps") if run.result else run.total("step")),
        "total_steps": integer(run.info.get("total_steps") or run.config.get("train.steps")),
        "seconds": jsonable(figures.get("seconds")),
        "tokens": integer(figures.get("tokens")),
        "supervised_tokens": integer(figures.get("supervised_tokens")),
        "tokens_per_second": jsonable(figures.get("tokens_per_second")),
        "peak_memory_bytes": integer(figures.get("peak_memory_bytes")),
        "command": jsonable(shlex.join(["uft", "train", *as_typed(words)])) if run.overrides else None,
        "wandb": jsonable(address) if isinstance(address, str) and WEB.match(address) else None,
        "facts": jsonable(run.facts),
    }


def curves(runs: Sequence[LoadedRun]) -> dict[str, dict[int, Curve]]:
    """By metric and number of the run: value against step, tokens and seconds, thinned so that all fit the budget.

    A metric that has one point in every run has no curve. Tokens and seconds that a line lacks are those before it.
    """
    points_of = [points(run.lines) for run in runs]  # of each run
    longest: Counter[str] = Counter()
    for of_run in points_of:
        longest |= Counter({name: len(values) for name, values in of_run.items()})
    main = {name: name in MAIN_CURVES or (name.startswith("eval/") and name.count("/") == 1) for name in longest}
    lengths = [(main[name], len(values)) for of in points_of for name, values in of.items() if longest[name] > 1]
    of_main, of_others = fitting(lengths)
    limits = {name: of_main if main[name] else of_others for name, length in longest.items() if length > 1}
    drawn: dict[str, dict[int, Curve]] = {name: {} for name, limit in limits.items() if limit}
    for n, (run, of_run) in enumerate(zip(runs, points_of, strict=True)):
        axes: dict[str, list[Any]] = {}
        for axis, start in (("step", None), ("tokens", None), ("seconds", 0)):
            last: float | None = start
            axes[axis] = [jsonable(last := number(line.get(axis, last))) for line in run.lines]
        for name in (name for name in of_run if name in drawn):
            places, values = zip(*of_run[name], strict=True)
            kept = thinned(values, limits[name])
            curve: Curve = {axis: [column[places[at]] for at in kept] for axis, column in axes.items()}
            drawn[name][n] = {**curve, "value": [jsonable(values[at]) for at in kept]}
    return drawn


def points(lines: Sequence[Line]) -> dict[str, list[tuple[int, float]]]:
    """By metric, (place of the line, value) of the lines that have it; axes and text are no metrics."""
    by_metric: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for place, line in enumerate(lines):
        for name, value in numbers(line).items():
            if name not in AXES:
                by_metric[name].append((place, value))
    return by_metric


def fitting(lengths: Sequence[tuple[bool, int]]) -> tuple[int, int]:
    """The first of CURVE_LIMITS under which the curves (whether main, points) fit the budget; else the last."""

    def total(limits: tuple[int, int]) -> int:
        return sum(min(count, limits[0] if main else limits[1]) for main, count in lengths)

    return next((limits for limits in CURVE_LIMITS if total(limits) <= CURVE_BUDGET), CURVE_LIMITS[-1])


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Places of at most `limit` values: the first, the last, and the lowest and highest of each stretch between.

    A value that is not finite counts as highest, so that a curve that broke shows it. `limit` is at least 4.
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


def samples(runs: Sequence[LoadedRun]) -> list[Object]:
    """Answers of all runs to the same held-out prompts: those that most runs answered first, sources in turn, texts cut
    to fit a page."""

    def text(value: Any) -> str:
        return encodable("" if value is None else str(value))

    def verdict(checks: Any) -> str | None:
        """`exact_match 1, correct 1, plain 0`; None for an answer that was not checked."""
        figures = numbers(checks).items() if isinstance(checks, dict) else ()
        said = ", ".join(f"{name} {value:g}" for name, value in figures)
        return truncated(text(said), SHORTEST_SAMPLE) or None

    by_prompt: dict[tuple[str, ...], list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for n, run in enumerate(runs):
        for sample in run.samples:
            by_prompt[tuple(text(sample.get(part)) for part in ("source", "row", "prompt"))].append((n, sample))
    turns: Counter[str] = Counter()  # of each source
    turn: dict[tuple[str, ...], int] = {}
    for key in sorted(by_prompt, key=lambda key: -len({n for n, _ in by_prompt[key]})):
        turn[key] = turns[key[0]]
        turns[key[0]] += 1
    count = max(FEWEST_PROMPTS, min(PROMPTS, SAMPLE_BUDGET // (SHORTEST_SAMPLE * max(len(runs), 1))))
    keys = sorted(turn, key=turn.__getitem__)[:count]
    answers = sum(len(by_prompt[key]) for key in keys)
    most = min(LONGEST_SAMPLE, max(SHORTEST_SAMPLE, SAMPLE_BUDGET // max(answers, 1)))
    records = []
    for key in keys:
        source, row, prompt = (truncated(part, most) for part in key)
        wanted = next((sample["answer"] for _, sample in by_prompt[key] if sample.get("answer") is not None), None)
        given = [
            {
                "run": f"r{n}",
                "step": sample["step"],
                "text": truncated(text(sample.get("reply")), most),
                "verdict": verdict(sample.get("verdict")),
            }
            for n, sample in by_prompt[key]
        ]
        reference = None if wanted is None else truncated(text(wanted), most)
        records.append({"source": source, "row": row, "prompt": prompt, "reference": reference, "answers": given})
    return records
