"""Pairwise preference losses: a function of the margin between a chosen and a rejected completion.

DPO (arXiv 2305.18290, eq. 7) and its label-smoothed form; every method that differs from it by constants is a preset
in YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.data.rows import Kind
from uft.data.views import Role, View
from uft.objectives import terms, views
from uft.objectives.base import Clock, Forward, Loss, Needs, Objective, key
from uft.objectives.sft import CONVENTION

Tensor = torch.Tensor


def logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """(P,) -(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta h; e: the share of labels taken to be flipped."""
    return (1 - label_smoothing) * softplus(-margin) + label_smoothing * softplus(margin)


@dataclass(frozen=True)
class Pairwise(Objective):
    """-log sigmoid(beta h), h = (S_w - S0_w) - (S_l - S0_l), S the summed log-probs and S0 the reference's.

    Every pair counts once; a row of one positive and K negatives is K pairs. With `sft_weight` the NLL of the positives
    is added under `reduction`, each positive once however many pairs it stands in, and demonstrations join that term.
    At policy = reference: log 2, whatever beta and label_smoothing.
    """

    reduction: str = key("sequence", "what counts once in the sft term", choices=("token", "sequence"))
    beta: float = key(0.1, "strength of the anchor to the reference", gt=0)
    label_smoothing: float = key(0.0, "share of pairs taken to be labelled the wrong way round", ge=0, le=0.5)
    sft_weight: float = key(0.0, "weight of the NLL of chosen completions and demonstrations", ge=0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    @property
    def views(self) -> Mapping[Kind, View]:
        taken: dict[Kind, View] = {
            Kind.PREFERENCE: views.against_each,
            Kind.SCORED: views.best_against_worst,
            Kind.NEGATIVES: views.against_each,
        }
        return {Kind.DEMONSTRATION: views.positives, **taken} if self.sft_weight > 0 else taken

    @property
    def length_convention(self) -> str:
        joined = "every pair counts once; log-ratios are summed over tokens"
        return f"{joined}; sft term: {CONVENTION[self.reduction]}" if self.sft_weight > 0 else joined

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {"pair": terms.units(batch, batch.pairs.shape[0]), "nll": terms.nll_count(batch)}
        if self.sft_weight > 0:
            counts["sft"] = terms.reduced_count(batch, self.reduction, batch.role == Role.POSITIVE)
        return {**counts, **terms.reward_counts(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, clock: Clock) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        anchor = terms.reference_log_probs(batch, reference)
        z = terms.implicit_reward(batch, log_probs, anchor, self.beta)
        chosen, rejected = z[batch.pairs].unbind(-1)
        totals = {
            "pair": logistic(chosen - rejected, self.label_smoothing).sum(),
            "nll": terms.nll_total(batch, log_probs),
            **terms.reward_totals(batch, z),
        }
        if self.sft_weight > 0:
            totals["sft"] = terms.reduced_total(batch, -log_probs, self.reduction, batch.role == Role.POSITIVE)
        return terms.assemble(totals, self.counts(batch), {"pair": 1.0, "sft": self.sft_weight})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"pair": math.log(2) * terms.units(batch, batch.pairs.shape[0])}
