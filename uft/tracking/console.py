"""The console: what a person who started the run sees, and the same without control codes in console.log.

On a terminal the step line is rewritten in place; anywhere else, as under a scheduler, every line stays a line.
"""

from __future__ import annotations

import io
import logging
import math
import os
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from uft.errors import redact

if TYPE_CHECKING:
    from rich.table import Table

    from uft.evaluation.evaluate import Sample

CLEAR_LINE = "\r\x1b[2K"
PLAIN_WIDTH = 110  # of tables where there is no terminal
PACE_WINDOW = 20  # metric lines that the remaining time is estimated from


class Console:
    """Writes to `stream` and to `log_file`. `interactive` None: whether the stream is a terminal that can go back."""

    def __init__(
        self,
        stream: TextIO,
        log_file: Path | None = None,
        total_steps: int = 0,
        interactive: bool | None = None,
    ) -> None:
        self.stream: TextIO | None = stream
        self.total_steps = total_steps
        self.interactive = _can_go_back(stream) if interactive is None else interactive
        self.color = self.interactive and not os.environ.get("NO_COLOR")
        self._log = open(log_file, "a", encoding="utf-8", errors="backslashreplace") if log_file else None  # noqa: SIM115
        self._live = ""  # the step line that stands unfinished on the terminal
        self._terms: dict[str, None] = {}
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_WINDOW)
        self._batteries: dict[int, Mapping[str, float]] = {}
        self.marks: dict[str, int] = {}  # batteries that stay in the table: the ends of stages, by what they are called

    def message(self, text: str) -> None:
        """A line or more between the steps."""
        self._print(printable_lines(text))

    def start(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The card before the first step of a run or of a stage: what runs, on what, and where it goes."""
        self._terms = {}  # the next steps may be another objective's
        self._heading(title)
        self._print(card(rows) + "\n")

    def end(self, title: str, ending: Ending) -> None:
        """The card after the last step."""
        self._finish_line()
        self._print("")
        self._heading(title, STYLES.get(ending.status, "bold"))
        self._print(card(ending_rows(ending)))

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Batteries of an earlier session of this run, from its metric lines: a resumed table still says "before"."""
        for line in lines:
            metrics = {name: value for name, value in line.items() if name.startswith("eval/")}
            if metrics:
                self._batteries[line["step"]] = metrics

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The line of a step."""
        names = (name.removeprefix("objective/") for name in metrics if name.startswith("objective/"))
        self._terms.update(dict.fromkeys(names))
        eta = self._eta(step, metrics.get("seconds"))
        line = step_line(step, self.total_steps, metrics, tuple(self._terms), eta)
        if not self.interactive:
            self._print(line)
            return
        self._live = step_line(step, self.total_steps, metrics, tuple(self._terms), eta, width=self._width() - 1)
        self._write(CLEAR_LINE + self._live)
        self._note(line)

    def battery(self, step: int, battery: Battery) -> None:
        """The battery's metrics before, last, now and by source, and one sample of each source."""
        self._print("")
        if battery.metrics:
            self._batteries[step] = dict(battery.metrics)
            self._rich(battery_table(step, self._batteries, self.marks))
            self._print("")
        if battery.samples:
            self._print("\n".join(sample_lines(battery.samples, self._width())) + "\n")

    @contextmanager
    def hearing(self, logger: str = "uft") -> Iterator[None]:
        """Within, warnings of this program's modules are messages too."""
        handler = _Messages(self)
        logging.getLogger(logger).addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger(logger).removeHandler(handler)

    def close(self) -> None:
        self._finish_line()
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with suppress(OSError):  # what could not be written is tried again
                log.close()

    def _eta(self, step: int, seconds: float | None) -> float | None:
        """Seconds of training left, by the pace of the last lines (of all steps, for the first line)."""
        if seconds is None or step == 0:
            return None
        self._pace.append((step, seconds))
        since, then = self._pace[0] if len(self._pace) > 1 else (0, 0.0)
        return (self.total_steps - step) * (seconds - then) / max(step - since, 1)

    def _heading(self, text: str, style: str = "bold") -> None:
        from rich.text import Text

        self._rich(Text(printable(text), style=style))

    def _rich(self, renderable: Any) -> None:
        """A table or styled text: styled on the terminal, plain in the log."""
        plain = _render(renderable, PLAIN_WIDTH, color=False)
        shown = _render(renderable, self._width(), color=True) if self.color else plain
        self._print(shown, plain)

    def _print(self, text: str, plain: str | None = None) -> None:
        """Text that stays, without secrets; the live step line moves below it."""
        text, plain = redact(text), None if plain is None else redact(plain)
        self._write(f"{CLEAR_LINE}{text}\n{self._live}" if self._live else f"{text}\n")
        self._note(text if plain is None else plain)

    def _finish_line(self) -> None:
        if self._live:
            self._live = ""
            self._write("\n")

    def _write(self, text: str) -> None:
        if self.stream is None:
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError):  # the terminal or the pipe is gone: no reason to end a run; console.log goes on
            self.stream = None

    def _note(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text + "\n")
            self._log.flush()
        except OSError as error:  # a full disk, most likely: what is said is the least of what is lost
            self._close_log()
            self._print(f"console.log ends here: {error.strerror}")

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns if self.stream is not None else PLAIN_WIDTH
        except (OSError, ValueError):  # not a terminal, or one of a test
            return PLAIN_WIDTH


class _Messages(logging.Handler):
    """Warnings as lines on a console."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.message(record.getMessage())


STYLES = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}


def _can_go_back(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _render(renderable: Any, width: int, color: bool) -> str:
    from rich.console import Console as Rich

    text = io.StringIO()
    rich = Rich(
        file=text,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    rich.print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


# --- What is shown around the steps: the table of a battery, samples, and the card at the end. Text is made
# elsewhere.


PREFIX = "eval/"
SHOWN_METRICS = 10  # in the end card
HEADLINES = ("nll", "exact_match", "pair_accuracy", "kl", "margin")
"""Metrics of the battery that come first, in this order, where there is no room for all."""


class Battery(Protocol):
    """What `uft.evaluation.evaluate` measures."""

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


# --- Numbers, times and lines as people read them. Pure functions of values to text.


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
