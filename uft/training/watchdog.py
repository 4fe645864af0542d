"""Watchdog: a run that hangs (a rank that waits for another, a dead disk) ends, and says where it was."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uft.errors import FAILED
from uft.parallel.environment import rank
from uft.runs import shown
from uft.tracking.format import duration
from uft.training.signals import Stop

TICKS = 20
PATIENCE = 60.0  # seconds for the last words of a run whose disk may be what hangs


@contextmanager
def watching(stop: Stop, seconds: float, folder: Path, last_words: Callable[[str], None]) -> Iterator[None]:
    """Within, the process ends with code 1 when nobody has looked at `stop` for `seconds`; 0: never.

    Every step looks, and every batch of the battery. The stacks of all threads go to stderr and to a file of this
    process in `folder`, and `last_words` is called with what happened. Time is counted in ticks that this thread really
    ran through: a process that was suspended for a night has not hung.
    """
    over = threading.Event()

    def watch() -> None:
        quiet, seen = 0, stop.seen
        while quiet < TICKS and not over.wait(seconds / TICKS):
            quiet = quiet + 1 if stop.seen == seen else 0
            seen = stop.seen
        if not over.is_set():
            give_up(seconds, folder / trace_name(), last_words)

    if seconds:
        threading.Thread(target=watch, daemon=True, name="uft-watchdog").start()
    try:
        yield
    finally:
        over.set()


def trace_name() -> str:
    """The file of this process's stacks: of several, all are needed to tell who waited for whom."""
    return f"hang-rank{rank()}.txt" if rank() else "hang.txt"


def give_up(seconds: float, trace: Path, last_words: Callable[[str], None]) -> None:
    """End this process, whose main thread hangs and can end nothing in order."""

    def speak() -> None:
        with suppress(OSError):
            with open(trace, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            print(trace.read_text(encoding="utf-8"), file=sys.stderr, flush=True)
        last_words(
            f"hung: no step and no batch of the battery for {duration(seconds)} (hardware.watchdog={seconds:g}). "
            f"Where it stood: {shown(trace)}"
        )

    speaker = threading.Thread(target=speak, daemon=True, name="uft-last-words")
    speaker.start()
    speaker.join(PATIENCE)
    os._exit(FAILED)
