"""KTO (arXiv 2402.01306): good and bad answers, each by itself, against a reference point shared by the whole step.

A prospect-theory value of the implicit reward a = log pi(y|x) - log pi_ref(y|x) around z, an estimate of the divergence
KL(pi || pi_ref): the mean of a over completions that stand under another row's prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, Loss, Needs, Objective, StepContext, Term, key

Tensor = torch.Tensor


@dataclass(frozen=True)
class KTO(Objective):
    """Desirable: 1 - sigmoid(beta (a - z)); undesirable: 1 - sigmoid(beta (z - a)); mean over completions.

    z = max(0, mean of a over mismatched completions), without gradient (eq. 8 and the authors' code). Every completion
    of a step is put under the prompt of the next other row of the same step, so that z belongs to the step and not to
    its micro-batches: TRL shifts within each device's batch, which is the same where that is the step's. A step of a
    single row has no mismatch, and z = 0. At policy = reference every completion is worth .5 times its weight.

    Both sides should weigh about alike: desirable_weight * desirable : undesirable_weight * undesirable within 1 to
    4/3 (section 4.2). Weights multiply the sum, never the count.
    """

    reduction: str = key("sequence", "completions count once", choices=("token", "sequence"))
    beta: float = key(0.1, "strength of the anchor to the reference", gt=0)
    desirable_weight: float = key(1.0, "weight of good completions", ge=0)
    undesirable_weight: float = key(1.0, "weight of bad completions", ge=0)
    min_score: float = key(views.GOOD_ENOUGH, "scored completions are good from here on", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, mismatched=True)

    @property
    def views(self) -> Mapping[Kind, View]:
        judged: View = partial(views.judged, min_score=self.min_score)
        return {**dict.fromkeys(Kind, judged), Kind.ROLLOUT: views.of_own(judged)}

    @property
    def length_convention(self) -> str:
        return "every completion counts once; log-ratios are summed over tokens"

    def problems(self) -> list[tuple[str, str]]:
        return terms.sequences_only(self.reduction)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        rows = terms.units(batch, terms.present(batch))
        return {"kto": rows, "reference_point": rows, "nll": terms.nll_count(batch), **terms.reward_counts(batch)}

    def baseline_terms(self, batch: Batch, policy: Forward, reference: Forward | None) -> Loss:
        ratio = self.ratios(batch, policy, reference)[1]
        return {"z": Term(ratio.sum(), terms.units(batch, terms.present(batch)))}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs, ratio = self.ratios(batch, policy, reference)
        z = context.kl_baseline.get("z", torch.zeros_like(ratio[:0].sum())).clamp(min=0).detach()
        present, good = terms.present(batch), batch.role == Role.POSITIVE
        ahead = torch.where(good, ratio - z, z - ratio)
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        # sigmoid(-x), not 1 - sigmoid(x): no digits are lost where x is large
        totals = {
            "kto": torch.where(present, weight * torch.sigmoid(-self.beta * ahead), 0.0).sum(),
            "reference_point": present.sum() * z,
            "nll": terms.nll_total(batch, log_probs),
            **terms.reward_totals(batch, self.beta * ratio, self.beta),
        }
        return terms.assemble(totals, self.counts(batch), {"kto": 1.0})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        weight = torch.where(batch.role == Role.POSITIVE, self.desirable_weight, self.undesirable_weight)
        return {"kto": 0.5 * torch.where(terms.present(batch), weight, 0.0).sum()}

    @staticmethod
    def ratios(batch: Batch, policy: Forward, reference: Forward | None) -> tuple[Tensor, Tensor]:
        """(N,) log-probs of the targets and (S,) log-ratios a."""
        log_probs = terms.promote(policy(batch).log_probs)
        return log_probs, batch.sum(log_probs - terms.reference_log_probs(batch, reference))
