"""The comparison as one plain object, format 1 of `compare.json`: the page, the terminal and W&B draw nothing else.

Figures have six significant digits; those that are not finite are the strings "nan", "inf" and "-inf", as in
`metrics.jsonl`. All text is as it was found, and untrusted.
"""

from __future__ import annotations

import gc
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from uft import __version__
from uft.report import metrics
from uft.report.cautions import Case, cautions
from uft.report.curves import curves
from uft.report.differences import differences, facts
from uft.report.figures import Figures, of_run, tabulate
from uft.report.groups import Grouping, grouping
from uft.report.headlines import Headline, baselines, headlines
from uft.report.load import Loaded, load, place
from uft.report.samples import samples
from uft.report.select import Selection
from uft.report.sentences import sentences
from uft.report.summary import Comparison, Verdict, judge
from uft.report.words import CAPTIONS, as_value, rounded, settled, shorten
from uft.runs import planned

FORMAT = 1
LONGEST_ERROR = 4000  # characters; the run's folder has the rest

Object = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What may be asked of a comparison."""

    metrics: Sequence[str] = ()  # headlines before the usual ones: NAME or NAME:min or NAME:max
    baseline: str | None = None  # a configuration's name, or key=value ...
    seed_keys: Sequence[str] = ()  # keys that are seeds; none: seed and seeds.*


def compare(selection: Selection, options: Options = Options()) -> Object:
    """Read the runs and compare them. Raises UftError for options that mean nothing here."""
    with without_collector():
        runs = [load(path) for path in selection.runs]
        return compared(runs, selection, options)


def compared(runs: Sequence[Loaded], selection: Selection, options: Options) -> Object:
    found = grouping(runs, options.seed_keys)
    taken = [of_run(run) for run in runs]
    figures = tabulate(runs, found, taken)
    comparable = not any(key.startswith("objective.") for key in found.varying)
    heads = headlines(runs, dict.fromkeys(name for run in taken for name in run), options.metrics, comparable)
    base = baselines(found.groups, options.baseline)
    drawn = curves(runs)
    names = metrics.ordered([*(n for run in taken for n in run), *drawn], [head.metric for head in heads])
    verdicts = [verdict for head in heads if (verdict := judge(head, figures, base)) is not None]
    case = Case(runs, found, figures, heads, waiting(selection))
    return {
        "format": FORMAT,
        "title": settled(selection.title),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
        "uft": __version__,
        "headline": [{"metric": head.metric, "direction": head.direction} for head in heads],
        "metrics": [metric(name, heads, name in drawn, comparable) for name in names],
        "axes": [axis(each.key, each.values, each.numeric) for each in found.axes],
        "runs": [run_record(number, run, found, taken[number]) for number, run in enumerate(runs)],
        "groups": [group_record(number, found, figures, base) for number in range(len(found.groups))],
        "curves": {settled(name): {f"r{n}": line for n, line in of.items()} for name, of in drawn.items()},
        "summary": [summary_record(verdict, figures) for verdict in verdicts],
        "warnings": [{"what": settled(c.what), "why": settled(c.why), "runs": ids(c.runs)} for c in cautions(case)],
        "differences": [
            {"key": settled(key), "values": [{"value": settled(value), "runs": ids(of)} for value, of in values]}
            for key, values in differences(runs, options.seed_keys)
        ],
        "samples": [with_ids(sample) for sample in samples(runs)],
        "captions": CAPTIONS,
    }


@contextmanager
def without_collector() -> Iterator[None]:
    """Half the time of reading goes into a search for garbage among millions of numbers that are all in use."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def waiting(selection: Selection) -> list[str]:
    """Names of jobs that have not started, where a whole sweep is compared."""
    jobs = planned(selection.folder)
    chosen = {path.resolve() for path in selection.runs}
    if any(job.exists and job.path.resolve() not in chosen for job in jobs):
        return []
    return [job.name for job in jobs if not job.exists]


def ids(numbers: Sequence[int]) -> list[str]:
    return [f"r{number}" for number in numbers]


def metric(name: str, heads: Sequence[Headline], curve: bool, comparable: bool) -> Object:
    asked = next((head.direction for head in heads if head.metric == name), None)
    return {
        "name": settled(name),
        "direction": asked or metrics.direction(name),
        "kind": metrics.kind(name),
        "curve": curve,
        "caption": metrics.caption(name),
        "comparable": comparable or not metrics.of_objective(name),
    }


def axis(key: str, values: Sequence[Any], numeric: bool) -> Object:
    return {"key": settled(key), "values": [as_value(value) for value in values], "numeric": numeric}


def run_record(number: int, run: Loaded, found: Grouping, taken: Mapping[str, float]) -> Object:
    group = next((place for place, group in enumerate(found.groups) if number in group.runs), None)
    best = run.result.get("best")
    return {
        "id": f"r{number}",
        "name": settled(run.name),
        "path": settled(place(run.path)),
        "group": None if group is None else f"g{group}",
        "color": len(found.groups) if group is None else group,
        "status": run.status,
        "error": None if run.error is None else shorten(settled(run.error), LONGEST_ERROR),
        "seed": as_value(found.seeds.get(number)),
        "config": {settled(a.key): as_value(a.column[number]) for a in found.axes if number in a.column},
        "final": settled({name: value for name, value in taken.items() if name not in metrics.COSTS}),
        "best": settled(best) if isinstance(best, dict) else {},
        "steps": whole(run.total("steps") if run.result else run.total("step")),
        "total_steps": whole(run.info.get("total_steps") or run.config.get("train.steps")),
        "seconds": settled(taken.get("seconds")),
        "tokens": whole(taken.get("tokens")),
        "supervised_tokens": whole(taken.get("supervised_tokens")),
        "tokens_per_second": settled(taken.get("tokens_per_second")),
        "peak_memory_bytes": whole(taken.get("peak_memory_bytes")),
        "command": command(run),
        "facts": settled(facts(run)),
    }


def whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def command(run: Loaded) -> str | None:
    """What to type for another run like it; its name and folder are its own."""
    words = [word for word in run.overrides if not word.lstrip("+").startswith("run.")]
    return settled(shlex.join(["uft", "train", *words])) if run.overrides else None


def group_record(number: int, found: Grouping, figures: Figures, base: Sequence[int]) -> Object:
    group = found.groups[number]
    spreads = {name: figures.spread(number, name) for name in figures.values[number]}
    return {
        "id": f"g{number}",
        "name": settled(group.name),
        "config": {settled(key): as_value(value) for key, value in group.config.items()},
        "runs": ids(group.runs),
        "baseline": number in base,
        "metrics": settled({name: vars(spread) for name, spread in spreads.items() if spread is not None}),
    }


def summary_record(verdict: Verdict, figures: Figures) -> Object:
    return {
        "metric": settled(verdict.headline.metric),
        "direction": verdict.headline.direction,
        "words": settled(sentences(verdict, figures)),
        "best": f"g{verdict.best}",
        "runner_up": None if verdict.runner_up is None else f"g{verdict.runner_up}",
        "baseline": None if verdict.baseline is None else f"g{verdict.baseline}",
        "comparisons": [comparison_record(comparison) for comparison in verdict.comparisons],
    }


def comparison_record(comparison: Comparison) -> Object:
    found = comparison.found
    return {
        "a": f"g{comparison.a}",
        "b": f"g{comparison.b}",
        "difference": rounded(found.difference),
        "low": settled(found.low),
        "high": settled(found.high),
        "p": settled(found.p),
        "p_adjusted": settled(comparison.adjusted),
        "n": found.n,
        "paired": found.paired,
        "method": found.method,
        "inside_noise": comparison.inside_noise,
        "bootstrap": settled(found.bootstrap),
    }


def with_ids(sample: Object) -> Object:
    return {**sample, "answers": [{**answer, "run": f"r{answer['run']}"} for answer in sample["answers"]]}


def as_json(comparison: Object) -> str:
    """`compare.json`: a line per part, strictly JSON."""
    parts = (f"{json.dumps(key)}: {compact(value)}" for key, value in comparison.items())
    return "{\n" + ",\n".join(parts) + "\n}\n"


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def write(comparison: Object, folder: Path) -> list[Path]:
    """compare.json and compare.html in `folder`, which is made; their paths."""
    from uft.report.page import render
    from uft.runs import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "compare.json": as_json(comparison), folder / "compare.html": render(comparison)}
    for path, text in files.items():
        write_atomically(path, text)
    return list(files)
