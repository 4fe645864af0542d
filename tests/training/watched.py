"""Hooks and stops that look at a training from outside."""

from __future__ import annotations

from uft.training.liveness import Stop
from uft.training.setup import Prepared
from uft.training.step import Step
from uft.training.trainer import Trainer


class Until(Stop):
    """Somebody who asks to stop after so many steps."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        super().__init__()
        self.trainer, self.step = trainer, step

    def agreed(self) -> bool:
        return self.trainer.progress.step >= self.step


class Losses:
    """Keeps what every step measured."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.tokens: list[int] = []

    def __call__(self, trainer: Trainer, step: Step) -> None:
        self.values.append(float(step.loss))
        self.tokens.append(step.tokens)


def trained(prepared: Prepared, until: int | None = None) -> Losses:
    """Train to the end, or until a step was made; what every step measured."""
    losses, trainer = Losses(), prepared.trainer
    trainer.hooks = (losses,)
    if until is not None:
        trainer.stop = Until(trainer, until)
    trainer.fit()
    return losses
