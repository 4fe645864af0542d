"""Signs of life of this process, and the phase that it is in.

The code that works reports here, in the main thread; the watchdog (`uft.training.liveness`) reads it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Life:
    """The count of signs of life so far, and the current phase."""

    signs: int = 0
    doing: str = "it was prepared"  # as it follows "while"
    moving: bool = True  # whether bytes that are read or written, and memory that is filled, are signs as well
    since: float = field(default_factory=time.monotonic)  # when the phase began
    far: str = ""  # how far it has come, for people: `12 of 30 rows`


heartbeat = Life()


def beat() -> None:
    """A sign of life: the process has come to another row, batch or step."""
    heartbeat.signs += 1


def come(far: str) -> None:
    """A sign of life, and how far the phase has come."""
    heartbeat.far = far
    beat()


@contextmanager
def activity(what: str, moving: bool = False) -> Iterator[None]:
    """A phase, named as it follows "while"; also a decorator of the function that is one. It gives signs of life.

    `moving`: it moves many bytes at once inside libraries, where it cannot count; that they move is a sign as well.
    """
    before = heartbeat.doing, heartbeat.moving, heartbeat.since, heartbeat.far
    heartbeat.doing, heartbeat.moving, heartbeat.since, heartbeat.far = what, moving, time.monotonic(), ""
    beat()
    try:
        yield
    finally:
        heartbeat.doing, heartbeat.moving, heartbeat.since, heartbeat.far = before
        beat()
