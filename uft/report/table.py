"""A comparison as a table: in the terminal, for a paper (CSV, Markdown, LaTeX), and in a report of one page.

All are drawn from `compare.json` alone. Names, errors and everything else that a run wrote are text: they cannot move
the cursor, and are neither Markdown nor LaTeX.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import product
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from uft.report.metrics import fixed, places, plural
from uft.report.verdict import ALONE, BETTER, SELECTED
from uft.tracking.console import bare_table, printable, shorten, table_console

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS, ROWS, OTHERS = 5, 30, 10  # shown at most: metrics, configurations, incomplete runs
LONGEST_CELL = 200  # characters of a name or an error
FLIPS, ANSWER = 3, 60  # prompts that flipped in the terminal, and characters of a prompt or answer


def show(comparison: Mapping[str, Any]) -> None:
    console = table_console()
    runs, groups = comparison["runs"], comparison["groups"]
    head = f"{comparison['title']}: {plural(len(runs), 'run')}, {plural(len(groups), 'configuration')}"
    console.print(Text(f"\n{one_line(head)}\n", style="bold"))
    for part in parts_of_table(comparison, console.width):
        console.print(part)

    incomplete = [run for run in runs if run["status"] != "finished" or run["error"]]
    for run in incomplete[:OTHERS]:
        why = f": {one_line(run['error'].splitlines()[0])}" if run["error"] else ""
        style = "red" if run["status"] == "failed" else "yellow"
        console.print(Text(f"  {one_line(run['name'])} {one_line(run['status'])}{why}", style=style))
    if len(incomplete) > OTHERS:
        console.print(Text(f"  and {len(incomplete) - OTHERS} more that are not finished or not whole", style="yellow"))

    once: set[str] = set()  # sentences that hold for every metric alike
    for finding in comparison["summary"]:
        best, *words = finding["words"]
        best = f"{finding['metric']} ({BETTER[finding['direction']]}): {best}"
        console.print(Text("\n" + hanging("", printable(best), console.width), style="bold"))
        for word in words:
            general = {text for text in (SELECTED, ALONE) if text in word}
            if not general & once:
                console.print(Text(hanging("  ", printable(word), console.width)))
            once |= general

    for title, listed in list(flips(comparison))[:1]:
        console.print(Text("\n" + printable(title), style="bold"))
        for one in listed[:FLIPS]:
            said = (f"{one_line(name)}: {shorten(printable(text), ANSWER)}" for name, text in one["answers"])
            console.print(Text(f"  {shorten(printable(one['prompt']), ANSWER)}  ->  {'   '.join(said)}"))

    for position, warning in enumerate(comparison["warnings"]):
        text = hanging("! ", f"{printable(warning['what'])}. {printable(warning['why'])}", console.width)
        console.print(Text(("" if position else "\n") + text, style="yellow"))


def hanging(first: str, text: str, width: int) -> str:
    """The text behind `first`, its further lines indented."""
    return fill(text, width, initial_indent=first, subsequent_indent="  ", break_on_hyphens=False)


def flips(comparison: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For every pair of configurations with verdicts of the same rows: a title, and the prompts that flipped."""
    names = {group["id"]: group["name"] for group in comparison["groups"]}
    for finding in comparison["summary"]:
        for one in finding["comparisons"]:
            if one["rows"] and one["rows"]["flipped"]:
                a, b = names[one["a"]], names[one["b"]]
                flipped = [
                    {**flip, "answers": [(a, flip["a"]), (b, flip["b"])], "right": names[one[flip["right"]]]}
                    for flip in one["rows"]["flipped"]
                ]
                yield f"{finding['metric']}: prompts that flipped between {a} and {b}", flipped


def standing(comparison: Mapping[str, Any], waiting: int, width: int) -> Group:
    """The table alone, how many runs are in which state, and how far those at work are: for `uft compare --watch`."""
    runs = comparison["runs"]
    states = Counter(run["status"] for run in runs) + Counter(waiting=waiting)
    counted = ", ".join(f"{count} {one_line(state)}" for state, count in states.items())
    work = [run for run in runs if run["status"] == "running"]
    steps = [f"  {one_line(run['name'])} step {run['steps'] or 0}/{run['total_steps'] or '?'}" for run in work[:OTHERS]]
    head = Text(f"{one_line(comparison['title'])}: {counted}\n", style="bold")
    return Group(head, *parts_of_table(comparison, width), Text("\n" + "\n".join(steps)))


def parts_of_table(comparison: Mapping[str, Any], width: int) -> list[Table | Text]:
    """A row per configuration, best first: its runs, and mean ± standard deviation of as many headline metrics as fit.

    Names are never cut away: they get up to half the width, and are folded there.
    """
    if not comparison["groups"]:
        return []
    alone = len(comparison["groups"]) == 1
    having = Counter(metric for group in comparison["groups"] for metric, spread in group["metrics"].items() if spread)
    leading = {one["metric"]: one["leading"] if having[one["metric"]] > 1 else [] for one in comparison["summary"]}
    finished = {run["id"] for run in comparison["runs"] if run["status"] == "finished"}
    groups = ranked(comparison)[:ROWS]
    names, runs = [], []
    for group in groups:
        names.append("  " + one_line(group["name"]) + (" (baseline)" if group["baseline"] else ""))
        count, done = len(group["runs"]), len(finished.intersection(group["runs"]))
        runs.append(str(count) if done == count else f"{done} of {count}")
    name_width = max(min(max(map(len, names)), width // 2), len("  configuration"))
    shown = bare_table()
    shown.add_column("  configuration", overflow="fold", min_width=name_width)
    shown.add_column("runs", justify="right", no_wrap=True)
    columns: list[list[Text]] = [[Text(name) for name in names], [Text(text) for text in runs]]
    room = width - name_width - max(map(len, ["runs", *runs])) - 4
    for head in comparison["headline"][:COLUMNS]:
        metric = head["metric"]
        title = f"{one_line(metric.removeprefix('eval/'))} {ARROWS[head['direction']]}"
        of = {group["id"]: group["metrics"].get(metric) for group in groups}
        digits = places(spread["mean"] for spread in of.values() if spread)
        cells = [cell(spread, digits, name in leading.get(metric, ())) for name, spread in of.items()]
        room -= max(len(title), *map(len, cells)) + 2
        if room < 0 and len(columns) > 2:
            break
        shown.add_column(title, justify="right", no_wrap=True)
        columns.append(cells)
    for row in zip(*columns, strict=True):
        shown.add_row(*row)
    notes = ["mean ± standard deviation over seeds; ↑ more is better, ↓ less is better"]
    if not alone:
        notes.append("* the best mean, and all that are not worse beyond seed noise")
    if left := min(len(comparison["headline"]), COLUMNS) - (len(columns) - 2):
        notes.append(f"{plural(left, 'more metric')} in a wider terminal")
    if len(comparison["groups"]) > ROWS:
        notes.append(f"and {len(comparison['groups']) - ROWS} more in compare.html")
    return [shown, *(Text(f"  {note}", style="dim") for note in notes)]


def ranked(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configurations by the first headline metric, best first; those without it at the end."""

    head = next(iter(comparison["headline"]), {"metric": "", "direction": "min"})

    def place(group: Mapping[str, Any]) -> tuple[bool, float]:
        mean = group["metrics"].get(head["metric"], {}).get("mean")
        if not isinstance(mean, (int, float)):
            return True, 0.0
        return False, -mean if head["direction"] == "max" else mean

    return sorted(comparison["groups"], key=place)


def cell(found: Mapping[str, Any] | None, digits: int, leads: bool) -> Text:
    if found is None:
        return Text("")
    text = fixed(found["mean"], digits)
    text += f" ± {fixed(found['sd'], digits)}" if isinstance(found["sd"], (int, float)) else ""
    return Text(f"{text} *" if leads else f"{text}  ", style="bold green" if leads else "")


def one_line(text: str) -> str:
    return shorten(printable(text), LONGEST_CELL)


# --- For a paper


CSV, MARKDOWN, LATEX = FORMS = ("csv", "markdown", "latex")
CAPTION = (
    "Mean [95 % interval] over seeds, of the last evaluation. Bold: the best, where its lead over the runner-up is"
    " more than seed noise (p < 0.05 after Holm's adjustment)."
)
OF_CSV = ("configuration", "metric", "direction", "n", "seeds", "mean", "sd", "low", "high", "baseline", "best")
OF_DIFFERENCE = {f"baseline_{key}": key for key in ("difference", "low", "high", "p_adjusted")}
"""Columns of CSV on the difference from the baseline, and where compare.json has them."""
ARROWS = {"max": "↑", "min": "↓"}
SPECIAL = re.compile(r"([\\`*_\[\]|#])")  # in Markdown


def as_text(comparison: Mapping[str, Any], form: str) -> str:
    """The configurations, best first, with means, intervals and seeds of the headline metrics, as one of FORMS.

    CSV has a line per configuration and metric, and the values of the axes; the others a row per configuration.
    """
    axes, groups = [axis["key"] for axis in comparison["axes"]], ranked(comparison)
    lines = measured(comparison, groups)
    if form == CSV:
        return str(lines.reindex(columns=[*OF_CSV, *OF_DIFFERENCE, *axes]).to_csv(index=False))
    metrics = {head["metric"]: head for head in comparison["headline"] if head["metric"] in set(lines["metric"])}
    heads = [f"{one_line(metric)} {ARROWS[head['direction']]}" for metric, head in metrics.items()]
    cells, bold = (
        lines.pivot(index="id", columns="metric", values=values)
        .reindex(index=[group["id"] for group in groups], columns=list(metrics))
        .set_axis(heads, axis=1)
        for values in ("cell", "bold")
    )
    cells.insert(0, "configuration", [one_line(group["name"]) for group in groups])
    counts = (max((found["n"] for found in group["metrics"].values()), default=0) for group in groups)
    cells.insert(1, "seeds", list(map(str, counts)))
    cells, bold = cells.fillna(""), bold.reindex_like(cells).eq(True)
    if form == LATEX:
        style = cells.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        style = style.apply(lambda _: bold.replace({True: "textbf:--rwrap;", False: ""}), axis=None)
        columns = "l" + "r" * (len(cells.columns) - 1)
        caption = CAPTION.replace("%", r"\%")
        text = str(style.to_latex(hrules=True, caption=caption, position_float="centering", column_format=columns))
        text = text.replace("\\\\\n[", "\\\\\n{}[")  # after a break of the line a bracket begins its argument
        return text.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$").replace(" < ", " $<$ ")
    rows = [[*map(plain, cells.columns)], ["---", *["---:"] * (len(cells.columns) - 1)]]
    for texts, marks in zip(cells.itertuples(index=False), bold.itertuples(index=False), strict=True):
        rows.append([f"**{plain(text)}**" if mark else plain(text) for text, mark in zip(texts, marks, strict=True)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def measured(comparison: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> DataFrame:
    """A line per configuration and judged metric: what CSV has, and the cell of a table with whether it is bold."""
    from pandas import DataFrame

    seeds = {run["id"]: str(run["seed"]) for run in comparison["runs"] if run["status"] == "finished"}
    findings = {finding["metric"]: finding for finding in comparison["summary"]}
    lines = []
    digits = {
        head["metric"]: places(group["metrics"].get(head["metric"], {}).get("mean") for group in groups)
        for head in comparison["headline"]
    }
    for group, head in product(groups, comparison["headline"]):
        finding, spread = findings.get(head["metric"]), group["metrics"].get(head["metric"])
        if finding is None or spread is None:
            continue
        best = finding["best"] == group["id"]
        inside_noise = {one["b"]: one["inside_noise"] for one in finding["comparisons"]}.get(finding["runner_up"])
        own = [seeds[run] for run in group["runs"] if run in seeds]
        mean, low, high = (
            None if spread[name] is None else fixed(spread[name], digits[head["metric"]])
            for name in ("mean", "low", "high")
        )
        compared = (one for one in finding["against_baseline"] if one["group"] == group["id"])
        against: Mapping[str, Any] = next(compared, {})
        lines.append(
            {
                **{"configuration": one_line(group["name"]), **head, **spread, "seeds": " ".join(own)},
                **{"baseline": group["baseline"], "best": best, **group["config"], "id": group["id"]},
                **{name: against.get(key) for name, key in OF_DIFFERENCE.items()},
                "cell": mean if low is None else f"{mean} [{low}, {high}]",
                "bold": best and inside_noise is False,
            }
        )
    return DataFrame(lines, columns=None if lines else ["id", "metric", "cell", "bold"])


def plain(text: str) -> str:
    """Text that is no Markdown."""
    return SPECIAL.sub(r"\\\1", escape(printable(text), quote=False))


def as_report(comparison: Mapping[str, Any]) -> str:
    """compare.md: the answer, the table, the warnings and a command for every configuration."""
    runs = {run["id"]: run for run in comparison["runs"]}
    title = f"{comparison['title']}: {plural(len(runs), 'run')}, {plural(len(comparison['groups']), 'configuration')}"
    lines = [f"# {plain(one_line(title))}", ""]
    for finding in comparison["summary"]:
        words = " ".join(map(plain, finding["words"]))
        lines += [f"**{plain(finding['metric'])}** ({BETTER[finding['direction']]}): {words}", ""]
    if comparison["groups"]:
        lines += [as_text(comparison, MARKDOWN), CAPTION, ""]
    for title, listed in flips(comparison):
        lines += [f"## {plain(one_line(title))}", "", "| prompt | right | answers |", "|---|---|---|"]
        for one in listed:
            said = "; ".join(f"{plain(one_line(name))}: {plain(one_line(text))}" for name, text in one["answers"])
            lines.append(f"| {plain(one_line(one['prompt']))} | {plain(one_line(one['right']))} | {said} |")
        lines.append("")
    if comparison["warnings"]:
        warnings = (f"* {plain(warning['what'])}. {plain(warning['why'])}" for warning in comparison["warnings"])
        lines += ["## Warnings", "", *warnings, ""]
    commands = [runs[group["runs"][0]]["command"] for group in comparison["groups"]]
    if any(commands):
        lines += ["## Commands", "", "One run of each configuration:", ""]
        lines += [f"    {printable(command)}" for command in commands if command] + [""]
    return "\n".join(lines)
