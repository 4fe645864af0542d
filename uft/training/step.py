"""One optimiser step, as it should read: take rows, count, forward and backward, clip, check, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from uft.data.batch import Batch
from uft.data.batches import Item, micro_batches
from uft.data.packing import Layout
from uft.objectives.base import Clock, Forward, Loss, Objective, Term
from uft.parallel.ranks import by_itself
from uft.parallel.sharing import sum_gradients
from uft.training.together import counted_over_all, joined_survey, joined_terms, owned, share_state, units_of
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
    objective: Objective, batches: Sequence[Batch], policy: Forward, reference: Forward | None, clock: Clock
) -> Loss:
    """Gradients of `sum over terms of weight * total / count`, the count taken over all micro-batches first.

    The count is that of all processes; gradients and totals are those of this one.
    """
    units = units_of(objective, batches)

    def weighted(loss: Loss) -> Tensor | None:
        parts = [t.weight * t.total / units[name].clamp(min=1) for name, t in loss.items() if t.weight and t.count > 0]
        return torch.stack(parts).sum() if parts else None

    terms: Loss = {}
    for batch in batches:
        losses = list(visit(objective, batch, policy, reference, clock, weighted))
        if not losses:
            losses = [objective(batch, policy, reference, clock)]
            total = weighted(losses[0])
            if total is not None:
                total.backward()
        for name, term in ((name, term) for loss in losses for name, term in loss.items()):
            before = terms[name].total if name in terms else 0.0
            terms[name] = Term(before + term.total.detach(), units[name], term.weight)
    return {name: terms.get(name, Term(torch.zeros(()), count, 0.0)) for name, count in units.items()}


@torch.no_grad()
def survey(
    objective: Objective, batches: Sequence[Batch], policy: Forward, reference: Forward | None
) -> dict[str, Tensor]:
    """() means of what the objective measures on the mismatched completions of the step, over all micro-batches."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for name, term in objective.survey(batch, policy, reference).items():
            total, count = sums.get(name, (torch.zeros_like(term.total), torch.zeros_like(term.count)))
            sums[name] = (total + term.total, count + term.count)
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
    batches = [batch.to(device) for batch in micro_batches(owned(items), micro_batch_tokens, pad_id, layout)]
    optimiser.zero_grad(set_to_none=True)
    unrelated = [batch.to(device) for batch in micro_batches(owned(mismatched), micro_batch_tokens, pad_id, layout)]
    clock = replace(clock, survey=survey(objective, unrelated, policy, reference))
    terms = joined_terms(forward_backward(objective, batches, policy, reference, clock), device)
    share_state(objective, items)
    sum_gradients(parameters.values())
    loss = reported_loss(objective, terms)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or float("inf"))
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
        if not all(bool(torch.isfinite(x).all()) for x in [reported_loss(objective, terms), *gradients]):
            found.append(item.row.id)
        for parameter in parameters.values():
            parameter.grad = None
    return found
