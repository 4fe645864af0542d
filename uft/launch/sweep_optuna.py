"""A search with Optuna over any launcher: it proposes, `result.json` answers.

The study lies in the sweep's folder unless told otherwise, so that the same command, or `uft resume`, adds trials up to
`n_trials`. A trial whose sitting was cut short is gone on with first; one that failed is told to Optuna as failed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from uft.config.examine import examine, quoted
from uft.config.loader import Request
from uft.errors import Problem, UftError
from uft.launch.forkserver import forkserver
from uft.launch.sweep import Plan, Sitting
from uft.launch.sweep_board import Board
from uft.launch.sweep_file import record
from uft.launch.sweep_jobs import Job, JobFailed
from uft.launch.sweep_space import Space, space_of
from uft.runs import Run, shown
from uft.tracking.format import number, printable

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

DATABASE = "optuna.db"
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
SAMPLERS = ("tpe", "random", "qmc")
BEST = 5  # trials in the last table


@dataclass(frozen=True)
class Settings:
    """What the sweeper was configured with: see `hydra_plugins.uft_optuna`."""

    n_trials: int = 20
    batch: int = 1
    sampler: str = "tpe"
    seed: int | None = 0
    metric: str | None = None
    direction: str | None = None
    storage: str | None = None
    study: str | None = None
    params: Mapping[str, str] | None = None

    def problems(self) -> list[Problem]:
        found = []
        for key, value, allowed in (
            ("sampler", self.sampler, SAMPLERS),
            ("direction", self.direction, (None, *DIRECTIONS)),
        ):
            if value not in allowed:
                choices = f"choices: {', '.join(choice for choice in allowed if choice)}"
                found.append(Problem(f"hydra.sweeper.{key}={value}", "no such choice", "", (choices,)))
        for key, count in (("n_trials", self.n_trials), ("batch", self.batch)):
            if count < 1:
                found.append(Problem(f"hydra.sweeper.{key}={count}", "must be at least 1"))
        return found


def search(
    settings: Settings, config: DictConfig, loader: ConfigLoaderImpl, launcher: Launcher, typed: Sequence[str]
) -> list[Sequence[JobReturn]]:
    """Run trials until there are `n_trials`. Exits the program when a signal stopped it or no trial succeeded.

    Raises UftError, before anything is started, where a part of the space cannot be run.
    """
    require(settings, str(config.hydra.job.name))
    lines = [*(f"{key}={value}" for key, value in (settings.params or {}).items()), *typed]
    space = space_of(lines, loader)
    plan = Plan(config, loader, tuple(typed), space.written)
    corner, *_ = plan.jobs(space.corners())
    tree = examine(Request(corner.overrides, str(config.hydra.job.config_name)), plan.loader).tree
    settings = replace(
        settings, metric=settings.metric or tree.eval.best, direction=settings.direction or tree.eval.best_mode
    )
    return Search(settings, plan, space.typed_by(tree), launcher, corner.folder.parent).go()


def require(settings: Settings, verb: str) -> None:
    problems = settings.problems()
    if verb != "train":
        problems.append(Problem("hydra/sweeper=uft_optuna", f"there is nothing to optimise in  uft {verb}"))
    try:
        import optuna  # noqa: F401
    except ImportError:
        advice = ("pip install 'uft[optuna]'",)
        problems.append(Problem("hydra/sweeper=uft_optuna", "Optuna is not installed", "", advice))
    if problems:
        raise UftError(*problems)


Asked = tuple["Trial", list[str]]
"""A trial and its overrides."""


@dataclass
class Search:
    """One sitting of a study."""

    settings: Settings
    plan: Plan
    space: Space
    launcher: Launcher
    folder: Path

    def go(self) -> list[Sequence[JobReturn]]:
        study = make_study(self.settings, self.folder)
        record(self.folder, (), self.plan.axes)
        before = len(study.trials)
        print(
            f"uft: trials up to {self.settings.n_trials} in {shown(self.folder)}, {ended(study)} are there", flush=True
        )
        board = Board(self.folder.name, expected=self.settings.n_trials - ended(study))
        sitting, results = Sitting(self.launcher, board), []
        with board, forkserver():
            while not sitting.stopped and (asked := self.ask(study)):
                results.append(self.run(study, sitting, asked))
        self.report(study, sitting, before)
        return results

    def ask(self, study: Study) -> list[Asked]:
        """The next trials: those that a sitting left unfinished, then new ones."""
        room = min(self.settings.batch, self.settings.n_trials - ended(study))
        left = unfinished(study)[:room]
        return [*left, *(self.fresh(study.ask()) for _ in range(room - len(left)))]

    def fresh(self, trial: Trial) -> Asked:
        line = self.space.draw(trial)
        trial.set_user_attr("overrides", line)
        return trial, line

    def run(self, study: Study, sitting: Sitting, asked: Sequence[Asked]) -> Sequence[JobReturn]:
        """Run some trials and tell the study how they ended. One that a signal stopped stays open."""
        jobs: dict[Job, Trial] = {}
        for trial, line in asked:
            try:
                (job,) = self.plan.jobs([line])
            except UftError as error:  # values that are right one by one and not together
                tell(study, trial, None, "; ".join(f"{problem.what}: {problem.why}" for problem in error.problems))
                continue
            if job in jobs:
                tell(study, trial, None, "the same values as another trial of its batch")
                continue
            trial.set_user_attr("run", str(job.folder))
            jobs[job] = trial
        record(self.folder, list(jobs), self.plan.axes)
        if sitting.board:
            sitting.board.add(list(jobs))
        returned = sitting.launch(list(jobs)) if jobs else []
        for job, trial in jobs.items():
            failure = sitting.failed.get(job)
            if failure is None or not failure.stopped:
                tell(study, trial, *outcome(job, failure, str(self.settings.metric)))
        return returned

    def report(self, study: Study, sitting: Sitting, before: int) -> None:
        """The best trials, and the command of the best one. Exits the program unless every trial was good."""
        good = sorted(
            succeeded(study), key=lambda trial: float(trial.value or 0), reverse=self.settings.direction == "max"
        )
        print(f"\n{ended(study)} trials, {len(good)} of them with a value of {self.settings.metric}\n")
        if good:
            print("\n".join(f"  {line}" for line in table(good[:BEST], list(self.space.axes), self.settings)))
            words = [word for word in good[0].user_attrs["overrides"] if not word.startswith(("sweep.name=", "sweep="))]
            print(f"\n  the best one alone:  {' '.join(['uft', 'train', *map(quoted, words)])}")
            print(f"  all of them:         uft compare {shown(self.folder)}", flush=True)
        told = [
            t.user_attrs["error"]
            for t in study.trials[before:]
            if "error" in t.user_attrs and "run" not in t.user_attrs
        ]
        print("".join(f"uft: a trial was not run: {why}\n" for why in told), end="", file=sys.stderr)
        if sitting.failed:
            raise SystemExit(sitting.report(sitting.launched, GO_ON.format(shown(self.folder))))


GO_ON = """\
Failed trials count among the trials, and Optuna has been told. One that was stopped is gone on with by the same
command, or by  uft resume {}"""


def make_study(settings: Settings, folder: Path) -> Study:
    """The study, made or continued; its sampler goes on where it stood instead of drawing the same again."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=settings.storage or f"sqlite:///{(folder / DATABASE).resolve()}",
        study_name=settings.study or folder.name,
        direction=DIRECTIONS[str(settings.direction)],
        load_if_exists=True,
    )
    study.sampler = make_sampler(settings, len(study.trials))
    return study


def make_sampler(settings: Settings, drawn: int) -> Any:
    from optuna import samplers

    seed = None if settings.seed is None else settings.seed + drawn
    makers = {
        "tpe": lambda: samplers.TPESampler(seed=seed, constant_liar=settings.batch > 1),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "qmc": lambda: samplers.QMCSampler(seed=settings.seed),
    }
    return makers[settings.sampler]()


def ended(study: Study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def succeeded(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def unfinished(study: Study) -> list[Asked]:
    """Trials that a sitting asked for and never told of, unless somebody works on them now."""
    from optuna.trial import Trial, TrialState

    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    known = [trial for trial in running if "overrides" in trial.user_attrs]
    free = [t for t in known if "run" not in t.user_attrs or not Run(Path(t.user_attrs["run"])).locked()]
    return [(Trial(study, trial._trial_id), list(trial.user_attrs["overrides"])) for trial in free]


def tell(study: Study, trial: Trial, value: float | None, why: str) -> None:
    """A value, or a failure and its reason."""
    from optuna.trial import TrialState

    if value is None:
        trial.set_user_attr("error", why)
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, value)


def outcome(job: Job, failure: JobFailed | None, metric: str) -> tuple[float | None, str]:
    """(value, "") or (None, why there is none): the best value where the run kept it, else the last."""
    if failure is not None:
        return None, failure.message
    result = Run(job.folder).result()
    value = {**result.get("final", {}), **result.get("best", {})}.get(metric)
    if value is None:
        return None, f"no {metric} in its result.json"
    found = float(value)  # "nan" among others
    return (found, "") if math.isfinite(found) else (None, f"{metric} is {found}")


def table(trials: Sequence[FrozenTrial], axes: Sequence[str], settings: Settings) -> list[str]:
    """Lines about trials, the best first."""
    rows = [["trial", str(settings.metric), *axes, "run"]]
    for trial in trials:
        values = dict(word.partition("=")[::2] for word in trial.user_attrs["overrides"])
        name = Path(trial.user_attrs["run"]).name
        cells = [str(trial.number), number(trial.value, 4), *(values[axis] for axis in axes), name]
        rows.append([printable(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
