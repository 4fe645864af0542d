"""The console: a run's output for people, and the same without control codes in console.log.

On a terminal the step line is rewritten in place; anywhere else, as under a scheduler, every line stays a line.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import textwrap
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from uft.errors import UftError, redact
from uft.heartbeat import heartbeat
from uft.runs import cache_root, shown, write_atomically
from uft.tracking.metrics import FEW, PREFIX, by_source, collapses

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

    from uft.evaluation.evaluate import Evaluation, Sample
    from uft.runs import Run

Card = Sequence[tuple[str, str]]
"""(label, value) lines; a value may have several lines."""

CLEAR_LINE = "\r\x1b[2K"
PLAIN_WIDTH = 110  # of a run's tables where there is no terminal
TABLE_WIDTH = 160  # likewise, of all others
PACE_WINDOW = 20  # metric lines that the remaining time is estimated from
SHOWN_METRICS = 10  # in the end card
WHOLE, SAMPLE_TEXT = 2, 2000  # samples that are shown whole, up to so many characters of each text
NOISE = 1e-6  # differences of log-probs below it are rounding
HEADLINES = ("exact_match", "pair_accuracy", "nll", "log_ratio", "margin")
"""Metrics of an evaluation that come first, in this order, where there is no room for all."""
STYLES = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}


def table_console(quiet: bool = False) -> RichConsole:
    """A console for tables, as wide as the terminal, or as they need where there is none."""
    from rich.console import Console as RichConsole

    return RichConsole(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False, quiet=quiet)


def bare_table() -> Table:
    """A table without lines, its columns two spaces apart."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


def is_terminal(stream: TextIO) -> bool:
    """Whether lines of this stream can be written over."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


QUIET = 2.0  # seconds without output after which a terminal is told what goes on
PHASES, MOST_PHASES = "phases.json", 100  # the file of their durations in the cache folder, and of how many jobs


class StatusStream:
    """A terminal's stream that knows when it was written to last, with a line of its own that any output replaces."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last, self.shown = stream, time.monotonic(), False
        self.lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.lock:
            self.clear()
            self.last = time.monotonic()
            return self.stream.write(text)

    def clear(self) -> None:
        with self.lock:
            if self.shown:
                self.stream.write(CLEAR_LINE)
                self.stream.flush()  # a process that ends at once would leave the line
                self.shown = False

    def tick(self) -> None:
        """Say what goes on where nothing was written for a while."""
        with self.lock, suppress(OSError, ValueError):
            if time.monotonic() - self.last < QUIET:
                return
            width = os.get_terminal_size(self.stream.fileno()).columns
            self.stream.write(CLEAR_LINE + shorten(phase_line(), width - 1))
            self.stream.flush()
            self.shown = True


def phase_line() -> str:
    """`the model is being evaluated: 12 of 30 rows scored, 00:15, about 00:22 left`"""
    doing = heartbeat.phase.doing.replace(" was ", " is being ").replace(" were ", " are being ")
    now = doing.replace("it trained", "training")
    far = f": {heartbeat.far}" if heartbeat.far else ""
    left = heartbeat.left()
    rest = "" if left is None else f", about {duration(left)} left"
    return f"{now}{far}, {duration(time.monotonic() - heartbeat.phase.since)}{rest}"


@contextmanager
def phase_status() -> Iterator[None]:
    """Within, a terminal is told what goes on, how far and how long still, when nothing else was said for a while."""
    stream = sys.stdout
    if not is_terminal(stream):
        yield
        return
    status, over = StatusStream(stream), threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            status.tick()

    thread = threading.Thread(target=watch, daemon=True, name="uft-phase")
    sys.stdout = status
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2.0)
        status.clear()
        sys.stdout = stream
        save_durations(heartbeat.subject)


def expect_durations(subject: str) -> None:
    """Learn what the phases of the last job of this kind, on this model, took here."""
    heartbeat.subject = subject
    heartbeat.took |= saved_durations().get(subject, {})


def saved_durations() -> dict[str, dict[str, float]]:
    """Seconds by subject and phase; none where the file is missing or not ours."""
    from pydantic import TypeAdapter

    with suppress(OSError, ValueError):
        return TypeAdapter(dict[str, dict[str, float]]).validate_json((cache_root() / PHASES).read_bytes())
    return {}


def save_durations(subject: str) -> None:
    """Keep what long phases took, for the newest hundred subjects."""
    known = saved_durations()
    took = known.pop(subject, {}) | {name: round(took, 1) for name, took in heartbeat.took.items() if took >= QUIET}
    with suppress(OSError, UftError):
        cache_root().mkdir(parents=True, exist_ok=True)
        write_atomically(cache_root() / PHASES, json.dumps(dict([*known.items()][1 - MOST_PHASES :]) | {subject: took}))


class Console:
    """Writes to `stream` and to `log_file`. `interactive` None: whether the stream is a terminal that can go back."""

    def __init__(
        self, stream: TextIO, log_file: Path | None = None, total_steps: int = 0, interactive: bool | None = None
    ) -> None:
        self.stream: TextIO | None = stream
        self.total_steps = total_steps
        self.interactive = is_terminal(stream) if interactive is None else interactive
        self.color = self.interactive and not os.environ.get("NO_COLOR")
        self._log = open(log_file, "a", encoding="utf-8", errors="backslashreplace") if log_file else None  # noqa: SIM115
        self._live = ""  # the step line that stands unfinished on the terminal
        self._terms: dict[str, None] = {}
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_WINDOW)
        self._evaluations: dict[int, Mapping[str, float]] = {}
        self._first: list[Mapping[str, float]] = []  # training lines of the stage, and its latest
        self._latest: deque[Mapping[str, float]] = deque(maxlen=FEW)
        self._reported: set[str] = set()  # kinds of collapse that were reported since the start or the last evaluation
        self.marks: dict[str, int] = {}  # evaluations that stay in the table, by name: the ends of stages

    def message(self, text: str) -> None:
        """A line or more between the steps."""
        self._print(printable_lines(text))

    def start(self, title: str, rows: Card) -> None:
        """The card before the first step of a run or of a stage: what runs, on what, and where it goes."""
        self._terms = {}  # the next steps may be another objective's
        self._first.clear()
        self._latest.clear()
        self._reported.clear()
        self._heading(title)
        self._print(card(rows, self._width()) + "\n")

    def end(
        self,
        title: str,
        result: Mapping[str, Any],
        total_steps: int,
        commands: Sequence[str] = (),
        run: Run | None = None,
    ) -> None:
        """The card after the last step. `result`: as in `result.json`, of `run`; `commands` to go on with."""
        self._finish_line()
        self._print("")
        self._heading(title, STYLES.get(result["status"], "bold"))
        rows = ending_rows(result, total_steps, commands, run)
        cautions = [("caution", note) for note in self._collapses(result["final"]).values()]
        at = next((place for place, (label, _) in enumerate(rows) if label in ("time", "tokens")), len(rows) - 1)
        rows[at:at] = cautions
        self._print(card(rows, self._width()))

    def _collapses(self, last: Mapping[str, float]) -> dict[str, str]:
        evaluated = ({**metrics, "step": step} for step, metrics in self._evaluations.items())
        found = collapses([*evaluated, *self._first, *self._latest, last])
        return {what: printable(note) for what, note in found.items()}

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Take up the metric lines of an earlier session of this run: its evaluations, and its first training lines."""
        for line in lines:
            if any(name.startswith(PREFIX) for name in line):
                self._evaluations[line["step"]] = line
            if "loss" in line:
                self._keep(line)

    def _keep(self, line: Mapping[str, float]) -> None:
        (self._first if len(self._first) < FEW else self._latest).append(line)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The line of a step."""
        names = (name.removeprefix("objective/") for name in metrics if name.startswith("objective/"))
        self._terms.update(dict.fromkeys(names))
        self._keep({**metrics, "step": step})
        notes = self._collapses(metrics)
        for what in [what for what in notes if what not in self._reported]:
            self._reported.add(what)
            self.message(f"caution: {notes[what]}")
        eta = None  # by the pace of the last lines; of all steps, for the first line
        if "seconds" in metrics and step > 0:
            self._pace.append((step, metrics["seconds"]))
            since, then = self._pace[0] if len(self._pace) > 1 else (0, 0.0)
            eta = (self.total_steps - step) * (metrics["seconds"] - then) / max(step - since, 1)
        line = partial(step_line, step, self.total_steps, metrics, tuple(self._terms), eta)
        if not self.interactive:
            self._print(line())
            return
        self._live = line(width=self._width() - 1)
        self._write(CLEAR_LINE + self._live)
        self._note(line())

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The metrics before, last, now and by source, and one sample of each source."""
        self._print("")
        if evaluation.metrics:
            self._evaluations[step] = dict(evaluation.metrics)
            self._rich(evaluation_table(step, self._evaluations, self.marks))
            notes = self._collapses({})
            self._reported |= notes.keys()
            unbroken: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
            folded = [textwrap.fill(note, max(self._width(), 20), **unbroken) for note in notes.values()]
            self._print("\n" + "".join(f"{note}\n" for note in folded))
        if evaluation.samples:
            self._print("\n".join(sample_lines(evaluation.samples, self._width())) + "\n")

    def close(self) -> None:
        self._finish_line()
        self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            with suppress(OSError):  # what could not be written is tried again
                log.close()

    def _heading(self, text: str, style: str = "bold") -> None:
        from rich.text import Text

        self._rich(Text(printable(text), style=style))

    def _rich(self, renderable: Any) -> None:
        """A table or styled text: styled on the terminal, plain in the log."""
        plain = rendered(renderable, PLAIN_WIDTH, color=False)
        self._print(rendered(renderable, self._width(), color=True) if self.color else plain, plain)

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


def rendered(renderable: Any, width: int, color: bool) -> str:
    from rich.console import Console as Rich

    colors, text = "standard" if color else None, io.StringIO()
    shape: dict[str, Any] = {"width": width, "force_terminal": color, "color_system": colors, "legacy_windows": False}
    Rich(file=text, highlight=False, markup=False, emoji=False, **shape).print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


# --- The table of an evaluation, samples, and the end card.


def evaluation_table(
    step: int, history: Mapping[int, Mapping[str, float]], marks: Mapping[str, int] | None = None
) -> Table:
    """A row per metric: before training, the last time, now, and now for each source.

    `history` holds every evaluation so far by step, `step` among them. `marks`: steps that stay in view, by name.
    """
    from rich.table import Table

    earlier = sorted(at for at in history if at < step)
    times = {"before": 0} if 0 in earlier else {}
    times |= {name: at for name, at in (marks or {}).items() if at in earlier}
    times |= {"last": earlier[-1]} if any(earlier) and earlier[-1] not in times.values() else {}
    columns = {f"{name} ({at})": by_source(history[at])[""] for name, at in times.items()}
    now, *sources = by_source(history[step]).items()
    columns |= {f"now ({step})": now[1], **dict(sources)}
    title = f"evaluation at step {step}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("metric", *columns):
        table.add_column(printable(name), justify="left" if name == "metric" else "right", overflow="fold")
    for metric in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(printable(metric), *(measure(column.get(metric)) for column in columns.values()))
    return table


def sample_lines(samples: Sequence[Sample], width: int) -> list[str]:
    """The first sample of every source, a line each; where these do not fit, two whole ones."""

    def quote(text: str) -> str:
        return f'"{printable(text)}"'

    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(sample.source, sample)
    lines = []
    for one in first.values():
        answer = f"  (answer {quote(one.answer)})" if one.answer is not None else ""
        lines.append(f"  {one.source}: {quote(one.prompt)} -> {quote(one.reply)}{answer}")
    if max(map(len, lines)) < width:
        return lines
    lines, room = [], max(width - 12, 20)
    for one in [*first.values()][:WHOLE]:
        texts = {"prompt": one.prompt, "reply": one.reply, "answer": one.answer}
        lines += [f"  {one.source}"]
        for name, text in texts.items():
            if text is not None:
                shown = printable_lines(shorten(text, SAMPLE_TEXT)) if text.strip() else "(empty)"
                folded = [part for line in shown.split("\n") for part in textwrap.wrap(line, room) or [""]]
                lines += [f"    {name if not number else '':<6}  {part}".rstrip() for number, part in enumerate(folded)]
    return lines


def ending_rows(
    result: Mapping[str, Any], total_steps: int, commands: Sequence[str], run: Run | None
) -> list[tuple[str, str]]:
    """The end card, line by line; with a `run`, its files as they are found from here."""

    def text(metrics: Mapping[str, float]) -> str:
        return ", ".join([f"{name} {measure(value)}" for name, value in metrics.items()][:SHOWN_METRICS])

    def place(name: str) -> str:
        return shown(run.path / name) if run else name

    final, best, tokens, seconds = result["final"], text(result["best"]), result["tokens"], result["seconds"]
    # training's own metrics first, then the headlines; those of single sources stand in the evaluation's table
    training = [name for name in final if not name.startswith(PREFIX)]
    order = [*(f"{PREFIX}{name}" for name in HEADLINES), *final]
    measured = [name for name in order if name in final and "/" not in name.removeprefix(PREFIX)]
    overall = {name: final[name] for name in dict.fromkeys([*training, *measured])}
    speed = f", {count(tokens / seconds)} tok/s" if seconds > 0 else ""
    memory, saved = result["peak_memory_bytes"], result["best_checkpoint"]  # which a full disk may have refused
    times = {"training": seconds, "stages that make rows": result.get("making_seconds")}
    at = f"at step {result['steps']}/{total_steps}" if total_steps else "at its start"
    rows = [
        ("status", f"{result['status']} {at}"),
        ("error", result["error"] or ""),
        ("final", text(overall)),
        ("best", f"{best} at step {result['best_step']}" if best and result["best_step"] is not None else best),
        ("time", ", ".join(f"{duration(spent)} of {what}" for what, spent in times.items() if spent)),
        ("tokens", count(tokens) + speed if tokens else ""),
        ("peak memory", f"{memory / 1e9:.1f} GB" if memory is not None else ""),
        ("checkpoint", place(saved) if saved and (run is None or (run.path / saved).is_dir()) else ""),
        ("model", place("model") if run and run.model_dir.is_dir() else ""),
        ("next", "\n".join(commands)),
    ]
    return [(label, value) for label, value in rows if value]


# --- Numbers, times and lines for people.


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


def measure(value: float | None) -> str:
    """A figure of an evaluation; what is no more than rounding is zero."""
    return number(0.0 if value is not None and abs(value) < NOISE else value, 3)


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

    def moves(character: str) -> bool:
        category = unicodedata.category(character)
        return (category[0] == "C" and character not in JOINERS) or category in ("Zl", "Zp")

    return "".join(c.encode("unicode_escape").decode() if moves(c) else c for c in text)


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


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
    """The line of one step. Unknown fields are left out, and so are the least wanted where `width` is too narrow.

    `terms`: names of the objective's terms, in places that stay when one of them has no value: `uft 0.21 nll 1.80`.
    """

    def field(template: str, name: str, decimals: int) -> str:
        return template.format(number(metrics[name], decimals)) if name in metrics else ""

    def join() -> str:
        first, *others = [text for name, text in fields.items() if text and name != "percent"]
        return SEPARATOR.join([f"{first} {fields['percent']}".rstrip(), *others])

    named = [(name, metrics.get(f"objective/{name}")) for name in terms[:HEADLINE_TERMS]]
    named += [(name.rpartition("/")[2], metrics[name]) for name in ("rollout/reward", "nll") if name in metrics]
    memory = f"{metrics['memory_gb']:.1f}" if "memory_gb" in metrics else ""
    if memory and "memory_total_gb" in metrics:
        memory += f"/{metrics['memory_total_gb']:.0f}"
    fields = {
        "step": f"step {step:>{len(str(total))}}/{total}",
        "percent": f"{100 * step // max(total, 1):>3}%",
        "loss": field("loss {:>6}", "loss", 3),
        "terms": " ".join(f"{name} {number(value):>5}" for name, value in named),
        "lr": f"lr {metrics['lr']:.1e}" if "lr" in metrics else "",
        "grad": field("grad {:>5}", "grad_norm", 2),
        "speed": f"{count(metrics['tokens_per_second']):>6} tok/s" if "tokens_per_second" in metrics else "",
        "mfu": f"mfu {100 * metrics['mfu']:>2.0f}%" if "mfu" in metrics else "",
        "memory": memory and f"{memory} GB",
        "eta": f"eta {duration(eta)}" if eta is not None else "",
    }
    for name in FIRST_TO_GO:
        if width is None or len(join()) <= width:
            break
        fields[name] = ""
    return join()


def card(rows: Card, width: int = 0) -> str:
    """Labels and values in two columns; a value of several lines stays in its column.

    Prose is folded to `width`; commands and tables, whose columns stand apart by spaces, are not.
    """
    label_width = max((len(label) for label, _ in rows), default=0)
    lines = []
    for label, value in rows:
        folded = list[str]()
        for line in printable_lines(value).split("\n"):
            room = width - label_width - 4
            prose = width > label_width + 30 and len(line) > room and "  " not in line.strip() and label != "next"
            folded += textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) if prose else [line]
        first, *more = folded
        lines.append(f"  {label:<{label_width}}  {first}".rstrip())
        lines += [f"  {'':<{label_width}}  {line}".rstrip() for line in more]
    return "\n".join(lines)
