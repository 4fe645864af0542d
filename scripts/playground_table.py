"""The playground's results as a Markdown table: `python scripts/playground_table.py outputs/DATE/playground`.

Runs that differ only in their seed are one row: mean ± standard deviation over seeds (n - 1; none for a single seed).
What the columns mean: docs/playground.md.
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


def measured(runs: Iterable[Run]) -> dict[str, list[Metrics]]:
    """Arm -> last metrics of each of its finished runs, by arm. What cannot be used is told on stderr."""
    found: dict[str, list[Metrics]] = defaultdict(list)
    for run in runs:
        metrics = run.result().get("final", {})
        if run.status == "finished" and complete(metrics):
            found[arm(run)].append(metrics)
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


def table(rows: Mapping[str, list[Metrics]]) -> str:
    lines = [f"| arm | {' | '.join(COLUMNS)} | seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, runs in rows.items():
        cells = [cell([float(metrics[key]) for metrics in runs]) for key in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a sweep, or any folder above runs")
    folder = parser.parse_args().folder
    runs = find_runs(folder)
    rows = measured(runs)
    if not rows:
        parser.error(f"no finished runs with the playground's figures in {folder}")
    base = untrained(runs)
    print(table({**({"base": base} if base else {}), **rows}))


if __name__ == "__main__":
    main()
