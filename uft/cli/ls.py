"""`uft ls [FOLDER]`: the runs and sweeps here, their state, steps and headline metrics."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft.errors import GOOD, Problem, UftError
from uft.runs import Run, find_runs, summary, waiting
from uft.tracking.console import HEADLINES

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 160  # where there is no terminal
COLUMNS = 4  # metrics shown at most
COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "waiting": "dim",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="uft ls", description="The runs here, oldest first.", allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help="where to look; outputs")
    parser.add_argument("--json", action="store_true", help="one JSON list, all metrics")
    parsed = parser.parse_args(arguments)
    if not parsed.folder.is_dir() and parsed.folder != Path("outputs"):
        raise UftError(Problem(str(parsed.folder), "no such folder"))
    rows = [describe(run) for run in find_runs(parsed.folder)] + [planned(run) for run in waiting(parsed.folder)]
    rows.sort(key=lambda row: Path(row["path"]).parts)
    if parsed.json:
        print(json.dumps(rows, indent=2, default=str))
    elif rows:
        show(rows)
    else:
        print(f"No runs in {parsed.folder}{os.sep}  Make one:  uft train objective=ift data=mix")
    return GOOD


def describe(run: Run) -> dict[str, Any]:
    """A run as a flat record; `total_steps` is None where only the worker knows it."""
    try:
        total = run.info().get("total_steps") or run.config().get("train", {}).get("steps")
        return {**summary(run), "total_steps": total, "error": run.result().get("error")}
    except Exception as error:  # a file that cannot be read is shown, not a reason to hide the other runs
        return {"name": run.name, "path": str(run.path), "status": f"unreadable ({type(error).__name__})", "steps": 0}


def planned(run: Run) -> dict[str, Any]:
    """A job of a sweep that has not started."""
    return {"name": run.name, "path": str(run.path), "status": "waiting", "steps": 0}


def show(rows: list[dict[str, Any]]) -> None:
    """A table per folder: a sweep, or the runs of a day."""
    from rich.console import Console
    from rich.text import Text

    width = None if sys.stdout.isatty() else WIDE
    console, metrics = Console(width=width), headlines(rows)
    for folder, inside in groupby(rows, key=lambda row: Path(row["path"]).parent):
        here = list(inside)
        console.print(Text(f"\n{folder}/", style="bold"))
        console.print(table(here, metrics), highlight=False)
        for row in here:
            if row.get("error"):
                console.print(Text(f"  {row['name']}: {str(row['error']).strip().splitlines()[0]}", style="red"))


def table(rows: list[dict[str, Any]], metrics: list[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("  run", overflow="fold")
    for name in ("state", "steps", *(metric.removeprefix("eval/") for metric in metrics)):
        shown.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for row in rows:
        state = Text(row["status"], style=COLOURS.get(row["status"], "red"))
        shown.add_row(Text(f"  {row['name']}"), state, steps(row), *(number(row.get(metric)) for metric in metrics))
    return shown


def headlines(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics that some run has and that are worth a column."""
    wanted = [f"eval/{name}" for name in HEADLINES]
    return [name for name in wanted if any(name in row for row in rows)][:COLUMNS]


def steps(row: Mapping[str, Any]) -> str:
    total = row.get("total_steps")
    return f"{row['steps']}/{total}" if total else str(row["steps"])


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""
