"""An optimiser step over several processes: which rows are whose, and how counts, losses and states become one.

Every process draws the same rows. Alone, all of this gives back what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from uft.data.batch import Batch
from uft.data.batches import Item
from uft.objectives.base import Loss, Objective, Term
from uft.parallel.ranks import ranks
from uft.parallel.sharing import shares

Tensor = torch.Tensor


def owned(items: Sequence[Item]) -> list[Item]:
    """The rows of a step that this process takes: about as many tokens as every other. An example is never divided,
    and visits of the same example stay together in their order: it has one owner, who keeps its state."""
    group = ranks()
    if group.size == 1:
        return list(items)
    sizes = [sum(encoded.length for encoded in item.encoded) for item in items]
    return [items[i] for i in shares(sizes, [item.example for item in items], group.size)[group.rank]]


def missing(batches: Sequence[Batch], blank: Sequence[Batch]) -> list[Batch]:
    """A `blank` for every pass that another process makes and this one does not; none unless the model is in pieces."""
    if not ranks().in_step:
        return []
    return list(blank) * (ranks().largest(len(batches)) - len(batches))


def units_of(objective: Objective, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Units of each term over all micro-batches of all processes, () each, known before any forward pass."""
    units: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            units[name] = units[name] + count if name in units else count
    if ranks().size == 1:
        return units
    sums: dict[str, float] = {}
    for counted in ranks().gather({name: float(count) for name, count in units.items()}):
        for name, more in counted.items():
            sums[name] = sums.get(name, 0.0) + more
    return {name: torch.tensor(total) for name, total in sums.items()}


def counted_over_all(numbers: Sequence[int]) -> list[int]:
    """Sums over all processes."""
    gathered = ranks().gather(list(numbers))
    return [sum(column) for column in zip(*gathered, strict=True)]


def joined_terms(terms: Loss, device: torch.device) -> Loss:
    """The totals of all processes. One without rows does not know a term's weight; the others do."""
    if ranks().size == 1 or not terms:
        return terms
    names = sorted(terms)
    columns = [[terms[n].total for n in names], [torch.tensor(terms[n].weight) for n in names]]
    mine = torch.stack([value.detach().to(device, torch.float32) for column in columns for value in column])
    totals, weights = ranks().stacked(mine).tensor_split(2, 1)
    largest = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0].tolist()
    joined = {n: Term(totals[:, i].sum(), terms[n].count, largest[i]) for i, n in enumerate(names)}
    return {name: joined[name] for name in terms}


def joined_survey(sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """() means of what was surveyed, over all processes."""
    if ranks().size == 1:
        return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}
    whole: dict[str, tuple[float, float]] = {}
    for found in ranks().gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        for name, (add, more) in found.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = (before[0] + add, before[1] + more)
    return {name: torch.tensor(t / max(c, 1.0)) for name, (t, c) in whole.items()}


def share_state(objective: Objective, items: Sequence[Item]) -> None:
    """Give every process what the owners of the step's examples wrote into the objective's state. Exact: each entry
    has one owner, and all others add zero."""
    if ranks().size == 1 or not objective.state:
        return
    whole = sorted({item.example for item in items})
    mine = {item.example for item in owned(items)}
    for name, table in objective.state.items():
        index = torch.tensor(whole, device=table.device)
        is_mine = torch.tensor([example in mine for example in whole], device=table.device)
        values = torch.where(is_mine, table[index], torch.zeros_like(table[index]))
        ranks().add_(values)
        objective.state[name][index] = values
