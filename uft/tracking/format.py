"""Numbers, times and lines as people read them. Pure functions of values to text."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence

SEPARATOR = " | "
FIRST_TO_GO = ("mfu", "lr", "grad", "memory", "terms", "speed", "percent")  # when a terminal is too narrow
JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji need them; they move nothing
HEADLINE_TERMS = 1  # what is differentiated; metrics.jsonl has all terms


def number(value: float | None, decimals: int = 2) -> str:
    """`value` with fixed decimals where these say something, else in powers of ten; "-" if there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == 0 or 10.0**-decimals <= size < 1000:
        return f"{value:.{decimals}f}"
    return f"{value:.1f}" if 1000 <= size < 100_000 else f"{value:.1e}"


def count(value: float) -> str:
    """1234567 -> 1.2M"""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """432 -> 07:12, 4032 -> 1:07:12, 187032 -> 2d 03:57:12"""
    whole = max(0, round(seconds))
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def printable(text: str) -> str:
    """One line that cannot move the cursor: line feeds and control codes of data and models are shown as escapes."""
    return "".join(c.encode("unicode_escape").decode() if _moves(c) else c for c in text)


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def _moves(character: str) -> bool:
    category = unicodedata.category(character)
    return (category[0] == "C" and character not in JOINERS) or category in ("Zl", "Zp")


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def step_line(
    step: int,
    total: int,
    metrics: Mapping[str, float],
    terms: Sequence[str] = (),
    eta: float | None = None,
    width: int | None = None,
) -> str:
    """The line of one step. What is not known is left out; so is the least wanted where `width` is too narrow."""
    fields = {
        "step": f"step {step:>{len(str(total))}}/{total}",
        "percent": f"{100 * step // max(total, 1):>3}%",
        "loss": _field("loss {:>6}", metrics.get("loss"), 3),
        "terms": _terms(metrics, terms),
        "lr": f"lr {metrics['lr']:.1e}" if "lr" in metrics else "",
        "grad": _field("grad {:>5}", metrics.get("grad_norm"), 2),
        "speed": f"{count(metrics['tokens_per_second']):>6} tok/s" if "tokens_per_second" in metrics else "",
        "mfu": f"mfu {100 * metrics['mfu']:>2.0f}%" if "mfu" in metrics else "",
        "memory": _memory(metrics),
        "eta": f"eta {duration(eta)}" if eta is not None else "",
    }
    for name in FIRST_TO_GO:
        if width is None or len(_join(fields)) <= width:
            break
        fields[name] = ""
    return _join(fields)


def _join(fields: Mapping[str, str]) -> str:
    shown = [text for name, text in fields.items() if text and name != "percent"]
    shown[0] += f" {fields['percent']}" if fields["percent"] else ""
    return SEPARATOR.join(shown)


def _field(template: str, value: float | None, decimals: int) -> str:
    return "" if value is None else template.format(number(value, decimals))


def _terms(metrics: Mapping[str, float], terms: Sequence[str]) -> str:
    """`uft 0.21 nll 1.80`: the objective's terms, in places that stay when one of them has nothing to show."""
    named = [(name, metrics.get(f"objective/{name}")) for name in terms[:HEADLINE_TERMS]]
    if "nll" in metrics:
        named.append(("nll", metrics["nll"]))
    return " ".join(f"{name} {number(value):>5}" for name, value in named)


def _memory(metrics: Mapping[str, float]) -> str:
    used, there = metrics.get("memory_gb"), metrics.get("memory_total_gb")
    if used is None:
        return ""
    return f"{used:.1f} GB" if there is None else f"{used:.1f}/{there:.0f} GB"


def card(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and values in two columns; a value of several lines stays in its column."""
    width = max((len(label) for label, _ in rows), default=0)
    lines = []
    for label, value in rows:
        first, *more = printable_lines(value).split("\n")
        lines.append(f"  {label:<{width}}  {first}".rstrip())
        lines += [f"  {'':<{width}}  {line}".rstrip() for line in more]
    return "\n".join(lines)
