"""A sweep: jobs that are checked together before the first one starts, named by what varies, and all told of."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from uft.config.compose import settle
from uft.config.examine import Examined, examine, footer
from uft.config.freeze import plain
from uft.config.loader import Request
from uft.errors import FAILED, INTERRUPTED, STOPPED, Problem, UftError
from uft.launch.launcher import check_sources
from uft.launch.names import job_name, short_hash, sweep_dir, sweep_name
from uft.runs import Run

OURS = ("++run.dir=", "++sweep.name=")
"""How a sweep tells its jobs, in whatever process they run, where they belong."""


METHODS = ("objective", "experiment")
"""What tells apart the jobs of several commands that write into one named sweep."""


class JobFailed(Exception):
    """A job of a sweep did not finish. Carries plain values: launchers send it between processes."""

    def __init__(self, code: int, folder: str, message: str) -> None:
        super().__init__(code, folder, message)
        self.code, self.folder, self.message = code, folder, message


def expand(lines: Sequence[str], loader: ConfigLoaderImpl) -> tuple[list[list[str]], list[str]]:
    """(the overrides of every job of the grid, the keys that vary). Raises HydraException for what is no grid."""
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    batches = BasicSweeper.split_arguments(overrides, None)
    axes = [override.get_key_element() for override in overrides if override.is_sweep_override()]
    return [job for batch in batches for job in batch], axes


def examine_jobs(request: Request, loader: ConfigLoaderImpl) -> tuple[list[Problem], Examined]:
    """The problems of every job of a request, together, and the first job as it was understood."""
    jobs, axes = expand(request.overrides, loader)
    examined = [examine(replace(request, overrides=tuple(job)), loader) for job in jobs]
    return [*together(examined, jobs, axes), *shared_folder(jobs, axes)], examined[0]


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]
    folder: Path

    @property
    def arguments(self) -> list[str]:
        """What the launcher is given."""
        return [*self.overrides, f"{OURS[0]}{quote(str(self.folder))}", f"{OURS[1]}{quote(self.folder.parent.name)}"]


def quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def typed_by_user(overrides: Sequence[str]) -> list[str]:
    """The overrides of a job without those that the sweep added."""
    return [line for line in overrides if not line.startswith(OURS)]


@dataclass(frozen=True)
class Sweep:
    """All jobs of a multirun."""

    jobs: tuple[Job, ...]

    @classmethod
    def plan(cls, config: DictConfig, loader: ConfigLoaderImpl, lines: list[str]) -> Sweep:
        """Check every job of the grid and find its folder. Raises UftError with the problems of all of them."""
        jobs, axes = expand(lines, loader)
        fixed_hydra = tuple(config.hydra.overrides.hydra)
        name = config.hydra.job.config_name
        examined = [examine(Request((*fixed_hydra, *job), name), loader) for job in jobs]
        problems = [*together(examined, jobs, axes), *shared_folder(jobs, axes)]
        if problems:
            raise UftError(*problems, footer=footer(examined[0]))
        check_all_sources(examined)
        first = examined[0].tree
        fixed = [line for line in jobs[0] if line.partition("=")[0] not in axes]
        folder = sweep_dir(first.sweep.name or sweep_name(axes, fixed))
        # commands that share a folder by its name must not share the names of their jobs
        named = [*(METHODS if first.sweep.name else ()), *axes]
        names = unique_names(jobs, list(dict.fromkeys(named)), first.run.name)
        return cls(tuple(Job(tuple(job), folder / name) for job, name in zip(jobs, names, strict=True)))

    def run(self, launcher: Launcher, batch_size: int) -> list[Sequence[JobReturn]]:
        """Hand the jobs to Hydra's launcher, `batch_size` at a time. Exits the program unless all went well.

        A job that was stopped by a signal stops the sweep; a job that failed does not.
        """
        results: list[Sequence[JobReturn]] = []
        failed: list[tuple[Job, JobFailed]] = []
        for start in range(0, len(self.jobs), batch_size):
            batch = self.jobs[start : start + batch_size]
            self.announce(start, batch)
            results.append(launcher.launch([job.arguments for job in batch], initial_job_idx=start))
            failed += failures(batch, results[-1])
            if any(failure.code in (STOPPED, INTERRUPTED) for _, failure in failed):
                break
        if failed:
            raise SystemExit(self.report(failed))
        print(f"\nuft: all {len(self.jobs)} jobs are done.  See them:  uft ls {self.jobs[0].folder.parent}")
        return results

    def announce(self, start: int, batch: Sequence[Job]) -> None:
        for number, job in enumerate(batch, start + 1):
            print(f"\nuft: job {number} of {len(self.jobs)}: {job.folder.name}", flush=True)

    def report(self, failed: list[tuple[Job, JobFailed]]) -> int:
        """Tell of every job that did not finish; the exit code of the sweep."""
        stopped = [failure.code for _, failure in failed if failure.code in (STOPPED, INTERRUPTED)]
        lost = len(failed) - len(stopped)
        head = [f"{lost} of {len(self.jobs)} jobs failed"] if lost else []
        head += ["the sweep was stopped"] if stopped else []
        lines = ["", f"uft: {' and '.join(head)}", ""]
        for job, failure in failed:
            lines += [f"  {job.folder.name}", f"      {failure.message}", f"      {job.folder}", ""]
        lines.append("Run the same command again to go on: finished jobs are skipped, the others continue.")
        print("\n".join(lines), file=sys.stderr)
        return stopped[0] if stopped else FAILED


def together(examined: list[Examined], jobs: list[list[str]], axes: list[str]) -> Iterator[Problem]:
    """Problems over all jobs: one per key and reason, with the jobs that have it."""
    found: dict[tuple[str, str], dict[int, Problem]] = {}
    for number, one in enumerate(examined):
        for problem in one.problems:
            found.setdefault((problem.what.partition("=")[0], problem.why), {})[number] = problem
    for having in found.values():
        number, problem = next(iter(having.items()))
        if len(having) < len(jobs):
            varying = " ".join(line for line in jobs[number] if line.partition("=")[0] in axes)
            more = f"in {len(having)} of {len(jobs)} jobs, the first is  {varying}"
            problem = replace(problem, advice=(*problem.advice, more, *apart(problem)))
        yield problem


def apart(problem: Problem) -> tuple[str, ...]:
    """How to sweep a key that only some objectives have."""
    if not problem.what.lstrip("+").startswith("objective.") or not problem.why.startswith("no such key"):
        return ()
    return ("sweep the objectives that have it in a command of their own; the same sweep.name puts them together",)


def shared_folder(jobs: list[list[str]], axes: list[str]) -> list[Problem]:
    """A folder given for all jobs would be one folder for all of them."""
    lines = [line for line in jobs[0] if line.lstrip("+").startswith("run.dir=")]
    if len(jobs) == 1 or not lines or lines[0].partition("=")[0] in axes:
        return []
    advice = ("the folder of a sweep is named by  sweep.name=...",)
    return [Problem(lines[0], f"one folder for {len(jobs)} jobs", "command line", advice)]


def check_all_sources(examined: list[Examined]) -> None:
    """Read the rows of every mixture of the sweep. Raises UftError with the bad ones of all of them."""
    problems: dict[Problem, None] = {}
    for one in examined:
        try:
            check_sources(plain(settle(one.tree)))
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UftError(*problems)


def unique_names(jobs: list[list[str]], axes: list[str], prefix: str | None) -> list[str]:
    """A name per job; a hash of its overrides where two would have the same."""
    names = [job_name(job, axes) for job in jobs]
    pairs = zip(names, jobs, strict=True)
    unique = [f"{name}-{short_hash(repr(sorted(job)))}" if names.count(name) > 1 else name for name, job in pairs]
    return [f"{prefix}-{name}" if prefix else name for name in unique]


def failures(jobs: Sequence[Job], results: Sequence[JobReturn]) -> list[tuple[Job, JobFailed]]:
    return [
        (job, as_failure(job, result._return_value))
        for job, result in zip(jobs, results, strict=True)
        if result.status != JobStatus.COMPLETED
    ]


def as_failure(job: Job, error: Any) -> JobFailed:
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, UftError):
        said = "; ".join(f"{problem.what}: {problem.why}" for problem in error.problems)
        return JobFailed(error.code, str(job.folder), said)
    return JobFailed(FAILED, str(job.folder), f"{type(error).__name__}: {error}")


STOPS = {STOPPED: "stopped by a signal", INTERRUPTED: "interrupted"}


def why(code: int, folder: Path) -> str:
    """One line about a job that did not finish."""
    error = str(Run(folder).result().get("error") or "").strip()
    return STOPS.get(code) or (error.splitlines()[0] if error else f"ended without a result, exit code {code}")
