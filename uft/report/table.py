"""A comparison for a terminal: the table of configurations, incomplete runs, the answer in words, warnings.

Drawn from `compare.json` alone. Names, errors and everything else that a run wrote cannot move the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uft.report.text import plural
from uft.report.verdict import ALONE, BETTER, SELECTED
from uft.tracking.console import printable, shorten

WIDE = 160  # where there is no terminal
COLUMNS, ROWS, OTHERS = 5, 30, 10  # shown at most: metrics, configurations, incomplete runs
LONGEST = 200  # characters of a name or an error
Object = Mapping[str, Any]


def show(comparison: Object) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    runs, groups = comparison["runs"], comparison["groups"]
    head = f"{comparison['title']}: {plural(len(runs), 'run')}, {plural(len(groups), 'configuration')}"
    console.print(Text(f"\n{one_line(head)}\n", style="bold"))
    if groups:
        console.print(table(comparison))

    incomplete = [run for run in runs if run["status"] != "finished" or run["error"]]
    for run in incomplete[:OTHERS]:
        why = f": {one_line(run['error'].splitlines()[0])}" if run["error"] else ""
        style = "red" if run["status"] == "failed" else "yellow"
        console.print(Text(f"  {one_line(run['name'])} {run['status']}{why}", style=style))
    if len(incomplete) > OTHERS:
        console.print(Text(f"  and {len(incomplete) - OTHERS} more that are not finished or not whole", style="yellow"))

    once: set[str] = set()  # sentences that hold for every metric alike
    for finding in comparison["summary"]:
        best, *words = finding["words"]
        best = f"{finding['metric']} ({BETTER[finding['direction']]}): {best}"
        console.print(Text("\n" + printable(best), style="bold"))
        for word in words:
            general = {text for text in (SELECTED, ALONE) if text in word}
            if not general & once:
                console.print(Text("  " + printable(word)))
            once |= general

    for number, warning in enumerate(comparison["warnings"]):
        text = f"! {printable(warning['what'])}. {printable(warning['why'])}"
        console.print(Text(("" if number else "\n") + text, style="yellow"))


def table(comparison: Object) -> Table:
    """A row per configuration, best first: its runs, and mean ± standard deviation of the headline metrics."""
    metrics = [head["metric"] for head in comparison["headline"]][:COLUMNS]
    best = {finding["metric"]: finding["best"] for finding in comparison["summary"]}
    finished = {run["id"] for run in comparison["runs"] if run["status"] == "finished"}
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("  configuration", overflow="fold")
    for name in ("runs", *metrics):
        shown.add_column(one_line(name.removeprefix("eval/")), justify="right", no_wrap=True)

    def place(group: Object) -> tuple[bool, float]:
        """By the first headline metric; groups without it at the end."""
        mean = group["metrics"].get(metrics[0], {}).get("mean") if metrics else None
        if not isinstance(mean, (int, float)):
            return True, 0.0
        return False, -mean if comparison["headline"][0]["direction"] == "max" else mean

    groups = sorted(comparison["groups"], key=place)
    for group in groups[:ROWS]:
        name = one_line(group["name"]) + (" (baseline)" if group["baseline"] else "")
        count, done = len(group["runs"]), len(finished.intersection(group["runs"]))
        cells = [cell(group["metrics"].get(metric), best.get(metric) == group["id"]) for metric in metrics]
        shown.add_row(Text(f"  {name}"), Text(str(count) if done == count else f"{done} of {count}"), *cells)
    if len(groups) > ROWS:
        shown.caption, shown.caption_justify = f"  and {len(groups) - ROWS} more in compare.html", "left"
    return shown


def cell(found: Object | None, best: bool) -> Text:
    if found is None:
        return Text("")
    mean, sd = found["mean"], found["sd"]
    text = mean if isinstance(mean, str) else f"{mean:.4g}"
    text += f" ± {sd:.2g}" if isinstance(sd, (int, float)) else ""
    return Text(f"{text} *" if best else f"{text}  ", style="bold green" if best else "")


def one_line(text: str) -> str:
    return shorten(printable(text), LONGEST)
