"""What this process is doing, and that it gets on with it: what the watchdog looks at.

Whatever does the work says so here, in the main thread, and knows nothing of who looks (`uft.training.liveness`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Life:
    """Signs of life so far, and the phase that the process is in."""

    signs: int = 0
    doing: str = "it was prepared"  # as it follows "while"
    moving: bool = True  # whether bytes that are read or written, and memory that is filled, are signs as well


heartbeat = Life()


def beat() -> None:
    """This process lives: it has come to another row, batch or step."""
    heartbeat.signs += 1


@contextmanager
def activity(what: str, moving: bool = False) -> Iterator[None]:
    """A phase, named as it follows "while"; also a decorator of the function that is one. It gives signs of life.

    `moving`: it moves so many bytes at once, within libraries, that it cannot count: that they move is a sign as well.
    """
    before = heartbeat.doing, heartbeat.moving
    heartbeat.doing, heartbeat.moving = what, moving
    beat()
    try:
        yield
    finally:
        heartbeat.doing, heartbeat.moving = before
        beat()
