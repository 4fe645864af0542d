"""What a person sees while a sweep runs: a table that is kept up to date on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING

from uft.launch.sweep_jobs import Job, JobFailed
from uft.launch.sweep_watch import State, Watch, count, leader
from uft.tracking.console import PREFIX, duration, number, printable, shorten

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

GLANCE = 0.5  # seconds between two looks at the folders
INTERVAL = 60.0  # seconds between lines where there is no terminal
MOST = 60  # rows of the last table
AROUND = 6  # lines of a terminal that the table leaves free
LONGEST_ERROR = 60
COLOURS = {"finished": "green", "running": "cyan", "failed": "red", "waiting": "dim"}


class Board:
    """Shows the jobs of a sweep from `with` to the end of it; what else is printed meanwhile stands above."""

    def __init__(
        self, name: str, interactive: bool | None = None, interval: float = INTERVAL, expected: int = 0
    ) -> None:
        """`expected`: jobs that there will be, where not all are known from the start."""
        self.name = name
        self.watch = Watch(expected=expected)
        self.interactive = can_go_back() if interactive is None else interactive
        self.interval = interval
        self._stack = ExitStack()

    def add(self, jobs: Sequence[Job]) -> None:
        self.watch.add(jobs)

    def end(self, jobs: Sequence[Job], failed: Mapping[Job, JobFailed]) -> None:
        """The launcher came back from these jobs."""
        self.watch.end(jobs, failed)

    def __enter__(self) -> Board:
        self._stack.enter_context(self._live() if self.interactive else Lines(self.watch, self.interval))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()
        console, states = make_console(self.interactive), self.watch.look()
        if not states:
            return
        with console.capture() as text:
            console.print(table(states, MOST))
        print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)

    def _live(self) -> ExitStack:
        from rich.live import Live

        console = make_console(True)
        stack = ExitStack()
        stack.enter_context(
            Live(
                get_renderable=lambda: self._page(console),
                console=console,
                refresh_per_second=1 / GLANCE,
                transient=True,
                vertical_overflow="crop",
            )
        )
        return stack

    def _page(self, console: Console) -> Group:
        """The table and the line below it, as high as the terminal allows."""
        from rich.console import Group
        from rich.text import Text

        states = self.watch.look()
        line = Text(
            shorten(summary(self.name, states, self.watch.left(states), self.watch.expected), console.width - 1),
            style="bold",
        )
        return Group("", table(states, max(console.height - AROUND, 3)), line)


class Lines:
    """Where there is no terminal: a line for every job that ended, and one for the sweep every `interval` seconds."""

    def __init__(self, watch: Watch, interval: float, say: Callable[[str], None] | None = None) -> None:
        self.watch = watch
        self.interval = interval
        self.say = say or (lambda line: print(line, flush=True))
        self._told = {state.name for state in watch.look() if state.ended}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go, daemon=True, name="uft-sweep")

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            self._tell_ended()

    def _go(self) -> None:
        with suppress(OSError):  # whoever read has left: no reason to end a sweep
            last = self.watch.clock()
            while not self._stop.wait(GLANCE):
                self._tell_ended()
                if self.watch.clock() - last >= self.interval:
                    last = self.watch.clock()
                    states = self.watch.look()
                    self.say(f"uft: {progress(states, self.watch.left(states), self.watch.expected)}")

    def _tell_ended(self) -> None:
        states = self.watch.look()
        for state in states:
            if state.ended and state.name not in self._told:
                self._told.add(state.name)
                self.say(f"uft: {ended(state, states, self.watch.left(states), self.watch.expected)}")


def can_go_back() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def make_console(interactive: bool) -> Console:
    from rich.console import Console

    return Console(width=None if interactive else 160, markup=False, emoji=False, highlight=False)


# words


def summary(name: str, states: Sequence[State], left: float | None, expected: int = 0) -> str:
    """One line about the sweep."""
    numbers, total = count(states), max(expected, len(states))
    others = [f"{numbers[what]} {what}" for what in ("running", "failed", "waiting") if numbers[what]]
    best = leader(states)
    parts = [
        ", ".join([f"sweep {name}: {numbers['done']} of {total} done", *others]),
        f"best {best.name} {metric(best)}" if best else "",
        f"left {duration(left)}" if left is not None and total > numbers["done"] else "",
    ]
    return printable(" | ".join(part for part in parts if part))


def progress(states: Sequence[State], left: float | None, expected: int = 0, most: int = 3) -> str:
    """One line about the sweep and the jobs at work."""
    numbers, total = count(states), max(expected, len(states))
    running = [state for state in states if state.status == "running"]
    shown = [f"{state.name} step {steps(state)} {metric(state)}".rstrip() for state in running[:most]]
    head = f"{numbers['done']} of {total} done, {numbers['running']} running, {numbers['failed']} failed"
    return printable(" | ".join([head, *shown, *([f"left {duration(left)}"] if left is not None else [])]))


def ended(state: State, states: Sequence[State], left: float | None, expected: int = 0) -> str:
    """One line about a job that ended."""
    numbers, total = count(states), max(expected, len(states))
    what = [f"{state.status} at step {steps(state)}", metric(state), first_line(state.error)]
    line = f"{numbers['done']} of {total} done: {state.name} " + ", ".join(part for part in what if part)
    return printable(line + (f", left {duration(left)}" if left and numbers["done"] < total else ""))


def metric(state: State) -> str:
    return f"{state.metric.removeprefix(PREFIX)} {number(state.best, 3)}" if state.best is not None else ""


def steps(state: State) -> str:
    return f"{state.step}/{state.steps}" if state.steps else str(state.step)


def first_line(text: str) -> str:
    return (text.splitlines() or [""])[0]


# the table


def table(states: Sequence[State], room: int) -> Table:
    """The jobs, in the order they were planned; those that say most where there is no room for all."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    metrics = list(dict.fromkeys(state.metric for state in states if state.metric))
    found.add_column("job", no_wrap=True, overflow="ellipsis")
    found.add_column("state", no_wrap=True)
    found.add_column("steps", justify="right", no_wrap=True)
    found.add_column("best", justify="right", no_wrap=True)
    if len(metrics) == 1:
        found.columns[-1].header = Text(f"best {printable(metrics[0].removeprefix(PREFIX))}")
    found.add_column("", no_wrap=True, overflow="ellipsis")
    best, shown = leader(states), chosen(states, room)
    for state in (states[index] for index in shown):
        style = COLOURS.get(state.status, "yellow")
        value = number(state.best, 3) if len(metrics) == 1 else metric(state)
        note = first_line(state.error) if state.status == "failed" else "best so far" if state is best else ""
        found.add_row(
            Text(printable(state.name), style="bold" if state is best else ""),
            Text(state.status, style=style),
            steps(state) if state.status != "waiting" or state.step else "",
            printable(value) if state.best is not None else "",
            Text(shorten(printable(note), LONGEST_ERROR), style=style),
        )
    if len(shown) < len(states):
        found.add_row(Text(f"and {len(states) - len(shown)} more", style="dim"))
    return found


def chosen(states: Sequence[State], room: int) -> list[int]:
    """Numbers of the jobs that are shown: those at work, those that failed, the best, then what is next to the work."""
    if len(states) <= room:
        return list(range(len(states)))
    best = leader(states)
    working = [number for number, state in enumerate(states) if state.status == "running"]
    middle = working[0] if working else next((n for n, s in enumerate(states) if s.status == "waiting"), len(states))
    order = {"running": 0, "failed": 1}

    def rank(number: int) -> tuple[int, int]:
        state = states[number]
        return (2 if state is best else order.get(state.status, 3), abs(number - middle))

    return sorted(sorted(range(len(states)), key=rank)[:room])
