"""A sweep: jobs that are checked together before the first one starts, named by what varies, and run by any launcher.

Its folder holds a run folder per job and `sweep.json`, what the sweep was asked for, so that jobs are known before they
start and the sweep can be completed, extended and resumed:

    {"format": 1, "name": ..., "made": time, "changed": time,
     "commands": [{"words": [what followed `uft train`], "cwd": folder, "time": the last time it was given}],
     "axes": {key: [values as typed]},
     "jobs": [{"name": folder in the sweep's, "overrides": [...], "planned": time}]}

Commands, axes and jobs of earlier sessions stay.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import itertools
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from uft.config.compose import Examined, examine, footer, quoted
from uft.config.files import Request, request_of_job
from uft.config.frozen import ABSENT, may_change
from uft.config.messages import COMMAND_LINE, as_typed, hint, nearest, written
from uft.errors import FAILED, Problem, UftError, raise_problems, visible
from uft.launch.forkserver import forkserver
from uft.launch.launcher import JOB_KEYS, JobFailed, changed_keys, row_problems, slug, today, trust, unusable_rows
from uft.launch.sweep_table import SweepTable
from uft.runs import OUTPUTS, SWEEP_FILE, Damaged, Run, read_json, shown, typed_path, write_json
from uft.tracking.console import shorten

MANY = 20  # jobs that take seconds to check
LONGEST_JOB_NAME = 120  # characters of a name; file systems allow 255
METHODS = ("objective", "experiment")
"""Keys that tell apart the jobs of several commands that write into one named sweep."""
ARM = "arm"
"""The key that chooses a row of a sweep's table of settings (`hydra.sweeper.arms`)."""
LOST = ("UncompletedJobError", "FailedJobError")
"""Errors of submitit where a job's process was killed and left no answer. Other jobs may be at work yet."""
AGAIN = "To go on, run the same command again: finished jobs are skipped, the others continue."


@dataclass(frozen=True)
class Job:
    """The overrides of a job as typed, its run folder, and its resolved configuration."""

    overrides: tuple[str, ...]
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def arguments(self) -> list[str]:
        """The overrides for Hydra's launcher."""
        values = (str(self.folder), self.folder.parent.name)
        return [*self.overrides, *(key + quote(value) for key, value in zip(JOB_KEYS, values, strict=True))]


def quote(text: str) -> str:
    """A value of Hydra's grammar that is exactly this text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass
class Sweep:
    """A sweep at work: the request that its jobs come from, the launcher that runs them, and those that failed."""

    config: DictConfig  # as composed by Hydra; only its `hydra` node is read
    typed: tuple[str, ...]  # the words of the command line, without Hydra's own
    axes: Mapping[str, Sequence[str]]  # the values of every key that varies
    launcher: Launcher
    table: SweepTable | None = None
    failed: dict[Job, JobFailed] = field(default_factory=dict)
    launched: int = 0

    @property
    def verb(self) -> str:
        return str(self.config.hydra.job.name)

    @property
    def stopped(self) -> list[int]:
        """Exit codes of the jobs that a signal stopped; it was meant for the whole sweep."""
        return [failure.code for failure in self.failed.values() if failure.stopped]

    def jobs(self, lines: Sequence[Sequence[str]]) -> tuple[Job, ...]:
        """The jobs with these overrides, checked. Raises UftError with the problems of all of them: their
        configurations, their rows, and runs in their folders that have another configuration."""
        hydra = self.config.hydra
        examined = [examine(request_of_job(hydra, line)) for line in lines]
        problems, last = refusal(examined, lines, self.axes, self.typed)
        if not problems and self.verb != "config":  # which is shown without the rows, as that of one run
            problems, last = row_problems(examined, refused=False)
        if not problems and self.verb in ("train", "check"):
            problems, last = self.unusable(examined, lines)
        raise_problems(problems, footer=last)
        settings = [one.settings for one in examined]
        sweep, prefix = settings[0]["sweep"]["name"], settings[0]["run"]["name"]
        # commands that share a folder by its name must not share the names of their jobs
        apart = METHODS if sweep and ARM not in self.axes else ()
        names = job_names(lines, list(dict.fromkeys([*apart, *self.axes])), prefix)
        folder = Path(str(hydra.sweep.dir))
        if folder == Path("."):
            common = self.typed if ARM in self.axes else lines[0]  # the settings of an arm are no part of the name
            fixed = [line for line in common if word_key(line) not in self.axes]
            folder = sweep_dir(sweep or sweep_name(list(self.axes), fixed))
        named = zip(lines, names, settings, strict=True)
        jobs = tuple(Job(tuple(line), folder / name, one) for line, name, one in named)
        if RESUMING.get() and not set(began := as_begun(jobs, self.axes)) <= set(lines[0]):
            print(f"uft: as this sweep began, and unlike today's defaults:  {' '.join(began)}", flush=True)
            return self.jobs([[*line, *began] for line in lines])
        refuse_other_runs(jobs)
        return jobs

    def unusable(self, examined: Sequence[Examined], lines: Sequence[Sequence[str]]) -> tuple[list[Problem], str]:
        """(problems of rows that the objectives of jobs cannot use, each once with the first job that has it; the
        commands that help)."""
        found: dict[Problem, int] = {}
        left = [True] * len(lines)
        for number, one in enumerate(examined):
            problems, left[number] = unusable_rows(one.settings)
            for problem in problems:
                found.setdefault(problem, number)
        varying = {number: " ".join(x for x in lines[number] if word_key(x) in self.axes) for number in found.values()}
        none = {number: "" if left[number] else ", which can use no other row" for number in found.values()}
        told = [replace(one, advice=(f"first in  {varying[n]}{none[n]}",)) for one, n in found.items()]
        if all(left):
            return told, "Leave these rows out in all of them:  data.unusable=drop"
        axis = next((name for name in METHODS if name in self.axes), "")
        able = [line for line, some in zip(lines, left, strict=True) if some]
        usable = {word for line in able for word in line if word_key(word) == axis}
        if not usable:
            return told, "What takes every kind of row:  objective=uft"
        values = ",".join(value for value in self.axes[axis] if f"{axis}={value}" in usable)
        words = [f"{axis}={values}" if word_key(word) == axis else word for word in self.typed]
        return told, f"Without what can use no row:  uft {self.verb} -m {' '.join(map(quoted, as_typed(words)))}"

    def launch(self, jobs: Sequence[Job]) -> Sequence[JobReturn]:
        """Give jobs to Hydra's launcher, which returns when all of them have ended."""
        try:
            results = self.launcher.launch([job.arguments for job in jobs], initial_job_idx=self.launched)
            failures = [failure_of(result) for result in results]
        except RuntimeError as error:
            if isinstance(error, BrokenExecutor) or type(error).__name__ in LOST:
                text = f"the launcher lost a job: {shorten(' '.join(str(error).split()), LONGEST_JOB_NAME)}"
                ended = [Run(job.folder).status == "finished" for job in jobs]
                results, failures = [], [None if done else JobFailed(FAILED, text) for done in ended]
            elif "slurm" in str(error).lower():
                advice = ("on a machine from which sbatch works, or with another  hardware=",)
                raise UftError(Problem("hydra/launcher", str(error), advice=advice)) from error
            else:
                raise
        self.launched += len(jobs)
        for job, failure in zip(jobs, failures, strict=True):
            self.failed.pop(job, None)
            status, why = "finished", ""
            if failure:
                self.failed[job] = failure
                status, why = "stopped" if failure.stopped else "failed", failure.message
            if self.table:
                self.table.end(job.folder, status, why)
        return results

    def report(self, count: int, last: str) -> int:
        """Print every job that did not finish, then `last`; the exit code of the sweep."""
        lost = len(self.failed) - len(self.stopped)
        head = [f"{lost} of {count} jobs failed"] if lost else []
        head += ["the sweep was stopped"] if self.stopped else []
        lines = ["", f"uft: {' and '.join(head)}", ""]
        for job, failure in self.failed.items():
            why = [f"      {line}".rstrip() for line in failure.message.splitlines()]
            lines += [f"  {job.folder.name}", *why, f"      {job.folder}", ""]
        print(visible("\n".join([*lines, last])), file=sys.stderr)
        return self.stopped[0] if self.stopped else FAILED


def failure_of(result: JobReturn) -> JobFailed | None:
    """Why a job did not finish; None where it did."""
    if result.status == JobStatus.COMPLETED:
        return None
    error = replace(result, status=JobStatus.COMPLETED).return_value  # as it stands it would be printed, and raised
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, UftError):
        lines = (": ".join(filter(None, (problem.what, problem.why))) for problem in error.problems)
        return JobFailed(error.code, "\n".join(lines))
    return JobFailed(FAILED, f"{type(error).__name__}: {error}")


def run_grid(sweep: Sweep, lines: Sequence[Sequence[str]], batch_size: int | None) -> list[Sequence[JobReturn]]:
    """Check every job, then run them, `batch_size` at a time (None: all at once). Exits unless all went well.

    A job that was stopped by a signal stops the sweep; a job that failed does not.
    """
    if len(lines) > MANY:
        print(f"uft: checking {len(lines)} jobs", flush=True)
    trains = sweep.verb == "train"
    if len(lines) > 1 and trains and os.environ.get("WANDB_SWEEP_ID"):
        advice = ("leave out -m, or let W&B vary the keys: uft docs sweeps",)
        raise UftError(Problem(f"{len(lines)} jobs", "a W&B agent asks for one run at a time", "command line", advice))
    jobs = sweep.jobs(lines)
    if sweep.verb == "config":  # the whole configuration of the first job will do for all of them
        print(f"# {len(jobs)} jobs; below is the first one's configuration")
        for job in jobs:
            print(f"#   {' '.join(word for word in job.overrides if word_key(word) in sweep.axes)}")
        jobs = jobs[:1]
    folder, size = jobs[0].folder.parent, batch_size or len(jobs)
    if trains:
        record_sweep(folder, jobs, sweep.axes)
        print(f"uft: {len(jobs)} job{'s' if len(jobs) != 1 else ''} in {shown(folder)}", flush=True)
        sweep.table = SweepTable(folder.name)
        sweep.table.add(job.folder for job in jobs)
    results = []
    with sweep.table or nullcontext(), forkserver() if len(jobs) > 1 else nullcontext():
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            if not trains and len(jobs) > 1:
                for number, job in enumerate(batch, start + 1):
                    print(f"\nuft: job {number} of {len(jobs)}: {job.folder.name}", flush=True)
            results.append(sweep.launch(batch))
            if sweep.stopped:
                break
    if sweep.failed:
        last = f"{AGAIN} Or:\n  uft resume {typed_path(folder)}" if trains else AGAIN
        raise SystemExit(sweep.report(len(jobs), last))
    if trains:
        done = f"all {len(jobs)} jobs are" if len(jobs) > 1 else "the one job is"
        print(f"\nuft: {done} done.  Compare:  uft compare {typed_path(folder)}")
    return results


# --- the grid and its checks


def expand(
    lines: Sequence[str], loader: ConfigLoader, arms: Mapping[str, str] | None = None
) -> tuple[list[list[str]], dict[str, list[str]]]:
    """(the overrides of every job of the grid, the values of every key that varies).

    A later line about a key replaces an earlier one: the command line, what a file sweeps, and both a setting of an
    arm. `arms`: the table that `arm` chooses from; nothing chosen, all of it. Raises HydraException for a line that
    cannot be parsed, UftError for an interval and for an arm that is not in the table.
    """
    values: dict[str, list[str]] = {}
    swept: dict[str, None] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(lines)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [override.get_value_element_as_str()]
            continue
        if not override.is_discrete_sweep():
            why, advice = "an interval is no list of values", "list the values, or search it:  hydra/sweeper=uft_optuna"
            raise UftError(Problem(str(override.input_line), why, "command line", (advice,)))
        values[key] = list(override.sweep_string_iterator())
        if not values[key] or len(set(values[key])) < len(values[key]):
            why = "names no value" if not values[key] else "names a value twice"
            raise UftError(Problem(str(override.input_line), why, COMMAND_LINE))
        swept[key] = None
    if arms or (arms is not None and ARM in values):
        values, swept = {ARM: values.get(ARM, list(arms)), **values}, {ARM: None, **swept}
    rows = settings_of_arms(values.get(ARM, ()) if arms is not None else (), arms or {})
    grid = [dict(zip(values, job, strict=True)) for job in itertools.product(*values.values())]
    jobs = [[f"{key}={v}" for key, v in {**rows.get(job.get(ARM, ""), {}), **job}.items()] for job in grid]
    return jobs, {key: list(dict.fromkeys(values[key])) for key in swept}


def settings_of_arms(chosen: Iterable[str], arms: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The chosen rows of a table of arms, each as its values by key. UftError with all that are not there."""
    problems = []
    for name in dict.fromkeys(chosen):
        if name not in arms:
            near = nearest(name, arms)
            advice = hint(near and f"{ARM}={near}", "arms", list(arms))
            why = "no such arm in this sweep" if arms else "this sweep has no table of arms"
            problems.append(Problem(f"{ARM}={name}", why, COMMAND_LINE, (advice,) if advice else ()))
    raise_problems(problems)
    parser = OverridesParser.create()
    rows = {name: parser.parse_overrides(shlex.split(arms[name])) for name in dict.fromkeys(chosen)}
    return {name: {one.get_key_element(): one.get_value_element_as_str() for one in row} for name, row in rows.items()}


def examine_jobs(request: Request, loader: ConfigLoader) -> tuple[list[Problem], str]:
    """The problems of every job of a request, together, and the footer of the refusal."""
    jobs, axes = expand(request.overrides, loader)
    examined = [examine(replace(request, overrides=tuple(job))) for job in jobs]
    return refusal(examined, jobs, axes, request.overrides)


def refusal(
    examined: Sequence[Examined], jobs: Sequence[Sequence[str]], axes: Mapping[str, Sequence[str]], typed: Sequence[str]
) -> tuple[list[Problem], str]:
    """(problems, footer): one problem per key and reason, with the number of jobs that have it; with them bad rows."""
    by_reason: dict[tuple[str, str], dict[int, Problem]] = {}
    for number, one in enumerate(examined):
        for problem in one.problems:
            by_reason.setdefault((word_key(problem.what), problem.why), {})[number] = problem
    problems = []
    for having in by_reason.values():
        number, problem = next(iter(having.items()))
        if len(having) < len(jobs):
            varying = " ".join(line for line in jobs[number] if word_key(line) in axes)
            more = f"in {len(having)} of {len(jobs)} jobs, the first is  {varying}"
            problem = replace(problem, advice=(*problem.advice, more))
        problems.append(problem)
    folder = next((line for line in jobs[0] if line.lstrip("+").startswith("run.dir=")), None)
    if len(jobs) > 1 and folder and word_key(folder) not in axes:
        advice = ("the folder of a sweep is named by  sweep.name=...",)
        problems.append(Problem(folder, f"one folder for {len(jobs)} jobs", "command line", advice))
    if not problems:
        return [], ""
    last = [*commands_apart(examined, jobs, axes, typed), footer(examined[0])]
    return [*problems, *row_problems(examined)[0]], "\n".join(last)


def word_key(line: str) -> str:
    """The key of an override as it was typed, with its `+` or `~`."""
    return line.partition("=")[0]


def commands_apart(
    examined: Sequence[Examined], jobs: Sequence[Sequence[str]], axes: Mapping[str, Sequence[str]], typed: Sequence[str]
) -> list[str]:
    """Where the command line (`typed`) sweeps objectives and keys that only some of them have: the commands that do
    it, one per set of objectives with the same keys. Else nothing."""
    axis = next((name for name in METHODS if name in axes), "")
    lacking: dict[str, set[str]] = {}  # objective -> keys that it does not have
    for job, one in zip(jobs, examined, strict=True):
        if method := dict(line.partition("=")[::2] for line in job).get(axis):
            lacking.setdefault(method, set()).update(
                word_key(problem.what)
                for problem in one.problems
                if problem.what.lstrip("+").startswith("objective.") and problem.why.startswith("no such key")
            )
    groups = {frozenset(keys): [method for method, own in lacking.items() if own == keys] for keys in lacking.values()}
    typed_keys = {word_key(word) for word in typed}
    if len(groups) < 2 or not frozenset().union(*groups) <= typed_keys or axis not in typed_keys:
        return []
    named = "sweep.name" in typed_keys
    name = [] if named else [f"sweep.name={slug('-'.join(key.rpartition('.')[2] for key in axes))}"]
    lines = ["Sweep them apart, into one folder; `uft compare` takes it as one sweep:"]
    for without, methods in groups.items():
        own = f"{axis}={','.join(methods)}"
        words = [own if word_key(word) == axis else word for word in typed if word_key(word) not in without]
        lines.append(f"  uft train -m {' '.join(map(quoted, [*as_typed(words), *name]))}")
    return [*lines, ""]


def as_begun(jobs: Sequence[Job], axes: Collection[str]) -> list[str]:
    """Overrides that train the remaining jobs of a resumed sweep as its first ones were: the values that all runs of it
    began with, where its commands give others today because a default or a file has changed."""
    began: dict[str, list[Any]] = {}
    runs = [(Run(job.folder), job) for job in jobs if Run(job.folder).exists]
    for run, job in runs:
        with suppress(UftError):  # a damaged folder, or one of another version, is told of where it is checked
            for key, old, new in changed_keys(run, job.settings):
                if ABSENT not in (old, new) and isinstance(old, (str, int, float, type(None))) and not may_change(key):
                    began.setdefault(key, []).append(old)
    agreed = {key: old[0] for key, old in began.items() if old == [old[0]] * len(runs) and key not in axes}
    return [f"{key}={quote(old) if isinstance(old, str) else json.dumps(old)}" for key, old in agreed.items()]


def refuse_other_runs(jobs: Sequence[Job]) -> None:
    """UftError where runs that exist in the sweep's folder have another configuration than the jobs of their names."""
    changed: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        run = Run(job.folder)
        try:
            changes = changed_keys(run, job.settings) if run.exists else []
        except Damaged:
            raise
        except UftError:  # another version wrote it: its job will tell of it, and the others can do without
            continue
        for key, old, new in changes:
            if not may_change(key):
                changed.setdefault((key, f"{written(old)} -> {written(new)}"), []).append(job)
    if changed:
        problems = [
            Problem(key, why, f"{len(having)} of {len(jobs)} jobs, the first is {having[0].folder.name}")
            for (key, why), having in changed.items()
        ]
        last = (
            f"{jobs[0].folder.parent} holds runs with another configuration (old -> new above), and a run goes on\n"
            "under the one it began with. Give this sweep a name of its own:  sweep.name=..."
        )
        raise UftError(*problems, footer=last)


# --- names. Never an = or a comma in them: Hydra could not read them back.


def short_hash(text: str, digits: int = 6) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def job_names(jobs: Sequence[Sequence[str]], axes: Sequence[str], prefix: str | None = None) -> list[str]:
    """A name per job, of the axes that vary: `ift-beta0.1-ratio0.5-seed1`.

    A value of a group stands alone, one of a key after the key's last part, or after two parts where one is ambiguous
    (`optim.lr` and `model.lr`). A value that cannot be written in a folder's name gets a hash, which depends on that
    value alone: a job keeps its name when the grid grows. So do jobs that would have the same name.
    """
    keys = [axis.lstrip("+~") for axis in axes]
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    names = []
    for job in jobs:
        values, parts = dict(line.partition("=")[::2] for line in job), []
        for axis, key in zip(axes, keys, strict=True):
            leaf = key.rpartition(".")[2]
            label = leaf if leaves[leaf] == 1 else ".".join(key.split(".")[-2:])
            if axis in values:
                value, text = values[axis], slug(values[axis])
                exact = text == value or text == value.lstrip("-") != value
                parts.append(("" if "." not in key and key != "seed" else label) + text)
                parts += [] if exact else [short_hash(value, 4)]
        name = "-".join(parts) or "run"
        names.append(name if len(name) <= LONGEST_JOB_NAME else f"{name[:LONGEST_JOB_NAME]}-{short_hash(name)}")
    counts = Counter(names)
    named = zip(names, jobs, strict=True)
    names = [f"{name}-{short_hash(repr(sorted(job)))}" if counts[name] > 1 else name for name, job in named]
    return [f"{prefix}-{name}" if prefix else name for name in names]


def sweep_name(axes: Sequence[str], fixed: Sequence[str]) -> str:
    """A sweep by its file (`sweep=NAME`), else by its swept keys, and a hash of the overrides that are the same in all
    jobs, but for keys that change no result."""
    typed = {line: word_key(line).lstrip("+~") for line in fixed}
    that_matter = sorted(line for line, key in typed.items() if not (may_change(key) or may_change(f"{key}.")))
    file = next((line.partition("=")[2] for line in fixed if line.startswith("sweep=")), "")
    keys = slug(file) if file else "-".join(slug(axis.lstrip("+~").rpartition(".")[2]) for axis in axes) or "sweep"
    return f"{keys[:LONGEST_JOB_NAME]}-{short_hash(repr((sorted(axes), that_matter)))}"


def sweep_dir(name: str, now: datetime | None = None) -> Path:
    """outputs/DATE/NAME: today's, or the newest one of that name, so that a sweep can be completed on another day."""
    earlier = sorted(OUTPUTS.glob(f"*/{glob.escape(name)}")) if OUTPUTS.is_dir() else []
    return earlier[-1] if earlier else OUTPUTS / today(now) / name


# --- sweep.json

RESUMING = ContextVar("RESUMING", default=False)
"""Whether `uft resume` gives the commands of a sweep: they are written down already."""


def record_sweep(folder: Path, jobs: Sequence[Job], axes: Mapping[str, Sequence[str]]) -> None:
    """Write down that these jobs are to run in `folder`, by the command line of this process."""
    folder.mkdir(parents=True, exist_ok=True)
    file, now = folder / SWEEP_FILE, datetime.now().astimezone().isoformat(timespec="seconds")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # another command may add to this sweep
        empty = {"format": 1, "name": folder.name, "made": now, "changed": now, "commands": [], "axes": {}, "jobs": []}
        sweep = {**empty, **read_json(file), "name": folder.name, "changed": now}
        command = {"words": sys.argv[1:], "cwd": str(Path.cwd())}
        if not RESUMING.get():
            others = [one for one in sweep["commands"] if {key: one.get(key) for key in command} != command]
            sweep["commands"] = [*others, {**command, "time": now}]
        for key, values in axes.items():
            sweep["axes"][key] = list(dict.fromkeys([*sweep["axes"].get(key, ()), *values]))
        known = {job["name"] for job in sweep["jobs"]}
        added = {job.folder.name: list(job.overrides) for job in jobs if job.folder.name not in known}
        sweep["jobs"] += [{"name": name, "overrides": line, "planned": now} for name, line in added.items()]
        began = not file.exists()
        write_json(file, sweep)
        if began:
            trust(folder)
    finally:
        os.close(handle)


@contextmanager
def resuming(folder: Path) -> Iterator[list[tuple[list[str], Path]]]:
    """(words, working directory) of every command that the sweep in `folder` was asked for by.

    Commands that are given in this context are part of that sweep and no new requests.
    """
    commands = read_json(folder / SWEEP_FILE).get("commands", ())
    before = RESUMING.set(True)
    try:
        yield [(list(command["words"]), Path(command["cwd"])) for command in commands]
    finally:
        RESUMING.reset(before)
