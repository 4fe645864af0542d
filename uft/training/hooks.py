"""What happens around the steps: metric lines, the battery, checkpoints. The loop calls them in this order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from uft.evaluation.battery import Battery
from uft.model.memory import device_memory
from uft.sampling.generate import Interrupted
from uft.tracking import Tracker
from uft.training.optim import learning_rate
from uft.training.step import Step
from uft.training.trainer import Trainer

Metrics = dict[str, float]


class Display(Protocol):
    """Where a person watches: the console."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def battery(self, step: int, battery: Battery) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass
class Lines:
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
            trainer.confirm()
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

    def __call__(self) -> Battery: ...


@dataclass
class Batteries:
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
        trainer.confirm()
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
class Checkpoints:
    """A checkpoint every `every` steps, at a new best, at the end, and when the run is asked to stop."""

    tracker: Tracker
    every: int
    saved: int = -1

    def after_step(self, trainer: Trainer, step: Step) -> None:
        trainer.settle(wait=False)
        number = trainer.progress.step
        due = number == trainer.steps or bool(self.every and number % self.every == 0)
        if due or trainer.progress.best_step == number:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        self.tracker.secure()
        trainer.save_checkpoint()
        self.saved = trainer.progress.step
