"""The training loop, its checkpoints, the rollback of a step that was not finite, and advice where memory runs out.

Metric lines, evaluations and the times of checkpoints are hooks of the session.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from uft.config.schema import Config
from uft.data.batch import Example, collate
from uft.data.loader import Collator, Prefetcher, RowSampler, StepBatches, use_prefetch_thread
from uft.distributed import all_finite, ranks
from uft.errors import FAILED, Problem, UftError, first_line
from uft.evaluation.evaluate import Sample, prompt_text
from uft.heartbeat import activity, report_progress
from uft.model import checkpoint
from uft.model.passes import EmbeddingNoise
from uft.model.policy import Frozen, Policy
from uft.objectives.base import Forward, Loss, Objective, StepContext
from uft.runs import Run
from uft.sampling.generate import Interrupted
from uft.sampling.rollouts import RolloutSampler
from uft.training.liveness import Stop
from uft.training.step import Step, defers_finite_check, nonfinite_rows, optimiser_step, warmup_steps

Tensor = torch.Tensor
State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass
class Progress:
    """Counters that survive a resume."""

    step: int = 0  # optimiser steps done
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, over all sessions of the run
    evaluated: int = -1  # the step of the last evaluation
    best_step: int | None = None
    best_value: float | None = None
    ended: str = ""  # why training ended before its horizon


class Meter:
    """Means over the steps since the last metric line, summed on the device in float64.

    Its tensors are part of the checkpoint, so that the curve of a resumed run is bit-equal.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}  # name -> () total, () count; no tensor is changed in place

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        added = [torch.as_tensor(number).detach().double() for number in (total, count)]
        # popped and put in again: the order is that of the last step, in a resumed meter too
        before = self.sums.pop(name, None)
        total, count = added if before is None else (before[0] + added[0], before[1] + added[1])
        self.sums[name] = (total, count)

    def add_loss(self, loss: Loss) -> None:
        """Each term's mean in this step; a step in which a term has no units does not count for it.

        `nll` is per supervised token of all these steps: it has one definition under every objective.
        """
        for name, term in loss.items():
            if name == "nll":
                self.add(name, term.total, term.count)
            else:
                self.add(name, term.total / term.count.clamp(min=1), term.count > 0)

    def means(self) -> dict[str, float]:
        """total / count of everything with a count; resets the meter."""
        sums, self.sums = self.sums, {}
        return {name: float(total) / float(count) for name, (total, count) in sums.items() if float(count) > 0}

    def state_dict(self) -> dict[str, Tensor]:
        totals = {f"totals/{name}": total for name, (total, _) in self.sums.items()}
        return totals | {f"counts/{name}": count for name, (_, count) in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        names = [key.removeprefix("totals/") for key in state if key.startswith("totals/")]
        self.sums = {n: (state[f"totals/{n}"].to(device), state[f"counts/{n}"].to(device)) for n in names}


@dataclass
class Trainer:
    """State and loop of training, put together by `setup.prepare` before the first step."""

    run: Run
    config: Config
    device: torch.device
    objective: Objective
    policy: Policy
    reference: Forward | None
    sampler: RowSampler
    rollouts: RolloutSampler | None  # samples completions of the rows of each step; None: rows are taken as they are
    optimiser: torch.optim.Optimizer
    collator: Collator  # examples -> micro-batches, as the configuration and the policy's layout have it
    steps: int  # the horizon; kept in the checkpoint
    total_rows: int  # rows the horizon draws; the last step may take fewer than a batch
    epoch_rows: int
    stop: Stop
    hooks: Sequence[Callable[[Trainer, Step], None]] = ()  # called after every step
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    prefetcher: Prefetcher | None = None  # while it trains
    last_step: tuple[Sequence[Example], State, Step] | None = None  # its rows and the state before it, until checked
    pending_checkpoint: tuple[Future[Any], Path] | None = None  # a sharded one that is being written, and its folder

    def __post_init__(self) -> None:
        self.parameters = self.policy.trainable()
        self.defer_check = defers_finite_check(self.config.train.sync_every_step, self.device, self.optimiser)
        self.nonfinite_at_start = set(self._nonfinite_weights())
        self.synced_reference: dict[str, torch.nn.Parameter] = {}  # its weights, where `reference.sync_every` is set
        if self.config.reference.sync_every and isinstance(self.reference, Frozen) and not self.objective.needs.teacher:
            self.synced_reference = dict(self.reference.policy.module.named_parameters())

    def fit(self) -> None:
        """Train to the horizon or until asked to stop. Raises UftError (code 1) after a step that is not finite."""
        report_progress(self.progress.step, self.steps, "steps done")
        self.policy.train()
        # rollouts need the weights of the step before them
        threaded = use_prefetch_thread(self.config.train.prefetch, self.device) and self.rollouts is None
        mismatched = self.objective.needs.mismatched
        self.prefetcher = Prefetcher(self.feed, self.collator, mismatched=mismatched, threaded=threaded)
        gc.collect()
        gc.freeze()  # no later collection looks through the millions of objects that are there now
        try:
            while not self.complete and not self.stop.agreed():
                step = self._step(self.prefetcher)
                for hook in self.hooks:
                    hook(self, step)
            self.await_finite_check()
        except Interrupted:  # within a rollout, which is sampled anew
            self.await_finite_check()
        finally:
            gc.unfreeze()
            self.prefetcher.close()
            self.prefetcher = None
            if self.rollouts:
                self.rollouts.engine.close()

    @property
    def complete(self) -> bool:
        """Whether the horizon is reached, or training ended before it."""
        return self.progress.step >= self.steps or bool(self.progress.ended)

    @property
    def feed(self) -> RowSampler | RolloutSampler:
        """Where the rows of each step come from."""
        return self.rollouts or self.sampler

    def _step(self, prefetcher: Prefetcher) -> Step:
        before = self.state()
        started, seconds = time.perf_counter(), self.progress.seconds
        left = self.total_rows - self.progress.rows
        rows = min(self.config.train.batch_size, left)
        batches = prefetcher.take(rows, then=min(self.config.train.batch_size, left - rows))
        with oom_advice(f"step {self.progress.step + 1}", self.config, batches.examples):
            step = self.update(batches)
        self.last_step = (batches.examples, before, step)
        if not self.defer_check:
            self.await_finite_check()
        self.progress.step += 1
        self.progress.rows += rows
        self.progress.tokens += step.tokens
        self.progress.supervised_tokens += step.supervised_tokens
        self.progress.seconds = seconds + time.perf_counter() - started  # includes waiting for the step before
        measured = float(bool(batches.examples))
        self.meter.add("loss", step.loss, measured)
        self.meter.add("grad_norm", step.grad_norm, measured)
        self.meter.add_loss({name: term for name, term in step.terms.items() if name != "loss"})
        for name, (total, number) in (self.rollouts.pop_metrics() if self.rollouts else {}).items():
            self.meter.add(name, total, number)
        if self.synced_reference and self.progress.step % (self.config.reference.sync_every or 1) == 0:
            self.await_finite_check()  # a step that is rolled back must not have moved it
            with torch.no_grad():  # alpha policy + (1 - alpha) reference, alpha = `sync_mix` (TR-DPO, arXiv 2404.09656)
                for name, weight in self.synced_reference.items():
                    weight.lerp_(self.parameters[name], self.config.reference.sync_mix)
        return step

    def update(self, batches: StepBatches) -> Step:
        """One optimiser step on `batches`, after the check of the step before; no rows, no update."""
        if not batches.examples:  # the objective takes nothing of any row of the step
            self.await_finite_check()
            nothing = torch.zeros((), device=self.device)
            return Step(nothing, {}, nothing)
        number, alpha = self.progress.step, self.config.train.neftune_alpha
        if alpha:
            self.policy.noise = EmbeddingNoise(alpha, (self.config.seeds.sampling, number, ranks().rank))
        return optimiser_step(self, batches, self.step_context(number))

    def step_context(self, step: int) -> StepContext:
        """The context of a step: a function of its number and the seed alone."""
        # torch's CPU generator takes 32 bits of its seed; Python's own hash may change between versions
        generator = torch.Generator().manual_seed((self.config.seeds.sampling * 1_000_003 + step) % 2**32)
        noise = float(torch.randn((), generator=generator))
        warmup = warmup_steps(self.config.optim.warmup, self.steps)
        return StepContext(step=step, steps=self.steps, warmup=warmup, noise=noise)

    def await_finite_check(self) -> None:
        """Block until the last step's finite check has arrived; roll back if it failed.

        To be called before anything shows or keeps what that step led to. Raises UftError (code 1), with everything as
        it was before the step.
        """
        last, self.last_step = self.last_step, None
        started = time.perf_counter()
        if last is not None and not last[-1].finite:
            rollback(self, *last)
        self.progress.seconds += time.perf_counter() - started

    # --- its state, and checkpoints

    def cursor(self) -> dict[str, Any]:
        """The sampler's state after the last step."""
        return self.prefetcher.cursor if self.prefetcher else self.feed.state_dict()

    def state(self) -> State:
        """State besides weights and moments that a step changes, as a checkpoint holds it."""
        tensors = {
            **add_prefix("objective", {name: tensor.clone() for name, tensor in self.objective.state.items()}),
            **add_prefix("meter", self.meter.state_dict()),
            **add_prefix(_random(ranks().rank), random_state(self.device)),
        }
        return tensors, {"progress": asdict(self.progress), "feed": self.cursor(), "steps": self.steps}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        for name, tensor in strip_prefix("objective", tensors).items():
            self.objective.state[name].copy_(tensor)
        self.meter.load_state_dict(strip_prefix("meter", tensors), self.device)
        if generators := strip_prefix(_random(ranks().rank), tensors):
            # else there are more ranks now: this one keeps its seed
            torch.set_rng_state(generators["cpu"])
            if self.device.type == "cuda" and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"], self.device)
        if self.prefetcher:
            self.prefetcher.rewind(values["feed"])
        else:
            self.feed.load_state_dict(values["feed"])
        self.progress = Progress(**values["progress"])
        # the horizon of a schedule that falls never changes under a run; a constant one may have been extended since
        extended = self.config.train.steps is not None and self.config.optim.schedule == "constant"
        self.steps = max(values["steps"], self.steps) if extended else values["steps"]

    def _nonfinite_weights(self) -> list[str]:
        finite = all_finite(self.parameters.values())
        return [name for name, is_finite in zip(self.parameters, finite, strict=True) if not is_finite]

    @activity("a checkpoint was written", moving=True)
    def save_checkpoint(self) -> Path:
        """Publish the state after the last step; its folder. Sharded, it is written in the background and published by
        `publish_pending_checkpoint`.

        Raises UftError (code 1) where weights have overflowed: a non-finite loss or gradient shows before the update,
        an update that is too large only after it.
        """
        self.await_finite_check()
        if overflown := [name for name in self._nonfinite_weights() if name not in self.nonfinite_at_start]:
            earlier = self.run.checkpoints()
            good = f"the last good state is {earlier[-1][1]}" if earlier else "there is no checkpoint before it"
            why = f"{len(overflown)} of the trained weights are not finite any more, {overflown[0]} among them"
            problem = Problem(f"step {self.progress.step}", why, advice=(good,))
            raise UftError(problem, footer="Lower optim.lr, and start again.", code=FAILED)
        moments = checkpoint.optimiser_tensors(self.optimiser, self.parameters)
        learned = {**add_prefix("model", self.parameters), **add_prefix("optimiser", moments)}
        learned |= add_prefix("reference", self.synced_reference)
        others, values = self.state()
        for rank, generators in enumerate(ranks().gather_objects(random_state(self.device))):
            others |= add_prefix(_random(rank), generators)
        step = self.progress.step
        if not ranks().sharded:
            tensors = {**learned, **others}
            return ranks().on_rank0(lambda: self._publish(checkpoint.begin(self.run, step, tensors, values)))
        self.publish_pending_checkpoint()
        folder = ranks().on_rank0(lambda: checkpoint.begin(self.run, step, others, values))
        self.pending_checkpoint = (checkpoint.begin_shards(folder, learned), folder)
        return checkpoint.final(folder)

    @activity("a checkpoint was written", moving=True)
    def publish_pending_checkpoint(self, wait: bool = True) -> None:
        """Publish the checkpoint that is being written in the background; without `wait` only if all ranks are done."""
        if self.pending_checkpoint is None:
            return
        writing, folder = self.pending_checkpoint
        if not wait and ranks().all_reduce_max(not writing.done()):
            return
        self.pending_checkpoint = None
        problem = writing.exception()  # waits
        if ranks().all_reduce_max(problem is not None):
            raise problem or RuntimeError("another process could not write its part of a checkpoint")
        ranks().on_rank0(lambda: self._publish(folder))

    def _publish(self, hidden: Path) -> Path:
        folder = checkpoint.publish(self.run, hidden)
        checkpoint.prune(self.run, self.config.train.keep_last, self.progress.best_step)
        return folder

    def load_checkpoint(self, folder: Path) -> None:
        """Raises checkpoint.Damaged, or UftError where the checkpoint is of another model or adapter."""
        tensors, values = checkpoint.load(folder, self.parameters)
        self.policy.load_trainable(strip_prefix("model", tensors))
        checkpoint.load_optimiser(self.optimiser, self.parameters, strip_prefix("optimiser", tensors))
        with torch.no_grad():
            for name, tensor in strip_prefix("reference", tensors).items():
                self.synced_reference[name].copy_(tensor)
        self.load_state(tensors, values)


def own_samples(trainer: Trainer) -> list[Sample]:
    """The first group that the policy sampled for the last step: each completion with its figures and its reward, and
    with its advantage where the objective has one."""
    rollouts, objective = trainer.rollouts, trainer.objective
    group = next(iter(rollouts.latest), None) if rollouts else None
    if rollouts is None or group is None:
        return []
    row, _ = rollouts.row(group)
    first = len(row.completions) - len(group.replies)
    verdicts = [{**found, "reward": score} for found, score in zip(group.figures, group.scores, strict=True)]
    verdicts = verdicts or [{} for _ in group.replies]
    example = rollouts.example(group)
    advantages = objective.advantages(collate([example], trainer.collator.pad_id)) if example else None
    if example and advantages is not None:
        for part, advantage in zip(example.parts, advantages.tolist(), strict=True):
            if part.completion >= first:
                verdicts[part.completion - first]["advantage"] = advantage
    source, prompt = f"{row.source} (own)", prompt_text(row.prompt)
    own = zip(row.completions[first:], verdicts, strict=True)
    return [Sample(source, row.id, prompt, one.text, row.answer, verdict) for one, verdict in own]


def add_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`, without it."""
    return {n.removeprefix(f"{prefix}/"): tensor for n, tensor in tensors.items() if n.startswith(f"{prefix}/")}


def _random(rank: int) -> str:
    """Prefix of a rank's generator states in a checkpoint."""
    return f"random/rank{rank}" if rank else "random"


# --- Rollback of a step whose loss or gradient norm is not finite. On a CPU the check is there before the update. A GPU
# is asked while it works on the next step, so that it never runs dry: its optimiser skips the update by itself, and the
# rest of what a step changes is kept until the check has arrived.


def rollback(trainer: Trainer, examples: Sequence[Example], before: State, step: Step) -> NoReturn:
    """Undo a step that was not finite, save a checkpoint, and raise a UftError (code 1) that names its rows."""
    trainer.load_state(*before)
    context = trainer.step_context(trainer.progress.step)
    rows = nonfinite_rows(trainer, examples, context)
    trainer.load_state(*before)  # the search drew random numbers
    named = ", ".join(rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
    if not named:
        named = "no single row; the step as a whole: " + ", ".join(item.row.id for item in examples[:10])
    why = f"the numbers are not finite: loss {float(step.loss)}, gradient norm {float(step.grad_norm)}"
    folder = trainer.save_checkpoint()
    trainer.publish_pending_checkpoint()
    advice = (f"rows: {named}", f"the last good state is kept in {folder}")
    footer = "Look at the rows, lower optim.lr or train.max_grad_norm, and start again."
    raise UftError(Problem(f"step {trainer.progress.step + 1}", why, advice=advice), footer=footer, code=FAILED)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


# --- The memory of a pass: its tokens, and advice where they are too many.


PASS, CPU_PASS = 8192, 768
"""Tokens of a forward pass unless asked otherwise. A GPU wants to be filled; a CPU is nearly as fast in small passes,
which take much less memory: see docs/performance.md."""


def available_devices() -> list[str]:
    """The kinds of devices of this machine, the best first."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in kinds.items() if there]


def tokens_per_pass(config: Config) -> int:
    """`train.micro_batch_tokens`, or the default of the device."""
    device = config.hardware.device
    on_cpu = (available_devices()[0] if device == "auto" else device) == "cpu"
    return config.train.micro_batch_tokens or (CPU_PASS if on_cpu else PASS)


REMEDIES = 3  # in one error, at most
CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")
"""Words of the plain RuntimeError that torch raises when the CPU's allocator fails."""


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_ALLOCATOR)


@contextmanager
def oom_advice(what: str, config: Config, examples: Sequence[Example] = ()) -> Iterator[None]:
    """Inside, running out of memory becomes a UftError (code 1) about `what`, which worked on `examples`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explain_oom(error, what, config, examples) from error


def explain_oom(error: BaseException, what: str, config: Config, examples: Sequence[Example] = ()) -> UftError:
    """The error's own words, the size of the step if there was one, and the cheapest keys that help."""
    advice = []
    if lengths := [encoded.length for item in examples for encoded in item.encoded]:
        advice.append(
            f"the step has {len(examples)} rows, {len(lengths)} sequences, {sum(lengths):,} tokens; the longest "
            f"sequence has {max(lengths):,}; passes of up to {tokens_per_pass(config):,} tokens"
        )
    remedies = [f"shorter passes:  train.micro_batch_tokens={max(1, tokens_per_pass(config) // 2)}"]
    if not config.model.gradient_checkpointing:
        remedies.append("recompute activations:  model.gradient_checkpointing=true")
    if config.model.adapter == "none":
        remedies.append("train an adapter alone:  model.adapter=lora")
    remedies.append(f"shorter rows:  train.max_length={max(2, config.train.max_length // 2)} data.too_long=drop")
    problem = Problem(what, f"out of memory: {first_line(error)}", advice=(*advice, *remedies[:REMEDIES]))
    return UftError(problem, code=FAILED)
