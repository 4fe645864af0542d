"""The watchdog, which ends a process that hangs and says where it was; and stopping at a safe point on a signal."""

from __future__ import annotations

import faulthandler
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from uft.environment import launched, rank
from uft.errors import FAILED, INTERRUPTED, signals_to, stop_code
from uft.heartbeat import beat, heartbeat
from uft.runs import shown

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TICKS, TICK = 20, 5.0  # the former at least, of so many seconds at most
LAST_WORDS_TIMEOUT = 60.0  # seconds for the last words of a run whose disk may be what hangs
MOVED = 1 << 20
"""Bytes that are a sign of life where bytes are: more than an idle process moves."""
BLOCK = 512  # bytes, of the system's count of disk traffic
SIGNS, ENDING = "uft/signs-of-life", "uft/ending"  # counters in the store of torch's launcher


@contextmanager
def watching(seconds: float, folder: Path | None, last_words: Callable[[str], None]) -> Iterator[None]:
    """Inside, end the process with code 1 after `seconds` without a sign of life (`uft.heartbeat`); 0: never.

    The stacks of all threads go to stderr and, with a `folder`, to a file of this rank in it; `last_words` is called
    with what happened. A rank that waits for another has not hung before that one has. Time is counted in ticks that
    the watching thread ran through, so that a process that was suspended for a night has not hung.
    """
    if not seconds:
        yield
        return
    with _interpreter_guard(seconds) as python_runs:
        watchdog = Watchdog(seconds, folder, last_words, python_runs)
        threads = [threading.Thread(target=watchdog.watch, daemon=True, name="uft-watchdog")]
        if launched() > 1:
            threads.append(threading.Thread(target=watchdog.exchange, daemon=True, name="uft-peers"))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            watchdog.over.set()
            for thread in threads:
                thread.join(1.0)  # no thread may be inside a library when the process ends


@dataclass
class Watchdog:
    """Counts the signs of life of this process and of the other ranks, and ends the process where there are none."""

    seconds: float
    folder: Path | None
    last_words: Callable[[str], None]
    python_runs: Callable[[], None]  # to be called at every tick
    over: threading.Event = field(default_factory=threading.Event)
    mine: int = 0  # signs of life of this process
    heard: int = 0  # of all ranks together, a tick or two ago

    def __post_init__(self) -> None:
        self.ticks = max(TICKS, math.ceil(self.seconds / TICK))

    def watch(self) -> None:
        quiet = seen = moves = 0
        moved = moved_bytes()
        while quiet < self.ticks and not self.over.wait(self.seconds / self.ticks):
            self.python_runs()
            now = moved_bytes()
            if not heartbeat.phase.moving:
                moved = now
            elif now - moved >= MOVED:
                moves, moved = moves + 1, now
            self.mine = heartbeat.signs + moves
            signs = self.mine + self.heard
            quiet, seen = quiet + 1 if signs == seen else 0, signs
        if self.over.is_set():
            return
        faulthandler.cancel_dump_traceback_later()
        speaker = threading.Thread(target=self.speak, daemon=True, name="uft-last-words")
        speaker.start()
        speaker.join(LAST_WORDS_TIMEOUT)
        os._exit(FAILED)

    def speak(self) -> None:
        """Stacks and last words; then wait until all ranks have come here."""
        where, (minutes, rest) = " is above", divmod(round(self.seconds), 60)
        if launched() > 1:
            print(f"process {rank()}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)  # first, since it needs no disk
        if self.folder is not None:
            trace = self.folder / (f"hang-rank{rank()}.txt" if rank() else "hang.txt")
            where = f": {shown(trace)}"
            with suppress(OSError), open(trace, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self.last_words(
            f"hung: no sign of life for {minutes:02}:{rest:02} while {heartbeat.phase.doing} "
            f"(hardware.watchdog={self.seconds:g}). Where it stood{where}"
        )
        if launched() == 1:
            return
        with suppress(RuntimeError):
            store = _store()
            store.add(ENDING, 1)
            while store.add(ENDING, 0) < launched():
                time.sleep(0.1)
        if rank():
            time.sleep(1)  # rank 0 ends first, lest it learn of another's end

    def exchange(self) -> None:
        """Add this rank's signs to the sum of all and read it, every tick. It may block: in a thread of its own."""
        with suppress(RuntimeError):  # of torch: the process that keeps the store has ended
            store, sent = _store(), 0
            while not self.over.wait(self.seconds / self.ticks):
                now = self.mine
                self.heard = store.add(SIGNS, now - sent)
                sent = now


def _store() -> TCPStore:
    """A connection of its own to the store of torch's launcher."""
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


GUARD = """
missed=0
while read -r line; do
    case "$line" in
        running) missed=0;;
        Timeout*) missed=$((missed + 1)); [ $missed -lt 2 ] || kill -ABRT "$1";;
    esac
done
"""


@contextmanager
def _interpreter_guard(seconds: float) -> Iterator[Callable[[], None]]:
    """Abort the process where no Python thread runs any more, because a library hangs with the interpreter's lock held.

    faulthandler's timer is a C thread that needs no lock: after `seconds` it writes the stacks to a shell, which kills
    on the second time in a row. (On the first time a process that was suspended would be ended when it is resumed.)
    SIGABRT makes faulthandler write the stacks to stderr; there are no last words, and the run counts as interrupted.
    To be told at every tick, by what this yields, that Python runs.
    """
    command = ["sh", "-c", f"trap '' HUP INT TERM USR1 USR2; {GUARD}", "uft-guard", str(os.getpid())]
    try:
        guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:  # no shell: a process that holds the lock is not seen
        yield lambda: None
        return
    assert guard.stdin is not None
    pipe = guard.stdin.fileno()

    def python_runs() -> None:
        faulthandler.dump_traceback_later(seconds, repeat=True, file=pipe)
        with suppress(OSError):
            os.write(pipe, b"running\n")

    python_runs()
    try:
        yield python_runs
    finally:
        faulthandler.cancel_dump_traceback_later()
        guard.stdin.close()
        guard.wait()


def moved_bytes() -> int:
    """Bytes that this process has read and written, and of memory that it has filled, as far as the system counts.

    Page faults are counted too: memory-mapped files are read by these alone, and some file systems count no reads.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    moved = (used.ru_minflt + used.ru_majflt) * resource.getpagesize() + (used.ru_inblock + used.ru_oublock) * BLOCK
    with suppress(OSError, ValueError):  # Linux alone has it
        read, written = Path("/proc/self/io").read_text().splitlines()[:2]
        moved += int(read.removeprefix("rchar: ")) + int(written.removeprefix("wchar: "))
    return moved


# --- Stopping at a safe point: a signal sets a flag; the loop, the evaluation and generation look at it between steps.


STOPPING = b"\nuft: stopping at the next safe point, with a checkpoint in a run; Ctrl-C again ends it at once\n"


@dataclass
class Stop:
    """Whether this process was asked to stop, and by which signal. Asking it is a sign of life."""

    signal: int | None = None

    def __call__(self) -> bool:
        beat()
        return self.signal is not None

    def agreed(self) -> bool:
        """Whether any rank was asked. All ranks call this at the same point and get the same answer."""
        from uft.distributed import ranks  # here: signals are listened to before torch is imported

        self.signal = ranks().all_reduce_max(self.signal or 0) or None
        return self()

    def between_passes(self) -> bool:
        """Whether to stop before the next forward pass, which sharded ranks make together."""
        from uft.distributed import ranks

        return self.agreed() if ranks().sharded else self()

    @property
    def exit_code(self) -> int:
        return stop_code(self.signal)


@contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set. A second Ctrl-C ends the process at once."""
    stop = Stop()

    def receive(number: int) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            os._exit(INTERRUPTED)
        if number == signal.SIGINT and rank() == 0:
            with suppress(OSError):  # at once, and by no buffer that this signal may have interrupted
                os.write(2, STOPPING)
        stop.signal = number

    with signals_to(receive):
        yield stop
