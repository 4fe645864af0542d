"""Writing to a disk that may be full, read-only or someone else's: what was refused is said with the file and the need.
Reading from one that may have changed what was written.

Nothing here imports anything heavy.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from uft.errors import FAILED, Problem, UftError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LEFT_AFTER = 24 * 3600
"""Seconds after which nobody is writing what nobody has written to."""
RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors, whose error is no OSError, tells the number of one."""


class Damaged(UftError, ValueError):
    """A file is not what was written into it."""


MOST_VALUES = 1_000_000
"""Of one file, each counted as often as anything refers to it."""


def bounded(found: Any) -> None:
    """ValueError where a few lines of YAML, by names for what they said before, stand for more than anybody wrote."""
    counts: dict[int, int] = {}

    def count(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) not in counts:
            counts[id(value)] = MOST_VALUES + 1  # what contains itself has no end
            counts[id(value)] = 1 + sum(map(count, value.values() if isinstance(value, dict) else value))
        return counts[id(value)]

    if count(found) > MOST_VALUES:
        raise ValueError(f"stands for more than {MOST_VALUES:,} values")


def read_yaml(path: Path, kind: type) -> Any:
    """What the file holds, which is of that kind. Raises Damaged."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        bounded(found)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Damaged(Problem(str(path), f"is damaged: {error}"), code=FAILED) from error
    return found


@contextmanager
def writing(path: Path, needs: int | None = None, code: int = FAILED) -> Iterator[None]:
    """Within, `path` is written, which takes about `needs` bytes. What the system refuses is a UftError about it.

    `code`: the exit code where writing is not allowed at all; a full disk is a failure (1) in any case.
    """
    try:
        yield
    except UftError:
        raise
    except Exception as error:
        number = refusal(error)
        if number is None:
            raise
        raise UftError(problem(path, number, needs), code=FAILED if number in FULL else code) from error


def refusal(error: BaseException) -> int | None:
    """The system's number of an error about a file; None for any other error."""
    if isinstance(error, OSError):
        return error.errno
    told = RUST.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(told[1]) if told else None


def problem(path: Path, number: int, needs: int | None = None) -> Problem:
    """What to say of a file that could not be written."""
    if number not in FULL:
        return Problem(str(path), f"cannot be written: {os.strerror(number)}")
    need = f"; this needs {size(needs)}" if needs is not None else ""
    why = f"no space is left for it ({os.strerror(number)}){need}, {free(path)} free on its disk"
    return Problem(str(path), why, advice=("make room there, and go on: what was saved before is whole",))


def cache_root(folder: str | os.PathLike[str] | None = None) -> Path:
    """`folder`, else UFT_CACHE, else ~/.cache/uft."""
    return Path(folder or os.environ.get("UFT_CACHE") or "~/.cache/uft").expanduser()


def free(path: Path) -> str:
    """Room on the disk that `path` is, or would be, on."""
    there = existing(path)
    try:
        return f"{size(shutil.disk_usage(there).free)} are"
    except OSError:
        return "an unknown amount is"


def clear_left(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half-written in `folder`: what is named like `pattern` and a day old.

    By age, since a process of another machine may be writing beside this one.
    """
    for path in folder.glob(pattern):
        with suppress(OSError):  # somebody else removed it, or owns it
            parts = [path, *path.iterdir()] if path.is_dir() else [path]
            if max(part.stat().st_mtime for part in parts) > time.time() - LEFT_AFTER:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def as_umask_leaves(folder: Path) -> None:
    """Give weights the mode of the JSON beside them: safetensors writes files that their owner alone may read."""
    for path in folder.rglob("*.safetensors"):
        beside = next(path.parent.glob("*.json"), None)
        if beside is not None:
            path.chmod(beside.stat().st_mode & 0o777)


def existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder`, which need not be there yet; None where it can."""
    there = existing(folder)
    if not there.is_dir():
        return f"{there} is a file"
    if os.access(there, os.W_OK | os.X_OK):
        return None
    read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
    return f"{there} is on a read-only file system" if read_only else f"no permission to write in {there}"


def size(count: int) -> str:
    """Bytes for people: 512 B, 3.4 MB, 1.2 GB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
