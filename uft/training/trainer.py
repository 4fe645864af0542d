"""The loop. What is optional around it (lines of metrics, the battery, checkpoints) are hooks in `hooks.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from uft.config.schema import Config
from uft.data.batch import Example
from uft.data.loader import Collator, Prefetcher, RowSampler, StepBatches, use_prefetch_thread
from uft.distributed import all_finite, ranks
from uft.errors import FAILED, Problem, UftError
from uft.heartbeat import activity
from uft.model.policy import Policy
from uft.objectives.base import Forward, Loss, Objective, StepContext
from uft.runs import Run
from uft.training import checkpoint
from uft.training.checkpoint import random_state, restore_random_state
from uft.training.device import oom_advice, tokens_per_pass
from uft.training.liveness import Stop
from uft.training.optim import asks_late, learning_rate, warmup_steps
from uft.training.step import Step, culprits, idle_step, optimiser_step

# --- Meter: what happened since the last metric line, summed on the device and brought to the host only when asked.


Tensor = torch.Tensor


class Meter:
    """Means over steps. Its tensors are part of the checkpoint: a resumed curve repeats every digit."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        total, count = torch.as_tensor(total).detach().double(), torch.as_tensor(count).detach().double()
        # taken out and put in again: the order is that of the last step, so that a resumed meter has it too
        self.totals[name] = self.totals.pop(name) + total if name in self.totals else total
        self.counts[name] = self.counts.pop(name) + count if name in self.counts else count

    def add_loss(self, loss: Loss) -> None:
        """Each term's mean in this step; a step in which it has no units does not count for it."""
        for name, term in loss.items():
            self.add(name, term.total / term.count.clamp(min=1), term.count > 0)

    def means(self) -> dict[str, float]:
        """total / count of everything that was counted at all; then start anew."""
        totals = {name: float(total) for name, total in self.totals.items()}
        counts = {name: float(count) for name, count in self.counts.items()}
        self.totals, self.counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items() if counts[name] > 0}

    def copy(self) -> Meter:
        """As it is now: what it holds is replaced, never changed."""
        copied = Meter()
        copied.totals, copied.counts = dict(self.totals), dict(self.counts)
        return copied

    def state_dict(self) -> dict[str, Tensor]:
        totals = {f"totals/{name}": total.cpu() for name, total in self.totals.items()}
        return totals | {f"counts/{name}": count.cpu() for name, count in self.counts.items()}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        for key, value in state.items():
            part, _, name = key.partition("/")
            getattr(self, part)[name] = value.to(device)


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
    sampler: RowSampler
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
    ahead: Prefetcher | None = None  # while it trains
    taken: PendingStep | None = None  # the last step, until somebody asked whether it happened

    def __post_init__(self) -> None:
        self.parameters = self.policy.trainable()
        self.late = asks_late(self.config.train.sync_every_step, self.device, self.optimiser)
        self.never_finite = {n for n, good in self._finite().items() if not good}

    def step_context(self, step: int) -> StepContext:
        """The context of a step: a function of its number and the seed alone."""
        # torch's CPU generator takes 32 bits of its seed; Python's own hash may change between versions
        generator = torch.Generator().manual_seed((self.config.seeds.sampling * 1_000_003 + step) % 2**32)
        noise = float(torch.randn((), generator=generator))
        warmup = warmup_steps(self.config.optim.warmup, self.steps)
        return StepContext(step=step, steps=self.steps, warmup=warmup, noise=noise)

    @property
    def lay_out(self) -> Collator:
        """How rows become micro-batches."""
        cuda = self.device.type == "cuda"
        return Collator(tokens_per_pass(self.config), self.pad_id, self.policy.layout, pinned=cuda)

    def fit(self) -> None:
        """Train to the horizon or until asked to stop. Raises UftError (code 1) when the numbers stop being numbers."""
        self.policy.train()
        threaded = use_prefetch_thread(self.config.train.prefetch, self.device)
        self.ahead = Prefetcher(
            self.sampler, self.lay_out, mismatched=self.objective.needs.mismatched, threaded=threaded
        )
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
        before = Snapshot.of(self)
        started, seconds = time.perf_counter(), self.progress.seconds
        left = self.total_rows - self.progress.rows
        rows = min(self.config.train.batch_size, left)
        laid = self.ahead.take(rows, then=min(self.config.train.batch_size, left - rows))
        with oom_advice(f"step {self.progress.step + 1}", self.config, laid.items):
            step = self._update(laid)
            self.confirm()  # the step before it, where this one had no rows and so no reason to ask
        self.taken = PendingStep(laid.items, before, step)
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
            rollback(self, taken)
        self.progress.seconds += time.perf_counter() - started

    def _update(self, rows: StepBatches) -> Step:
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
            self.step_context(number),
            lr=learning_rate(number, self.steps, self.config.optim),
            max_grad_norm=self.config.train.max_grad_norm,
            device=self.device,
            late=self.late,
            confirm=self.confirm,
        )

    def cursor(self) -> dict[str, Any]:
        """Where the data stand after the last step."""
        return self.ahead.cursor if self.ahead else self.sampler.state_dict()

    def _overflown(self) -> list[str]:
        """Trained weights that hold numbers which are not finite, and did not when they came from their files."""
        return [name for name, good in self._finite().items() if not good and name not in self.never_finite]

    def _finite(self) -> dict[str, bool]:
        return dict(zip(self.parameters, all_finite(self.parameters.values()), strict=True))

    @activity("a checkpoint was written", moving=True)
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
            **checkpoint.nested("model", self.parameters),
            **checkpoint.nested("optimiser", checkpoint.optimiser_tensors(self.optimiser, names)),
        }
        generators = ranks().gather_objects(checkpoint.random_state(self.device))
        if not ranks().sharded:
            return ranks().on_rank0(lambda: self._publish(self._begin_checkpoint(learned, generators)))
        self.settle()
        beside = ranks().on_rank0(lambda: self._begin_checkpoint({}, generators))
        self.pending = (checkpoint.begin_sharded(beside, learned), beside)
        return checkpoint.final(beside)

    @activity("a checkpoint was written", moving=True)
    def settle(self, wait: bool = True) -> None:
        """Publish the checkpoint that is being written in the background, if one is: in any case, or only if it is done
        in every process."""
        if self.pending is None:
            return
        future, beside = self.pending
        if not wait and ranks().all_reduce_max(not future.done()):
            return
        self.pending = None
        problem = future.exception()  # waits
        if ranks().all_reduce_max(problem is not None):
            raise problem or RuntimeError("another process could not write its part of a checkpoint")
        ranks().on_rank0(lambda: self._publish(beside))

    def _begin_checkpoint(self, learned: Mapping[str, Tensor], generators: Sequence[Mapping[str, Tensor]]) -> Path:
        tensors = {
            **learned,
            **checkpoint.nested("objective", self.objective.state),
            **checkpoint.nested("meter", self.meter.state_dict()),
            **{
                n: t
                for rank, state in enumerate(generators)
                for n, t in checkpoint.nested(_random(rank), state).items()
            },
        }
        state = {"progress": asdict(self.progress), "feed": self.cursor(), "steps": self.steps}
        return checkpoint.begin(self.run, self.progress.step, tensors, state)

    def _publish(self, beside: Path) -> Path:
        folder = checkpoint.publish(self.run, beside)
        checkpoint.prune(self.run, self.config.train.keep_last, self.progress.best_step)
        return folder

    def load_checkpoint(self, folder: Path) -> None:
        tensors, state = checkpoint.load(folder)
        if checkpoint.is_sharded(folder):
            tensors |= checkpoint.read_sharded(folder, self.parameters)
        self.policy.load_trainable(checkpoint.below("model", tensors))
        checkpoint.load_optimiser(self.optimiser, self.parameters, checkpoint.below("optimiser", tensors))
        for name, tensor in checkpoint.below("objective", tensors).items():
            self.objective.state[name].copy_(tensor)
        self.meter.load_state_dict(checkpoint.below("meter", tensors), self.device)
        generators = checkpoint.below(_random(ranks().rank), tensors)
        if generators:  # else there are more processes now, and this one keeps the seed it began with
            checkpoint.restore_random_state(generators, self.device)
        self.sampler.load_state_dict(state["feed"])
        self.progress = Progress(**state["progress"])
        self.steps = state["steps"]  # the horizon of the schedule never changes shape under a run


# --- A step whose loss or gradient is not finite did not happen: everything is as it was, and its rows are named.
#
# To know, somebody has to wait for the device. On a CPU the answer is there before the update. A GPU is asked while
# it
# works on the next step, so that it never runs dry: its optimiser passes over the update by itself, and what the step
# did besides (the data's cursors, the objective's state, the generators, the counters) is kept until the answer is
# there.


@dataclass(frozen=True)
class Snapshot:
    """What a step changes besides the weights and the optimiser's state, as it was before it."""

    sampler: dict[str, Any]
    state: Mapping[str, Tensor]  # of the objective
    random: Mapping[str, Tensor]
    progress: Progress
    meter: Meter

    @classmethod
    def of(cls, trainer: Trainer) -> Snapshot:
        return cls(
            sampler=trainer.cursor(),
            state={name: tensor.clone() for name, tensor in trainer.objective.state.items()},
            random=random_state(trainer.device),
            progress=replace(trainer.progress),
            meter=trainer.meter.copy(),
        )

    def restore(self, trainer: Trainer) -> None:
        if trainer.ahead:
            trainer.ahead.go_back(self.sampler)
        for name, tensor in self.state.items():
            trainer.objective.state[name].copy_(tensor)
        restore_random_state(self.random, trainer.device)
        trainer.progress, trainer.meter = replace(self.progress), self.meter.copy()


@dataclass(frozen=True)
class PendingStep:
    """A step that was taken. Whether it happened, `step.good` knows."""

    items: Sequence[Example]
    before: Snapshot
    step: Step


def rollback(trainer: Trainer, taken: PendingStep) -> NoReturn:
    """Undo a step that came to no numbers, and end the training: a UftError (code 1) that names its rows."""
    taken.before.restore(trainer)
    trainer.optimiser.zero_grad(set_to_none=True)  # of the step after it, if that had begun
    rows = culprits(
        taken.items,
        trainer.objective,
        trainer.policy,
        trainer.reference,
        trainer.parameters,
        replace(trainer.step_context(trainer.progress.step), learning=False),
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
