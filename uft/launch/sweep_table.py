"""The table of a sweep's jobs while they run.

It is read from the run folders, so it is the same under every launcher, on this machine or another. On a terminal it is
redrawn in place; elsewhere a line is printed for every job that ends, and one a minute about the jobs at work.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from uft.errors import problem_lines
from uft.launch.process import signalled
from uft.report.metrics import HEADLINES as CRITERIA
from uft.report.metrics import LIKELIHOOD, direction
from uft.runs import Run
from uft.tracking.console import bare_table, duration, is_terminal, number, printable, shorten
from uft.tracking.metrics import PREFIX

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table

REFRESH = 0.5  # seconds between two looks at the folders
INTERVAL = 60.0  # seconds between two lines about the sweep where there is no terminal
PLAIN_WIDTH = 160  # of the last table where there is no terminal
MOST_ROWS = 60  # of the last table
MARGIN = 6  # lines of a terminal that the table leaves free
LONGEST_NOTE = 60  # characters
ENDED = ("finished", "failed", "stopped", "interrupted")
STYLES = {"finished": "green", "running": "cyan", "failed": "red", "waiting": "dim"}


@dataclass
class JobState:
    """One job as far as it has come. `refresh` reads what is new in its run folder."""

    folder: Path
    status: str = "waiting"  # then running, finished, failed, stopped or interrupted
    step: int = 0
    steps: int | None = None  # None: not known before the worker has counted its rows
    metric: str = ""  # its eval.best; where that is the likelihood, what a checker says or a preference if measured
    mode: str = "min"  # whether less or more of it is better
    best: float | None = None
    error: str = ""
    begun: bool = False  # during this session of the sweep
    since: float | None = None  # when it was first seen at work, by the monotonic clock
    returned: bool = False  # by the launcher
    earlier: Mapping[str, Any] = field(default_factory=dict)  # the result that an earlier session left
    inode: int | None = None  # of metrics.jsonl, which a resumed run writes anew
    offset: int = 0  # bytes of it that were read

    def __post_init__(self) -> None:
        with suppress(OSError, ValueError):
            self.earlier = Run(self.folder).result()
        self.refresh()

    @property
    def share(self) -> float:
        """The part of its steps that is done, from 0 to 1."""
        if self.status == "finished":
            return 1.0
        return min(self.step / self.steps, 1.0) if self.steps else 0.0

    def refresh(self) -> None:
        """Read the run folder. The result of an earlier session is no end, unless the run had finished."""
        run = Run(self.folder)
        if self.status == "finished" or self.returned or not run.exists:
            return
        with suppress(OSError, ValueError, KeyError, TypeError, YAMLError):  # being written, or damaged
            if not self.metric:
                config = run.config()
                self.metric, self.mode = config["eval"]["best"], config["eval"]["best_mode"]
                self.steps = config["train"]["steps"]
            self.steps = run.info().get("total_steps") or self.steps
            status, result = run.status, run.result()
            self.begun = self.begun or status == "running" or result != self.earlier
            self.status = status if self.begun or status == "finished" else "waiting"
            self.since = self.since or (time.monotonic() if status == "running" else None)
            if run.metrics_file.is_file():
                self._read_metrics(run.metrics_file)
            if self.status in ENDED:
                self.step, self.error = result.get("steps", self.step), str(result.get("error") or "")

    def _read_metrics(self, path: Path) -> None:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self.inode or found.st_size < self.offset:
                self.inode, self.offset, self.step, self.best = found.st_ino, 0, 0, None
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    return
                self.offset += len(line)
                metrics = json.loads(line)
                self.step = max(self.step, int(metrics["step"]))
                if self.metric == LIKELIHOOD:  # the default, which does not rank what people want
                    first = next((name for name in CRITERIA if name in metrics), LIKELIHOOD)
                    self.mode = self.mode if first == LIKELIHOOD else str(direction(first))
                    self.metric = first
                value = metrics.get(self.metric)
                # step 0 is the model before training
                if isinstance(value, (int, float)) and math.isfinite(value) and metrics["step"] > 0:
                    self.best = value if self.best is None else self.better(self.best, value)

    @property
    def better(self) -> Callable[..., Any]:
        return max if self.mode == "max" else min

    @property
    def steps_text(self) -> str:
        return f"{self.step}/{self.steps}" if self.steps else str(self.step)

    @property
    def best_text(self) -> str:
        return f"{self.metric.removeprefix(PREFIX)} {number(self.best, 3)}" if self.best is not None else ""

    @property
    def reason(self) -> str:
        """The first line of its error that says what is wrong."""
        return next(iter(problem_lines(self.error)), "")


class SweepTable:
    """Shows the jobs of a sweep while this context is open, and the last table at its end.

    `expected`: how many jobs there will be, where not all are known from the start. Other output goes above the table.
    """

    def __init__(self, name: str, expected: int = 0, interactive: bool | None = None) -> None:
        self.name, self.expected, self.interval = name, expected, INTERVAL
        self.interactive = is_terminal(sys.stdout) if interactive is None else interactive
        self.clock = time.monotonic
        self._opened = self.clock()
        self._jobs: dict[Path, JobState] = {}
        self._lock = threading.RLock()
        self._began: tuple[float, float] | None = None  # when the first job was seen at work, and the share done then
        self._printed: set[Path] = set()  # jobs whose end was printed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, daemon=True, name="uft-sweep")
        self._live: Live | None = None
        self._signals = len(signalled)  # before this sweep

    def add(self, folders: Iterable[Path]) -> None:
        """Jobs by their run folders, in the order that they are shown in."""
        with self._lock:
            jobs = {folder: JobState(folder) for folder in folders}
            self._jobs |= jobs
            self._printed |= {folder for folder, job in jobs.items() if job.status in ENDED}

    def end(self, folder: Path, status: str, error: str = "") -> None:
        """The launcher returned from a job; this goes before what its folder says."""
        with self._lock:
            job = self._jobs[folder]
            job.refresh()
            job.begun = job.returned = True
            job.status, job.error = status, error

    def refresh(self) -> list[JobState]:
        """All jobs as they are now."""
        with self._lock:
            jobs = list(self._jobs.values())
            for job in jobs:
                job.refresh()
            if self._began is None and any(job.begun for job in jobs):
                self._began = (self.clock(), sum(job.share for job in jobs))
            return jobs

    @property
    def total(self) -> int:
        return max(self.expected, len(self._jobs))

    def seconds_left(self) -> float | None:
        """Seconds until all jobs are done, at the pace of this session; None before there is one."""
        jobs = self._jobs.values()
        since, before = self._began or (0.0, math.inf)
        done = sum(job.share for job in jobs)
        ahead = sum(1 - job.share for job in jobs if job.status in ("waiting", "running"))
        ahead += self.total - len(jobs)
        return (self.clock() - since) * ahead / (done - before) if done > before else None

    def __enter__(self) -> SweepTable:
        if not self.interactive:
            self._thread.start()
            return self
        from rich.live import Live

        console = plain_console(None)
        self._live = Live(
            get_renderable=lambda: self._page(console),
            console=console,
            refresh_per_second=1 / REFRESH,
            transient=True,
            vertical_overflow="crop",
        )
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._over.set()
            self._thread.join()
            with suppress(OSError):
                self._print_ended()
        if jobs := self.refresh():
            console = plain_console(None if self.interactive else PLAIN_WIDTH)
            with console.capture() as text:
                console.print(jobs_table(jobs, MOST_ROWS))
            print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)

    def _page(self, console: Console) -> Group:
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            jobs = self.refresh()
            clock = duration(self.clock() - self._opened)  # a first job loads its model, and there is no step to see
            line = shorten(f"sweep {self.name}, {clock}: {self.summary()}", console.width - 1)
            return Group("", jobs_table(jobs, max(console.height - MARGIN, 3)), Text(line, style="bold"))

    def _print_lines(self) -> None:
        with suppress(OSError):  # the reader of the output has left: no reason to end a sweep
            last = self.clock()
            while not self._over.wait(REFRESH):
                self._print_ended()
                if self.clock() - last >= self.interval:
                    last = self.clock()
                    with self._lock:
                        self.refresh()
                        print(f"uft: {self.summary(running=3)}", flush=True)

    def _print_ended(self) -> None:
        with self._lock:
            jobs = self.refresh()
            done, left = sum(job.status == "finished" for job in jobs), self.seconds_left()
            for job in jobs:
                gone = job.status == "interrupted" and not (job.returned or self._over.is_set())
                if job.status in ENDED and not gone and job.folder not in self._printed:
                    self._printed.add(job.folder)
                    parts = [f"{job.status} at step {job.steps_text}", job.best_text, job.reason]
                    parts += [f"left {duration(left)}"] if left and done < self.total else []
                    line = f"{done} of {self.total} done: {job.folder.name} " + ", ".join(filter(None, parts))
                    print(f"uft: {printable(line)}", flush=True)

    def summary(self, running: int = 0) -> str:
        """One line about the sweep, with the steps of at most `running` jobs at work. Stopped jobs wait."""
        jobs = list(self._jobs.values())
        counts = Counter(job.status if job.status in ("finished", "running", "failed") else "waiting" for job in jobs)
        best, left = best_job(jobs), self.seconds_left()
        head = [f"{counts['finished']} of {self.total} done"]
        head += [f"{counts[status]} {status}" for status in ("running", "failed", "waiting") if counts[status]]
        at_work = [job for job in jobs if job.status == "running"][:running]
        parts = ["stopping at the next safe point"] if len(signalled) > self._signals else []
        parts += [", ".join(head)]
        parts += [f"{job.folder.name} step {job.steps_text} {job.best_text}".rstrip() for job in at_work]
        parts += [f"best {best.folder.name} {best.best_text}"] if best else []
        parts += [f"left {duration(left)}"] if left is not None and self.total > counts["finished"] else []
        return printable(" | ".join(parts))


def plain_console(width: int | None) -> Console:
    """A console that takes brackets and colons in names for what they are."""
    from rich.console import Console

    return Console(width=width, markup=False, emoji=False, highlight=False)


def best_job(jobs: Iterable[JobState]) -> JobState | None:
    """The job with the best value so far; None where there is none, or where jobs have different headline metrics."""
    found = [job for job in jobs if job.best is not None]
    if not found or len({(job.metric, job.mode) for job in found}) > 1:
        return None
    best: JobState = found[0].better(found, key=lambda job: job.best)
    return best


def jobs_table(jobs: list[JobState], room: int) -> Table:
    """The jobs in their order. Where there are more than `room`, the running and failed ones, the best one, and those
    that come next are shown."""
    from rich.text import Text

    known = [job.metric for job in jobs if job.best is not None] or [job.metric for job in jobs if job.metric]
    metrics = list(dict.fromkeys(known))
    best, ranks = best_job(jobs), {"running": 0, "failed": 1, "waiting": 3}
    order = sorted(range(len(jobs)), key=lambda n: (2 if jobs[n] is best else ranks.get(jobs[n].status, 4), n))
    table = bare_table()
    headline = Text(f"best {printable(metrics[0].removeprefix(PREFIX))}" if len(metrics) == 1 else "best")
    table.add_column("job", no_wrap=True, overflow="ellipsis")
    table.add_column("state", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column(headline, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="ellipsis")
    for job in (jobs[place] for place in sorted(order[:room])):
        value = number(job.best, 3) if len(metrics) == 1 else job.best_text
        notes = [job.reason] if job.status == "failed" else ["best so far"] if job is best else []
        notes += [duration(time.monotonic() - job.since)] if job.status == "running" and job.since else []
        style = STYLES.get(job.status, "yellow")
        table.add_row(
            Text(printable(job.folder.name), style="bold" if job is best else ""),
            Text(job.status, style=style),
            job.steps_text if job.status != "waiting" or job.step else "",
            printable(value) if job.best is not None else "",
            Text(shorten(printable(", ".join(notes)), LONGEST_NOTE), style=style),
        )
    if len(jobs) > room:
        table.add_row(Text(f"and {len(jobs) - room} more", style="dim"))
    return table
