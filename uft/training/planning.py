"""What a run will cost: memory and time, by its configuration alone, and against the largest step it can have."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from uft.alive import doing
from uft.config.schema import Config
from uft.model.forward import DTYPES
from uft.model.load import empty_policy
from uft.model.memory import matrix_rate, peak_memory, shape_of, step_flops
from uft.model.reference import choose_mode
from uft.objectives import make
from uft.tracking.format import count
from uft.training.prepare import Prepared
from uft.training.records import planned
from uft.training.scarce import sparing
from uft.training.step import forward_backward
from uft.training.together import counted_over_all, missing

GIGABYTE = 1e9
LOOKED_AT = 200_000
"""Draws among which the largest step is looked for, or as many as show every row: one may be longer when it comes again
with other completions, and a run may be endless."""


def paper_plan(config: Config) -> str:
    """Memory of each device in a line, before anything but the model's configuration was read."""
    objective, mode = make(config.objective), None
    if objective.needs.reference:
        visits = config.train.epochs if config.train.steps is None else math.inf
        mode = choose_mode(config.model, config.reference, visits, objective.needs.distributions)[0]
    parts = planned(config, shape_of(empty_policy(config.model)), mode)
    devices = config.hardware.processes * config.hardware.nodes
    where = f"each of {devices} devices" if devices > 1 else "one device"
    named = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    return f"plan: about {count(sum(parts.values()))}B on {where} ({named})"


@dataclass(frozen=True)
class Largest:
    """The largest step there can be, as it was taken."""

    tokens: int  # of all processes
    supervised: int
    forwarded: int  # tokens of the largest micro-batch of this one, padding counted
    seconds: float


@doing("the largest step was taken", moving=True)
def worst_step(prepared: Prepared) -> Largest:
    """Forward, backward and update on a whole batch of the longest rows the objective takes. The trainer is spoilt."""
    trainer = prepared.trainer
    cfg = trainer.config.train
    enough = max(trainer.feed.mixture.first_pass, LOOKED_AT)
    draws = trainer.feed.preview(min(prepared.plan.total_rows, enough))
    longest = trainer.feed.longest(draws, cfg.batch_size)
    if not longest:
        return Largest(0, 0, 0, 0.0)

    laid, device = trainer.lay_out(longest), trainer.device
    batches, blanks = laid.batches, missing(laid.batches, laid.blank)
    forwards, clock = (trainer.policy, trainer.reference), trainer.clock(0)
    started = time.perf_counter()
    with sparing("the largest step", trainer.config, longest):
        forward_backward(trainer.objective, batches, *forwards, clock, device, blanks)
        trainer.optimiser.step()  # its moments are memory too
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - started
    tokens, supervised = counted_over_all([sum(b.tokens for b in batches), sum(len(b.target_ids) for b in batches)])
    return Largest(tokens, supervised, max((b.input_ids.numel() for b in batches), default=0), seconds)


def largest_step(prepared: Prepared, before: int | None = None) -> str:
    """The worst-case step, taken, in a line or more. `before`: bytes in use before the model was loaded, to compare
    with what was planned."""
    largest, trainer = worst_step(prepared), prepared.trainer
    peak = peak_memory(trainer.device)
    told = f"largest step: {largest.tokens:,} tokens in {largest.seconds:.1f} s; peak memory {peak / GIGABYTE:.2f} GB"
    if before is None or not largest.tokens:
        return told
    shape = shape_of(trainer.policy)
    mode = prepared.reference.mode if prepared.reference else None
    expected = sum(planned(trainer.config, shape, mode, largest.forwarded).values())
    memory = f"  the model took {count(peak - before)}B of it; planned for this step: {count(expected)}B"
    share = shape.trained / max(1, sum(p.numel() for p in trainer.policy.module.parameters()))
    work = step_flops(shape, largest.tokens, largest.supervised, trained_share=share)
    devices = trainer.config.hardware.processes * trainer.config.hardware.nodes
    rate = devices * matrix_rate(trainer.device, DTYPES[trainer.config.model.dtype])
    ideal = work / rate
    pace = f"  {count(work)}FLOP at {count(rate)}FLOP/s, as large matrices are multiplied here: {ideal:.1f} s at best"
    return "\n".join([told, memory, pace])
