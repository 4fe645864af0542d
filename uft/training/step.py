"""One optimiser step, as it should read: take rows, count, forward and backward, clip, check, step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from uft.data.batch import Batch, Example
from uft.data.loader import Collator, StepBatches, local_shard
from uft.distributed import all_finite, all_reduce_gradients, full_tensor, ranks, single_process
from uft.model.policy import Policy
from uft.objectives.base import PLAIN, Forward, ForwardOutput, ForwardRequest, Loss, Objective, StepContext, Term
from uft.training.optim import passes_over

# --- Answer: a yes or no that a device works out, to be asked for without waiting for what it does afterwards.


Tensor = torch.Tensor


@dataclass(frozen=True)
class FiniteCheck:
    """`value`: () bool on a device. On a GPU its copy to the host is under way from the start; who asks for it later
    waits for that copy, not for the work that was queued behind it."""

    value: Tensor
    copied: Tensor = field(init=False)
    arrived: torch.cuda.Event | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        copied, arrived = self.value, None
        if self.value.is_cuda:
            copied = torch.empty_like(self.value, device="cpu", pin_memory=True)
            copied.copy_(self.value, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        object.__setattr__(self, "copied", copied)
        object.__setattr__(self, "arrived", arrived)

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.copied)


ALWAYS_FINITE = FiniteCheck(torch.ones((), dtype=torch.bool))


Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured, still on the device."""

    loss: Tensor  # () the number shown as `loss`
    terms: Loss  # totals and counts over all micro-batches
    grad_norm: Tensor  # () before clipping
    tokens: int  # of all sequences, padding not counted
    supervised_tokens: int
    good: FiniteCheck = ALWAYS_FINITE  # whether loss and gradient are finite; where not, nothing was updated


def idle_step(device: torch.device) -> Step:
    """A step whose rows gave the objective nothing: no update, nothing measured."""
    nothing = torch.zeros((), device=device)
    return Step(nothing, {}, nothing, tokens=0, supervised_tokens=0)


def forward_backward(
    objective: Objective,
    batches: Sequence[Batch],
    policy: Forward,
    reference: Forward | None,
    context: StepContext,
    device: torch.device | None = None,
    blanks: Sequence[Batch] = (),
) -> Loss:
    """Gradients of `sum over terms of weight * total / count`, the count taken over all micro-batches first.

    The count is that of all processes; gradients and totals are those of this one. Counting happens where the batches
    are, which go to `device` one by one: whether a term has any units is known without asking a GPU. `blanks` take part
    in the passes and in nothing else: every process of a model in pieces makes as many.
    """
    units = global_counts(objective, batches)
    counted = {name for name, count in units.items() if count > 0}
    divisors = {name: (count.to(device) if device else count).clamp(min=1) for name, count in units.items()}

    def weighted(loss: Loss) -> Tensor | None:
        parts = [t.weight * t.total / divisors[name] for name, t in loss.items() if t.weight and name in counted]
        return torch.stack(parts).sum() if parts else None

    terms: Loss = {}
    for batch in batches:
        for loss in _losses(objective, batch, policy, reference, context, weighted, device):
            for name, term in loss.items():
                before = terms[name].total if name in terms else 0.0
                terms[name] = Term(before + term.total.detach(), units[name], term.weight)
    for batch in blanks:
        _losses(objective, batch, policy, reference, replace(context, learning=False), _nothing, device)
    return terms | {name: Term(torch.zeros(()), count, 0.0) for name, count in units.items() if name not in terms}


def _losses(
    objective: Objective,
    batch: Batch,
    policy: Forward,
    reference: Forward | None,
    context: StepContext,
    weighted: Callable[[Loss], Tensor | None],
    device: torch.device | None,
) -> list[Loss]:
    """Of a micro-batch or its parts, whose gradients are added."""
    losses = list(chunked_backward(objective, batch, policy, reference, context, weighted, device))
    if losses:
        return losses
    loss = objective(batch.to(device) if device else batch, policy, reference, context)
    total = weighted(loss)
    if total is not None and total.requires_grad:
        total.backward()
    return [loss]


def _nothing(loss: Loss) -> Tensor | None:
    """What a blank adds to the gradient."""
    return torch.stack([0.0 * term.total for term in loss.values() if term.weight]).sum()


@torch.no_grad()
def kl_baseline(
    objective: Objective,
    batches: Sequence[Batch],
    policy: Forward,
    reference: Forward | None,
    blanks: Sequence[Batch] = (),
) -> dict[str, Tensor]:
    """() means of what the objective measures on the mismatched completions of the step, over all micro-batches."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for name, term in objective.baseline_terms(batch, policy, reference).items():
            total, count = sums.get(name, (torch.zeros_like(term.total), torch.zeros_like(term.count)))
            sums[name] = (total + term.total, count + term.count)
    for batch in blanks:
        objective.baseline_terms(batch, policy, reference)
    return all_reduce_means(sums)


def reported_loss(objective: Objective, terms: Loss) -> Tensor:
    """The objective's headline term, else the weighted sum that was differentiated."""
    if objective.headline:
        return terms[objective.headline].total / terms[objective.headline].count.clamp(min=1)
    return torch.stack([t.weight * t.total / t.count.clamp(min=1) for t in terms.values() if t.weight]).sum()


def optimiser_step(
    rows: StepBatches,
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    optimiser: torch.optim.Optimizer,
    parameters: Parameters,
    context: StepContext,
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
    baseline = kl_baseline(objective, unrelated, policy, reference, padding_batches(unrelated, blank))
    context = replace(context, kl_baseline=baseline)
    blanks = padding_batches(rows.batches, rows.blank)
    terms = forward_backward(objective, rows.batches, policy, reference, context, device, blanks)
    terms = all_reduce_terms(terms, device)
    sync_state(objective, rows.items)
    all_reduce_gradients(parameters.values())
    loss = reported_loss(objective, terms)
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or float("inf")))
    good = FiniteCheck(torch.isfinite(loss) & torch.isfinite(grad_norm))
    confirm()
    if late:
        passes_over(optimiser, unless=good.value)
    if late or good:
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
    else:
        optimiser.zero_grad(set_to_none=True)
    tokens, supervised_tokens = all_reduce_sums(
        [sum(batch.tokens for batch in rows.batches), sum(batch.target_ids.numel() for batch in rows.batches)]
    )
    return Step(loss, terms, grad_norm, tokens, supervised_tokens, good)


def culprits(
    items: Sequence[Example],
    objective: Objective,
    policy: Forward,
    reference: Forward | None,
    parameters: Parameters,
    context: StepContext,
    *,
    lay_out: Collator,
    device: torch.device,
) -> list[str]:
    """Ids of the rows whose loss or gradient alone is not finite; empty when only their sum overflows."""
    found = []
    for item in items:
        with single_process():
            laid = lay_out([item])
            blanks = padding_batches(laid.batches, laid.blank)
            terms = forward_backward(objective, laid.batches, policy, reference, context, device, blanks)
            terms = all_reduce_terms(terms, device)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        if not all(all_finite([reported_loss(objective, terms), *gradients])):
            found.append(item.row.id)
        for parameter in parameters.values():
            parameter.grad = None
    return found


# --- Gradients in one visit of the head: an objective is asked part by part, while the logits of the part are still
# there.
#
# Counts are known before any forward pass and every loss is a sum over rows, so a few rows of a micro-batch can be
# judged
# like a micro-batch of their own: the objective gets them with their log-probs, and what comes out is the gradient of
# these. No objective knows. It works for all that make one forward pass with gradients (others before it, without,
# are
# made for the whole micro-batch); those that make several, or compare whole distributions, go the ordinary way.


Weighted = Callable[[Loss], Tensor | None]

LIKELY = -1.0
"""Log-prob of every target while an objective only shows what it asks for."""


def chunked_backward(
    objective: Objective,
    batch: Batch,
    policy: Forward,
    reference: Forward | None,
    context: StepContext,
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
    shown = _RequestRecorder(policy)
    objective(whole, shown, reference, replace(context, learning=False))
    if shown.asked is None or shown.more or shown.asked.anchor is not None:
        return
    losses: list[Loss] = []
    groups = {part.start: (part, rows) for part, rows in _groups(batch, policy.head.rows)}

    def loss_grad(part: slice, log_probs: Tensor, argmax: Tensor | None) -> Tensor:
        rows = batch.only(groups[part.start][1])
        rows = rows.to(device) if device else rows
        if "reference" in whole.columns:
            rows = replace(rows, columns={**rows.columns, "reference": whole.columns["reference"][part]})
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            forward = _KnownForward([_cut(scores, part) for scores in shown.before], ForwardOutput(leaf, argmax))
            loss = objective(rows, forward, reference, context)
            total = weighted(loss)
        losses.append({name: replace(term, total=term.total.detach()) for name, term in loss.items()})
        if total is None or not total.requires_grad:
            return torch.zeros_like(log_probs)
        return torch.autograd.grad(total, leaf)[0]

    policy.chunked_backward(whole, shown.asked, [part for part, _ in groups.values()], loss_grad)
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


def _cut(scores: ForwardOutput, part: slice) -> ForwardOutput:
    return ForwardOutput(scores.log_probs[part], None if scores.argmax is None else scores.argmax[part])


@dataclass
class _RequestRecorder:
    """A forward that answers truly until one with gradients is asked for, and notes what is asked then."""

    policy: Policy
    before: list[ForwardOutput] = field(default_factory=list)
    asked: ForwardRequest | None = None
    more: bool = False

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        if self.asked is None and not torch.is_grad_enabled():
            self.before.append(self.policy(batch, request))
            return self.before[-1]
        self.more = self.more or self.asked is not None
        self.asked = request
        made_up = torch.full(batch.target_ids.shape, LIKELY, device=batch.target_ids.device)
        return ForwardOutput(made_up, batch.target_ids, torch.zeros_like(made_up))


@dataclass
class _KnownForward:
    """A forward that gives what is known of a few rows: first what was made without gradients, then the log-probs."""

    before: list[ForwardOutput]
    scores: ForwardOutput

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        return self.scores if torch.is_grad_enabled() else self.before.pop(0)


# --- An optimiser step over several processes: which rows are whose, and how counts, losses and states become one.
#
# Every process draws the same rows. Alone, all of this gives back what it was given.


def padding_batches(batches: Sequence[Batch], blank: Sequence[Batch]) -> list[Batch]:
    """A `blank` for every pass that another process makes and this one does not; none unless the model is in pieces."""
    if not ranks().sharded:
        return []
    return list(blank) * (ranks().all_reduce_max(len(batches)) - len(batches))


def global_counts(objective: Objective, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Units of each term over all micro-batches of all processes, () each, known before any forward pass."""
    units: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            units[name] = units[name] + count if name in units else count
    if ranks().size == 1:
        return units
    sums: dict[str, float] = {}
    for counted in ranks().gather_objects({name: float(count) for name, count in units.items()}):
        for name, more in counted.items():
            sums[name] = sums.get(name, 0.0) + more
    return {name: torch.tensor(total) for name, total in sums.items()}


def all_reduce_sums(numbers: Sequence[int]) -> list[int]:
    """Sums over all processes."""
    gathered = ranks().gather_objects(list(numbers))
    return [sum(column) for column in zip(*gathered, strict=True)]


def all_reduce_terms(terms: Loss, device: torch.device) -> Loss:
    """The totals of all processes. One without rows does not know a term's weight; the others do."""
    if ranks().size == 1 or not terms:
        return terms
    names = sorted(terms)
    columns = [[terms[n].total for n in names], [torch.tensor(terms[n].weight) for n in names]]
    mine = torch.stack([value.detach().to(device, torch.float32) for column in columns for value in column])
    totals, weights = ranks().all_gather(mine).tensor_split(2, 1)
    largest = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0].tolist()
    joined = {n: Term(totals[:, i].sum(), terms[n].count, largest[i]) for i, n in enumerate(names)}
    return {name: joined[name] for name in terms}


def all_reduce_means(sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """() means of the baseline terms, over all processes."""
    if ranks().size == 1:
        return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}
    whole: dict[str, tuple[float, float]] = {}
    for found in ranks().gather_objects({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        for name, (add, more) in found.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = (before[0] + add, before[1] + more)
    return {name: torch.tensor(t / max(c, 1.0)) for name, (t, c) in whole.items()}


def sync_state(objective: Objective, items: Sequence[Example]) -> None:
    """Give every process what the owners of the step's examples wrote into the objective's state. Exact: each entry
    has one owner, and all others add zero."""
    if ranks().size == 1 or not objective.state:
        return
    whole = sorted({item.example for item in items})
    mine = {item.example for item in local_shard(items)}
    for name, table in objective.state.items():
        index = torch.tensor(whole, device=table.device)
        is_mine = torch.tensor([example in mine for example in whole], device=table.device)
        values = torch.where(is_mine, table[index], torch.zeros_like(table[index]))
        ranks().all_reduce_sum(values)
        objective.state[name][index] = values
