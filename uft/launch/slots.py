"""GPUs of this machine shared out among runs that start by themselves: each is held through a locked file.

The kernel frees the lock of a holder that died, so nothing has to be cleared up after a crash.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOOK = 0.5
"""Seconds between two looks for free slots."""


@contextmanager
def slots(hardware: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The environment of a run that has its GPUs of `hardware.pool` to itself, as soon as there are enough; {} without
    a pool, and where a scheduler has chosen already."""
    pool: Sequence[int] | None = hardware.get("pool")
    if pool is None or "SLURM_JOB_ID" in os.environ:
        yield {}
        return
    held: list[tuple[int, IO[bytes]]] = []
    try:
        while len(held) < hardware.get("processes", 1):
            held = _taken(pool, hardware.get("processes", 1))
            if not held:
                time.sleep(LOOK)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(str(number) for number, _ in held)}
    finally:
        for _, handle in held:
            handle.close()


def _taken(pool: Sequence[int], count: int) -> list[tuple[int, IO[bytes]]]:
    """`count` GPUs with their locks; none where there are not as many free: half of what is needed helps nobody."""
    held: list[tuple[int, IO[bytes]]] = []
    for number in pool:
        handle = _locked(_folder() / f"{number}.lock")
        if handle is not None:
            held.append((number, handle))
        if len(held) == count:
            return held
    for _, handle in held:
        handle.close()
    return []


def _locked(file: Path) -> IO[bytes] | None:
    try:
        handle = open(file, "rb")  # noqa: SIM115  # held as long as the lock; a file that somebody else made will do
    except FileNotFoundError:
        handle = open(os.open(file, os.O_RDONLY | os.O_CREAT, 0o644), "rb")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def _folder() -> Path:
    """One for all people on this machine."""
    folder = Path(tempfile.gettempdir()) / "uft-gpus"
    try:
        folder.mkdir(mode=0o1777)
        folder.chmod(0o1777)  # whatever the umask
    except FileExistsError:
        pass
    return folder
