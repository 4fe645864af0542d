"""What is wrong with the jobs of a sweep: of all of them, before the first one starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from uft.config.compose import Examined, quoted
from uft.config.frozen import free
from uft.config.messages import written
from uft.errors import Problem, UftError
from uft.launch.launcher import changed_keys, check_sources
from uft.launch.names import slug
from uft.launch.sweep_jobs import Job
from uft.runs import Damaged, Run

Jobs = Sequence[Sequence[str]]
"""The overrides of every job."""

METHODS = ("objective", "experiment")
"""What tells apart the jobs of several commands that write into one named sweep."""


def problems_of(examined: Sequence[Examined], jobs: Jobs, axes: Sequence[str]) -> list[Problem]:
    return [*together(examined, jobs, axes), *shared_folder(jobs, axes)]


def together(examined: Sequence[Examined], jobs: Jobs, axes: Sequence[str]) -> Iterator[Problem]:
    """Problems over all jobs: one per key and reason, with the jobs that have it."""
    found: dict[tuple[str, str], dict[int, Problem]] = {}
    for number, one in enumerate(examined):
        for problem in one.problems:
            found.setdefault((key_of(problem.what), problem.why), {})[number] = problem
    for having in found.values():
        number, problem = next(iter(having.items()))
        if len(having) < len(jobs):
            varying = " ".join(line for line in jobs[number] if key_of(line) in axes)
            more = f"in {len(having)} of {len(jobs)} jobs, the first is  {varying}"
            problem = replace(problem, advice=(*problem.advice, more))
        yield problem


def key_of(line: str) -> str:
    return line.partition("=")[0]


def shared_folder(jobs: Jobs, axes: Sequence[str]) -> list[Problem]:
    """A folder given for all jobs would be one folder for all of them."""
    lines = [line for line in jobs[0] if line.lstrip("+").startswith("run.dir=")]
    if len(jobs) == 1 or not lines or key_of(lines[0]) in axes:
        return []
    advice = ("the folder of a sweep is named by  sweep.name=...",)
    return [Problem(lines[0], f"one folder for {len(jobs)} jobs", "command line", advice)]


# objectives that lack a swept key


def apart(examined: Sequence[Examined], jobs: Jobs, axes: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The commands that sweep keys which only some objectives have: one per set of objectives with the same keys.

    [] where that would not help: no objective has such a key, or it is a file that sweeps it. `typed` are the words of
    the command line.
    """
    axis = next((name for name in METHODS if name in axes), None)
    if axis is None:
        return []
    lacking: dict[str, set[str]] = {}
    for job, one in zip(jobs, examined, strict=True):
        method = next(line for line in job if key_of(line) == axis).partition("=")[2]
        lacking.setdefault(method, set()).update(key_of(p.what) for p in one.problems if no_such_key(p))
    sets = {frozenset(keys): [method for method, own in lacking.items() if own == keys] for keys in lacking.values()}
    typed_keys = {key_of(word) for word in typed}
    if len(sets) < 2 or not frozenset().union(*sets) <= typed_keys or axis not in typed_keys:
        return []
    name = [] if "sweep.name" in typed_keys else [f"sweep.name={slug('-'.join(a.rpartition('.')[2] for a in axes))}"]
    return [command(typed, axis, methods, without, name) for without, methods in sets.items()]


def no_such_key(problem: Problem) -> bool:
    return problem.what.lstrip("+").startswith("objective.") and problem.why.startswith("no such key")


def command(
    typed: Sequence[str], axis: str, methods: Sequence[str], without: frozenset[str], more: Sequence[str]
) -> str:
    """The request for some of its objectives, without the keys that these lack."""
    words = [f"{axis}={','.join(methods)}" if key_of(w) == axis else w for w in typed if key_of(w) not in without]
    return " ".join(["uft", "train", "-m", *(quoted(word) for word in (*words, *more))])


def advised(footer: str, commands: Sequence[str]) -> str:
    """The last lines of a refusal, with the commands that would do."""
    if not commands:
        return footer
    head = "Sweep them apart, into one folder; `uft compare` takes it as one sweep:"
    return "\n".join([head, *(f"  {line}" for line in commands), "", footer])


# rows, and runs that are there already


def check_all_sources(settings: Sequence[Mapping[str, Any]]) -> None:
    """Read the rows of every mixture of the sweep. Raises UftError with the bad ones of all of them."""
    problems: dict[Problem, None] = {}
    for one in settings:
        try:
            check_sources(one)
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UftError(*problems)


def refuse_other_runs(jobs: Sequence[Job], settings: Sequence[Mapping[str, Any]]) -> None:
    """UftError where runs that are in the folder already have another configuration than the jobs of their names."""
    found: dict[tuple[str, str], list[Job]] = {}
    for job, wanted in zip(jobs, settings, strict=True):
        run = Run(job.folder)
        for key, old, new in changes(run, wanted) if run.exists else ():
            if not free(key):
                found.setdefault((key, f"{written(old)} -> {written(new)}"), []).append(job)
    if found:
        problems = [
            Problem(key, why, f"{len(having)} of {len(jobs)} jobs, the first is {having[0].name}")
            for (key, why), having in found.items()
        ]
        footer = (
            f"{jobs[0].folder.parent} holds runs with another configuration (old -> new above), and a run goes on\n"
            "under the one it began with. Give this sweep a name of its own:  sweep.name=..."
        )
        raise UftError(*problems, footer=footer)


def changes(run: Run, wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    try:
        return changed_keys(run, wanted)
    except Damaged:
        raise
    except UftError:  # another version wrote it: its job will tell of it, and the others can do without
        return []
