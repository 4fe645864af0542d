"""One optimiser step, as it should read: take rows, count, forward and backward, clip, check, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from uft.data.batch import Batch
from uft.data.batches import Item, micro_batches
from uft.data.packing import Layout
from uft.objectives.base import Clock, Forward, Loss, Objective, Term
from uft.parallel.ranks import by_itself, ranks
from uft.parallel.sharing import finite, sum_gradients, whole
from uft.training.together import (
    counted_over_all,
    joined_survey,
    joined_terms,
    missing,
    owned,
    share_state,
    units_of,
)
from uft.training.visits import visit

Tensor = torch.Tensor
Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured, still on the device."""

    loss: Tensor  # () the number shown as `loss`
    terms: Loss  # totals and counts over all micro-batches
    grad_norm: Tensor  # () before clipping
    tokens: int  # of all sequences, padding not counted
    supervised_tokens: int


def idle_step(device: torch.device) -> Step:
    """A step whose rows gave the objective nothing: no update, nothing measured."""
    nothing = torch.zeros((), device=device)
    return Step(nothing, {}, nothing, tokens=0, supervised_tokens=0)


class NonFinite(Exception):
    """The loss or a gradient is not a number any more; `items` are the rows of the step."""

    def __init__(self, items: Sequence[Item], loss: float, grad_norm: float) -> None:
        self.items, self.loss, self.grad_norm = items, loss, grad_norm
        super().__init__(f"loss {loss}, gradient norm {grad_norm}")


def forward_backward(
    objective: Objective,
    batches: Sequence[Batch],
    policy: Forward,
    reference: Forward | None,
    clock: Clock,
    blanks: Sequence[Batch] = (),
) -> Loss:
    """Gradients of `sum over terms of weight * total / count`, the count taken over all micro-batches first.

    The count is that of all processes; gradients and totals are those of this one. `blanks` take part in the passes
    and in nothing else: every process of a model in pieces makes as many.
    """
    units, everywhere = units_of(objective, batches), ranks().in_step

    def weighted(loss: Loss) -> Tensor | None:
        parts = [
            t.weight * t.total / units[name].clamp(min=1)
            for name, t in loss.items()
            if t.weight and (everywhere or t.count > 0)  # in pieces, a backward pass is everybody's
        ]
        return torch.stack(parts).sum() if parts else None

    terms: Loss = {}
    for batch in batches:
        for loss in _passed(objective, batch, policy, reference, clock, weighted):
            for name, term in loss.items():
                before = terms[name].total if name in terms else 0.0
                terms[name] = Term(before + term.total.detach(), units[name], term.weight)
    for batch in blanks:
        _passed(objective, batch, policy, reference, replace(clock, learning=False), _nothing)
    return {name: terms.get(name, Term(torch.zeros(()), count, 0.0)) for name, count in units.items()}


def _passed(
    objective: Objective,
    batch: Batch,
    policy: Forward,
    reference: Forward | None,
    clock: Clock,
    weighted: Callable[[Loss], Tensor | None],
) -> list[Loss]:
    """Forward and backward of one micro-batch; its losses, in one piece or several."""
    losses = list(visit(objective, batch, policy, reference, clock, weighted))
    if losses:
        return losses
    losses = [objective(batch, policy, reference, clock)]
    total = weighted(losses[0])
    if total is not None:
        total.backward()
    return losses


def _nothing(loss: Loss) -> Tensor | None:
    """What a blank adds to the gradient."""
    return torch.stack([0.0 * term.total for term in loss.values() if term.weight]).sum()


@torch.no_grad()
def survey(
    objective: Objective,
    batches: Sequence[Batch],
    policy: Forward,
    reference: Forward | None,
    blanks: Sequence[Batch] = (),
) -> dict[str, Tensor]:
    """() means of what the objective measures on the mismatched completions of the step, over all micro-batches."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for name, term in objective.survey(batch, policy, reference).items():
            total, count = sums.get(name, (torch.zeros_like(term.total), torch.zeros_like(term.count)))
            sums[name] = (total + term.total, count + term.count)
    for batch in blanks:
        objective.survey(batch, policy, reference)
    return joined_survey(sums)


def reported_loss(objective: Objective, terms: Loss) -> Tensor:
    """The objective's headline term, else the weighted sum that was differentiated."""
    if objective.headline:
        return terms[objective.headline].total / terms[objective.headline].count.clamp(min=1)
    return torch.stack([t.weight * t.total / t.count.clamp(min=1) for t in terms.values() if t.weight]).sum()


def optimiser_step(
    items: Sequence[Item],
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    optimiser: torch.optim.Optimizer,
    parameters: Parameters,
    clock: Clock,
    *,
    mismatched: Sequence[Item] = (),
    lr: float,
    micro_batch_tokens: int,
    max_grad_norm: float,
    pad_id: int,
    device: torch.device,
    layout: Layout = Layout.PADDED,
) -> Step:
    """Update the parameters with the gradient of `items`, of which this process takes its share.

    Raises NonFinite before anything was changed, in all processes.
    """

    def laid_out(rows: Sequence[Item]) -> list[Batch]:
        return [batch.to(device) for batch in micro_batches(rows, micro_batch_tokens, pad_id, layout)]

    optimiser.zero_grad(set_to_none=True)
    unrelated = laid_out(owned(mismatched))
    surveyed = survey(objective, unrelated, policy, reference, missing(unrelated, mismatched, laid_out))
    clock, batches = replace(clock, survey=surveyed), laid_out(owned(items))
    terms = forward_backward(objective, batches, policy, reference, clock, missing(batches, items, laid_out))
    terms = joined_terms(terms, device)
    share_state(objective, items)
    sum_gradients(parameters.values())
    loss = reported_loss(objective, terms)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or float("inf")))
    if not bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        optimiser.zero_grad(set_to_none=True)
        raise NonFinite(items, float(loss), float(grad_norm))
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    sizes = [sum(batch.tokens for batch in batches), sum(batch.target_ids.numel() for batch in batches)]
    tokens, supervised_tokens = counted_over_all(sizes)
    return Step(loss, terms, grad_norm, tokens, supervised_tokens)


def culprits(
    items: Sequence[Item],
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    parameters: Parameters,
    clock: Clock,
    *,
    pad_id: int,
    device: torch.device,
    layout: Layout = Layout.PADDED,
) -> list[str]:
    """Ids of the rows whose loss or gradient alone is not finite; empty when only their sum overflows."""
    found = []
    for item in items:
        batches = [batch.to(device) for batch in micro_batches([item], 1, pad_id, layout)]
        with by_itself():
            terms = forward_backward(objective, batches, policy, reference, clock)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if not all(finite([reported_loss(objective, terms), *gradients])):
            found.append(item.row.id)
        for parameter in parameters.values():
            parameter.grad = None
    return found
