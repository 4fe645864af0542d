"""Gradients in one visit of the head: an objective is asked part by part, while the logits of the part are still there.

Counts are known before any forward pass and every loss is a sum over rows, so a few rows of a micro-batch can be judged
like a micro-batch of their own: the objective gets them with their log-probs, and what comes out is the gradient of
these. No objective knows. It works for all that make one forward pass with gradients (others before it, without, are
made for the whole micro-batch); those that make several, or compare whole distributions, go the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from uft.data.batch import Batch
from uft.model.forward import Policy
from uft.objectives.base import PLAIN, Ask, Clock, Forward, Loss, Objective, Scores

Tensor = torch.Tensor
Weighted = Callable[[Loss], Tensor | None]

LIKELY = -1.0
"""Log-prob of every target while an objective only shows what it asks for."""


def visit(
    objective: Objective,
    batch: Batch,
    policy: Forward,
    reference: Forward | None,
    clock: Clock,
    weighted: Weighted,
    device: torch.device | None = None,
) -> Iterator[Loss]:
    """Add the gradients of a packed micro-batch and yield the losses of its parts; nothing where that cannot be.

    `weighted` tells what is differentiated of a loss, None for nothing. The batch is divided where it is, and goes to
    `device` then.
    """
    if batch.segments is None or not isinstance(policy, Policy) or policy.head is None:
        return
    whole = _with_reference(objective, batch.to(device) if device else batch, reference)
    shown = _Shown(policy)
    objective(whole, shown, reference, replace(clock, learning=False))
    if shown.asked is None or shown.more or shown.asked.anchor is not None:
        return
    losses: list[Loss] = []
    groups = {part.start: (part, rows) for part, rows in _groups(batch, policy.head.rows)}

    def judge(part: slice, log_probs: Tensor, guesses: Tensor | None) -> Tensor:
        rows = batch.only(groups[part.start][1])
        rows = rows.to(device) if device else rows
        if "reference" in whole.columns:
            rows = replace(rows, columns={**rows.columns, "reference": whole.columns["reference"][part]})
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            forward = _Known([_cut(scores, part) for scores in shown.before], Scores(leaf, guesses))
            loss = objective(rows, forward, reference, clock)
            total = weighted(loss)
        losses.append({name: replace(term, total=term.total.detach()) for name, term in loss.items()})
        if total is None or not total.requires_grad:
            return torch.zeros_like(log_probs)
        return torch.autograd.grad(total, leaf)[0]

    policy.visit(whole, shown.asked, [part for part, _ in groups.values()], judge)
    yield from losses


def _with_reference(objective: Objective, batch: Batch, reference: Forward | None) -> Batch:
    """With the reference's log-probs in a column, of which every part gets its own."""
    if reference is None or objective.needs.distributions or "reference" in batch.columns:
        return batch
    with torch.no_grad():
        return replace(batch, columns={**batch.columns, "reference": reference(batch).log_probs})


def _groups(batch: Batch, most: int) -> Iterator[tuple[slice, Tensor]]:
    """(their targets, which rows (R,) bool) of neighbouring rows with at most `most` targets, or of one row with more.

    Rows without a target belong to the group before them: they are counted, too.
    """
    targets_of_rows = torch.zeros_like(batch.example).index_add(0, batch.row, batch.lengths).tolist()
    start = stop = first = 0
    for row, targets in enumerate([*targets_of_rows, most + 1]):
        if stop > start and targets and stop - start + targets > most:
            rows = torch.zeros_like(batch.example, dtype=torch.bool)
            rows[first:row] = True
            yield slice(start, stop), rows
            start, first = stop, row
        stop += targets


def _cut(scores: Scores, part: slice) -> Scores:
    return Scores(scores.log_probs[part], None if scores.guesses is None else scores.guesses[part])


@dataclass
class _Shown:
    """A forward that answers truly until one with gradients is asked for, and notes what is asked then."""

    policy: Policy
    before: list[Scores] = field(default_factory=list)
    asked: Ask | None = None
    more: bool = False

    def __call__(self, batch: Batch, ask: Ask = PLAIN) -> Scores:
        if self.asked is None and not torch.is_grad_enabled():
            self.before.append(self.policy(batch, ask))
            return self.before[-1]
        self.more = self.more or self.asked is not None
        self.asked = ask
        made_up = torch.full(batch.target_ids.shape, LIKELY, device=batch.target_ids.device)
        return Scores(made_up, batch.target_ids, torch.zeros_like(made_up))


@dataclass
class _Known:
    """A forward that gives what is known of a few rows: first what was made without gradients, then the log-probs."""

    before: list[Scores]
    scores: Scores

    def __call__(self, batch: Batch, ask: Ask = PLAIN) -> Scores:
        return self.scores if torch.is_grad_enabled() else self.before.pop(0)
