"""A sitting of a run: prepare, show the card, train until the end or until asked to stop, and leave a true result."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from uft.alive import doing
from uft.config.frozen import plain
from uft.config.schema import Config
from uft.disk import FULL, problem, writing
from uft.errors import BAD_REQUEST, FAILED, GOOD, UftError
from uft.evaluation.battery import Battery, HeldOut, battery
from uft.model.export import export
from uft.parallel.environment import PeerLost, note
from uft.parallel.ranks import ranks
from uft.redact import tell_redacted
from uft.runs import Run, write_json
from uft.tracking import Tracker, Trackers, make_tracker
from uft.tracking.console import Console
from uft.tracking.files import read_metrics
from uft.training.card import start_card
from uft.training.corpus import Corpus
from uft.training.device import choose_device, tokens_per_pass
from uft.training.hooks import Batteries, Checkpoints, Display, Lines
from uft.training.prepare import (
    Prepared,
    Stopped,
    check_start,
    prepare,
    refuse_other_data,
    resume,
    standing,
)
from uft.training.records import check_record, data_record
from uft.training.result import ending, last_words, leave_result, next_commands, result_record
from uft.training.scarce import explained, out_of_memory
from uft.training.signals import Stop
from uft.training.trainer import Progress, Trainer
from uft.training.watchdog import watching

NO_TRAINER = torch.device("cpu")


def train(run: Run, config: Config, stop: Stop) -> int:
    """Train `run`, whose lock the caller holds, from where it stands; the exit code.

    Raises the UftError of a request that cannot be carried out; whatever fails later stands in `result.json`.
    """
    with told(run) as console:
        return _Sitting(run, config, stop, console).go()


@contextmanager
def told(run: Run) -> Iterator[Console]:
    """The console of a sitting, which warnings of this program's modules go to as well; of several processes, the first
    one's words alone are heard."""
    first = ranks().first
    with nullcontext(sys.stdout) if first else open(os.devnull, "w") as stream:
        with writing(run.path / "console.log", code=BAD_REQUEST):
            console = Console(stream, run.path / "console.log" if first else None)
        try:
            with console.hearing():
                yield console
        finally:
            console.close()


@dataclass
class _Sitting:
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
        elif ranks().first:
            write_json(self.run.path / "check.json", checks)
        if ranks().first:
            self._open(prepared, resumed)
        return prepared

    def _open(self, prepared: Prepared, resumed: int) -> None:
        """Everything that is written before the first step: who, what, where, and the card."""
        trainer = prepared.trainer
        fresh = resumed < 0
        (self.run.path / "result.json").unlink(missing_ok=True)
        data = data_record(prepared.corpus, trainer.feed, prepared.plan)
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
        if not ranks().first:
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


@doing("it trained")
def fit(trainer: Trainer, tracker: Tracker, display: Display, measure: Callable[[], Battery], *, before: bool) -> bool:
    """Train to the horizon, with lines, batteries and checkpoints; False when asked to stop before that.

    `before`: whether to measure before the first step.
    """
    cfg = trainer.config
    lines = Lines(tracker, display, cfg.train.log_every, since=trainer.progress.seconds)
    saving = Checkpoints(tracker, cfg.train.checkpoint_every)
    batteries = Batteries(
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
        trainer.settle()
        return False
    trainer.settle()
    return True


def owes_battery(trainer: Trainer) -> bool:
    """Asked to stop within the last battery: the run has its steps but not its result."""
    return trainer.stop.agreed() and trainer.progress.evaluated < trainer.steps


def measured_on(corpus: Corpus) -> list[HeldOut]:
    """The held-out rows of every source, as the battery takes them."""
    checkers = {source.name: source.checker for source in corpus.loaded}
    return [HeldOut(s.source, s.rows, s.encoded, checkers[s.source]) for s in corpus.held_out]


def measuring(prepared: Prepared, sources: Sequence[HeldOut], stop: Stop) -> Callable[[], Battery]:
    """The battery on `sources`, of the policy as it is whenever this is called."""
    config = prepared.trainer.config

    def measure() -> Battery:
        return battery(
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
        return str(explained(error, "memory", config))
    if isinstance(error, OSError) and error.errno in FULL and error.filename:
        return str(UftError(problem(Path(error.filename), error.errno)))
    tell_redacted(type(error), error, error.__traceback__)
    return f"{type(error).__name__}: {error}"
