"""Stopping politely: a signal sets a flag, and the loop, the battery and generation look at it at their safe points."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from uft.alive import sign
from uft.errors import INTERRUPTED, STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Stop:
    """Whether somebody asked this process to stop, and how. Call it to ask: who does is alive."""

    signal: int | None = None

    def __call__(self) -> bool:
        sign()
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process of the run was asked: all come here at the same point, and leave with one answer."""
        from uft.parallel.ranks import ranks  # here: signals are listened to before torch is imported

        self.signal = ranks().largest(self.signal or 0) or None
        return self()

    def between_passes(self) -> bool:
        """Whether to stop before the next forward pass: of a model in pieces all processes make it, or none."""
        from uft.parallel.ranks import ranks

        return self.agreed() if ranks().in_step else self()

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.signal == signal.SIGINT else STOPPED

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else ""


@contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set. A second Ctrl-C does not wait for the safe point."""
    stop = Stop()

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        stop.signal = number

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
