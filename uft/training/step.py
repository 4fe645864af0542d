"""One optimiser step, as it should read: take rows, count, forward and backward, clip, check, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from uft.data.batch import Batch
from uft.data.batches import Item
from uft.objectives.base import Clock, Forward, Loss, Objective, Term
from uft.parallel.ranks import by_itself
from uft.parallel.sharing import finite, sum_gradients, whole
from uft.training.ahead import Laid, Plan
from uft.training.answer import YES, Answer
from uft.training.optim import passes_over
from uft.training.together import counted_over_all, joined_survey, joined_terms, missing, share_state, units_of
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
    good: Answer = YES  # whether loss and gradient are finite; where not, nothing was updated


def idle_step(device: torch.device) -> Step:
    """A step whose rows gave the objective nothing: no update, nothing measured."""
    nothing = torch.zeros((), device=device)
    return Step(nothing, {}, nothing, tokens=0, supervised_tokens=0)


def forward_backward(
    objective: Objective,
    batches: Sequence[Batch],
    policy: Forward,
    reference: Forward | None,
    clock: Clock,
    device: torch.device | None = None,
    blanks: Sequence[Batch] = (),
) -> Loss:
    """Gradients of `sum over terms of weight * total / count`, the count taken over all micro-batches first.

    The count is that of all processes; gradients and totals are those of this one. Counting happens where the batches
    are, which go to `device` one by one: whether a term has any units is known without asking a GPU. `blanks` take part
    in the passes and in nothing else: every process of a model in pieces makes as many.
    """
    units = units_of(objective, batches)
    counted = {name for name, count in units.items() if count > 0}
    divisors = {name: (count.to(device) if device else count).clamp(min=1) for name, count in units.items()}

    def weighted(loss: Loss) -> Tensor | None:
        parts = [t.weight * t.total / divisors[name] for name, t in loss.items() if t.weight and name in counted]
        return torch.stack(parts).sum() if parts else None

    terms: Loss = {}
    for batch in batches:
        for loss in _losses(objective, batch, policy, reference, clock, weighted, device):
            for name, term in loss.items():
                before = terms[name].total if name in terms else 0.0
                terms[name] = Term(before + term.total.detach(), units[name], term.weight)
    for batch in blanks:
        _losses(objective, batch, policy, reference, replace(clock, learning=False), _nothing, device)
    return terms | {name: Term(torch.zeros(()), count, 0.0) for name, count in units.items() if name not in terms}


def _losses(
    objective: Objective,
    batch: Batch,
    policy: Forward,
    reference: Forward | None,
    clock: Clock,
    weighted: Callable[[Loss], Tensor | None],
    device: torch.device | None,
) -> list[Loss]:
    """Of a micro-batch or its parts, whose gradients are added."""
    losses = list(visit(objective, batch, policy, reference, clock, weighted, device))
    if losses:
        return losses
    loss = objective(batch.to(device) if device else batch, policy, reference, clock)
    total = weighted(loss)
    if total is not None and total.requires_grad:
        total.backward()
    return [loss]


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
    rows: Laid,
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    optimiser: torch.optim.Optimizer,
    parameters: Parameters,
    clock: Clock,
    *,
    lr: float,
    max_grad_norm: float,
    device: torch.device,
    late: bool = False,
    confirm: Callable[[], None] = lambda: None,
) -> Step:
    """Update the parameters with the gradient of `rows`, this process with that of its share of them, unless it or the
    loss is not finite: the same in all processes.

    To know that, the step waits for the device; `late`: the device knows, and passes over the update by itself
    (`optim.passes_over`). `confirm` is called before the update, when the device has work to go on with: may the step
    before this one be built upon?
    """
    optimiser.zero_grad(set_to_none=True)
    unrelated, blank = ([batch.to(device) for batch in more] for more in (rows.mismatched, rows.blank))
    surveyed = survey(objective, unrelated, policy, reference, missing(unrelated, blank))
    clock = replace(clock, survey=surveyed)
    blanks = missing(rows.batches, rows.blank)
    terms = forward_backward(objective, rows.batches, policy, reference, clock, device, blanks)
    terms = joined_terms(terms, device)
    share_state(objective, rows.items)
    sum_gradients(parameters.values())
    loss = reported_loss(objective, terms)
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or float("inf")))
    good = Answer(torch.isfinite(loss) & torch.isfinite(grad_norm))
    confirm()
    if late:
        passes_over(optimiser, unless=good.value)
    if late or good:
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
    else:
        optimiser.zero_grad(set_to_none=True)
    tokens, supervised_tokens = counted_over_all(
        [sum(batch.tokens for batch in rows.batches), sum(batch.target_ids.numel() for batch in rows.batches)]
    )
    return Step(loss, terms, grad_norm, tokens, supervised_tokens, good)


def culprits(
    items: Sequence[Item],
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    parameters: Parameters,
    clock: Clock,
    *,
    lay_out: Plan,
    device: torch.device,
) -> list[str]:
    """Ids of the rows whose loss or gradient alone is not finite; empty when only their sum overflows."""
    found = []
    for item in items:
        with by_itself():
            laid = lay_out([item])
            blanks = missing(laid.batches, laid.blank)
            terms = forward_backward(objective, laid.batches, policy, reference, clock, device, blanks)
            terms = joined_terms(terms, device)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if not all(finite([reported_loss(objective, terms), *gradients])):
            found.append(item.row.id)
        for parameter in parameters.values():
            parameter.grad = None
    return found
