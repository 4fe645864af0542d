"""Objectives of completions by themselves, good and bad ones, by their log-ratio to a reference: UFT, UNA and KTO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.data.rows import ANSWERED, Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, Loss, Needs, Objective, StepContext, Term, key

Tensor = torch.Tensor


REGRESSION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # UFT eq. 7; UNA eqs. 11-13, whose printed minus is a typo; saturates at both ends
    "mse": lambda z, target: (torch.sigmoid(z) - target) ** 2,
    # -r log sigmoid(z) - (1 - r) log sigmoid(-z), stable for any z; r may be soft
    "bce": lambda z, target: target * softplus(-z) + (1 - target) * softplus(z),
}
"""From z and an explicit reward r, (S,) each, to a loss (S,)."""


@dataclass(frozen=True)
class UFT(Objective):
    """Unified Fine-Tuning (arXiv 2410.21438) and UNA (arXiv 2408.15339): one regression for every kind of feedback.

    The optimum of the KL-regularised objective satisfies r(x, y) = beta log(pi/pi_ref) + f(x) + c; both papers set
    f = c = 0. Training fits the score sigmoid(z), z = beta (log pi(y|x) - log pi_ref(y|x)) (S,), to an explicit reward
    r (S,) in [0, 1]. UNA is the same on alignment data alone: a preset.

    One term over all rows: every scored completion counts once, and so does every pair.

    Scored sequence: `loss`(z, r); an empty one adds an exact 0 and is not counted. Pair: softplus(-(z_w - z_l)), which
    is DPO's loss; UFT's eq. 10 as printed lacks the log-sigmoid and is unbounded. Weights of kinds multiply the sum,
    never the count. At policy = reference mse is (.5 - r)^2, bce and pairs are log 2.
    """

    reduction: str = key(
        "sequence", "what counts once in the mean: completions and pairs", choices=("token", "sequence")
    )
    beta: float = key(0.01, "strength of the anchor to the reference: z = beta log(pi / pi_ref)", gt=0)
    loss: str = key("mse", "distance between implicit and explicit reward", choices=tuple(REGRESSION))
    pairs: str = key("pairwise", "preferences: one comparison, or r = 1 and r = 0", choices=("pairwise", "scores"))
    demonstration_score: float = key(1.0, "explicit reward of a demonstration", ge=0, le=1)
    length_normalize: bool = key(False, "average the log-ratio over tokens instead of summing it")
    kind_weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "weight per kind of row, e.g. demonstration: 0.5; default 1"}
    )

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    @property
    def views(self) -> Mapping[Kind, View]:
        scored: View = partial(views.pointwise, demonstration_score=self.demonstration_score)
        pairs: dict[str, View] = {"pairwise": views.against_each, "scores": scored}
        taken = {Kind.PREFERENCE: pairs[self.pairs], Kind.ROLLOUT: views.of_own(views.pointwise)}
        return {**dict.fromkeys(ANSWERED, scored), **taken}

    @property
    def length_convention(self) -> str:
        joined = "averaged" if self.length_normalize else "summed"
        return f"every scored completion and every pair counts once; log-ratios are {joined} over tokens"

    def problems(self) -> list[tuple[str, str]]:
        problems = terms.sequences_only(self.reduction)
        kinds = [kind.value for kind in Kind]
        unknown = [name for name in self.kind_weights if name not in kinds]
        problems += [("kind_weights", f"{name} is no kind of row; kinds: {', '.join(kinds)}") for name in unknown]
        bad = {n: w for n, w in self.kind_weights.items() if not (w >= 0 and math.isfinite(w))}
        return problems + [("kind_weights", f"{name}: {weight} is not a weight") for name, weight in bad.items()]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        scored, compared = self.scored(batch), self.compared(batch)
        counted = terms.units(batch, scored) + terms.units(batch, compared)
        return {"uft": counted, "nll": terms.nll_count(batch), **terms.reward_counts(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        ratios = log_probs - terms.reference_log_probs(batch, reference)  # per target: sums would lose four digits
        z = self.beta * (batch.mean if self.length_normalize else batch.sum)(ratios)
        totals = {
            "uft": self.regression(batch, z),
            "nll": terms.nll_total(batch, log_probs),
            **terms.reward_totals(batch, z, self.beta),
        }
        return terms.assemble(totals, self.counts(batch), {"uft": 1.0})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"uft": self.regression(batch, torch.zeros_like(batch.target))}

    def regression(self, batch: Batch, z: Tensor) -> Tensor:
        """() the weighted sum over scored sequences and pairs, given z (S,)."""
        weight = self.weights(batch).to(z.dtype)
        scored = self.scored(batch)
        target = torch.where(scored, batch.target, 0.0).to(z.dtype)
        points = torch.where(scored, weight * REGRESSION[self.loss](z, target), 0.0)
        chosen, rejected = batch.pairs.unbind(-1)
        comparisons = weight[chosen] * softplus(-(z[chosen] - z[rejected]))
        return points.sum() + torch.where(self.compared(batch), comparisons, 0.0).sum()

    @staticmethod
    def scored(batch: Batch) -> Tensor:
        """(S,) bool: sequences with an explicit reward."""
        return ~batch.target.isnan() & terms.present(batch)

    @staticmethod
    def compared(batch: Batch) -> Tensor:
        """(P,) bool: pairs without explicit rewards; those of scored completions are shown, not trained."""
        return batch.target[batch.pairs].isnan().all(-1)

    def weights(self, batch: Batch) -> Tensor:
        """(S,) float32: the weight of each sequence's kind."""
        table = torch.tensor([self.kind_weights.get(kind.value, 1.0) for kind in Kind], device=batch.kind.device)
        return table[batch.kind][batch.row]


@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): good and bad answers, each by itself, against a reference point
    shared by the whole step.

    A prospect-theory value of the implicit reward a = log pi(y|x) - log pi_ref(y|x) (S,) around z (), an estimate of
    KL(pi || pi_ref): the mean of a over completions that stand under another row's prompt.

    Desirable: 1 - sigmoid(beta (a - z)); undesirable: 1 - sigmoid(beta (z - a)); mean over completions.

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
        return {**dict.fromkeys(ANSWERED, judged), Kind.ROLLOUT: views.of_own(judged)}

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
