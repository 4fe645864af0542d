"""Signs of life of this process, and the phase that it is in.

The code that works reports here, in the main thread; the watchdog (`uft.training.liveness`) reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Phase:
    """What is being done, since when, and how much of it is counted and done."""

    doing: str = "it was prepared"  # as it follows "while"
    moving: bool = True  # whether bytes that are read or written, and memory that is filled, are signs as well
    since: float = field(default_factory=time.monotonic)
    total: int = 0  # of what is counted
    what: str = ""  # `rows scored`; "": nothing is counted
    done: int = 0
    share: float = 0.0
    started: tuple[float, float] = (0.0, 0.0)  # (time, share) of the first count of it
    last: float = 0.0  # time of the last one


@dataclass
class Life:
    """The count of signs of life so far, the current phase, and the seconds that earlier ones took."""

    signs: int = 0
    phase: Phase = field(default_factory=Phase)
    took: dict[str, float] = field(default_factory=dict)
    subject: str = ""  # the job and its model: what phases took is remembered for the next such job

    @property
    def far(self) -> str:
        """How far the phase has come, for people: `12 of 30 rows scored`."""
        phase = self.phase
        return f"{phase.done:,} of {phase.total:,} {phase.what}" if phase.what else ""

    def left(self) -> float | None:
        """Seconds that the phase may take yet: by the pace of what is counted, else as long as the last one took."""
        phase, now = self.phase, time.monotonic()
        then, share = phase.started
        if phase.share > share:
            return max(0.0, (phase.last - then) * (1 - phase.share) / (phase.share - share) - (now - phase.last))
        rest = self.took.get(phase.doing, 0.0) - (now - phase.since)
        return rest if rest > 0 and not phase.what else None


heartbeat = Life()


def beat() -> None:
    """A sign of life: the process has come to another row, batch or step."""
    heartbeat.signs += 1


def report_progress(done: int, total: int, what: str, share: float | None = None) -> None:
    """A sign of life: `done` of `total` of what `what` says; `share`: of the time, where that is another."""
    phase, now = heartbeat.phase, time.monotonic()
    share = done / max(total, 1) if share is None else share
    if total != phase.total or what != phase.what or share < phase.share:
        phase.total, phase.what, phase.started = total, what, (now, share)
    phase.done, phase.share, phase.last = done, share, now
    beat()


@contextmanager
def activity(what: str, moving: bool = False) -> Iterator[None]:
    """A phase, named as it follows "while"; also a decorator of the function that is one. It gives signs of life.

    `moving`: it moves many bytes at once inside libraries, where it cannot count; that they move is a sign as well.
    """
    before, phase = heartbeat.phase, Phase(what, moving)
    heartbeat.phase = phase
    beat()
    try:
        yield
    finally:
        heartbeat.took[what] = time.monotonic() - phase.since
        heartbeat.phase = before
        beat()
