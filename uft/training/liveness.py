"""Watchdog: a run that hangs (a rank that waits for another, a dead disk) ends, and says where it was."""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from uft.distributed import launched, rank
from uft.errors import FAILED, INTERRUPTED, STOPPED
from uft.heartbeat import beat, heartbeat
from uft.runs import shown
from uft.tracking.console import duration

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TICKS, TICK = 20, 5.0  # the former at least, of so many seconds at most
PATIENCE = 60.0  # seconds for the last words of a run whose disk may be what hangs
MOVED = 1 << 20
"""Bytes that are a sign of life where bytes are: more than a process moves that does nothing."""
BLOCK = 512  # bytes, of the system's count of what goes to and from disks
LastWords = Callable[[str], None]


@contextmanager
def watching(seconds: float, folder: Path | None, last_words: LastWords) -> Iterator[None]:
    """Within, the process ends with code 1 when it gives no sign of life for `seconds` (see `uft.heartbeat`); 0: never.

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
        if not heartbeat.moving:
            self.moved = now
        elif now - self.moved >= MOVED:
            self.moves, self.moved = self.moves + 1, now
        return heartbeat.signs + self.moves


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
            f"hung: no sign of life for {duration(seconds)} while {heartbeat.doing} (hardware.watchdog={seconds:g}). "
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


# --- Stopping politely: a signal sets a flag, and the loop, the battery and generation look at it at their safe
# points.


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Stop:
    """Whether somebody asked this process to stop, and how. Call it to ask: who does is alive."""

    signal: int | None = None

    def __call__(self) -> bool:
        beat()
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any process of the run was asked: all come here at the same point, and leave with one answer."""
        from uft.distributed import ranks  # here: signals are listened to before torch is imported

        self.signal = ranks().all_reduce_max(self.signal or 0) or None
        return self()

    def between_passes(self) -> bool:
        """Whether to stop before the next forward pass: of a model in pieces all processes make it, or none."""
        from uft.distributed import ranks

        return self.agreed() if ranks().sharded else self()

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


# --- What the processes of a run hear of each other past everything that may hang: that they live, and that they end.
#
# Through connections of their own to the store where torch's launcher lets processes meet.


SIGNS, ENDING = "uft/signs-of-life", "uft/ending"


class Peers:
    """The other processes, if there are any. One that waits for another lives as long as that one does."""

    def __init__(self) -> None:
        self.mine = 0  # signs of life of this process
        self.heard = 0  # of all together, a tick or two ago

    def talk(self, over: threading.Event, tick: float) -> None:
        """Tell of one's own signs and hear of all, every `tick` seconds until it is over or nobody answers.

        In a thread of its own, for it may wait for an answer that never comes.
        """
        with suppress(RuntimeError):  # of torch: whoever keeps the store has ended
            store, told = _store(), 0
            while not over.wait(tick):
                now = self.mine
                self.heard = store.add(SIGNS, now - told)
                told = now

    def end_together(self) -> None:
        """Wait until all processes have come here. The first one goes first, lest it hear of another's end."""
        if launched() == 1:
            return
        with suppress(RuntimeError):
            store = _store()
            store.add(ENDING, 1)
            while store.add(ENDING, 0) < launched():
                time.sleep(0.1)
        if rank():
            time.sleep(1)


def _store() -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
