"""The playground's results as a Markdown table: `python scripts/playground_table.py outputs/DATE/playground`.

Runs that differ only in their seed are one row: mean ± standard deviation over seeds (n - 1; none for a single seed).
With `--search` a row is the best trial of an arm of sweep=playground_search. What the columns mean: docs/playground.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from uft.runs import Run, find_runs
from uft.tracking.metrics import read_metrics

COLUMNS = {
    "new": "eval/instruct/exact_match",
    "style": "eval/pairs/exact_match",
    "skill": "eval/pairs/correct",
    "nll new": "eval/instruct/nll",
    "nll chosen": "eval/pairs/nll",
}
Metrics = dict[str, Any]


def arm(run: Run) -> str:
    """`ift-seed1` -> `ift`: what the runs of a row share; the sweep's name where only seeds were swept."""
    return re.sub(r"-?seed\d+(-\d+)*$", "", run.name) or run.path.resolve().parent.name


def complete(metrics: Metrics) -> bool:
    return all(isinstance(metrics.get(name), (int, float)) for name in COLUMNS.values())


def measured(runs: Iterable[Run]) -> dict[str, dict[Any, Metrics]]:
    """Arm -> seed -> last metrics of its finished run, by arm. What cannot be used is told on stderr."""
    found: dict[str, dict[Any, Metrics]] = defaultdict(dict)
    for run in runs:
        metrics = run.result().get("final", {})
        if run.status == "finished" and complete(metrics):
            if (seed := run.config().get("seed")) in (seeds := found[arm(run)]):
                print(f"left out: {run.path} (another run of this arm has seed {seed})", file=sys.stderr)
            seeds.setdefault(seed, metrics)
        else:
            print(f"left out: {run.path} ({run.status})", file=sys.stderr)
    return dict(sorted(found.items()))


def untrained(runs: Iterable[Run]) -> list[Metrics]:
    """The battery before the first step of the first run that has one: the base model, the same for every run."""
    lines = (line for run in runs for line in read_metrics(run) if line["step"] == 0)
    return [line for line in lines if complete(line)][:1]


def cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def table(rows: Mapping[str, Sequence[Metrics]]) -> str:
    lines = [f"| arm | {' | '.join(COLUMNS)} | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, runs in rows.items():
        cells = [cell([float(metrics[key]) for metrics in runs]) for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def score(metrics: Metrics) -> float:
    """The search's rule: the mean of new, style and skill."""
    return mean(float(metrics[COLUMNS[name]]) for name in ("new", "style", "skill"))


def search_table(rows: Mapping[str, Mapping[Any, Metrics]]) -> str:
    """`rows`: ARM.SETTING-lrRATE -> seed -> metrics. A row an arm, with the best of its other setting."""
    trials: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)  # arm -> (setting, rate) -> score
    for name, seeds in rows.items():
        setting, _, rate = name.partition("-lr")
        arm, _, setting = setting.partition(".")
        trials[arm][setting, rate] = mean(map(score, seeds.values()))
    lines = ["| arm | trials | setting | learning rate | mean of three | the other setting |", "|---" * 6 + "|"]
    for arm, scores in trials.items():
        best = max(scores, key=scores.__getitem__)
        other = max((value for (setting, _), value in scores.items() if setting != best[0]), default=None)
        cells = (
            arm,
            str(len(scores)),
            best[0],
            best[1],
            f"{scores[best]:.2f}",
            "" if other is None else f"{other:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a sweep, or any folder above runs")
    parser.add_argument("--search", action="store_true", help="the best trial of every arm")
    asked = parser.parse_args()
    runs = find_runs(asked.folder)
    rows = measured(runs)
    if not rows:
        parser.error(f"no finished runs with the playground's figures in {asked.folder}")
    if asked.search:
        return print(search_table(rows))
    base = {"base": untrained(runs)}
    print(
        table(
            {name: metrics for name, metrics in base.items() if metrics} | {n: [*s.values()] for n, s in rows.items()}
        )
    )


if __name__ == "__main__":
    main()
