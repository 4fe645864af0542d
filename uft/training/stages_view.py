"""A stage's steps and counters as the run's own: what is logged and shown runs on over the stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.evaluation.battery import Battery
from uft.evaluation.samples import Sample
from uft.tracking import Tracker
from uft.training.hooks import Display

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

    def battery(self, step: int, battery: Battery) -> None:
        self.whole.battery(self.before.steps + step, battery)

    def message(self, text: str) -> None:
        self.whole.message(text)
