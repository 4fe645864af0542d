"""Supervised fine-tuning: the negative log-likelihood of what was shown as good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind
from uft.data.views import View
from uft.objectives import terms, views
from uft.objectives.base import Clock, Forward, Loss, Objective, key

Tensor = torch.Tensor

CONVENTION = {
    "token": "every supervised token of the batch counts once",
    "sequence": "every completion counts once: mean over its tokens, then mean over completions",
}


@dataclass(frozen=True)
class SFT(Objective):
    """-log pi(y|x) on demonstrations, chosen, good and well-scored completions.

    `token`: sum over all N targets / N. `sequence`: sum over S sequences of their own mean / S. An empty sequence adds
    an exact 0 and is not counted.
    """

    reduction: str = key("token", "what counts once in the mean", choices=("token", "sequence"))
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def views(self) -> Mapping[Kind, View]:
        return views.every_kind(partial(views.positives, min_score=self.min_score))

    @property
    def length_convention(self) -> str:
        return CONVENTION[self.reduction]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        every = torch.ones_like(batch.good)
        return {"sft": terms.reduced_count(batch, self.reduction, every), "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, clock: Clock) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        every = torch.ones_like(batch.good)
        totals = {
            "sft": terms.reduced_total(batch, -log_probs, self.reduction, every),
            "nll": terms.nll_total(batch, log_probs),
        }
        return terms.assemble(totals, self.counts(batch), {"sft": 1.0})
