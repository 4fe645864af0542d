"""Signs of life of this process, and the phase that it is in.

The code that works reports here, in the main thread; the watchdog (`uft.training.liveness`) reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Phase:
    """What is being done, since when, and how much of it is counted and done."""

    doing: str = "it was prepared"  # as it follows "while"
    moving: bool = True  # whether bytes that are read or written, and memory that is filled, are signs as well
    since: float = field(default_factory=time.monotonic)
    counted: str = ""  # what is counted: `of 30 rows scored`
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
        return f"{self.phase.done:,} {self.phase.counted}" if self.phase.counted else ""

    def left(self) -> float | None:
        """Seconds that the phase may take yet: by the pace of what is counted, else as long as the last one took."""
        phase, now = self.phase, time.monotonic()
        then, share = phase.started
        if phase.share > share:
            return max(0.0, (phase.last - then) * (1 - phase.share) / (phase.share - share) - (now - phase.last))
        rest = self.took.get(phase.doing, 0.0) - (now - phase.since)
        return rest if rest > 0 and not phase.counted else None


heartbeat = Life()


def beat() -> None:
    """A sign of life: the process has come to another row, batch or step."""
    heartbeat.signs += 1


def come(done: int, total: int, what: str, share: float | None = None) -> None:
    """A sign of life: `done` of `total` of what `what` says; `share`: of the time, where that is another."""
    phase, counted, now = heartbeat.phase, f"of {total:,} {what}", time.monotonic()
    share = done / max(total, 1) if share is None else share
    new = counted != phase.counted or share < phase.share
    started = (now, share) if new else phase.started
    heartbeat.phase = replace(phase, counted=counted, done=done, share=share, started=started, last=now)
    beat()


@contextmanager
def activity(what: str, moving: bool = False) -> Iterator[None]:
    """A phase, named as it follows "while"; also a decorator of the function that is one. It gives signs of life.

    `moving`: it moves many bytes at once inside libraries, where it cannot count; that they move is a sign as well.
    """
    before, heartbeat.phase = heartbeat.phase, Phase(what, moving)
    beat()
    try:
        yield
    finally:
        heartbeat.took[what] = time.monotonic() - heartbeat.phase.since
        heartbeat.phase = before
        beat()
