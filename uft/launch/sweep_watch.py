"""How the jobs of a sweep stand, read from their folders: whatever launcher runs them, here or on another machine.

A folder is looked at again and again, so only what is new is read: a finished job never again, metrics from where the
last look ended.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yaml import YAMLError

from uft.launch.sweep_jobs import Job, JobFailed
from uft.runs import Run

ENDED = ("finished", "failed", "stopped", "interrupted")


@dataclass
class State:
    """One job, as far as it has come."""

    name: str
    status: str = "waiting"  # then running, finished, failed, stopped or interrupted
    step: int = 0
    steps: int | None = None  # None: not known before the worker has counted its rows
    metric: str = ""  # its eval.best
    mode: str = "min"
    best: float | None = None
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def share(self) -> float:
        """How much of it is done."""
        if self.status == "finished":
            return 1.0
        return min(self.step / self.steps, 1.0) if self.steps else 0.0


@dataclass
class Tail:
    """The lines of a JSON Lines file, those that are new at each look."""

    path: Path
    offset: int = 0
    inode: int | None = None

    def replaced(self) -> bool:
        """Whether the file is another one than at the last look (a resumed run writes it anew)."""
        found = os.stat(self.path) if self.path.is_file() else None
        inode = found.st_ino if found else None
        other = inode != self.inode or (found is not None and found.st_size < self.offset)
        self.inode, self.offset = inode, 0 if other else self.offset
        return other

    def lines(self) -> Iterator[dict[str, Any]]:
        if self.inode is None:
            return
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    return
                self.offset += len(line)
                yield json.loads(line)


@dataclass
class Follower:
    """Looks at the folder of one job. What an earlier sitting left is not its end, unless it had finished."""

    job: Job
    state: State = field(init=False)
    tail: Tail = field(init=False)
    begun: bool = False  # in this sitting
    over: bool = False  # the launcher came back from it
    earlier: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = State(self.job.name)
        self.tail = Tail(self.run.metrics_file)
        with suppress(OSError, ValueError):
            self.earlier = self.run.result()
        self.look()

    @property
    def run(self) -> Run:
        return Run(self.job.folder)

    def look(self) -> State:
        if self.state.status != "finished" and not self.over:
            with suppress(OSError, ValueError, KeyError, TypeError, YAMLError):  # in the making, or damaged
                self._look()
        return self.state

    def end(self, failure: JobFailed | None) -> None:
        """The launcher came back from this job: what it says goes before what the folder says, if there is one."""
        self.begun = True
        self.look()
        self.over = True
        if failure is None:
            self.state.status = "finished"
        else:
            self.state.status = "stopped" if failure.stopped else "failed"
            self.state.error = failure.message

    def _look(self) -> None:
        run, state = self.run, self.state
        if not run.exists:
            return
        if not state.metric:
            self._introduce()
        state.steps = run.info().get("total_steps") or state.steps
        status, result = run.status, run.result()
        self.begun = self.begun or status == "running" or result != self.earlier
        state.status = status if self.begun or status == "finished" else "waiting"
        self._read()
        if state.ended:
            state.step = result.get("steps", state.step)

    def _introduce(self) -> None:
        config = self.run.config()
        self.state.metric, self.state.mode = config["eval"]["best"], config["eval"]["best_mode"]
        self.state.steps = config["train"]["steps"]

    def _read(self) -> None:
        """Steps and the best value so far. Step 0 is the model before training: it counts for no one."""
        state = self.state
        if self.tail.replaced():
            state.step, state.best = 0, None
        for line in self.tail.lines():
            state.step = max(state.step, int(line["step"]))
            value = line.get(state.metric)
            if isinstance(value, (int, float)) and math.isfinite(value) and line["step"] > 0:
                state.best = value if state.best is None else better(state.mode)(state.best, value)


def better(mode: str) -> Callable[..., Any]:
    return max if mode == "max" else min


class Watch:
    """All jobs of a sweep, in the order they were planned. Several threads may look."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, expected: int = 0) -> None:
        """`expected`: jobs that there will be, where not all are known from the start."""
        self.followers: dict[Path, Follower] = {}
        self.expected = expected
        self.clock = clock
        self._lock = threading.Lock()
        self._began: tuple[float, float] | None = None  # when the first job was seen at work, and what was done then

    def add(self, jobs: Sequence[Job]) -> None:
        with self._lock:
            for job in jobs:
                self.followers[job.folder] = Follower(job)

    def end(self, jobs: Sequence[Job], failed: Mapping[Job, JobFailed]) -> None:
        """The launcher came back from these jobs."""
        with self._lock:
            for job in jobs:
                self.followers[job.folder].end(failed.get(job))

    def look(self) -> list[State]:
        with self._lock:
            states = [follower.look() for follower in self.followers.values()]
            if self._began is None and any(follower.begun for follower in self.followers.values()):
                self._began = (self.clock(), sum(state.share for state in states))
            return [replace(state) for state in states]

    def left(self, states: Sequence[State]) -> float | None:
        """Seconds until all jobs are done, at the pace of this sitting; None before there is one."""
        if self._began is None:
            return None
        since, before = self._began
        done = sum(state.share for state in states)
        ahead = sum(1 - state.share for state in states if state.status in ("waiting", "running"))
        ahead += max(self.expected - len(states), 0)
        return (self.clock() - since) * ahead / (done - before) if done > before else None


def count(states: Sequence[State]) -> dict[str, int]:
    """Jobs by what is to be told of them; stopped and interrupted ones wait to be gone on with."""
    found = {"done": 0, "running": 0, "failed": 0, "waiting": 0}
    for state in states:
        found[COUNTED_AS.get(state.status, "waiting")] += 1
    return found


COUNTED_AS = {"finished": "done", "running": "running", "failed": "failed"}


def leader(states: Sequence[State]) -> State | None:
    """The job with the best value so far; None where there is none, or where jobs are judged by different metrics."""
    having = [state for state in states if state.best is not None]
    if not having or len({(state.metric, state.mode) for state in having}) > 1:
        return None
    return better(having[0].mode)(having, key=lambda state: state.best)
