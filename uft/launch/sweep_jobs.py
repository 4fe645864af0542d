"""The jobs of a sweep: what a launcher is given, what they are called, and how they tell that they failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from uft.errors import FAILED, INTERRUPTED, STOPPED, UftError
from uft.launch.names import job_name, short_hash
from uft.runs import Run

OURS = ("++run.dir=", "++sweep.name=")
"""How a sweep tells its jobs, in whatever process they run, where they belong."""


class JobFailed(Exception):
    """A job of a sweep did not finish. Carries plain values: launchers send it between processes."""

    def __init__(self, code: int, folder: str, message: str) -> None:
        super().__init__(code, folder, message)
        self.code, self.folder, self.message = code, folder, message

    @property
    def stopped(self) -> bool:
        """By a signal, which is meant for the whole sweep."""
        return self.code in STOPS


@dataclass(frozen=True)
class Job:
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        """What the launcher is given."""
        return [*self.overrides, f"{OURS[0]}{quote(str(self.folder))}", f"{OURS[1]}{quote(self.folder.parent.name)}"]


def quote(text: str) -> str:
    """A value of Hydra's grammar that is exactly this text."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def of_a_sweep(overrides: Sequence[str]) -> bool:
    """Whether these overrides are those of a job of ours."""
    return any(line.startswith(OURS[0]) for line in overrides)


def typed_by_user(overrides: Sequence[str]) -> list[str]:
    """The overrides of a job without those that the sweep added."""
    return [line for line in overrides if not line.startswith(OURS)]


def unique_names(jobs: Sequence[Sequence[str]], axes: Sequence[str], prefix: str | None) -> list[str]:
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
        said = "\n".join(": ".join(filter(None, (problem.what, problem.why))) for problem in error.problems)
        return JobFailed(error.code, str(job.folder), said)
    return JobFailed(FAILED, str(job.folder), f"{type(error).__name__}: {error}")


STOPS = {STOPPED: "stopped by a signal", INTERRUPTED: "interrupted"}


def why(code: int, folder: Path) -> str:
    """One line about a job that did not finish: its error, else the last thing that it or its launcher said."""
    if code in STOPS:
        return STOPS[code]
    run = Run(folder)
    error = str(run.result().get("error") or "").strip()
    log = run.path / "console.log"
    said = log.read_text(encoding="utf-8", errors="replace").strip() if not error and log.is_file() else ""
    last = said.splitlines()[-1].removeprefix("uft: ") if said else f"ended without a result, exit code {code}"
    return error.splitlines()[0] if error else last
