"""Limits for what comes with a model and is run here: a chat template gets some processor time, memory and room.

Templates are rendered in Jinja's sandbox, which keeps them from files and from Python's insides, and lets them loop and
write without end. Time is that of the processor, so that a slow or stopped machine refuses nothing.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 5.0  # for one conversation, which takes a thousandth of that
AGAIN = 0.5  # seconds after which time is called again, should the first call have been lost
MEMORY, MEMORY_PER_CHARACTER = 256 * 2**20, 64  # bytes beyond what the process has
ROOM, ROOM_PER_CHARACTER = 1_000_000, 16  # characters written
STATM = Path("/proc/self/statm")

_running = False


class TooMuch(Exception):
    """It took more than it may; the message says what."""


def render(template: Callable[[], list[str]], characters: Sequence[int]) -> list[str]:
    """The texts that `template` writes, each made of so many `characters`. Raises :class:`TooMuch`.

    All of them together have the time and the memory of one. Elsewhere than in the main thread, time is not limited;
    elsewhere than on Linux, memory is not.
    """
    try:
        with _time(), _memory(MEMORY + MEMORY_PER_CHARACTER * sum(characters)):
            texts = template()
    except MemoryError:
        raise TooMuch("it needs too much memory") from None
    except RecursionError:
        raise TooMuch("it calls itself too deeply") from None
    for text, given in zip(texts, characters, strict=True):
        if len(text) > ROOM + ROOM_PER_CHARACTER * given:
            raise TooMuch(f"it writes {len(text):,} characters where the conversation has {given:,}")
    return texts


@contextmanager
def _time() -> Iterator[None]:
    global _running
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGPROF) is not _time_is_up:
        signal.signal(signal.SIGPROF, _time_is_up)
    _running = True
    signal.setitimer(signal.ITIMER_PROF, SECONDS, AGAIN)
    try:
        yield
    finally:
        _running = False  # first: a late call raises nothing
        signal.setitimer(signal.ITIMER_PROF, 0)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    if _running:
        raise TooMuch(f"it takes more than {SECONDS:g} seconds")


@contextmanager
def _memory(more: int) -> Iterator[None]:
    """The process may grow by so many bytes and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _size() + more if STATM.exists() else resource.RLIM_INFINITY
    bounds = [bound for bound in (soft, hard, wanted) if bound != resource.RLIM_INFINITY]
    if wanted == resource.RLIM_INFINITY or min(bounds) != wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Bytes of address space that this process has."""
    return int(STATM.read_bytes().split()[0]) * resource.getpagesize()
