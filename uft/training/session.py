"""A sitting of a run: prepare, show the card, train until the end or until asked to stop, and leave a true result."""

from __future__ import annotations

import gc
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from uft.config.freeze import plain
from uft.config.schema import Config, Model
from uft.config.stages import Stage, stages_of
from uft.distributed import ranks
from uft.environment import PeerLost, note
from uft.errors import BAD_REQUEST, FAILED, GOOD, UftError, tell_redacted
from uft.evaluation.evaluate import Evaluation, HeldOut, Sample, evaluate
from uft.heartbeat import activity
from uft.model.export import export
from uft.model.memory import device_memory, peak_memory
from uft.runs import FULL, Run, problem, shown, write_json, writing
from uft.sampling.generate import Interrupted
from uft.tracking import Tracker, Trackers, make_tracker
from uft.tracking.console import Console, Ending
from uft.tracking.metrics import read_metrics
from uft.training.card import stage_card, stages_card, start_card
from uft.training.device import choose_device, explain_oom, out_of_memory, tokens_per_pass
from uft.training.jobs import MAKERS, Place
from uft.training.liveness import Stop, watching
from uft.training.optim import learning_rate
from uft.training.setup import (
    PipelineData,
    Prepared,
    Stopped,
    TrainData,
    check_positions,
    check_record,
    check_start,
    data_record,
    prepare,
    read_pipeline_data,
    refuse_other_data,
    resume,
    stage_inputs,
    standing,
)
from uft.training.step import Step
from uft.training.trainer import Progress, Trainer

NO_TRAINER = torch.device("cpu")


def train(run: Run, config: Config, stop: Stop) -> int:
    """Train `run`, whose lock the caller holds, from where it stands; the exit code.

    Raises the UftError of a request that cannot be carried out; whatever fails later stands in `result.json`.
    """
    with told(run) as console:
        return _Session(run, config, stop, console).go()


@contextmanager
def told(run: Run) -> Iterator[Console]:
    """The console of a sitting, which warnings of this program's modules go to as well; of several processes, the first
    one's words alone are heard."""
    first = ranks().is_rank0
    with nullcontext(sys.stdout) if first else open(os.devnull, "w") as stream:
        with writing(run.path / "console.log", code=BAD_REQUEST):
            console = Console(stream, run.path / "console.log" if first else None)
        try:
            with console.hearing():
                yield console
        finally:
            console.close()


@dataclass
class _Session:
    run: Run
    config: Config
    stop: Stop
    console: Console
    started: float = field(default_factory=time.perf_counter)
    tracker: Trackers = field(default_factory=Trackers)

    def go(self) -> int:
        trainer = None
        words = last_words(self.run, self._hung, self.console.message)
        try:
            with watching(self.config.hardware.watchdog, self.run.path, words):
                prepared = self._begin()
                trainer = prepared.trainer
                whole = self._work(prepared)
        except Stopped:
            return self._end(trainer, "stopped", self.stop.exit_code)
        except UftError as error:
            if trainer is None and error.code == BAD_REQUEST:
                raise
            return self._end(trainer, "failed", FAILED, error=said(error, self.config))
        except Exception as error:
            return self._end(trainer, "failed", FAILED, error=said(error, self.config))
        return self._end(trainer, "finished", GOOD) if whole else self._end(trainer, "stopped", self.stop.exit_code)

    def _begin(self) -> Prepared:
        """Everything before the first step, and the newest checkpoint."""
        device = choose_device(self.config.hardware)
        prepared = prepare(self.run, self.config, device, self.stop, self.console.message)
        checks = check_record(prepared, check_start(prepared.trainer, prepared.reference))
        resumed = resume(prepared.trainer, self.console.message)
        if resumed >= 0:
            refuse_other_data(self.run, prepared.corpus)
        elif ranks().is_rank0:
            write_json(self.run.path / "check.json", checks)
        if ranks().is_rank0:
            self._open(prepared, resumed)
        return prepared

    def _open(self, prepared: Prepared, resumed: int) -> None:
        """Everything that is written before the first step: who, what, where, and the card."""
        trainer = prepared.trainer
        fresh = resumed < 0
        (self.run.path / "result.json").unlink(missing_ok=True)
        data = data_record(prepared.corpus, trainer.sampler, prepared.plan)
        write_json(self.run.path / "data.json", data)
        self.run.update_info(
            data_digest=prepared.corpus.digest,
            total_steps=trainer.steps,
            device=str(trainer.device),
            torch=torch.__version__,
        )
        # -1: whatever an earlier sitting wrote without reaching a checkpoint is written again
        self.tracker = make_tracker(
            self.run, plain(asdict(self.config)), resumed_step=resumed, say=self.console.message
        )
        self.tracker.start()
        self.console.total_steps = trainer.steps
        title = f"uft train {self.run.name}" if fresh else f"uft train {self.run.name}, resumed at step {resumed}"
        self.console.start(title, start_card(prepared, self.run, data, self.tracker.description))
        if not fresh:
            self.console.recall(read_metrics(self.run))

    def _work(self, prepared: Prepared) -> bool:
        """Train and export; False when asked to stop before that."""
        measure = measuring(prepared, measured_on(prepared.corpus), self.stop)
        if not fit(prepared.trainer, self.tracker, self.console, measure, before=self.config.eval.before):
            return False
        if self.config.train.save_model:
            export(prepared.trainer.policy, prepared.tokenizer, self.run.model_dir)
        return True

    def _end(self, trainer: Trainer | None, status: str, code: int, error: str | None = None) -> int:
        """Write `result.json`, close the tracker with the true status, show the last card."""
        if not ranks().is_rank0:
            return code
        progress, total_steps = (trainer.progress, trainer.steps) if trainer else standing(self.run)
        result = self._result(progress, trainer.device if trainer else NO_TRAINER, status, error)
        code = leave_result(self.run, result, code, self.console.message)
        self.tracker.finish(status, code, {**result["final"], "steps": result["steps"]})
        commands = next_commands(self.run, self.config, status)
        self.console.end(f"uft train {self.run.name}", ending(result, total_steps, commands))
        return code

    def _hung(self, why: str) -> dict[str, Any]:
        return self._result(standing(self.run)[0], NO_TRAINER, "failed", why)

    def _result(self, progress: Progress, device: torch.device, status: str, error: str | None) -> dict[str, Any]:
        wall = time.perf_counter() - self.started
        record = result_record(progress, self.config, device, wall, read_metrics(self.run))
        return {"status": status, "error": error, **record}


@activity("it trained")
def fit(
    trainer: Trainer, tracker: Tracker, display: Display, measure: Callable[[], Evaluation], *, before: bool
) -> bool:
    """Train to the horizon, with lines, batteries and checkpoints; False when asked to stop before that.

    `before`: whether to measure before the first step.
    """
    cfg = trainer.config
    lines = MetricsHook(tracker, display, cfg.train.log_every, since=trainer.progress.seconds)
    saving = CheckpointHook(tracker, cfg.train.checkpoint_every)
    batteries = EvaluationHook(
        measure=measure,
        tracker=tracker,
        display=display,
        every=cfg.train.eval_every,
        before=before,
        best=cfg.eval.best,
        best_mode=cfg.eval.best_mode,
    )
    trainer.hooks = (lines, batteries, saving)
    measured = trainer.progress.evaluated
    batteries.start(trainer)
    if trainer.progress.evaluated > measured and trainer.progress.step > 0:
        saving.save(trainer)  # the battery that the last sitting owed is now part of the checkpoint
    trainer.fit()
    if trainer.progress.step < trainer.steps or owes_battery(trainer):
        if saving.saved != trainer.progress.step:
            saving.save(trainer)
        trainer.publish_pending_checkpoint()
        return False
    trainer.publish_pending_checkpoint()
    return True


def owes_battery(trainer: Trainer) -> bool:
    """Asked to stop within the last battery: the run has its steps but not its result."""
    return trainer.stop.agreed() and trainer.progress.evaluated < trainer.steps


def measured_on(corpus: TrainData) -> list[HeldOut]:
    """The held-out rows of every source, as the battery takes them."""
    checkers = {source.name: source.checker for source in corpus.loaded}
    return [HeldOut(s.source, s.rows, s.encoded, checkers[s.source]) for s in corpus.held_out]


def measuring(prepared: Prepared, sources: Sequence[HeldOut], stop: Stop) -> Callable[[], Evaluation]:
    """The battery on `sources`, of the policy as it is whenever this is called."""
    config = prepared.trainer.config

    def measure() -> Evaluation:
        return evaluate(
            prepared.trainer.policy,
            prepared.yardstick,
            sources,
            prepared.corpus.renderer,
            prepared.tokenizer,
            config.eval,
            stop.between_passes,
            micro_batch_tokens=tokens_per_pass(config),
        )

    return measure


def said(error: Exception, config: Config) -> str:
    """What `result.json` says of an error. The unforeseen ones have a traceback, for whoever mends them."""
    if isinstance(error, PeerLost):
        return f"another process of this run ended ({error})"
    text = str(error) if isinstance(error, UftError) else _unforeseen(error, config)
    note(text)
    return text


def _unforeseen(error: Exception, config: Config) -> str:
    """What to say of an error that no part of the program has explained."""
    if out_of_memory(error):
        return str(explain_oom(error, "memory", config))
    if isinstance(error, OSError) and error.errno in FULL and error.filename:
        return str(UftError(problem(Path(error.filename), error.errno)))
    tell_redacted(type(error), error, error.__traceback__)
    return f"{type(error).__name__}: {error}"


# --- A sitting of a run of stages: every stage from where it stands, one after the other.
#
# A stage is finished when its `result.json` says so, which is written after everything else of it: it is never run
# again,
# and what it left (a model, rows) is what the next one starts from. A stage that trains is a run in a folder of its
# own,
# with checkpoints that it resumes from; its lines, batteries and samples go to the run's files and tracker, where
# steps,
# rows, tokens and seconds run on. Objective state, optimiser and schedule start afresh in every stage.
#
# The battery compares with the model that the run started from, in every stage, on the same rows. The last battery of
# a
# stage is the one before the next.


def train_stages(run: Run, config: Config, stop: Stop) -> int:
    """Carry out the stages of `run`, whose lock the caller holds, from where they stand; the exit code.

    Raises the UftError of a request that cannot be carried out; whatever fails later stands in `result.json`.
    """
    with told(run) as console:
        return _StagesSession(run, config, stop, console, stages_of(config)).go()


@dataclass
class _StagesSession:
    run: Run
    config: Config
    stop: Stop
    console: Console
    stages: list[Stage]
    started: float = field(default_factory=time.perf_counter)
    tracker: Trackers = field(default_factory=Trackers)
    device: torch.device = NO_TRAINER
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # of finished stages, in their order
    begun: bool = False  # whether anything was written that is worth keeping

    def go(self) -> int:
        words = last_words(self.run, self._hung, self.console.message)
        try:
            with watching(self.config.hardware.watchdog, self.run.path, words):
                ground = self._begin()
                whole = all(self._stage(stage, ground) for stage in self.stages)
        except (Stopped, Interrupted):
            return self._end("stopped", self.stop.exit_code)
        except UftError as error:
            if not self.begun and error.code == BAD_REQUEST:
                raise
            return self._end("failed", FAILED, error=said(error, self.config))
        except Exception as error:
            return self._end("failed", FAILED, error=said(error, self.config))
        return self._end("finished", GOOD) if whole else self._end("stopped", self.stop.exit_code)

    # --- the run as a whole

    def _begin(self) -> PipelineData:
        """Everything that is read and checked before the first stage begins or goes on."""
        self.device = choose_device(self.config.hardware)
        ground = read_pipeline_data(self.run, self.config, self.stages)
        for stage in self.stages:
            if stage.name in ground.records:
                ranks().on_rank0(partial(ground.keep, stage))
            result = self.folder(stage).result()
            if result.get("status") == "finished" and len(self.results) == stage.number - 1:
                self.results[stage.name] = result
        self.begun = bool(self.results) or any(self.folder(stage).checkpoints() for stage in self.stages)
        if self.stop.agreed():
            raise Stopped
        if ranks().is_rank0:
            self._open(ground)
        ranks().barrier()  # until the result of an earlier sitting is gone
        return ground

    def _open(self, ground: PipelineData) -> None:
        """Who, what and where, and the card; from here on lines are written."""
        progress = self._current()[0]
        (self.run.path / "result.json").unlink(missing_ok=True)
        info = {"data_digest": ground.digest, "device": str(self.device), "torch": torch.__version__}
        self.run.update_info(**info, total_steps=ground.steps)
        self.tracker = make_tracker(
            self.run,
            plain(asdict(self.config)),
            # -1: whatever an earlier sitting wrote without reaching a checkpoint is written again
            resumed_step=progress.step if self.begun else -1,
            say=self.console.message,
        )
        self.tracker.start()
        self.console.total_steps = ground.steps
        title = f"uft train {self.run.name}"
        card = stages_card(self.run, self.config, self.stages, ground, self.tracker.description)
        self.console.start(f"{title}, resumed at step {progress.step}" if self.begun else title, card)
        self.console.recall(read_metrics(self.run))
        self._mark()

    def _mark(self) -> None:
        """Batteries at the ends of stages stay in view."""
        totals = Totals()
        for name, result in self.results.items():
            totals = totals.after(result)
            if result.get("steps"):
                self.console.marks[f"after {name}"] = totals.steps

    def _current(self) -> tuple[Progress, int]:
        """(counters of the whole run, total steps) by what is on disk."""
        totals, total = self.before, 0
        for stage in self.stages[len(self.results) :][:1]:
            progress, total = standing(self.folder(stage))
            totals = totals.after(asdict(progress) | {"steps": progress.step})
        counters = asdict(totals)
        return Progress(step=counters.pop("steps"), **counters), total

    @property
    def before(self) -> Totals:
        """What the finished stages have done."""
        totals = Totals()
        for result in self.results.values():
            totals = totals.after(result)
        return totals

    def folder(self, stage: Stage) -> Run:
        return Run(self.run.path / stage.folder)

    def model_dir(self, stage: Stage) -> Path:
        """Where a stage leaves its model: the last one's is the run's."""
        last = [other for other in self.stages if other.do == "fit"][-1]
        return self.run.model_dir if stage.name == last.name else self.folder(stage).model_dir

    def so_far(self, stage: Stage) -> Model:
        """The model that a stage starts from."""
        trained = [other for other in self.stages[: stage.number - 1] if other.do == "fit"]
        if not trained:
            return stage.config.model
        return replace(stage.config.model, path=str(self.model_dir(trained[-1])), revision=None)

    # --- a stage

    def _stage(self, stage: Stage, ground: PipelineData) -> bool:
        """Carry out a stage unless it is finished; False when asked to stop before its end."""
        if stage.name in self.results:
            return True
        if self.stop.agreed():
            return False
        folder = self.folder(stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        if stage.do == "fit":
            record = self._fit(stage, ground, folder, started)
            if record is None:
                return False
        else:
            self.console.message(f"\nstage {stage.number} of {len(self.stages)}, {stage.name}: {stage.do}")
            self.begun = True
            record = MAKERS[stage.do](self._place(stage)) | {"wall_seconds": time.perf_counter() - started}
        self.results[stage.name] = {"status": "finished", "error": None, "do": stage.do, **record}
        ranks().on_rank0(lambda: write_json(folder.path / "result.json", self.results[stage.name]))
        self._mark()
        ground.corpora.pop(stage.name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def _place(self, stage: Stage) -> Place:
        by_name = {other.name: other for other in self.stages}
        trained = [other.name for other in self.stages[: stage.number - 1] if other.do == "fit"]
        return Place(
            run=self.run,
            stage=stage,
            model=replace(self.so_far(stage), adapter="none"),
            made_by=f"stage:{trained[-1]}" if trained else stage.config.model.path,
            models=lambda name: self.model_dir(by_name[name]),
            device=self.device,
            stop=self.stop,
            say=self.console.message,
        )

    def _fit(self, stage: Stage, ground: PipelineData, folder: Run, started: float) -> dict[str, Any] | None:
        """Train a stage and leave its model; None when asked to stop before that."""
        if stage.name not in ground.corpora:
            ground.read(stage)
            ranks().on_rank0(partial(ground.keep, stage))
            ranks().on_rank0(lambda: self.run.update_info(total_steps=ground.steps))
            self.console.total_steps = ground.steps
        prepared = self._prepare(stage, ground, folder)
        trainer = prepared.trainer
        first = not any(other.do == "fit" for other in self.stages[: stage.number - 1])
        whole = fit(
            trainer,
            StageTracker(self.tracker, stage.name, self.before),
            StageDisplay(self.console, self.before),
            measuring(prepared, ground.held_out, self.stop),
            before=stage.config.eval.before and first,
        )
        if not whole:
            return None
        later = any(other.do == "generate" for other in self.stages[stage.number :])
        if stage.config.train.save_model or later or self.model_dir(stage) != self.run.model_dir:
            export(trainer.policy, prepared.tokenizer, self.model_dir(stage))
        lines = (line for line in read_metrics(self.run) if line.get("stage") == stage.name)
        return result_record(trainer.progress, stage.config, self.device, time.perf_counter() - started, lines)

    def _prepare(self, stage: Stage, ground: PipelineData, folder: Run) -> Prepared:
        """A trainer ready for its next step, and the stage's card."""
        config, given = stage_inputs(stage, self.config, self.so_far(stage), ground)
        prepared = prepare(folder, config, self.device, self.stop, self.console.message, given)
        for corpus in ground.corpora.values():  # what can be told of later stages is told before the first step
            check_positions(prepared.trainer.policy, corpus)
        checks = check_record(prepared, check_start(prepared.trainer, prepared.reference))
        resumed = resume(prepared.trainer, self.console.message)
        if resumed < 0 and ranks().is_rank0:
            write_json(folder.path / "check.json", checks)
        self.begun = True
        title = f"stage {stage.number} of {len(self.stages)}: {stage.name}"
        more = f", resumed at its step {resumed}" if resumed >= 0 else ""
        self.console.start(f"{title}{more}", stage_card(prepared, ground.records[stage.name]))
        return prepared

    # --- the end

    def _end(self, status: str, code: int, error: str | None = None) -> int:
        """Write `result.json`, close the tracker with the true status, show the last card."""
        if not ranks().is_rank0:
            return code
        progress, _ = self._current()
        result = self._result(progress, self.device, status, error)
        code = leave_result(self.run, result, code, self.console.message)
        self.tracker.finish(status, code, {**result["final"], "steps": result["steps"]})
        commands = next_commands_of_stages(self.run, status)
        total = self.run.info().get("total_steps", progress.step)
        self.console.end(f"uft train {self.run.name}", ending(result, total, commands))
        return code

    def _hung(self, why: str) -> dict[str, Any]:
        return self._result(self._current()[0], NO_TRAINER, "failed", why)

    def _result(self, progress: Progress, device: torch.device, status: str, error: str | None) -> dict[str, Any]:
        wall = time.perf_counter() - self.started
        record = result_record(progress, self.config, device, wall, read_metrics(self.run))
        return {"status": status, "error": error, **record, **self._best(), "stages": self.results}

    def _best(self) -> Mapping[str, Any]:
        """The best battery of the last stage that was trained to its end, by the run's own steps and folders."""
        totals, found = Totals(), dict[str, Any]()
        for stage in self.stages:
            result = self.results.get(stage.name, {})
            if result.get("best"):
                at = {"best": result["best"], "best_step": totals.steps + result["best_step"]}
                found = at | {"best_checkpoint": f"{stage.folder}/{result['best_checkpoint']}"}
            totals = totals.after(result)
        return found


# --- A stage's steps and counters as the run's own: what is logged and shown runs on over the stages.


RUNNING_ON = ("rows", "tokens", "supervised_tokens", "seconds")


@dataclass(frozen=True)
class Totals:
    """What the stages before one have done."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0

    def after(self, result: Mapping[str, Any]) -> Totals:
        """With a stage's result on top; one that trained nothing has no counters."""
        return Totals(**{name: getattr(self, name) + result.get(name, 0) for name in ("steps", *RUNNING_ON)})

    def added_to(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """A line of a stage as a line of the run, its names in their order."""
        return {n: value + getattr(self, n) if n in RUNNING_ON else value for n, value in metrics.items()}


@dataclass(frozen=True)
class StageTracker:
    """The run's tracker as a stage sees it: every line says which stage wrote it."""

    whole: Tracker
    stage: str
    before: Totals

    def start(self) -> None:
        """The run's tracker is started by the run."""

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        self.whole.log(self.before.steps + step, {"stage": self.stage, **self.before.added_to(metrics)})

    def samples(self, step: int, samples: Sequence[Sample], stage: str | None = None) -> None:
        self.whole.samples(self.before.steps + step, samples, self.stage)

    def secure(self) -> None:
        self.whole.secure()

    def finish(self, status: str, exit_code: int, summary: Mapping[str, Any]) -> None:
        """The run's tracker is closed by the run."""


@dataclass(frozen=True)
class StageDisplay:
    """The run's console as a stage sees it."""

    whole: Display
    before: Totals

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.whole.step(self.before.steps + step, self.before.added_to(metrics))

    def battery(self, step: int, battery: Evaluation) -> None:
        self.whole.battery(self.before.steps + step, battery)

    def message(self, text: str) -> None:
        self.whole.message(text)


# --- What happens around the steps: metric lines, the battery, checkpoints. The loop calls them in this order.


Metrics = dict[str, float]


class Display(Protocol):
    """Where a person watches: the console."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def battery(self, step: int, battery: Evaluation) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass
class MetricsHook:
    """One metric line at the first step, every `every` steps and at the last; meters stay on the device till then."""

    tracker: Tracker
    display: Display
    every: int
    since: float = 0.0  # seconds of training at the last line: a battery or a checkpoint between two is not in them
    tokens: int = 0

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.tokens += step.tokens
        number = trainer.progress.step
        if number == 1 or number % self.every == 0 or number == trainer.steps:
            trainer.await_finite_check()
            metrics = self._metrics(trainer)
            self.tracker.log(number, metrics)
            self.display.step(number, metrics)

    def _metrics(self, trainer: Trainer) -> Metrics:
        progress, means = trainer.progress, trainer.meter.means()
        seconds, tokens = progress.seconds - self.since, self.tokens
        self.since, self.tokens = progress.seconds, 0
        metrics: Metrics = {
            "rows": progress.rows,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised_tokens,
            "seconds": progress.seconds,
            "epoch": progress.rows / trainer.epoch_rows,
            **_taken(means, "loss", "nll"),
            "lr": learning_rate(progress.step - 1, trainer.steps, trainer.config.optim),
            **_taken(means, "grad_norm"),
            "tokens_per_second": tokens / max(seconds, 1e-9),
            **device_memory(trainer.device),
        }
        return metrics | {f"objective/{name}": value for name, value in means.items()}


def _taken(means: Metrics, *names: str) -> Metrics:
    """Move `names` out of `means`; what no row gave anything for since the last line is not there."""
    return {name: means.pop(name) for name in names if name in means}


class Measure(Protocol):
    """Runs the battery on the policy as it is now. Raises Interrupted when the run is asked to stop."""

    def __call__(self) -> Evaluation: ...


@dataclass
class EvaluationHook:
    """The battery before the first step, every `every` steps and after the last, and which step was the best."""

    measure: Measure
    tracker: Tracker
    display: Display
    every: int
    before: bool
    best: str
    best_mode: str
    told: bool = False  # that `best` names nothing

    def start(self, trainer: Trainer) -> None:
        """Before the first step, and on a resume whose battery was cut short."""
        self._maybe(trainer)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self._maybe(trainer)

    def _due(self, step: int, steps: int) -> bool:
        if step == 0:
            return self.before
        return step == steps or bool(self.every and step % self.every == 0)

    def _maybe(self, trainer: Trainer) -> None:
        progress = trainer.progress
        if progress.evaluated >= progress.step or not self._due(progress.step, trainer.steps):
            return
        trainer.await_finite_check()
        try:
            battery = self.measure()
        except Interrupted:
            return  # `evaluated` stays behind: the resumed run measures this step first
        progress.evaluated = progress.step
        self._note_best(trainer, battery.metrics)
        if battery.metrics:
            axes: Metrics = {"rows": progress.rows, "tokens": progress.tokens}  # so that W&B can plot it against either
            self.tracker.log(progress.step, axes | battery.metrics)
        if battery.samples:
            self.tracker.samples(progress.step, battery.samples)
        self.display.battery(progress.step, battery)

    def _note_best(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        value, progress = metrics.get(self.best), trainer.progress
        if metrics and value is None and not self.told:
            self.told = True
            self.display.message(f"eval.best={self.best} is not measured here: no best checkpoint is kept")
        if value is None or not math.isfinite(value) or progress.step == 0:
            return
        sign = 1 if self.best_mode == "max" else -1
        if progress.best_value is None or sign * value > sign * progress.best_value:
            progress.best_step, progress.best_value = progress.step, value


@dataclass
class CheckpointHook:
    """A checkpoint every `every` steps, at a new best, at the end, and when the run is asked to stop."""

    tracker: Tracker
    every: int
    saved: int = -1

    def after_step(self, trainer: Trainer, step: Step) -> None:
        trainer.publish_pending_checkpoint(wait=False)
        number = trainer.progress.step
        due = number == trainer.steps or bool(self.every and number % self.every == 0)
        if due or trainer.progress.best_step == number:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        self.tracker.secure()
        trainer.save_checkpoint()
        self.saved = trainer.progress.step


# --- What a sitting leaves: `result.json`, the last card, and what one would type next.


GIGABYTE = 1e9


def leave_result(run: Run, result: Mapping[str, Any], code: int, say: Callable[[str], None]) -> int:
    """Write `result.json`; the exit code. Where there is no room, the run counts as interrupted and can be resumed."""
    try:
        write_json(run.path / "result.json", result)
    except UftError as error:
        say(str(error))
        return FAILED
    return code


def last_words(
    run: Run, record: Callable[[str], Mapping[str, Any]], say: Callable[[str], None]
) -> Callable[[str], None]:
    """What a run that hangs does before it is ended: its result is what is on disk. `record`: of why it failed."""

    def speak(why: str) -> None:
        note(why)
        if ranks().is_rank0:
            leave_result(run, record(why), FAILED, say)
            say(f"{why}\nContinue it:  uft resume {shown(run.path)}")

    return speak


def result_record(
    progress: Progress, config: Config, device: torch.device, wall_seconds: float, lines: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `result.json` says besides how it ended: counters, final and best metrics."""
    best_step, best_value = progress.best_step, progress.best_value
    return {
        "steps": progress.step,
        "rows": progress.rows,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "seconds": progress.seconds,
        "wall_seconds": wall_seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "peak_memory_bytes": peak_memory(device),
        "final": final_metrics(lines),
        "best": {config.eval.best: best_value} if best_value is not None else {},
        "best_step": best_step,
        "best_checkpoint": f"checkpoints/step-{best_step:06d}" if best_step is not None else None,
    }


def ending(result: Mapping[str, Any], total_steps: int, commands: Sequence[str]) -> Ending:
    """The last card."""
    return Ending(
        status=result["status"],
        steps=result["steps"],
        total_steps=total_steps,
        seconds=result["seconds"],
        tokens=result["tokens"],
        final=result["final"],
        best=result["best"],
        best_step=result["best_step"],
        best_checkpoint=result["best_checkpoint"],
        peak_memory_gb=result["peak_memory_bytes"] / GIGABYTE,
        error=result["error"],
        commands=commands,
    )


def final_metrics(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last training loss and likelihood, and the last battery, as they were written: an earlier sitting counts."""
    found: dict[str, float] = {}
    for line in lines:
        battery = {name: value for name, value in line.items() if name.startswith("eval/")}
        kept = {name: value for name, value in found.items() if not (battery and name.startswith("eval/"))}
        found = {**kept, **{name: line[name] for name in ("loss", "nll") if name in line}, **battery}
    return found


OWN = ("objective", "experiment", "run.", "++run.", "++sweep.")
"""What was typed for this run alone: its objective (an experiment sets one too) and its folder."""


def next_commands(run: Run, config: Config, status: str) -> list[str]:
    """What one would type next."""
    if status != "finished":
        return [f"uft resume {shown(run.path)}"]
    other = "sft" if config.objective["name"] != "sft" else "ift"
    kept = [word for word in run.overrides() if not word.startswith(OWN)]
    again = shlex.join(["uft", "train", f"objective={other}", *kept])
    return [
        f"{again}      the same rows under another objective",
        f"uft generate {shown(run.path)}      what it answers now",
    ]


def next_commands_of_stages(run: Run, status: str) -> list[str]:
    """Likewise after a run of stages."""
    if status != "finished":
        return [f"uft resume {shown(run.path)}"]
    return [f"uft generate {shown(run.path)}      what it answers now"]
