"""A sweep: jobs that are checked together before the first one starts, named by what varies, and all told of."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import RunMode
from omegaconf import DictConfig

from uft.config.examine import Examined, examine, footer
from uft.config.freeze import plain
from uft.config.loader import Request
from uft.errors import FAILED, Problem, UftError
from uft.launch.forkserver import forkserver
from uft.launch.names import sweep_dir, sweep_name
from uft.launch.sweep_board import Board
from uft.launch.sweep_check import METHODS, advised, apart, check_all_sources, problems_of, refuse_other_runs
from uft.launch.sweep_file import record
from uft.launch.sweep_jobs import Job, JobFailed, failures, unique_names
from uft.runs import shown

MANY = 20  # jobs that take seconds to check


def expand(lines: Sequence[str], loader: ConfigLoaderImpl) -> tuple[list[list[str]], dict[str, list[str]]]:
    """(the overrides of every job of the grid, the values of every key that varies).

    A later line about a key replaces an earlier one: the command line, what a file sweeps. Raises HydraException for
    what is no grid.
    """
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    batches = BasicSweeper.split_arguments(overrides, None)
    jobs = [job for batch in batches for job in batch]
    axes = dict.fromkeys(override.get_key_element() for override in overrides if override.is_sweep_override())
    return jobs, {axis: values_of(axis, jobs) for axis in axes}


def remembering(loader: ConfigLoaderImpl) -> ConfigLoaderImpl:
    """A loader that reads no file twice, and finds out once which files a choice of groups draws in.

    For the check of jobs that mostly differ in values: half of its time goes there.
    """
    quick = copy(loader)
    quick.repository = CachingConfigRepository(loader.repository)  # type: ignore[assignment]
    found: dict[tuple[str | None, tuple[str, ...]], Any] = {}

    def compute_defaults_list(config_name: str | None, overrides: list[str], run_mode: RunMode) -> Any:
        key = (config_name, tuple(overrides))
        if key not in found:
            found[key] = ConfigLoaderImpl.compute_defaults_list(quick, config_name, overrides, run_mode)
        return found[key]

    quick.compute_defaults_list = compute_defaults_list  # type: ignore[method-assign]
    return quick


def values_of(axis: str, jobs: Sequence[Sequence[str]]) -> list[str]:
    pairs = (line.partition("=")[::2] for job in jobs for line in job)
    return list(dict.fromkeys(value for key, value in pairs if key == axis))


def examine_jobs(request: Request, loader: ConfigLoaderImpl) -> tuple[list[Problem], str]:
    """The problems of every job of a request, together, and the last lines of what is said about them."""
    jobs, axes = expand(request.overrides, loader)
    quick = remembering(loader)
    examined = [examine(replace(request, overrides=tuple(job)), quick) for job in jobs]
    return problems_of(examined, jobs, list(axes)), closing(examined, jobs, list(axes), request.overrides)


def closing(examined: Sequence[Examined], jobs: Sequence[Sequence[str]], axes: list[str], typed: Sequence[str]) -> str:
    """The last lines of a refusal: what would do, and how to look."""
    return advised(footer(examined[0]), apart(examined, jobs, axes, typed))


@dataclass(frozen=True)
class Plan:
    """What all jobs of a sweep share: the request they come from, and what varies between them."""

    config: DictConfig
    loader: ConfigLoaderImpl
    typed: tuple[str, ...]  # the words of the command line, but for Hydra's own
    axes: Mapping[str, Sequence[str]]
    trains: bool = field(init=False)  # whether jobs leave run folders

    def __post_init__(self) -> None:
        object.__setattr__(self, "trains", self.config.hydra.job.name == "train")
        object.__setattr__(self, "loader", remembering(self.loader))

    def jobs(self, lines: Sequence[Sequence[str]]) -> tuple[Job, ...]:
        """The jobs with these overrides, checked. Raises UftError with the problems of all of them."""
        axes = list(self.axes)
        hydras = tuple(self.config.hydra.overrides.hydra)
        examined = [examine(Request((*hydras, *job), self.config.hydra.job.config_name), self.loader) for job in lines]
        problems = problems_of(examined, lines, axes)
        if problems:
            raise UftError(*problems, footer=closing(examined, lines, axes, self.typed))
        settings = [plain(one.tree) for one in examined]
        check_all_sources(settings)
        jobs = self.named(lines, examined[0])
        refuse_other_runs(jobs, settings)
        return jobs

    def named(self, lines: Sequence[Sequence[str]], first: Examined) -> tuple[Job, ...]:
        """Every job in its folder."""
        # commands that share a folder by its name must not share the names of their jobs
        named = [*(METHODS if first.tree.sweep.name else ()), *self.axes]
        names = unique_names(lines, list(dict.fromkeys(named)), first.tree.run.name)
        folder = self.folder(lines[0], first)
        return tuple(Job(tuple(job), folder / name) for job, name in zip(lines, names, strict=True))

    def folder(self, line: Sequence[str], first: Examined) -> Path:
        """`hydra.sweep.dir` if somebody set it, else outputs/DATE/NAME."""
        chosen = str(self.config.hydra.sweep.dir)
        if chosen != ".":
            return Path(chosen)
        fixed = [word for word in line if word.partition("=")[0] not in self.axes]
        return sweep_dir(first.tree.sweep.name or sweep_name(list(self.axes), fixed))


@dataclass
class Sitting:
    """Jobs on their way through a launcher: watched while they run, their failures collected."""

    launcher: Launcher
    board: Board | None
    failed: dict[Job, JobFailed] = field(default_factory=dict)
    launched: int = 0

    @property
    def stopped(self) -> list[int]:
        """Exit codes of the jobs that a signal stopped; it was meant for the whole sweep."""
        return [failure.code for failure in self.failed.values() if failure.stopped]

    def launch(self, jobs: Sequence[Job]) -> Sequence[JobReturn]:
        """Hand jobs to Hydra's launcher, which returns when all of them have ended."""
        try:
            results = self.launcher.launch([job.arguments for job in jobs], initial_job_idx=self.launched)
        except RuntimeError as error:
            if "slurm" not in str(error).lower():
                raise
            advice = ("on a machine from which sbatch works, or with another  hardware=",)
            raise UftError(Problem("hydra/launcher", str(error), advice=advice)) from error
        self.launched += len(jobs)
        failed = dict(failures(jobs, results))
        self.failed = {job: why for job, why in self.failed.items() if job not in jobs} | failed
        if self.board:
            self.board.end(jobs, failed)
        return results

    def report(self, count: int, last: str) -> int:
        """Tell of every job that did not finish, then `last`; the exit code of the sweep."""
        stopped, lost = self.stopped, len(self.failed) - len(self.stopped)
        head = [f"{lost} of {count} jobs failed"] if lost else []
        head += ["the sweep was stopped"] if stopped else []
        lines = ["", f"uft: {' and '.join(head)}", ""]
        for job, failure in self.failed.items():
            said = [f"      {line}".rstrip() for line in failure.message.splitlines()]
            lines += [f"  {job.name}", *said, f"      {job.folder}", ""]
        print("\n".join([*lines, last]), file=sys.stderr)
        return stopped[0] if stopped else FAILED


AGAIN = "To go on, run the same command again: finished jobs are skipped, the others continue."


def run_grid(plan: Plan, lines: Sequence[Sequence[str]], launcher: Launcher, batch_size: int | None) -> list:
    """Check every job, then run them, `batch_size` at a time (None: all at once). Exits unless all went well.

    A job that was stopped by a signal stops the sweep; a job that failed does not.
    """
    if len(lines) > MANY:
        print(f"uft: checking {len(lines)} jobs", flush=True)
    if len(lines) > 1 and plan.trains and os.environ.get("WANDB_SWEEP_ID"):
        advice = ("leave out -m, or let W&B vary the keys: docs/sweeps.md",)
        raise UftError(Problem(f"{len(lines)} jobs", "a W&B agent asks for one run at a time", "command line", advice))
    jobs = plan.jobs(lines)
    if plan.config.hydra.job.name == "config":
        jobs = listed(jobs, plan.axes)
    folder, size = jobs[0].folder.parent, batch_size or len(jobs)
    board = begin(folder, jobs, plan.axes) if plan.trains else None
    sitting, results = Sitting(launcher, board), []
    with board or nullcontext(), forkserver() if len(jobs) > 1 else nullcontext():
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            if board is None and len(jobs) > 1:
                announce(batch, start, len(jobs))
            results.append(sitting.launch(batch))
            if sitting.stopped:
                break
    if sitting.failed:
        raise SystemExit(sitting.report(len(jobs), f"{AGAIN} Or:\n  uft resume {shown(folder)}" if board else AGAIN))
    if plan.trains:
        print(f"\nuft: {whole(len(jobs))} done.  Compare:  uft compare {shown(folder)}")
    return results


def whole(count: int) -> str:
    return f"all {count} jobs are" if count > 1 else "the one job is"


def listed(jobs: Sequence[Job], axes: Mapping[str, Sequence[str]]) -> tuple[Job, ...]:
    """Print what varies between the jobs; the first one, whose whole configuration will do for all of them."""
    lines = [" ".join(word for word in job.overrides if word.partition("=")[0] in axes) for job in jobs]
    print(
        "\n".join([f"# {len(jobs)} jobs; below is the first one's configuration", *(f"#   {line}" for line in lines)])
    )
    return tuple(jobs[:1])


def begin(folder: Path, jobs: Sequence[Job], axes: Mapping[str, Sequence[str]]) -> Board:
    """Write down what is to run, say where, and watch it."""
    record(folder, jobs, axes)
    print(f"uft: {len(jobs)} job{'s' if len(jobs) != 1 else ''} in {shown(folder)}", flush=True)
    board = Board(folder.name)
    board.add(jobs)
    return board


def announce(jobs: Sequence[Job], start: int, count: int) -> None:
    for number, job in enumerate(jobs, start + 1):
        print(f"\nuft: job {number} of {count}: {job.name}", flush=True)
