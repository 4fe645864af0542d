"""Base of all losses over pairs: the rows they take, their terms, and an optional likelihood term.

`pairwise.py` compares with a reference, `contrastive.py` does without. Each is one shape: a score of a completion and a
link from two scores to a loss. Every published method that fits is a file of conf/objective, not a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import Objective, key
from uft.objectives.nll import CONVENTION

Tensor = torch.Tensor


@dataclass(frozen=True)
class PairLoss(Objective):
    """Every pair counts once; a row of one positive and K negatives is K pairs.

    With `sft_weight` the NLL of the positives is added under `reduction`, each positive once however many pairs it
    stands in, and demonstrations join that term.
    """

    reduction: str = key("sequence", "what counts once in the sft term", choices=("token", "sequence"))
    sft_weight: float = key(0.0, "weight of the NLL of chosen completions and demonstrations", ge=0)

    @property
    def views(self) -> Mapping[Kind, View]:
        taken: dict[Kind, View] = {
            Kind.PREFERENCE: views.against_each,
            Kind.SCORED: views.best_against_worst,
            Kind.NEGATIVES: views.against_each,
        }
        return {Kind.DEMONSTRATION: views.positives, **taken} if self.sft_weight > 0 else taken

    def convention(self, score: str) -> str:
        joined = f"every pair counts once; {score}"
        return f"{joined}; sft term: {CONVENTION[self.reduction]}" if self.sft_weight > 0 else joined

    def shared_counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {"pair": terms.units(batch, batch.pairs.shape[0]), "nll": terms.nll_count(batch)}
        if self.sft_weight > 0:
            counts["sft"] = terms.reduced_count(batch, self.reduction, batch.role == Role.POSITIVE)
        return {**counts, **terms.reward_counts(batch)}

    def shared_totals(self, batch: Batch, log_probs: Tensor, rewards: Tensor, beta: float) -> dict[str, Tensor]:
        """All but the pairs; `rewards` (S,), in units of `beta`, are what is shown of both sides."""
        totals = {"nll": terms.nll_total(batch, log_probs), **terms.reward_totals(batch, rewards, beta)}
        if self.sft_weight > 0:
            totals["sft"] = terms.reduced_total(batch, -log_probs, self.reduction, batch.role == Role.POSITIVE)
        return totals
