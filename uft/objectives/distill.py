"""Distillation: the next-token distributions of the policy drawn to those of a teacher, over the whole vocabulary.

Generalised knowledge distillation (GKD, arXiv 2306.13649, eq. 1) on the completions of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, ForwardRequest, Loss, Needs, Objective, StepContext, key
from uft.objectives.nll import CONVENTION

Tensor = torch.Tensor


@dataclass(frozen=True)
class Distill(Objective):
    """Generalised Jensen-Shannon divergence JSD(beta) of teacher and policy at every target of demonstrations, chosen,
    good and well-scored completions.

    beta = 0 is the forward divergence KL(teacher || policy), 1 the reverse one, as in TRL's `generalized_jsd_loss`.
    Between them beta KL(teacher || m) + (1 - beta) KL(policy || m), m = beta teacher + (1 - beta) policy: towards its
    ends it is beta, or 1 - beta, times that divergence, and so smaller than at them. The teacher comes in the place of
    the reference. TRL's GKD learns besides from completions that the policy samples (its `lmbda`).
    """

    reduction: str = key("token", "what counts once in the mean", choices=("token", "sequence"))
    beta: float = key(0.5, "0: forward KL(teacher || policy), 1: reverse KL, between: JSD", ge=0, le=1)
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, distributions=True, teacher=True)

    @property
    def views(self) -> Mapping[Kind, View]:
        return dict.fromkeys(Kind, partial(views.positives, min_score=self.min_score))

    @property
    def length_convention(self) -> str:
        return CONVENTION[self.reduction]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        units = terms.reduced_count(batch, self.reduction, torch.ones_like(batch.good))
        return {"distill": units, "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        scores = policy(batch, ForwardRequest(anchor=reference, beta=self.beta))
        assert scores.divergence is not None
        every, divergence = torch.ones_like(batch.good), terms.promote(scores.divergence)
        totals = {
            "distill": terms.reduced_total(batch, divergence, self.reduction, every),
            "nll": terms.nll_total(batch, terms.promote(scores.log_probs)),
        }
        return terms.assemble(totals, self.counts(batch), {"distill": 1.0})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"distill": torch.zeros_like(batch.target[:0].sum())}
