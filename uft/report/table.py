"""A comparison for a terminal: the table of configurations, runs that are not whole, the answer in words, warnings.

Drawn from `compare.json` alone. Names, errors and everything else that a run wrote cannot move the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from uft.report.sentences import ALONE, BETTER, SELECTED
from uft.report.words import many
from uft.tracking.console import printable, shorten

WIDE = 160  # where there is no terminal
COLUMNS, ROWS, OTHERS = 5, 30, 10  # shown at most: metrics, configurations, runs with something to say of
ONCE = (SELECTED, ALONE)  # what holds for every metric alike
LONGEST = 200
Object = Mapping[str, Any]


def show(comparison: Object) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)
    runs, groups = comparison["runs"], comparison["groups"]
    head = f"{comparison['title']}: {many(len(runs), 'run')}, {many(len(groups), 'configuration')}"
    console.print(Text(f"\n{line(head)}\n", style="bold"))
    if groups:
        console.print(table(comparison))
    for text, style in (*incomplete(comparison), *answer(comparison), *warnings(comparison)):
        console.print(Text(text, style=style))


def table(comparison: Object) -> Table:
    """A row per configuration: its runs, and mean ± standard deviation of the headline metrics."""
    metrics = [head["metric"] for head in comparison["headline"]][:COLUMNS]
    best = {each["metric"]: each["best"] for each in comparison["summary"]}
    finished = {run["id"] for run in comparison["runs"] if run["status"] == "finished"}
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("  configuration", overflow="fold")
    for name in ("runs", *metrics):
        shown.add_column(line(name.removeprefix("eval/")), justify="right", no_wrap=True)
    groups = ranked(comparison)
    for group in groups[:ROWS]:
        name = line(group["name"]) + (" (baseline)" if group["baseline"] else "")
        cells = [cell(group["metrics"].get(metric), best.get(metric) == group["id"]) for metric in metrics]
        shown.add_row(Text(f"  {name}"), Text(counted(group["runs"], finished)), *cells)
    if len(groups) > ROWS:
        shown.caption, shown.caption_justify = f"  and {len(groups) - ROWS} more in compare.html", "left"
    return shown


def ranked(comparison: Object) -> list[Object]:
    """Configurations by the first headline metric, best first; those without it at the end."""
    groups = list(comparison["groups"])
    if not comparison["headline"]:
        return groups
    head = comparison["headline"][0]
    sign = -1 if head["direction"] == "max" else 1

    def place(group: Object) -> tuple[bool, float]:
        mean = group["metrics"].get(head["metric"], {}).get("mean")
        known = isinstance(mean, (int, float))
        return not known, sign * mean if known else 0.0

    return sorted(groups, key=place)


def counted(runs: Sequence[str], finished: set[str]) -> str:
    """`3`, or `2 of 3` where one has not finished."""
    count = len(finished.intersection(runs))
    return str(count) if count == len(runs) else f"{count} of {len(runs)}"


def cell(found: Object | None, best: bool) -> Text:
    if found is None:
        return Text("")
    mean, sd = found["mean"], found["sd"]
    text = mean if isinstance(mean, str) else f"{mean:.4g}"
    text += f" ± {sd:.2g}" if isinstance(sd, (int, float)) else ""
    return Text(f"{text} *" if best else f"{text}  ", style="bold green" if best else "")


def incomplete(comparison: Object) -> Iterator[tuple[str, str]]:
    """Runs that are not counted, and those of which something is lost, with the first line of what went wrong."""
    runs = [run for run in comparison["runs"] if run["status"] != "finished" or run["error"]]
    for run in runs[:OTHERS]:
        why = f": {line(run['error'].splitlines()[0])}" if run["error"] else ""
        yield f"  {line(run['name'])} {run['status']}{why}", "red" if run["status"] == "failed" else "yellow"
    if len(runs) > OTHERS:
        yield f"  and {len(runs) - OTHERS} more that are not finished or not whole", "yellow"


def answer(comparison: Object) -> Iterator[tuple[str, str]]:
    """The sentences of every headline metric; what holds for all of them is said once."""
    said: set[str] = set()
    for each in comparison["summary"]:
        best, *words = each["words"]
        first = f"{each['metric']} ({BETTER[each['direction']]}): {best}"
        yield "\n" + line(first, len(first)), "bold"
        for word in words:
            general = {text for text in ONCE if text in word}
            if not general & said:
                yield "  " + line(word, len(word)), ""
            said |= general


def warnings(comparison: Object) -> Iterator[tuple[str, str]]:
    for number, warning in enumerate(comparison["warnings"]):
        what, why = (line(warning[key], len(warning[key])) for key in ("what", "why"))
        yield ("" if number else "\n") + f"! {what}. {why}", "yellow"


def line(text: str, most: int = LONGEST) -> str:
    """One line that stays one line."""
    return shorten(printable(text), most)
