"""Watchdog: a run that hangs (a rank that waits for another, a dead disk) ends, and says where it was."""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uft.alive import life
from uft.errors import FAILED
from uft.parallel.environment import launched, rank
from uft.parallel.peers import Peers
from uft.runs import shown
from uft.tracking.format import duration

TICKS, TICK = 20, 5.0  # the former at least, of so many seconds at most
PATIENCE = 60.0  # seconds for the last words of a run whose disk may be what hangs
MOVED = 1 << 20
"""Bytes that are a sign of life where bytes are: more than a process moves that does nothing."""
BLOCK = 512  # bytes, of the system's count of what goes to and from disks
LastWords = Callable[[str], None]


@contextmanager
def watching(seconds: float, folder: Path | None, last_words: LastWords) -> Iterator[None]:
    """Within, the process ends with code 1 when it gives no sign of life for `seconds` (see `uft.alive`); 0: never.

    Of several processes none does: one that waits for another has not hung before that one has. The stacks of all
    threads go to stderr and, if there is a `folder`, to a file of this process in it, and `last_words` is called with
    what happened. Time is counted in ticks that this thread really ran through: a process that was suspended for a
    night has not hung.
    """
    over, peers = threading.Event(), Peers()
    ticks = max(TICKS, math.ceil(seconds / TICK))

    def watch() -> None:
        pulse = Pulse()
        quiet, seen = 0, 0
        while quiet < ticks and not over.wait(seconds / ticks):
            peers.mine = pulse.count()
            now = peers.mine + peers.heard
            quiet = quiet + 1 if now == seen else 0
            seen = now
        if not over.is_set():
            give_up(seconds, folder, last_words, peers)

    threads = [threading.Thread(target=watch, daemon=True, name="uft-watchdog")] if seconds else []
    if seconds and launched() > 1:
        threads.append(threading.Thread(target=peers.talk, args=(over, seconds / ticks), daemon=True, name="uft-peers"))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(1.0)  # a process that ends must not have one within a library


class Pulse:
    """Signs of life: those that were given, and in phases where bytes are signs every MOVED of them."""

    def __init__(self) -> None:
        self.moves, self.moved = 0, moved()

    def count(self) -> int:
        now = moved()
        if not life.moving:
            self.moved = now
        elif now - self.moved >= MOVED:
            self.moves, self.moved = self.moves + 1, now
        return life.signs + self.moves


def moved() -> int:
    """Bytes that this process has read and written, and of memory that it has filled, as far as the system counts.

    Faults are counted too: files that are mapped into memory are read by these alone, and not every file system counts
    what it reads.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = (used.ru_minflt + used.ru_majflt) * resource.getpagesize() + (used.ru_inblock + used.ru_oublock) * BLOCK
    with suppress(OSError, ValueError):  # Linux alone has it
        read, written = Path("/proc/self/io").read_text().splitlines()[:2]
        found += int(read.removeprefix("rchar: ")) + int(written.removeprefix("wchar: "))
    return found


def trace_name() -> str:
    """The file of this process's stacks: of several, all are needed to tell who waited for whom."""
    return f"hang-rank{rank()}.txt" if rank() else "hang.txt"


def give_up(seconds: float, folder: Path | None, last_words: LastWords, peers: Peers) -> None:
    """End this process, whose main thread hangs and can end nothing in order."""

    def speak() -> None:
        where = leave_stacks(folder)
        last_words(
            f"hung: no sign of life for {duration(seconds)} while {life.doing} (hardware.watchdog={seconds:g}). "
            f"Where it stood{where}"
        )
        peers.end_together()

    speaker = threading.Thread(target=speak, daemon=True, name="uft-last-words")
    speaker.start()
    speaker.join(PATIENCE)
    os._exit(FAILED)


def leave_stacks(folder: Path | None) -> str:
    """Write them down, first where no disk is needed; how the sentence ends that says where."""
    if launched() > 1:
        print(f"process {rank()}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    if folder is None:
        return " is above"
    trace = folder / trace_name()
    with suppress(OSError), open(trace, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return f": {shown(trace)}"
