"""`sweep.json`: what a sweep was asked for, so that jobs are known before they start and it can be gone on with.

    {"format": 1, "name": ..., "made": time, "changed": time,
     "commands": [{"words": [what followed `uft train`], "cwd": folder, "time": the last time it was given}],
     "axes": {key: [values as typed]},
     "jobs": [{"name": folder in the sweep's, "overrides": [...], "planned": time}]}

Commands, axes and jobs of earlier sittings stay: a sweep grows.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from uft.launch.sweep_jobs import Job
from uft.runs import SWEEP_FILE, read_json, write_json

FORMAT = 1
_continuing: list[Path] = []  # the sweep that `uft resume` goes on with: its commands are written down already


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def record(folder: Path, jobs: Sequence[Job], axes: Mapping[str, Sequence[str]]) -> None:
    """Write down that these jobs are to run in `folder`, by the command line of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        _record(folder, jobs, axes)


def _record(folder: Path, jobs: Sequence[Job], axes: Mapping[str, Sequence[str]]) -> None:
    before, time = read_json(folder / SWEEP_FILE), now()
    commands, command = before.get("commands", []), {"words": sys.argv[1:], "cwd": str(Path.cwd())}
    if not _continuing:
        commands = [*others(commands, command), {**command, "time": time}]
    known = {job["name"]: job for job in before.get("jobs", ())}
    added = {job.name: {"name": job.name, "overrides": list(job.overrides), "planned": time} for job in jobs}
    sweep = {
        "format": FORMAT,
        "name": folder.name,
        "made": before.get("made", time),
        "changed": time,
        "commands": commands,
        "axes": merged(before.get("axes", {}), axes),
        "jobs": list({**known, **{name: job for name, job in added.items() if name not in known}}.values()),
    }
    write_json(folder / SWEEP_FILE, sweep)


def axes_of(folder: Path) -> list[str]:
    """The keys that a sweep varies."""
    return list(read_json(folder / SWEEP_FILE).get("axes", ()))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other command adds to this sweep meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def continuing(folder: Path) -> Iterator[list[tuple[list[str], Path]]]:
    """(words, folder they were typed in) of every command that the sweep in `folder` was asked for by.

    What runs meanwhile is part of that sweep and no new request.
    """
    commands = read_json(folder / SWEEP_FILE).get("commands", ())
    _continuing.append(folder)
    try:
        yield [(list(command["words"]), Path(command["cwd"])) for command in commands]
    finally:
        _continuing.pop()


def others(commands: Iterable[Mapping[str, Any]], command: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The commands that differ from this one."""
    return [one for one in commands if {key: one.get(key) for key in command} != command]


def merged(before: Mapping[str, Sequence[str]], axes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Every axis with all values that it ever had, in the order in which they came."""
    keys = dict.fromkeys([*before, *axes])
    return {key: list(dict.fromkeys([*before.get(key, ()), *axes.get(key, ())])) for key in keys}
