"""A session of a run: from its folder and configuration to a true `result.json`.

A run is a list of stages, carried out one after the other; the usual run is a single unnamed stage whose folder is the
run folder itself. A stage that trains has checkpoints in its folder and resumes from them. A stage whose result is
"finished" is never run again: what it left (a model, rows) is what the next one starts from. Lines, samples and console
are the run's: steps, rows, tokens and seconds continue over the stages. Objective state, optimiser and schedule start
afresh in every stage; all stages are evaluated on the same rows against the same reference, and the last evaluation of
one stage is the one before the next.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uft.config.frozen import to_builtins
from uft.config.messages import as_typed
from uft.config.schema import Config, Eval, Model
from uft.config.stages import Stage, is_made, maker, stages_of
from uft.distributed import ranks
from uft.environment import PeerLost, note
from uft.errors import BAD_REQUEST, FAILED, GOOD, UftError, tell_redacted
from uft.evaluation.evaluate import Evaluation, evaluate
from uft.heartbeat import activity, report_progress
from uft.model import checkpoint
from uft.model.memory import Utilisation, device_memory, peak_memory
from uft.model.policy import DTYPES
from uft.runs import FULL, Run, disk_problem, typed_path, write_json, writing
from uft.sampling.generate import Interrupted
from uft.tracking.console import Card, Console
from uft.tracking.metrics import final_metrics, read_metrics
from uft.tracking.trackers import Trackers, make_tracker
from uft.training.card import ModelCard, stage_card, start_card
from uft.training.dataset import RunData, read_run_data, resolve_made_paths
from uft.training.exporting import export_checked
from uft.training.liveness import Stop, watching
from uft.training.setup import (
    Prepared,
    Stopped,
    Work,
    check_positions,
    check_record,
    check_start,
    choose_device,
    prepare_stage,
    resume,
    saved_progress,
)
from uft.training.step import Step, learning_rate
from uft.training.trainer import Progress, Trainer, explain_oom, out_of_memory, own_samples, tokens_per_pass


def train(run: Run, config: Config, stop: Stop) -> int:
    """Carry out the stages of `run`, whose lock the caller holds, from where they stand; the exit code.

    Raises the UftError of a request that cannot be carried out; any later failure is recorded in `result.json`.
    """
    with run_console(run) as console:
        session = Session(run, config, stages_of(config), stop, console)
        try:
            with watching(config.hardware.watchdog, run.path, session.end_hung):
                session.begin()
                finished = all(session.run_stage(stage) for stage in session.stages)
        except (Stopped, Interrupted):
            finished = False
        except Exception as error:
            if isinstance(error, UftError) and error.code == BAD_REQUEST and not session.opened:
                raise
            return session.end("failed", FAILED, error_text(error, config))
        return session.end("finished", GOOD) if finished else session.end("stopped", stop.exit_code)


@contextmanager
def run_console(run: Run) -> Iterator[Console]:
    """The console of a session, which shows this program's log warnings too; only rank 0 is heard."""
    is_rank0 = ranks().is_rank0
    with nullcontext(sys.stdout) if is_rank0 else open(os.devnull, "w") as stream:
        with writing(run.path / "console.log", code=BAD_REQUEST):
            console = Console(stream, run.path / "console.log" if is_rank0 else None)
        handler, logger = logging.Handler(logging.WARNING), logging.getLogger("uft")
        handler.emit = lambda record: console.message(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        try:
            yield console
        finally:
            logger.removeHandler(handler)
            console.close()


@dataclass
class Session:
    """One process lifetime of a run."""

    run: Run
    config: Config
    stages: list[Stage]
    stop: Stop
    console: Console
    started: float = field(default_factory=time.perf_counter)
    tracker: Trackers = field(default_factory=Trackers)
    device: torch.device = torch.device("cpu")
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # of finished stages, in their order
    trainer: Trainer | None = None  # of the stage that trains
    opened: bool = False  # whether this session has written anything: a bad request is refused before that
    data: RunData = field(init=False)

    @property
    def work(self) -> Work:
        return Work(self.config, self.device, self.stop, self.console.message)

    def begin(self) -> None:
        """Find out where the run stands, and read and check the data of all stages."""
        self.device = choose_device(self.config.hardware)
        self.data = read_run_data(self.run, self.config, self.stages)
        self.results, begun = ranks().on_rank0(self._read_results)
        for stage in self.stages if begun else ():  # a run that never reached a checkpoint may begin with other rows
            if stage.name in self.data.stages:
                self.data.stages[stage.name].refuse_other_data(self.folder(stage))

    def run_stage(self, stage: Stage) -> bool:
        """Carry out a stage unless it is finished; False when asked to stop before its end."""
        if stage.name in self.results:
            return True
        if self.stop.agreed():
            return False
        started, folder = time.perf_counter(), self.folder(stage)
        folder.path.mkdir(parents=True, exist_ok=True)
        if stage.do == "fit":
            if not self._fit(stage, folder):
                return False
            assert self.trainer is not None
            lines = (line for line in read_metrics(self.run) if line.get("stage", "") == stage.name)
            self.data.steps[stage.name] = self.trainer.progress.step  # fewer, where it ended early
            best = best_record(self.trainer.progress, stage.config.eval.best)
            record = result_record(self.trainer.progress, best, self.device, started, lines)
        else:
            self._start_tracking(self.before.step if self.results else -1)
            self.console.message(f"\nstage {stage.number} of {len(self.stages)}, {stage.name}: {stage.do}")
            record = self._make_rows(stage, folder) | {"wall_seconds": time.perf_counter() - started}
        named = {"do": stage.do} if stage.name else {}
        self.results[stage.name] = result = {"status": "finished", "error": None, **named, **record}
        if stage.name:  # of an unnamed stage it is the run's, which `end` writes
            ranks().on_rank0(lambda: write_json(folder.path / "result.json", result))
            self.console.marks |= self._stage_ends()
        if stage is not self.stages[-1]:
            self.trainer = None
            self.data.stages.pop(stage.name, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    def _fit(self, stage: Stage, folder: Run) -> bool:
        """Train a stage and leave its model; False when asked to stop before its end."""
        if stage.name not in self.data.stages:  # an earlier stage made its rows
            self.data.read_training(stage)
            self.data.stages[stage.name].refuse_other_data(folder)
            ranks().on_rank0(lambda: self._write_data(stage))
        prepared = prepare_stage(self.work, stage, self.start_model(stage), self.data)
        trainer, renderer = prepared.trainer, prepared.data.dataset.renderer
        for other in self.stages:  # rows of later stages that do not fit are told before the first step
            if other.name in self.data.stages:
                check_positions(trainer.policy, self.data.stages[other.name], other.config)
        checks = check_record(prepared, check_start(trainer, prepared.reference))
        step = resume(trainer, self.console.message)
        if step < 0 and ranks().is_rank0:
            write_json(folder.path / "check.json", checks)
        self.data.steps[stage.name] = trainer.steps  # of the checkpoint, unless it was extended
        lines = stage_card(prepared) if ranks().is_rank0 else ()
        self._start_tracking(self.before.step + max(step, 0) if self.results or step >= 0 else -1, lines)
        if stage.name:
            where = f", resumed at its step {step}" if step >= 0 else ""
            own = [line for line in lines if line[0] != "evaluation"]  # the run's card has that of all stages
            self.console.start(f"stage {stage.number} of {len(self.stages)}: {stage.name}{where}", own)
        self.trainer = trainer
        measure = partial(
            evaluate,
            trainer.policy,
            prepared.eval_reference,
            self.data.held_out,
            renderer,
            trainer.config.eval,
            self.stop.between_passes,
            micro_batch_tokens=tokens_per_pass(trainer.config),
        )
        at_start = stage.config.eval.before and not self.trained_before(stage)
        named = (stage.name, self.before, Utilisation.of(trainer.policy, ranks().size))
        if not Recorder(self.tracker, self.console, measure, at_start, *named).fit(trainer):
            return False
        later = any(other.do in ("generate", "select") for other in self.stages[stage.number :])
        if stage.config.train.save_model or later or self.model_dir(stage) != self.run.model_dir:
            self._export(stage, prepared)
        return True

    def _export(self, stage: Stage, prepared: Prepared) -> None:
        """Leave the model of a stage, if plain transformers says what the policy in memory says."""
        config, dataset, folder = stage.config, prepared.data.dataset, self.model_dir(stage)
        dtype = config.train.save_dtype if folder == self.run.model_dir else "float32"
        sources = [*(held.encoded for held in self.data.held_out), *(source.encoded for source in dataset.train)]
        rows = [row[0] for source in sources for row in source[:2]]
        trainer, renderer = prepared.trainer, dataset.renderer
        policy, steps = trainer.policy, self.before.step + trainer.progress.step
        card = ModelCard(self.run, config, steps, renderer.name != "plain")
        export_checked(policy, renderer, config, rows, folder, DTYPES[dtype], card, self.console.message)

    def _make_rows(self, stage: Stage, folder: Run) -> dict[str, Any]:
        """Sample completions, write a column or choose rows; counts of what was made. Raises Interrupted."""
        by_name = {other.name: other for other in self.stages}
        trained, paths = self.trained_before(stage), stage.config.annotate.models
        models = [str(self.model_dir(by_name[maker(path)])) if is_made(path) else path for path in paths]
        model, past = self.start_model(stage), stage.config.select.past
        past = str(self.folder(by_name[maker(past)]).path) if past and is_made(past) else past
        config = replace(
            resolve_made_paths(stage.config, self.run),
            model=model if stage.do == "select" else replace(model, adapter="none", quantize="none"),
            annotate=replace(stage.config.annotate, models=models),
            select=replace(stage.config.select, past=past),
        )
        sampled_by = f"stage:{trained[-1].name}" if trained else stage.config.model.path
        from uft.training.making import ROW_STAGES  # here: most runs make no rows, and start without these imports

        return ROW_STAGES[stage.do](replace(self.work, config=config), folder.path, sampled_by)

    def _start_tracking(self, resumed_step: int, stage_lines: Card = ()) -> None:
        """Before the first line of this session: record data and machine, start the tracker, show the card.

        `resumed_step`: of the whole run; -1: there is no checkpoint, and lines of an earlier session are written again.
        """
        if self.opened:
            self.console.total_steps = self.data.total_steps
            ranks().on_rank0(lambda: self.run.update_info(total_steps=self.data.total_steps))
            return
        self.opened = True
        if ranks().is_rank0:
            for stage in self.stages:
                self._write_data(stage)
            (self.run.path / "result.json").unlink(missing_ok=True)
            info = {"data_digest": self.data.digest, "total_steps": self.data.total_steps}
            self.run.update_info(**info, device=str(self.device), torch=torch.__version__)
            settings = to_builtins(asdict(self.config))
            self.tracker = make_tracker(self.run, settings, resumed_step=resumed_step, say=self.console.message)
            self.tracker.start()
            self.console.total_steps = self.data.total_steps
            title = f"uft train {self.run.name}" + (f", resumed at step {resumed_step}" if resumed_step >= 0 else "")
            lines = stage_lines if not self.config.stages else ()
            card = start_card(self.run, self.config, self.stages, self.data, self.tracker.description, lines)
            self.console.start(title, card)
            self.console.recall(read_metrics(self.run))
            self.console.marks |= self._stage_ends()
        ranks().barrier()  # until the result of an earlier session is gone

    def _write_data(self, stage: Stage) -> None:
        if stage.name in self.data.stages:
            folder = self.folder(stage).path
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "data.json", self.data.stages[stage.name].record)

    # --- where the run stands

    def _read_results(self) -> tuple[dict[str, dict[str, Any]], bool]:
        """(results of the stages that are finished, whether there are any or a checkpoint)."""
        results: dict[str, dict[str, Any]] = {}
        for stage in self.stages:
            result = self.folder(stage).result()
            if result.get("status") != "finished":
                checkpoint.recover(self.folder(stage))
                return results, bool(results or self.folder(stage).checkpoints())
            results[stage.name] = result
        return results, True

    @property
    def before(self) -> Progress:
        """The counters of the finished stages together."""
        return total_progress(self.results.values())

    def _stage_ends(self) -> dict[str, int]:
        """The evaluations at the ends of stages, which stay in the console's table."""
        ends, steps = {}, 0
        for name, result in self.results.items():
            steps += result.get("steps", 0)
            if name and result.get("steps"):
                ends[f"after {name}"] = steps
        return ends

    def folder(self, stage: Stage) -> Run:
        return Run(self.run.path / stage.folder)

    def model_dir(self, stage: Stage) -> Path:
        """The folder of a stage's model; that of the last stage is the run's."""
        last = [other for other in self.stages if other.do == "fit"][-1]
        return self.run.model_dir if stage.name == last.name else self.folder(stage).model_dir

    def start_model(self, stage: Stage) -> Model:
        """The model that a stage starts from: that of the last stage before it that trained."""
        trained = self.trained_before(stage)
        if not trained:
            return stage.config.model
        return replace(stage.config.model, path=str(self.model_dir(trained[-1])), revision=None)

    def trained_before(self, stage: Stage) -> list[Stage]:
        return [other for other in self.stages[: stage.number - 1] if other.do == "fit"]

    # --- the end

    def end(self, status: str, code: int, error: str | None = None) -> int:
        """Write `result.json`, close the tracker with the true status, show the last card; the exit code."""
        if not ranks().is_rank0:
            return code
        result = self._result(status, error, self.trainer.progress if self.trainer else None)
        code = self._write_result(result, code)
        self.tracker.finish(status, code, {**result["final"], "steps": result["steps"]})
        total = self.run.info().get("total_steps", result["steps"])
        commands = next_commands(self.run, self.config, status)
        self.console.end(f"uft train {self.run.name}", result, total, commands, self.run)
        return code

    def end_hung(self, why: str) -> None:
        """Record why the watchdog is about to end this process; the result is what is on disk."""
        note(why)
        if ranks().is_rank0:
            self.device = torch.device("cpu")  # the other one may be what hangs
            self._write_result(self._result("failed", why, None), FAILED)
            self.console.message(f"{why}\nContinue it:  uft resume {typed_path(self.run.path)}")

    def _write_result(self, result: Mapping[str, Any], code: int) -> int:
        """The exit code. Where there is no room for it, the run counts as interrupted and can be resumed."""
        try:
            write_json(self.run.path / "result.json", result)
        except UftError as error:
            self.console.message(str(error))
            return FAILED
        return code

    def _result(self, status: str, error: str | None, progress: Progress | None) -> dict[str, Any]:
        """`result.json`; `progress` of the stage that is not finished, by default that of its newest checkpoint."""
        if "" in self.results:
            wall = {"wall_seconds": time.perf_counter() - self.started}
            return {**self.results[""], "status": status, "error": error, **wall}
        records = dict(self.results)
        for stage in self.stages[len(records) :][:1]:
            current = progress or saved_progress(self.folder(stage))
            counters = {name: getattr(current, name) for name in COUNTERS}
            records[stage.name] = {"steps": current.step, **counters, **best_record(current, stage.config.eval.best)}
        best, steps = best_record(Progress(), ""), 0
        for stage in self.stages[: len(records)]:
            record = records[stage.name]
            if record.get("best"):
                folder = str(Path(stage.folder, record["best_checkpoint"]))
                best = {"best": record["best"], "best_step": steps + record["best_step"], "best_checkpoint": folder}
            steps += record.get("steps", 0)
        total = total_progress(records.values())
        record = result_record(total, best, self.device, self.started, read_metrics(self.run))
        making = sum(one["wall_seconds"] for one in self.results.values() if one.get("do", "fit") != "fit")
        stages = {"making_seconds": making, "stages": self.results} if self.config.stages else {}
        return {"status": status, "error": error, **record, **stages}


# --- Training one stage: the loop is the trainer's; metric lines, evaluations and checkpoints happen around its steps.


@dataclass
class Recorder:
    """The hook of a stage's trainer: metric lines, evaluations, the best of them, and checkpoints.

    Steps and counters on its lines continue those of the stages before it.
    """

    tracker: Trackers
    console: Console
    measure: Callable[[], Evaluation]  # raises Interrupted when asked to stop
    at_start: bool = True  # evaluate before the first step
    stage: str = ""  # the name that every line has; "": none
    before: Progress = field(default_factory=Progress)
    utilisation: Utilisation | None = None
    seconds: float = 0.0  # of training at the last line: evaluations and checkpoints between two do not count
    tokens: int = 0  # since the last line
    supervised: int = 0  # likewise
    sampling: float = 0.0  # seconds of rollouts at the last line
    saved: int = -1  # the step of the last checkpoint of this session
    warned: bool = False  # that eval.best names no metric

    @activity("it trained")
    def fit(self, trainer: Trainer) -> bool:
        """Train to the horizon; False when asked to stop before that."""
        trainer.hooks = (self,)
        progress, evaluated = trainer.progress, trainer.progress.evaluated
        self.seconds = progress.seconds
        self.evaluate_if_due(trainer)
        if progress.evaluated > evaluated and progress.step > 0:
            self.save(trainer)  # the evaluation that the last session owed is now part of the checkpoint
        trainer.fit()
        # asked to stop within the last evaluation, a run has its steps but not its result
        owes_evaluation = trainer.stop.agreed() and trainer.progress.evaluated < trainer.progress.step
        complete = trainer.complete and not owes_evaluation
        if not complete and self.saved != trainer.progress.step:
            self.save(trainer)
        trainer.publish_pending_checkpoint()
        return complete

    def __call__(self, trainer: Trainer, step: Step) -> None:
        """After a step."""
        self.tokens += step.tokens
        self.supervised += step.supervised_tokens
        number, cfg = trainer.progress.step, trainer.config.train
        report_progress(number, trainer.steps, "steps done")
        if number == 1 or number % cfg.log_every == 0 or number == trainer.steps:
            self.write_line(trainer)
        self.evaluate_if_due(trainer)
        trainer.publish_pending_checkpoint(wait=False)
        due = trainer.complete or bool(cfg.checkpoint_every and number % cfg.checkpoint_every == 0)
        if due or trainer.progress.best_step == number:
            self.save(trainer)

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write a line of metrics.jsonl; the run's numbers in it."""
        ours = {name: getattr(self.before, name) + v if name in COUNTERS else v for name, v in metrics.items()}
        self.tracker.log(self.before.step + step, {**({"stage": self.stage} if self.stage else {}), **ours})
        return ours

    def write_line(self, trainer: Trainer) -> None:
        """Write the means since the last metric line; meters stay on the device till then."""
        trainer.await_finite_check()
        progress, means = trainer.progress, trainer.meter.means()  # without names that no row gave anything for
        seconds, tokens, supervised = progress.seconds - self.seconds, self.tokens, self.supervised
        self.seconds, self.tokens, self.supervised = progress.seconds, 0, 0
        metrics = {
            **{name: getattr(progress, name) for name in COUNTERS},
            "epoch": progress.rows / trainer.epoch_rows,
            **{name: means.pop(name) for name in ("loss", "nll") if name in means},
            "lr": learning_rate(progress.step - 1, trainer.steps, trainer.config.optim),
            **{name: means.pop(name) for name in ("grad_norm",) if name in means},
            "tokens_per_second": tokens / max(seconds, 1e-9),
            **({"mfu": self.utilisation(tokens, supervised, seconds)} if self.utilisation else {}),
            **device_memory(trainer.device),
            **{name if name.startswith("rollout/") else f"objective/{name}": value for name, value in means.items()},
        }
        if trainer.rollouts:
            metrics["rollout/seconds"] = trainer.rollouts.seconds - self.sampling
            self.sampling = trainer.rollouts.seconds
            self.tracker.samples(self.before.step + progress.step, own_samples(trainer), self.stage or None)
        self.console.step(self.before.step + progress.step, self.log(progress.step, metrics))

    def evaluate_if_due(self, trainer: Trainer) -> None:
        """Evaluate before the first step, every few, after the last, and on a resume whose evaluation was cut short."""
        progress, step, every = trainer.progress, trainer.progress.step, trainer.config.train.eval_every
        due = self.at_start if step == 0 else step == trainer.steps or bool(every and step % every == 0)
        if not due or progress.evaluated >= step:
            return
        trainer.await_finite_check()
        try:
            evaluation = self.measure()
        except Interrupted:
            return  # `evaluated` stays behind: the resumed run evaluates this step first
        progress.evaluated = step
        self._update_best(progress, evaluation.metrics, trainer.config.eval)
        self._check_early_stop(trainer)
        if evaluation.metrics:
            axes = {"rows": progress.rows, "tokens": progress.tokens}  # so that W&B can plot it against either
            self.log(step, axes | evaluation.metrics)
        if evaluation.samples:
            self.tracker.samples(self.before.step + step, evaluation.samples, self.stage or None)
        ends, evaluations = step == 0 or trainer.complete, 2 + (trainer.steps // every if every else 0)
        if ends or evaluations * len(evaluation.items) <= MOST_ITEMS:
            self.tracker.items(self.before.step + step, evaluation.items, self.stage or None, answers=trainer.complete)
        self.console.evaluation(self.before.step + step, evaluation)

    def _update_best(self, progress: Progress, metrics: Mapping[str, float], cfg: Eval) -> None:
        value = metrics.get(cfg.best)
        if metrics and value is None and not self.warned:
            self.warned = True
            self.console.message(f"eval.best={cfg.best} is not measured here: no best checkpoint is kept")
        if value is None or not math.isfinite(value) or progress.step == 0:
            return
        sign = 1 if cfg.best_mode == "max" else -1
        if progress.best_value is None or sign * value > sign * progress.best_value:
            progress.best_step, progress.best_value = progress.step, value

    def _check_early_stop(self, trainer: Trainer) -> None:
        """Whether the last evaluations had none better than the best (`train.early_stop`)."""
        progress, cfg, patience = trainer.progress, trainer.config.train, trainer.config.train.early_stop
        if patience is None or progress.best_step is None or trainer.complete:
            return
        if progress.step - progress.best_step >= patience * cfg.eval_every:
            best = f"{trainer.config.eval.best}={progress.best_value:.6g}"
            progress.ended = f"train.early_stop={patience}: {best} at step {progress.best_step} is still the best"
            self.console.message(f"training ends at step {self.before.step + progress.step}: {progress.ended}")

    def save(self, trainer: Trainer) -> None:
        self.tracker.secure()
        trainer.save_checkpoint()
        self.saved = trainer.progress.step


# --- The parts of `result.json`.

COUNTERS = ("rows", "tokens", "supervised_tokens", "seconds")
MOST_ITEMS = 100_000
"""Lines of items.jsonl, about 30 MB, beyond which it has the first and the last evaluation of a stage alone."""


def total_progress(results: Iterable[Mapping[str, Any]]) -> Progress:
    """The counters of stages together; one that trained nothing has none."""
    total = Progress()
    for result in results:
        total.step += result.get("steps", 0)
        for name in COUNTERS:
            setattr(total, name, getattr(total, name) + result.get(name, 0))
    return total


def best_record(progress: Progress, metric: str) -> dict[str, Any]:
    """The best evaluation, within the folder of its stage."""
    step, value = progress.best_step, progress.best_value
    return {
        "best": {metric: value} if value is not None else {},
        "best_step": step,
        "best_checkpoint": f"checkpoints/step-{step:06d}" if step is not None else None,
    }


def result_record(
    progress: Progress,
    best: Mapping[str, Any],
    device: torch.device,
    started: float,
    lines: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Counters, final and best metrics. `lines`: of metrics.jsonl, those of earlier sessions too."""
    return {
        "steps": progress.step,
        **{name: getattr(progress, name) for name in COUNTERS},
        "wall_seconds": time.perf_counter() - started,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "peak_memory_bytes": peak_memory(device),
        "final": final_metrics(lines),
        **({"ended": progress.ended} if progress.ended else {}),
        **best,
    }


def error_text(error: Exception, config: Config) -> str:
    """The error of `result.json`. The traceback of an unforeseen one goes to stderr."""
    if isinstance(error, PeerLost):
        return f"another process of this run ended ({error})"
    if isinstance(error, UftError):
        text = str(error)
    elif out_of_memory(error):
        text = str(explain_oom(error, "memory", config))
    elif isinstance(error, OSError) and error.errno in FULL and error.filename:
        text = str(UftError(disk_problem(Path(error.filename), error.errno)))
    else:
        tell_redacted(type(error), error, error.__traceback__)
        text = f"{type(error).__name__}: {error}"
    note(text)
    return text


OWN_KEYS = ("objective", "run.", "sweep.")
"""Overrides that belong to this run alone: its objective, its folder and its sweep."""


def next_commands(run: Run, config: Config, status: str) -> list[str]:
    """Commands to go on with, each as it can be given here, with a word about it."""
    if status != "finished":
        return [f"uft resume {typed_path(run.path)}"]
    path, to = typed_path(run.path), shlex.quote(f"{run.name}-model")
    lines = [f"uft chat {path}      # a conversation with it", f"uft export {path} --to {to}      # for other programs"]
    lines += [f"uft eval {path}      # the tasks of eval.tasks"] if config.eval.tasks else []
    lines = lines if run.model_dir.is_dir() else []
    other = "sft" if config.objective["name"] != "sft" else "ift"
    words = [f"objective={other}", *(w for w in run.overrides() if not w.lstrip("+~").startswith(OWN_KEYS))]
    words = [f"train.steps={config.train.steps or 'null'}" if w.startswith("train.steps=") else w for w in words]
    files = any(word.lstrip("+").startswith(("experiment", "--")) for word in words)  # which may set anything
    swept = any(word.lstrip("+").startswith("sweep=") for word in words)  # the command would be the whole sweep
    if not config.stages and not swept and (not files or can_be_composed(words)):
        lines.insert(0, f"uft train {shlex.join(as_typed(words))}      # the same rows under another objective")
    return lines


def can_be_composed(words: Iterable[str]) -> bool:
    """Whether these words, options among them, are a valid request: an experiment may set keys of its objective."""
    from uft.config.compose import examine
    from uft.config.files import Request

    options = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    overrides, name = tuple(w for w in words if not w.startswith("--")), options.get("--config-name", "config")
    return not examine(Request(overrides, name, options.get("--config-dir"), options.get("--config-path"))).problems
