"""A sitting of a run of stages: every stage from where it stands, one after the other.

A stage is finished when its `result.json` says so, which is written after everything else of it: it is never run again,
and what it left (a model, rows) is what the next one starts from. A stage that trains is a run in a folder of its own,
with checkpoints that it resumes from; its lines, batteries and samples go to the run's files and tracker, where steps,
rows, tokens and seconds run on. Objective state, optimiser and schedule start afresh in every stage.

The battery compares with the model that the run started from, in every stage, on the same rows. The last battery of a
stage is the one before the next.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uft.config.frozen import plain
from uft.config.schema import Config, Model
from uft.config.stages import Stage, stages_of
from uft.errors import BAD_REQUEST, FAILED, GOOD, UftError
from uft.model.export import export
from uft.parallel.ranks import ranks
from uft.runs import Run, write_json
from uft.sampling.generate import Interrupted
from uft.tracking import Trackers, make_tracker
from uft.tracking.console import Console
from uft.tracking.files import read_metrics
from uft.training.card import stage_card, stages_card
from uft.training.device import choose_device
from uft.training.prepare import (
    Prepared,
    Stopped,
    check_positions,
    check_start,
    prepare,
    resume,
    standing,
)
from uft.training.records import check_record
from uft.training.result import ending, last_words, leave_result, next_commands_of_stages, result_record
from uft.training.session import fit, measuring, said, told
from uft.training.signals import Stop
from uft.training.stages_ground import Ground, handed, survey
from uft.training.stages_make import MAKERS, Place
from uft.training.stages_view import StageDisplay, StageTracker, Totals
from uft.training.trainer import Progress
from uft.training.watchdog import watching

NO_TRAINER = torch.device("cpu")


def train(run: Run, config: Config, stop: Stop) -> int:
    """Carry out the stages of `run`, whose lock the caller holds, from where they stand; the exit code.

    Raises the UftError of a request that cannot be carried out; whatever fails later stands in `result.json`.
    """
    with told(run) as console:
        return _Sitting(run, config, stop, console, stages_of(config)).go()


@dataclass
class _Sitting:
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

    def _begin(self) -> Ground:
        """Everything that is read and checked before the first stage begins or goes on."""
        self.device = choose_device(self.config.hardware)
        ground = survey(self.run, self.config, self.stages)
        for stage in self.stages:
            if stage.name in ground.records:
                ranks().from_first(partial(ground.keep, stage))
            result = self.folder(stage).result()
            if result.get("status") == "finished" and len(self.results) == stage.number - 1:
                self.results[stage.name] = result
        self.begun = bool(self.results) or any(self.folder(stage).checkpoints() for stage in self.stages)
        if self.stop.agreed():
            raise Stopped
        if ranks().first:
            self._open(ground)
        ranks().wait()  # until the result of an earlier sitting is gone
        return ground

    def _open(self, ground: Ground) -> None:
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

    def _stage(self, stage: Stage, ground: Ground) -> bool:
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
        ranks().from_first(lambda: write_json(folder.path / "result.json", self.results[stage.name]))
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

    def _fit(self, stage: Stage, ground: Ground, folder: Run, started: float) -> dict[str, Any] | None:
        """Train a stage and leave its model; None when asked to stop before that."""
        if stage.name not in ground.corpora:
            ground.read(stage)
            ranks().from_first(partial(ground.keep, stage))
            ranks().from_first(lambda: self.run.update_info(total_steps=ground.steps))
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

    def _prepare(self, stage: Stage, ground: Ground, folder: Run) -> Prepared:
        """A trainer ready for its next step, and the stage's card."""
        config, given = handed(stage, self.config, self.so_far(stage), ground)
        prepared = prepare(folder, config, self.device, self.stop, self.console.message, given)
        for corpus in ground.corpora.values():  # what can be told of later stages is told before the first step
            check_positions(prepared.trainer.policy, corpus)
        checks = check_record(prepared, check_start(prepared.trainer, prepared.reference))
        resumed = resume(prepared.trainer, self.console.message)
        if resumed < 0 and ranks().first:
            write_json(folder.path / "check.json", checks)
        self.begun = True
        title = f"stage {stage.number} of {len(self.stages)}: {stage.name}"
        more = f", resumed at its step {resumed}" if resumed >= 0 else ""
        self.console.start(f"{title}{more}", stage_card(prepared, ground.records[stage.name]))
        return prepared

    # --- the end

    def _end(self, status: str, code: int, error: str | None = None) -> int:
        """Write `result.json`, close the tracker with the true status, show the last card."""
        if not ranks().first:
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
