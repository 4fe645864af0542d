"""What is shown around the steps: the table of a battery, samples, and the card at the end. Text is made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from uft.evaluation.samples import Sample
from uft.tracking.format import count, duration, number, printable, shorten

if TYPE_CHECKING:
    from rich.table import Table

PREFIX = "eval/"
SHOWN_METRICS = 10  # in the end card
HEADLINES = ("nll", "exact_match", "pair_accuracy", "kl", "margin")
"""Metrics of the battery that come first, in this order, where there is no room for all."""


class Battery(Protocol):
    """What `uft.evaluation.battery` measures."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def samples(self) -> Sequence[Sample]: ...


@dataclass(frozen=True)
class Ending:
    """How a run ended, for its last card. `final` and `best` are metrics by their full names."""

    status: str  # finished, failed or stopped
    steps: int
    total_steps: int
    seconds: float
    tokens: int
    final: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_checkpoint: str | None = None
    peak_memory_gb: float | None = None
    error: str | None = None  # the first one
    commands: Sequence[str] = ()  # to try next; the resume command of a run that did not finish


def overall(metrics: Mapping[str, float]) -> dict[str, float]:
    """eval/<metric> by metric, without the sources' own."""
    names = {name: name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX)}
    return {short: metrics[name] for name, short in names.items() if "/" not in short}


def by_source(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """eval/<source>/<metric> by source and metric."""
    found: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        source, slash, metric = name.removeprefix(PREFIX).rpartition("/")
        if name.startswith(PREFIX) and slash:
            found.setdefault(source, {})[metric] = value
    return found


def battery_table(
    step: int, history: Mapping[int, Mapping[str, float]], marks: Mapping[str, int] | None = None
) -> Table:
    """A row per metric: before training, the last time, now, and now for each source.

    `history` holds every battery so far by step, `step` among them. `marks`: steps that stay in view, by name.
    """
    from rich.table import Table

    earlier = sorted(at for at in history if at < step)
    times = {"before": 0} if 0 in earlier else {}
    times |= {name: at for name, at in (marks or {}).items() if at in earlier}
    times |= {"last": earlier[-1]} if any(earlier) and earlier[-1] not in times.values() else {}
    times |= {"now": step}
    sources = by_source(history[step])
    columns = [overall(history[at]) for at in times.values()] + list(sources.values())
    title = f"evaluation at step {step}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    for name in ("metric", *(f"{name} ({at})" for name, at in times.items()), *sources):
        table.add_column(printable(name), justify="left" if name == "metric" else "right", overflow="fold")
    for metric in dict.fromkeys(name for column in columns for name in column):
        table.add_row(printable(metric), *(number(column.get(metric), 3) for column in columns))
    return table


def sample_lines(samples: Sequence[Sample], width: int, per_source: int = 1) -> list[str]:
    """The first samples of every source, a line each."""
    shown: dict[str, int] = {}
    lines = []
    for sample in samples:
        shown[sample.source] = shown.get(sample.source, 0) + 1
        if shown[sample.source] <= per_source:
            part = max((width - len(sample.source) - 12) // 2, 16)
            line = f"{sample.source}: {_quote(sample.prompt, part)} -> {_quote(sample.reply, part)}"
            wanted = f"  (answer {_quote(sample.answer, 16)})" if sample.answer is not None else ""
            lines.append("  " + line + wanted)
    return lines


def _quote(text: str, width: int) -> str:
    return f'"{shorten(printable(text), width)}"'


def ending_rows(ending: Ending) -> list[tuple[str, str]]:
    """The last card, line by line."""
    speed = ending.tokens / ending.seconds if ending.seconds > 0 else None
    rows = [
        ("status", f"{ending.status} at step {ending.steps}/{ending.total_steps}"),
        ("error", ending.error or ""),
        ("final", _metrics(_headlines(ending.final))),
        ("best", _best(ending)),
        ("time", f"{duration(ending.seconds)} of training" if ending.seconds else ""),
        ("tokens", count(ending.tokens) + (f", {count(speed)} tok/s" if speed else "") if ending.tokens else ""),
        ("peak memory", f"{ending.peak_memory_gb:.1f} GB" if ending.peak_memory_gb is not None else ""),
        ("checkpoint", ending.best_checkpoint or ""),
        ("next", "\n".join(ending.commands)),
    ]
    return [(label, value) for label, value in rows if value]


def _headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those over all sources, training's own and the headlines first; the sources' own stand in the battery's table."""
    training = [name for name in metrics if not name.startswith(PREFIX)]
    order = dict.fromkeys([*training, *(f"{PREFIX}{name}" for name in HEADLINES), *metrics])
    return {name: metrics[name] for name in order if name in metrics and "/" not in name.removeprefix(PREFIX)}


def _metrics(metrics: Mapping[str, float]) -> str:
    pairs = [f"{name} {number(value, 3)}" for name, value in metrics.items()]
    lines = [pairs[start : start + 5] for start in range(0, min(len(pairs), SHOWN_METRICS), 5)]
    return "\n".join(", ".join(line) for line in lines)


def _best(ending: Ending) -> str:
    text = _metrics(ending.best)
    return f"{text} at step {ending.best_step}" if text and ending.best_step is not None else text
