"""The loop. What is optional around it (lines of metrics, the battery, checkpoints) are hooks in `hooks.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from uft.alive import doing
from uft.config.schema import Config
from uft.errors import FAILED, Problem, UftError
from uft.model.forward import Policy
from uft.objectives.base import Clock, Forward, Objective
from uft.parallel.ranks import ranks
from uft.parallel.sharing import finite
from uft.runs import Run
from uft.training import checkpoints, shards
from uft.training.ahead import Ahead, Laid, Plan, worth_a_thread
from uft.training.device import tokens_per_pass
from uft.training.feed import Feed
from uft.training.meter import Meter
from uft.training.optim import asks_late, learning_rate, warmup_steps
from uft.training.scarce import sparing
from uft.training.signals import Stop
from uft.training.step import Step, idle_step, optimiser_step
from uft.training.undo import Before, Taken, give_up

Tensor = torch.Tensor


def _random(rank: int) -> str:
    """Where the generators of a process stand in a checkpoint."""
    return f"random/rank{rank}" if rank else "random"


@dataclass
class Progress:
    """Counters that survive a resume."""

    step: int = 0  # optimiser steps done
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, over all sessions of the run
    evaluated: int = -1  # the step whose battery was last written
    best_step: int | None = None
    best_value: float | None = None


class Hook(Protocol):
    """Something that happens around steps. `trainer.stop()` is looked at between hooks."""

    def after_step(self, trainer: Trainer, step: Step) -> None: ...


@dataclass
class Trainer:
    """Everything a training run is made of, after `prepare` has put it together and before any step."""

    run: Run
    config: Config
    device: torch.device
    objective: Objective
    policy: Policy
    reference: Forward | None
    feed: Feed
    optimiser: torch.optim.Optimizer
    pad_id: int
    steps: int  # the horizon; kept in the checkpoint
    total_rows: int  # rows the horizon draws; the last step may take fewer than a batch
    epoch_rows: int
    stop: Stop
    hooks: Sequence[Hook] = ()
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    pending: tuple[Future[Any], Path] | None = None  # a checkpoint that is being written, and where
    ahead: Ahead | None = None  # while it trains
    taken: Taken | None = None  # the last step, until somebody asked whether it happened

    def __post_init__(self) -> None:
        self.parameters = self.policy.trainable()
        self.late = asks_late(self.config.train.sync_every_step, self.device, self.optimiser)
        self.never_finite = {n for n, good in self._finite().items() if not good}

    def clock(self, step: int) -> Clock:
        """The clock of a step: a function of its number and the seed alone."""
        # torch's CPU generator takes 32 bits of its seed; Python's own hash may change between versions
        generator = torch.Generator().manual_seed((self.config.seeds.sampling * 1_000_003 + step) % 2**32)
        noise = float(torch.randn((), generator=generator))
        warmup = warmup_steps(self.config.optim.warmup, self.steps)
        return Clock(step=step, steps=self.steps, warmup=warmup, noise=noise)

    @property
    def lay_out(self) -> Plan:
        """How rows become micro-batches."""
        cuda = self.device.type == "cuda"
        return Plan(tokens_per_pass(self.config), self.pad_id, self.policy.layout, pinned=cuda)

    def fit(self) -> None:
        """Train to the horizon or until asked to stop. Raises UftError (code 1) when the numbers stop being numbers."""
        self.policy.train()
        threaded = worth_a_thread(self.config.train.prefetch, self.device)
        self.ahead = Ahead(self.feed, self.lay_out, mismatched=self.objective.needs.mismatched, threaded=threaded)
        gc.collect()
        gc.freeze()  # what is there stays: no collection needs to look through it again
        try:
            while self.progress.step < self.steps and not self.stop.agreed():
                step = self._step()
                for hook in self.hooks:
                    hook.after_step(self, step)
            self.confirm()
        finally:
            gc.unfreeze()
            self.ahead.close()
            self.ahead = None

    def _step(self) -> Step:
        assert self.ahead is not None
        before = Before.of(self)
        started, seconds = time.perf_counter(), self.progress.seconds
        left = self.total_rows - self.progress.rows
        rows = min(self.config.train.batch_size, left)
        laid = self.ahead.take(rows, then=min(self.config.train.batch_size, left - rows))
        with sparing(f"step {self.progress.step + 1}", self.config, laid.items):
            step = self._update(laid)
            self.confirm()  # the step before it, where this one had no rows and so no reason to ask
        self.taken = Taken(laid.items, before, step)
        if not self.late:
            self.confirm()
        self.progress.step += 1
        self.progress.rows += rows
        self.progress.tokens += step.tokens
        self.progress.supervised_tokens += step.supervised_tokens
        self.progress.seconds = seconds + time.perf_counter() - started  # what was waited for the step before is in it
        measured = float(bool(laid.items))
        self.meter.add("loss", step.loss, measured)
        self.meter.add("grad_norm", step.grad_norm, measured)
        self.meter.add_loss({name: term for name, term in step.terms.items() if name != "loss"})
        return step

    def confirm(self) -> None:
        """Whoever shows or keeps what the last step led to asks first whether it happened.

        Raises UftError (code 1), with everything as it was before that step, where its numbers were not finite.
        """
        taken, self.taken = self.taken, None
        started = time.perf_counter()
        if taken is not None and not taken.step.good:
            give_up(self, taken)
        self.progress.seconds += time.perf_counter() - started

    def _update(self, rows: Laid) -> Step:
        number = self.progress.step
        if not rows.items:  # the objective takes nothing of any of these rows
            return idle_step(self.device)
        return optimiser_step(
            rows,
            self.objective,
            self.policy,
            self.reference,
            self.optimiser,
            self.parameters,
            self.clock(number),
            lr=learning_rate(number, self.steps, self.config.optim),
            max_grad_norm=self.config.train.max_grad_norm,
            device=self.device,
            late=self.late,
            confirm=self.confirm,
        )

    def cursor(self) -> dict[str, Any]:
        """Where the data stand after the last step."""
        return self.ahead.cursor if self.ahead else self.feed.state_dict()

    def _overflown(self) -> list[str]:
        """Trained weights that hold numbers which are not finite, and did not when they came from their files."""
        return [name for name, good in self._finite().items() if not good and name not in self.never_finite]

    def _finite(self) -> dict[str, bool]:
        return dict(zip(self.parameters, finite(self.parameters.values()), strict=True))

    @doing("a checkpoint was written", moving=True)
    def save_checkpoint(self) -> Path:
        """Publish the state after the last step, or begin to (`settle`); its folder.

        Raises UftError (code 1) where its weights overflowed.
        A loss or gradient that is not finite shows before the update, an update that is too large only after it.
        """
        self.confirm()
        if overflown := self._overflown():
            earlier = self.run.checkpoints()
            good = f"the last good state is {earlier[-1][1]}" if earlier else "there is no checkpoint before it"
            why = f"{len(overflown)} of the trained weights are not finite any more, {overflown[0]} among them"
            problem = Problem(f"step {self.progress.step}", why, advice=(good,))
            raise UftError(problem, footer="Lower optim.lr, and start again.", code=FAILED)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        learned = {
            **checkpoints.nested("model", self.parameters),
            **checkpoints.nested("optimiser", checkpoints.optimiser_tensors(self.optimiser, names)),
        }
        generators = ranks().gather(checkpoints.random_state(self.device))
        if not ranks().in_step:
            return ranks().from_first(lambda: self._publish(self._begin_checkpoint(learned, generators)))
        self.settle()
        beside = ranks().from_first(lambda: self._begin_checkpoint({}, generators))
        self.pending = (shards.begin(beside, learned), beside)
        return checkpoints.final(beside)

    @doing("a checkpoint was written", moving=True)
    def settle(self, wait: bool = True) -> None:
        """Publish the checkpoint that is being written in the background, if one is: in any case, or only if it is done
        in every process."""
        if self.pending is None:
            return
        future, beside = self.pending
        if not wait and ranks().largest(not future.done()):
            return
        self.pending = None
        problem = future.exception()  # waits
        if ranks().largest(problem is not None):
            raise problem or RuntimeError("another process could not write its part of a checkpoint")
        ranks().from_first(lambda: self._publish(beside))

    def _begin_checkpoint(self, learned: Mapping[str, Tensor], generators: Sequence[Mapping[str, Tensor]]) -> Path:
        tensors = {
            **learned,
            **checkpoints.nested("objective", self.objective.state),
            **checkpoints.nested("meter", self.meter.state_dict()),
            **{
                n: t
                for rank, state in enumerate(generators)
                for n, t in checkpoints.nested(_random(rank), state).items()
            },
        }
        state = {"progress": asdict(self.progress), "feed": self.cursor(), "steps": self.steps}
        return checkpoints.begin(self.run, self.progress.step, tensors, state)

    def _publish(self, beside: Path) -> Path:
        folder = checkpoints.publish(self.run, beside)
        checkpoints.prune(self.run, self.config.train.keep_last, self.progress.best_step)
        return folder

    def load_checkpoint(self, folder: Path) -> None:
        tensors, state = checkpoints.load(folder)
        if shards.there(folder):
            tensors |= shards.read(folder, self.parameters)
        self.policy.load_trainable(checkpoints.below("model", tensors))
        checkpoints.load_optimiser(self.optimiser, self.parameters, checkpoints.below("optimiser", tensors))
        for name, tensor in checkpoints.below("objective", tensors).items():
            self.objective.state[name].copy_(tensor)
        self.meter.load_state_dict(checkpoints.below("meter", tensors), self.device)
        generators = checkpoints.below(_random(ranks().rank), tensors)
        if generators:  # else there are more processes now, and this one keeps the seed it began with
            checkpoints.restore_random_state(generators, self.device)
        self.feed.load_state_dict(state["feed"])
        self.progress = Progress(**state["progress"])
        self.steps = state["steps"]  # the horizon of the schedule never changes shape under a run
