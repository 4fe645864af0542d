"""A search with Optuna over any launcher: it proposes trials, and is told what their `result.json` says.

The study lies in the sweep's folder unless configured otherwise, so that the same command, or `uft resume`, adds trials
up to `n_trials`. A trial that was stopped is continued first; a failed one is told to Optuna as failed.

The space is written in Hydra's override grammar:

    objective.beta=interval(0.01,1)              a number in between; a whole one where the key takes whole ones
    optim.lr=tag(log,interval(1e-5,1e-3))        likewise, spread over its powers of ten
    train.batch_size=range(16,65,16)             16, 32, 48, 64
    objective=uft,dpo                            one of these
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, RangeSweep
from hydra.core.utils import JobReturn

from uft.config.compose import quoted
from uft.config.parameters import whole_number
from uft.errors import Problem, UftError, raise_problems
from uft.launch.forkserver import forkserver
from uft.launch.sweep import Job, Sweep, record_sweep
from uft.launch.sweep_table import SweepTable
from uft.runs import Run, shown, typed_path
from uft.tracking.console import number, printable

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

DATABASE = "optuna.db"
DIRECTIONS: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
SAMPLERS = ("tpe", "random", "qmc")
BEST = 5  # trials in the last table
DIGITS = 6  # of a number that was drawn: enough for any search, and it stands in folder names
RESUME = """\
Failed trials count among the trials, and Optuna has been told. One that was stopped is continued by the same
command, or by  uft resume {}"""


def search(
    settings: Mapping[str, Any], sweep: Sweep, lines: Sequence[str], loader: ConfigLoader
) -> list[Sequence[JobReturn]]:
    """Run trials until there are `n_trials`. Exits the program when a signal stopped it or a trial failed.

    `settings`: of the sweeper, see `hydra_plugins.uft_sweeper`; `lines`: the space and what all trials share. Raises
    UftError, before anything is started, where a part of the space cannot be run.
    """
    refuse_settings(settings, sweep.verb)
    space = parse_space(lines, loader)
    sweep.axes = space.written
    corner, *_ = sweep.jobs(space.corners())
    space, evaluation = space.with_integers(corner.settings), corner.settings["eval"]
    metric, direction = settings["metric"] or evaluation["best"], settings["direction"] or evaluation["best_mode"]
    folder = corner.folder.parent
    study, storage = make_study({**settings, "direction": direction}, folder)
    record_sweep(folder, (), sweep.axes)
    before, there = len(study.trials), count_ended(study)
    print(f"uft: trials up to {settings['n_trials']} in {shown(folder)}, {there} are there", flush=True)
    sweep.table, results = SweepTable(folder.name, expected=settings["n_trials"] - there), []
    with sweep.table, forkserver():
        while not sweep.stopped and (room := min(settings["batch"], settings["n_trials"] - count_ended(study))) > 0:
            trials = unfinished_trials(study, storage)[:room]
            trials += [study.ask(dict(space.distributions)) for _ in range(room - len(trials))]
            results.append(run_trials(trials, study, space, sweep, metric))
    report(study, study.trials[before:], space, metric, direction, folder)
    if sweep.failed:
        raise SystemExit(sweep.report(sweep.launched, RESUME.format(typed_path(folder))))
    return results


def refuse_settings(settings: Mapping[str, Any], verb: str) -> None:
    """UftError with all settings of the sweeper that cannot be, or where Optuna is not installed."""
    chosen = {"sampler": (settings["sampler"], SAMPLERS), "direction": (settings["direction"] or "min", DIRECTIONS)}
    problems = [
        Problem(f"hydra.sweeper.{key}={value}", "no such choice", "", (f"choices: {', '.join(allowed)}",))
        for key, (value, allowed) in chosen.items()
        if value not in allowed
    ]
    counts = {"n_trials": settings["n_trials"], "batch": settings["batch"]}
    problems += [Problem(f"hydra.sweeper.{k}={n}", "must be at least 1") for k, n in counts.items() if n < 1]
    if verb != "train":
        problems.append(Problem("hydra/sweeper=uft_optuna", f"there is nothing to optimise in  uft {verb}"))
    if find_spec("optuna") is None:
        advice = ("pip install 'uft-lm[optuna]'",)
        problems.append(Problem("hydra/sweeper=uft_optuna", "Optuna is not installed", "", advice))
    raise_problems(problems)


# --- the space


@dataclass(frozen=True)
class Space:
    """What a trial draws from, by key in the order of the command line, and the overrides that all trials share."""

    distributions: Mapping[str, BaseDistribution]
    fixed: tuple[str, ...]
    written: Mapping[str, Sequence[str]]  # by key: the distribution as it was typed

    def job(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of a trial with these values."""
        return [*self.fixed, *(f"{key}={value_text(values[key])}" for key in self.distributions)]

    def corners(self) -> list[list[str]]:
        """Jobs in which every end of an interval and every option occurs, the other keys at their first value."""
        axes: Mapping[str, Any] = self.distributions
        ends = {key: getattr(axis, "choices", None) or (axis.low, axis.high) for key, axis in axes.items()}
        first = {key: values[0] for key, values in ends.items()}
        others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
        return [self.job(values) for values in (first, *others)]

    def with_integers(self, settings: Mapping[str, Any]) -> Space:
        """The same space with whole numbers for the keys that take them in a resolved configuration of it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        axes = dict(self.distributions)
        for key, axis in axes.items():
            if isinstance(axis, FloatDistribution) and whole_number(key.lstrip("+"), settings):
                axes[key] = IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
        return replace(self, distributions=axes)


def value_text(value: Any) -> str:
    """A value as it is typed; of a number, six digits."""
    if not isinstance(value, float):
        return str(value)
    short = float(f"{value:.{DIGITS}g}")
    return str(int(short)) if short.is_integer() and abs(short) < 10**DIGITS else repr(short)


def parse_space(lines: Sequence[str], loader: ConfigLoader) -> Space:
    """The space of these overrides; a later line about a key replaces an earlier one. Raises UftError for none."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(lines))
    distributions: dict[str, BaseDistribution] = {}
    fixed, typed = [], {}
    for key, override in {override.get_key_element(): override for override in overrides}.items():
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
            continue
        sweep, typed[key] = override.value(), [str(override.input_line).partition("=")[2]]
        if isinstance(sweep, IntervalSweep):
            low, high = sorted((float(sweep.start or 0), float(sweep.end or 0)))
            if "log" in sweep.tags and low <= 0:
                why = "a logarithmic interval begins above 0"
                raise UftError(Problem(str(override.input_line), why, "command line"))
            distributions[key] = FloatDistribution(low, high, log="log" in sweep.tags)
            continue
        values = sorted(map(float, sweep.range())) if isinstance(sweep, RangeSweep) and "log" not in sweep.tags else []
        if isinstance(sweep, RangeSweep) and len(values) > 1:
            distributions[key] = FloatDistribution(values[0], values[-1], step=abs(float(sweep.step)))
        else:
            distributions[key] = CategoricalDistribution(list(override.sweep_string_iterator()))
    if not distributions:
        examples = (
            "objective.beta=interval(0.01,1)",
            "optim.lr=tag(log,interval(1e-5,1e-3))",
            "data.ratio=0.25,0.5,0.75",
        )
        raise UftError(Problem("hydra/sweeper=uft_optuna", "no key says what to search", "command line", examples))
    return Space(distributions, tuple(fixed), typed)


# --- the study


def make_study(settings: Mapping[str, Any], folder: Path) -> tuple[Study, BaseStorage]:
    """The study, made or continued, and the storage that it lies in. Its sampler does not draw again what it drew in an
    earlier session."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(settings["storage"] or f"sqlite:///{(folder / DATABASE).resolve()}")
    study = optuna.create_study(
        storage=storage,
        study_name=settings["study"] or folder.name,
        direction=DIRECTIONS[str(settings["direction"])],
        load_if_exists=True,
    )
    seed = None if settings["seed"] is None else settings["seed"] + len(study.trials)
    study.sampler = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=settings["batch"] > 1),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "qmc": lambda: optuna.samplers.QMCSampler(seed=settings["seed"]),
    }[settings["sampler"]]()
    return study, storage


def count_ended(study: Study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def unfinished_trials(study: Study, storage: BaseStorage) -> list[Trial]:
    """Trials that an earlier session asked for and never told the result of, unless their runs are at work now."""
    from optuna.trial import Trial, TrialState

    running = study.get_trials(deepcopy=False, states=[TrialState.RUNNING])
    known = [trial for trial in running if "overrides" in trial.user_attrs]
    free = [t for t in known if "run" not in t.user_attrs or not Run(Path(t.user_attrs["run"])).locked()]
    number = storage.get_study_id_from_name(study.study_name)
    return [Trial(study, storage.get_trial_id_from_study_id_trial_number(number, trial.number)) for trial in free]


def run_trials(trials: Sequence[Trial], study: Study, space: Space, sweep: Sweep, metric: str) -> Sequence[JobReturn]:
    """Run trials and tell the study how they ended. One that a signal stopped stays open."""
    jobs: dict[Job, Trial] = {}
    for trial in trials:
        line = trial.user_attrs.get("overrides") or space.job(trial.params)
        trial.set_user_attr("overrides", line)
        try:
            (job,) = sweep.jobs([line])
        except UftError as error:  # values that are right one by one and not together
            tell_study(study, trial, None, "; ".join(f"{problem.what}: {problem.why}" for problem in error.problems))
            continue
        if job in jobs:
            tell_study(study, trial, None, "the same values as another trial of its batch")
            continue
        trial.set_user_attr("run", str(job.folder))
        jobs[job] = trial
    if not jobs:
        return []
    assert sweep.table is not None
    record_sweep(next(iter(jobs)).folder.parent, list(jobs), sweep.axes)
    sweep.table.add(job.folder for job in jobs)
    returned = sweep.launch(list(jobs))
    for job, trial in jobs.items():
        failure = sweep.failed.get(job)
        if failure is None:
            result = Run(job.folder).result()
            found = {**result.get("final", {}), **result.get("best", {})}.get(metric)
            value = math.nan if found is None else float(found)  # "nan" among others
            why = f"no {metric} in its result.json" if found is None else f"{metric} is {value}"
            tell_study(study, trial, value if math.isfinite(value) else None, why)
        elif not failure.stopped:
            tell_study(study, trial, None, failure.message)
    return returned


def tell_study(study: Study, trial: Trial, value: float | None, why: str) -> None:
    """A value, or (None) a failure and its reason."""
    from optuna.trial import TrialState

    if value is None:
        trial.set_user_attr("error", why)
    study.tell(trial, value, state=TrialState.FAIL if value is None else None)


def report(study: Study, new: Sequence[FrozenTrial], space: Space, metric: str, direction: str, folder: Path) -> None:
    """Print the best trials, the command of the best one, and the trials of this session that were not run."""
    from optuna.trial import TrialState

    good = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    good.sort(key=lambda trial: float(trial.value or 0), reverse=direction == "max")
    print(f"\n{count_ended(study)} trials, {len(good)} of them with a value of {metric}\n")
    if good:
        rows = [["trial", metric, *space.distributions, "run"]]
        for trial in good[:BEST]:
            values = dict(word.partition("=")[::2] for word in trial.user_attrs["overrides"])
            cells = [str(trial.number), number(trial.value, 4), *(values[key] for key in space.distributions)]
            rows.append([printable(cell) for cell in (*cells, Path(trial.user_attrs["run"]).name)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
        words = [word for word in good[0].user_attrs["overrides"] if not word.startswith(("sweep.name=", "sweep="))]
        print(f"\n  the best one alone:  {' '.join(['uft', 'train', *map(quoted, words)])}")
        print(f"  all of them:         uft compare {typed_path(folder)}", flush=True)
    for trial in new:
        if "error" in trial.user_attrs and "run" not in trial.user_attrs:
            print(f"uft: a trial was not run: {trial.user_attrs['error']}", file=sys.stderr)
