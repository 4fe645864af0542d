"""The console: what a person who started the run sees, and the same without control codes in console.log.

On a terminal the step line is rewritten in place; anywhere else, as under a scheduler, every line stays a line.
"""

from __future__ import annotations

import io
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from uft.redact import redact
from uft.tracking.cards import Battery, Ending, battery_table, ending_rows, sample_lines
from uft.tracking.format import card, printable, printable_lines, step_line

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
