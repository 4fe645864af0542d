"""Arithmetic that objectives share: float32, sums instead of means, and the terms every researcher wants to see."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from uft.data.batch import Batch
from uft.objectives.base import Forward, Loss, Term

Tensor = torch.Tensor


def promote(values: Tensor) -> Tensor:
    """At least float32, whatever precision the model ran in; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def assemble(totals: Mapping[str, Tensor], counts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Loss:
    """Totals and counts as terms; what has no weight is logged only, and cut from the graph."""
    assert totals.keys() == counts.keys(), (sorted(totals), sorted(counts))
    return {
        name: Term(total if name in weights else total.detach(), counts[name], weights.get(name, 0.0))
        for name, total in totals.items()
    }


def units(batch: Batch, number: Tensor | int) -> Tensor:
    """() float32 count on the batch's device; a mask is counted."""
    if isinstance(number, int):
        return torch.full((), float(number), device=batch.role.device)
    return number.sum().to(torch.float32)


def annotation(batch: Batch, name: str) -> Tensor:
    """(S,) numbers that were written beside completions; never a gradient. Sequences without targets may lack them."""
    values = promote(batch.annotations[name].detach())
    assert not (values.isnan() & present(batch)).any(), f"completions without {name}"
    return torch.where(values.isnan(), 0.0, values)


def sequences_only(reduction: str) -> list[tuple[str, str]]:
    """The problem of asking for tokens where there is no such mean."""
    return [("reduction", "rows are counted, never tokens: use sequence")] if reduction == "token" else []


def present(batch: Batch) -> Tensor:
    """(S,) bool: sequences that have a supervised target. An empty one is worth an exact 0 and is not counted."""
    return batch.lengths > 0


# --- negative log-likelihood


def nll_count(batch: Batch) -> Tensor:
    """() supervised targets of the good sequences."""
    return units(batch, batch.good[batch.sequence])


def nll_total(batch: Batch, log_probs: Tensor) -> Tensor:
    """() sum of -log p over the targets of the good sequences: the same measure under every objective."""
    return -torch.where(batch.good[batch.sequence], log_probs, 0.0).sum()


def reduced_count(batch: Batch, reduction: str, sequences: Tensor) -> Tensor:
    """() units of a likelihood term over `sequences` (S,) bool: targets, or sequences that have any."""
    return units(batch, sequences[batch.sequence] if reduction == "token" else sequences & present(batch))


def reduced_total(batch: Batch, values: Tensor, reduction: str, sequences: Tensor) -> Tensor:
    """() sum of `values` (N,) over the targets of `sequences` (S,) bool, or of their means over those sequences."""
    if reduction == "sequence":
        return torch.where(sequences, batch.mean(values), 0.0).sum()
    return torch.where(sequences[batch.sequence], values, 0.0).sum()


def discounted_sums(batch: Batch, values: Tensor, sequences: Tensor, whole: Tensor, discount: float) -> Tensor:
    """Sums of `values` (N,) over `sequences` (any shape), targets after the first `whole` of each counted `discount`
    times. A sequence may be asked for several times, each time with another `whole`."""
    asked, lengths = sequences.flatten(), batch.lengths
    each = lengths[asked]
    owner = torch.arange(asked.numel(), device=asked.device).repeat_interleave(each)
    offset = torch.arange(owner.numel(), device=asked.device) - (each.cumsum(0) - each)[owner]
    target = (lengths.cumsum(0) - lengths)[asked][owner] + offset
    weight = torch.where(offset < whole.flatten()[owner], 1.0, discount).to(values.dtype)
    total = values.new_zeros(asked.numel()).index_add(0, owner, weight * values[target])
    return total.view(sequences.shape)


# --- the reference


def reference_log_probs(batch: Batch, reference: Forward | None) -> Tensor:
    """(N,) log-probs under the frozen reference, from the cached column or a forward pass; never a gradient."""
    if "reference" in batch.columns:
        return promote(batch.columns["reference"].detach())
    assert reference is not None, "neither a reference nor its cached column"
    with torch.no_grad():
        return promote(reference(batch).log_probs)


# --- what is shown of rewards


def reward_counts(batch: Batch) -> dict[str, Tensor]:
    pairs = units(batch, batch.pairs.shape[0])
    shown = dict.fromkeys(("chosen_reward", "rejected_reward", "margin", "accuracy"), pairs)
    return {**shown, "implicit_reward": units(batch, present(batch))}


TIE = 1e-4
"""Nats below which two sides count as equally likely, here and in the evaluation. Equal completions, and a policy that
equals its reference, differ by rounding, which depends on the layout."""


def reward_totals(batch: Batch, z: Tensor, beta: float) -> dict[str, Tensor]:
    """Implicit rewards z (S,), in units of beta, of both sides of every pair, their margin and how often it is
    positive; a tie is a half."""
    z = z.detach()
    chosen, rejected = z[batch.pairs].unbind(-1)
    margin = chosen - rejected
    ahead = torch.where(margin.abs() < TIE * beta, 0.5, (margin > 0).to(z.dtype))
    return {
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
        "margin": margin.sum(),
        "accuracy": ahead.sum(),
        "implicit_reward": torch.where(present(batch), z, 0.0).sum(),
    }
