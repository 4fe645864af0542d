"""One optimiser step: count, forward and backward, reduce over ranks, clip, check, update.

`optimiser_step` is the whole step. Below it, in the order in which it calls them: the KL baseline, pairs matched by
rank, the backward pass through the fused LM head, sums over ranks, optimisers and learning rates; and the search for
the rows of a step that was not finite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch

from uft.config.schema import Optim
from uft.data.batch import Batch, Example
from uft.data.loader import StepBatches, local_shard
from uft.distributed import all_reduce_gradients, full_tensor, ranks, single_process
from uft.model.policy import Policy
from uft.model.precision import bitsandbytes
from uft.objectives.base import MATCHED, PLAIN, ForwardOutput, ForwardRequest, Loss, Objective, StepContext, Term

if TYPE_CHECKING:
    from uft.training.trainer import Trainer

Tensor = torch.Tensor
Parameters = Mapping[str, torch.nn.Parameter]


class FiniteCheck:
    """Whether a step's loss and gradient norm are finite; `bool()` of it blocks until the host knows.

    On a GPU the copy of `value` (() bool) to the host starts at once, so that `bool()` waits for that copy and not for
    the work that was queued after it.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = self.copied = value
        self.arrived = torch.cuda.Event() if value.is_cuda else None
        if self.arrived is not None:
            self.copied = torch.empty_like(value, device="cpu", pin_memory=True)
            self.copied.copy_(value, non_blocking=True)
            self.arrived.record()

    def __bool__(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.copied)


ALWAYS_FINITE = FiniteCheck(torch.ones((), dtype=torch.bool))


@dataclass(frozen=True)
class Step:
    """Measurements of one optimiser step, still on the device."""

    loss: Tensor  # () the objective's headline term, else the weighted sum that was differentiated
    terms: Loss  # totals and counts over all micro-batches and ranks
    grad_norm: Tensor  # () before clipping
    tokens: int = 0  # of all sequences, padding not counted
    supervised_tokens: int = 0
    finite: FiniteCheck = ALWAYS_FINITE  # where it is false, nothing was updated


def optimiser_step(trainer: Trainer, batches: StepBatches, context: StepContext, update: bool = True) -> Step:
    """Update the parameters with the gradient of `sum over terms of weight * total / count` over `batches`.

    The counts are those of all micro-batches of all ranks, so neither accumulation nor the number of ranks changes the
    gradient. Nothing is updated where the loss or the gradient norm is not finite: the host waits for that check, or
    with `trainer.defer_check` a fused optimiser skips the update on the device and `Step.finite` is known later. The
    check of the step before is awaited just before the update, while the device still works: it raises where that step
    has to be rolled back. `update` false: leave the gradients, not clipped, and change nothing.
    """
    objective, optimiser, device = trainer.objective, trainer.optimiser, trainer.device
    optimiser.zero_grad(set_to_none=True)

    # Units of every term, counted where the batches are: on the CPU, before any forward pass.
    counts = global_counts(objective, batches.micro_batches)
    divisors = {name: count.to(device).clamp(min=1) for name, count in counts.items()}
    counted = {name for name, count in counts.items() if count > 0}

    def scaled(loss: Loss) -> Tensor | None:
        parts = [t.weight * t.total / divisors[name] for name, t in loss.items() if t.weight and name in counted]
        return torch.stack(parts).sum() if parts else None

    def scaled_to_zero(loss: Loss) -> Tensor | None:
        return torch.stack([0.0 * t.total for t in loss.values() if t.weight]).sum()

    context = replace(context, kl_baseline=kl_baseline(trainer, batches))

    # Gradients add up over micro-batches. Sharded, all ranks make the same number of passes: a rank with fewer
    # micro-batches repeats a padding batch whose gradient is zero and whose terms are dropped.
    terms: Loss = {}
    padding = padding_batches(batches.micro_batches, batches.padding)
    for batch, is_padding in [*zip(matched_pairs(trainer, batches), repeat(False)), *zip(padding, repeat(True))]:
        current = replace(context, learning=False) if is_padding else context
        scale = scaled_to_zero if is_padding else scaled
        losses = chunked_backward(trainer, batch, current, scale)
        if not losses:
            losses = [objective(batch.to(device), trainer.policy, trainer.reference, current)]
            total = scale(losses[0])
            if total is not None and total.requires_grad:
                total.backward()
        for name, term in (named for loss in losses for named in loss.items() if not is_padding):
            before = terms[name].total if name in terms else 0.0
            terms[name] = Term(before + term.total.detach(), counts[name], term.weight)
    terms |= {name: Term(torch.zeros(()), count, 0.0) for name, count in counts.items() if name not in terms}

    terms = all_reduce_terms(terms, device)
    sync_state(objective, batches.examples)
    parameters = list(trainer.parameters.values())
    all_reduce_gradients(parameters)
    if objective.headline:
        shown = terms[objective.headline]
        loss = shown.total / shown.count.clamp(min=1)
    else:
        loss = torch.stack([t.weight * t.total / t.count.clamp(min=1) for t in terms.values() if t.weight]).sum()
    most = trainer.config.train.max_grad_norm if update else 0.0  # 0: no limit
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(parameters, most or float("inf")))
    finite = FiniteCheck(torch.isfinite(loss) & torch.isfinite(grad_norm))

    if update:
        trainer.await_finite_check()
        if trainer.defer_check:  # the interface of torch's gradient scaler: a fused update is skipped on the device
            optimiser.found_inf = finite.value.logical_not().float()  # type: ignore[attr-defined]
        if trainer.defer_check or finite:
            lr = learning_rate(context.step, trainer.steps, trainer.config.optim)
            for group in optimiser.param_groups:
                group["lr"] = lr * group["lr_ratio"]
            optimiser.step()
            trainer.policy.weights_changed()
        else:
            optimiser.zero_grad(set_to_none=True)

    supervised = sum(batch.target_ids.numel() for batch in batches.micro_batches)
    tokens = sum_over_ranks({"all": sum(one.tokens for one in batches.micro_batches), "supervised": supervised})
    return Step(loss, terms, grad_norm, int(tokens["all"]), int(tokens["supervised"]), finite)


@torch.no_grad()
def kl_baseline(trainer: Trainer, batches: StepBatches) -> dict[str, Tensor]:
    """() means of what the objective measures on the step's mismatched completions (KTO), over all ranks."""
    objective, forwards = trainer.objective, (trainer.policy, trainer.reference)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches.mismatched:
        for name, term in objective.baseline_terms(batch.to(trainer.device), *forwards).items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = (total + term.total, count + term.count)
    for batch in padding_batches(batches.mismatched, batches.padding):
        objective.baseline_terms(batch.to(trainer.device), *forwards)
    if ranks().size == 1:
        return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}
    totals = sum_over_ranks({name: float(total) for name, (total, _) in sums.items()})
    counts = sum_over_ranks({name: float(count) for name, (_, count) in sums.items()})
    return {name: torch.tensor(total / max(counts[name], 1.0)) for name, total in totals.items()}


@torch.no_grad()
def matched_pairs(trainer: Trainer, batches: StepBatches) -> Sequence[Batch]:
    """The micro-batches, with `MATCHED` of every pair where the objective matches pairs over the step and all ranks.

    That is a pass without gradient over all of them.
    """
    objective, forwards = trainer.objective, (trainer.policy, trainer.reference)
    if not objective.needs.matched:
        return batches.micro_batches
    passes = [*batches.micro_batches, *padding_batches(batches.micro_batches, batches.padding)]
    values = [objective.matched_values(batch.to(trainer.device), *forwards) for batch in passes]
    values = values[: len(batches.micro_batches)]
    by_rank = ranks().gather_objects(torch.cat(values).tolist() if values else [])
    u, v = torch.tensor([pair for pairs in by_rank for pair in pairs], dtype=torch.float64).reshape(-1, 2).unbind(1)
    (sorted_u, by_u), (sorted_v, by_v) = u.sort(stable=True), v.sort(stable=True)
    shifts = torch.stack([v - sorted_v[by_u.argsort()], sorted_u[by_v.argsort()] - u], 1)
    start, matched = sum(map(len, by_rank[: ranks().rank])), list[Batch]()
    for batch in batches.micro_batches:
        of_sequences = torch.full((batch.role.shape[0], 2), math.nan)
        of_sequences[batch.pairs[:, 1]] = shifts[start : start + len(batch.pairs)].float()
        start += len(batch.pairs)
        annotations = batch.annotations | dict(zip(MATCHED, of_sequences.unbind(1), strict=True))
        matched.append(replace(batch, annotations=annotations))
    return matched


# --- Backward through the fused LM head: loss and gradient chunk by chunk while each chunk's logits are in memory.


def chunked_backward(
    trainer: Trainer, batch: Batch, context: StepContext, scale: Callable[[Loss], Tensor | None]
) -> list[Loss]:
    """Fused backward pass of a packed micro-batch; the losses of its groups of rows, [] where it is not applicable.

    Every loss is a sum over rows and its counts are known beforehand. So a few rows are evaluated like a micro-batch of
    their own as soon as the head has their log-probs, and the gradient of the log-probs goes straight into the head.
    Applicable to an objective that makes one forward pass with gradients and asks it for log-probs alone; passes
    without gradients are made for the whole micro-batch. `scale`: a loss -> the () tensor to differentiate, None for
    nothing.
    """
    objective, policy, reference = trainer.objective, trainer.policy, trainer.reference
    if batch.segments is None or policy.head is None:
        return []
    whole = batch.to(trainer.device)
    if reference is not None and not objective.needs.distributions and "reference" not in whole.columns:
        with torch.no_grad():
            whole = replace(whole, columns={**whole.columns, "reference": reference(whole).log_probs})
    recorder = _RequestRecorder(policy)
    objective(whole, recorder, reference, replace(context, learning=False))
    request = recorder.request
    if request is None or recorder.several or request.distributions:
        return []

    losses: list[Loss] = []
    groups = {targets.start: (targets, rows) for targets, rows in _row_groups(batch, policy.head.rows)}

    def loss_grad(targets: slice, log_probs: Tensor, argmax: Tensor | None) -> Tensor:
        rows = batch.only(groups[targets.start][1]).to(trainer.device)
        if "reference" in whole.columns:
            rows = replace(rows, columns={**rows.columns, "reference": whole.columns["reference"][targets]})
        recorded = iter(recorder.without_grad)
        leaf = log_probs.detach().requires_grad_()

        def replay(batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
            if torch.is_grad_enabled():
                return ForwardOutput(leaf, argmax)
            output = next(recorded)
            return ForwardOutput(output.log_probs[targets], None if output.argmax is None else output.argmax[targets])

        with torch.enable_grad():
            loss = objective(rows, replay, reference, context)
            total = scale(loss)
        losses.append({name: replace(term, total=term.total.detach()) for name, term in loss.items()})
        if total is None or not total.requires_grad:
            return torch.zeros_like(log_probs)
        return torch.autograd.grad(total, leaf)[0]

    policy.chunked_backward(whole, request, [targets for targets, _ in groups.values()], loss_grad)
    return losses


@dataclass
class _RequestRecorder:
    """A forward that runs passes without gradient and records the request of the first one with gradient."""

    policy: Policy
    without_grad: list[ForwardOutput] = field(default_factory=list)
    request: ForwardRequest | None = None
    several: bool = False

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        if self.request is None and not torch.is_grad_enabled():
            self.without_grad.append(self.policy(batch, request))
            return self.without_grad[-1]
        self.several = self.several or self.request is not None
        self.request = request
        placeholder = torch.full(batch.target_ids.shape, -1.0, device=batch.target_ids.device)
        zeros = torch.zeros_like(placeholder)
        return ForwardOutput(placeholder, batch.target_ids, zeros, placeholder, zeros)


def _row_groups(batch: Batch, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Neighbouring rows with at most `most` targets together, or one row with more: (targets, rows (R,) bool).

    Rows without a target belong to the group before them, since they are counted too.
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


# --- Sums over ranks. All ranks draw the same rows; with one rank, these functions return what they are given.


def padding_batches(batches: Sequence[Batch], padding: Sequence[Batch]) -> list[Batch]:
    """Sharded: `padding` as often as this rank has fewer micro-batches than another; else none."""
    if not ranks().sharded:
        return []
    return list(padding) * (ranks().all_reduce_max(len(batches)) - len(batches))


def sum_over_ranks(values: Mapping[str, float]) -> Counter[str]:
    """Sums by name; a rank that lacks a name adds nothing to it."""
    sums: Counter[str] = Counter()
    for found in ranks().gather_objects(dict(values)):
        sums.update(found)
    return sums


def global_counts(objective: Objective, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """() units of each term over all micro-batches of all ranks, known before any forward pass."""
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts[name] + count if name in counts else count
    if ranks().size == 1:
        return counts
    sums = sum_over_ranks({name: float(count) for name, count in counts.items()})
    return {name: torch.tensor(float(total)) for name, total in sums.items()}


def all_reduce_terms(terms: Loss, device: torch.device) -> Loss:
    """Terms with the totals of all ranks. A rank without rows does not know a term's weight; the others do."""
    if ranks().size == 1 or not terms:
        return terms
    names = sorted(terms)
    columns = [[terms[n].total for n in names], [torch.tensor(terms[n].weight) for n in names]]
    mine = torch.stack([value.detach().to(device, torch.float32) for column in columns for value in column])
    totals, weights = ranks().all_gather(mine).tensor_split(2, 1)
    largest = weights.gather(0, weights.abs().argmax(0, keepdim=True))[0].tolist()
    reduced = {n: Term(totals[:, i].sum(), terms[n].count, largest[i]) for i, n in enumerate(names)}
    return {name: reduced[name] for name in terms}


def sync_state(objective: Objective, examples: Sequence[Example]) -> None:
    """Give all ranks the objective's per-example state that the owners of these examples wrote.

    Exact: every example has one owner, and all other ranks add zero.
    """
    if ranks().size == 1 or not objective.state:
        return
    whole = sorted({item.example for item in examples})
    mine = {item.example for item in local_shard(examples)}
    for name, table in objective.state.items():
        index = torch.tensor(whole, device=table.device)
        is_mine = torch.tensor([example in mine for example in whole], device=table.device)
        values = torch.where(is_mine, table[index], torch.zeros_like(table[index]))
        ranks().all_reduce_sum(values)
        objective.state[name][index] = values


# --- Optimisers and learning rates.


def make_optimiser(
    parameters: Parameters, cfg: Optim, hidden: Collection[str] | None = None, lr_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """Weight decay acts on matrices only: gains and biases are scales, and those are not to shrink.

    `hidden`: names of the matrices that Muon updates, those within blocks; None: all. `lr_ratio`: the rate of an
    adapter's B over that of everything else (LoRA+, arXiv 2402.12354). Raises UftError where a package is missing.
    """
    by_group: dict[tuple[bool, bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        is_hidden = parameter.ndim == 2 and (hidden is None or name in hidden)
        by_group.setdefault((parameter.ndim < 2, is_hidden, ".lora_B." in name), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "weight_decay": 0.0 if is_vector else cfg.weight_decay,
            "hidden": is_hidden,
            "lr_ratio": lr_ratio if is_b else 1.0,
        }
        for (is_vector, is_hidden, is_b), members in sorted(by_group.items(), key=lambda pair: pair[0])
    ]
    kind, names = OPTIMISERS[cfg.name]
    return kind(groups, **{name: getattr(cfg, name) for name in names})


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the groups that are `hidden`, AdamW on all else, under one rate: Muon's updates have the size of AdamW's
    (arXiv 2502.16982, eq. 4)."""

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, lr: float, betas: Sequence[float], eps: float, momentum: float
    ) -> None:
        matrices, others = [g for g in groups if g["hidden"]], [g for g in groups if not g["hidden"]]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr, (betas[0], betas[1]), eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})  # the same groups
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def eight_bit_adamw(groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, in blocks of 256 (arXiv 2110.02861); those of fewer than 4,096 weights in 32."""
    return bitsandbytes("optim.name=adamw8bit").optim.AdamW8bit(groups, **settings)


OPTIMISERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[str, ...]]] = {
    "adamw": (torch.optim.AdamW, ("lr", "betas", "eps", "fused")),
    "adamw8bit": (eight_bit_adamw, ("lr", "betas", "eps")),
    "adafactor": (torch.optim.Adafactor, ("lr",)),
    "muon": (MuonWithAdamW, ("lr", "betas", "eps", "momentum")),
    "rmsprop": (torch.optim.RMSprop, ("lr", "alpha", "eps", "momentum")),
    "sgd": (torch.optim.SGD, ("lr", "momentum", "fused")),
}
"""Name -> what makes the optimiser of its groups, and the keys of `optim` that it takes."""


def defers_finite_check(sync: bool | None, device: torch.device, optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step's finite check is awaited only while the device works on the next step (`train.sync_every_step`).

    It takes an optimiser that can skip an update on the device, and a model that is not sharded: a sharded one waits
    for other ranks in every step anyway.
    """
    able = bool(optimiser.defaults.get("fused")) and not ranks().sharded
    return able and (device.type == "cuda" if sync is None else not sync)


def warmup_steps(warmup: float, steps: int) -> int:
    """`optim.warmup`: a share of the horizon below 1, a number of steps from 1 on."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, decay: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, decay: 1 - progress,
    "constant": lambda progress, decay: 1.0,
    "wsd": lambda progress, decay: 1 - math.sqrt(max(0.0, progress - (1 - decay)) / decay),
}
"""Factor by the share of the steps after warm-up that is over, and `optim.decay`: the share in which `wsd` (warm-up,
stable, decay: arXiv 2404.06395) falls, by 1 - sqrt (arXiv 2405.18392)."""


def learning_rate(step: int, steps: int, cfg: Optim) -> float:
    """Rate of the 0-based `step`: linear warm-up that begins above 0, then the schedule down to 0.

    A pure function of the step: a resumed run needs no scheduler state.
    """
    warmup = warmup_steps(cfg.warmup, steps)
    if step < warmup:
        return cfg.lr_scale * cfg.lr * (step + 1) / warmup
    return cfg.lr_scale * cfg.lr * SCHEDULES[cfg.schedule]((step - warmup) / max(1, steps - warmup), cfg.decay)


# --- The rows of a step that was not finite.


def nonfinite_rows(trainer: Trainer, examples: Sequence[Example], context: StepContext) -> list[str]:
    """Ids of the rows whose loss or gradient norm alone is not finite; empty where only their sum overflows."""
    rows = []
    for item in examples:
        with single_process():
            step = optimiser_step(trainer, trainer.collator([item]), replace(context, learning=False), update=False)
        if not step.finite:
            rows.append(item.row.id)
    trainer.optimiser.zero_grad(set_to_none=True)
    return rows
