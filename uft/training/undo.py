"""A step whose loss or gradient is not finite did not happen: everything is as it was, and its rows are named.

To know, somebody has to wait for the device. On a CPU the answer is there before the update. A GPU is asked while it
works on the next step, so that it never runs dry: its optimiser passes over the update by itself, and what the step
did besides (the data's cursors, the objective's state, the generators, the counters) is kept until the answer is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from uft.data.batches import Item
from uft.errors import FAILED, Problem, UftError
from uft.training.checkpoints import random_state, restore_random_state
from uft.training.meter import Meter
from uft.training.step import Step, culprits

if TYPE_CHECKING:
    from uft.training.trainer import Progress, Trainer

Tensor = torch.Tensor


@dataclass(frozen=True)
class Before:
    """What a step changes besides the weights and the optimiser's state, as it was before it."""

    feed: dict[str, Any]
    state: Mapping[str, Tensor]  # of the objective
    random: Mapping[str, Tensor]
    progress: Progress
    meter: Meter

    @classmethod
    def of(cls, trainer: Trainer) -> Before:
        return cls(
            feed=trainer.cursor(),
            state={name: tensor.clone() for name, tensor in trainer.objective.state.items()},
            random=random_state(trainer.device),
            progress=replace(trainer.progress),
            meter=trainer.meter.copy(),
        )

    def restore(self, trainer: Trainer) -> None:
        if trainer.ahead:
            trainer.ahead.go_back(self.feed)
        for name, tensor in self.state.items():
            trainer.objective.state[name].copy_(tensor)
        restore_random_state(self.random, trainer.device)
        trainer.progress, trainer.meter = replace(self.progress), self.meter.copy()


@dataclass(frozen=True)
class Taken:
    """A step that was taken. Whether it happened, `step.good` knows."""

    items: Sequence[Item]
    before: Before
    step: Step


def give_up(trainer: Trainer, taken: Taken) -> NoReturn:
    """Undo a step that came to no numbers, and end the training: a UftError (code 1) that names its rows."""
    taken.before.restore(trainer)
    trainer.optimiser.zero_grad(set_to_none=True)  # of the step after it, if that had begun
    rows = culprits(
        taken.items,
        trainer.objective,
        trainer.policy,
        trainer.reference,
        trainer.parameters,
        replace(trainer.clock(trainer.progress.step), learning=False),
        lay_out=trainer.lay_out,
        device=trainer.device,
    )
    taken.before.restore(trainer)  # looking for them drew random numbers
    named = ", ".join(rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    if not named:
        named = "no single row; the step as a whole: " + ", ".join(item.row.id for item in taken.items[:10])
    said = f"loss {float(taken.step.loss)}, gradient norm {float(taken.step.grad_norm)}"
    folder = trainer.save_checkpoint()
    trainer.settle()
    raise UftError(
        Problem(
            f"step {trainer.progress.step + 1}",
            f"the numbers are not finite: {said}",
            advice=(f"rows: {named}", f"the last good state is kept in {folder}"),
        ),
        footer="Look at the rows, lower optim.lr or train.max_grad_norm, and start again.",
        code=FAILED,
    )
