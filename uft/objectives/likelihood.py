"""Likelihood objectives: losses of single completions that are good, without a comparison of two.

| preset | loss |
|---|---|
| `sft` | -log pi, a token's weight 1 |
| `dynamic_ft` (arXiv 2508.05629, eq. 8; what other libraries call `dft`) | its weight its own probability, detached |
| `anchored_sft` (Anchored SFT, as LLaMA-Factory has it) | likewise, with alpha KL(reference, policy) beside it |
| `rwr` (reward-weighted regression, as arXiv 2404.14367 has it) | weight exp(score / tau), of all completions |
| `f_sft` (after arXiv 2507.00018) | -phi(beta log(pi / pi_ref)) of a completion, by a divergence f |
| `poft` (arXiv 2412.12865) | -log sigmoid of how much likelier than under other aligned models |
| `distill` (arXiv 2306.13649) | divergence of a teacher's next-token distributions from the policy's |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.data.rows import ANSWERED, BASELINE, Kind, View
from uft.objectives import terms, views
from uft.objectives.base import PLAIN, Forward, ForwardRequest, Loss, Needs, Objective, StepContext, key

Tensor = torch.Tensor

CONVENTION = {
    "token": "every supervised token of the batch counts once",
    "sequence": "every completion counts once: mean over its tokens, then mean over completions",
}

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {"one": torch.ones_like, "probability": torch.exp}
"""Of log-probs (N,): the weight of each token, a constant to the gradient."""


@dataclass(frozen=True)
class WeightedNLL(Objective):
    """Weighted negative log-likelihood, -w log pi(y_t | x, y_<t), of good completions; w (N,) is detached.

    SFT has w = 1, Dynamic Fine-Tuning (arXiv 2508.05629, eq. 8) w = pi(y_t). Good are demonstrations, chosen and
    well-labelled completions, and those scored from `min_score` on.

    `token`: sum over all N targets / N. `sequence`: sum over S sequences of their own mean / S. An empty sequence adds
    an exact 0 and is not counted. Under `token` TRL's SFT and its `dft` agree in value and gradient.

    With w = p a token's gradient is p times that of SFT, which is that of -p; the value is not monotone in p (it rises
    while p goes from 0 to 1/e): watch `nll`.

    `alpha` adds alpha KL(reference || policy) (N,), summed over the whole vocabulary at every target.
    """

    reduction: str = key("token", "what counts once in the mean", choices=("token", "sequence"))
    weight: str = key("one", "of a token: one, its own probability, or by its score", choices=(*WEIGHTS, "score"))
    tau: float = key(1.0, "weight=score: a token counts exp(score / tau) times", gt=0)
    cap: float | None = key(None, "weight=score: no token counts more often than this; null: no bound", gt=0)
    alpha: float = key(0.0, "weight of the divergence from the reference, over the whole vocabulary", ge=0)
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.alpha > 0, distributions=self.alpha > 0)

    @property
    def views(self) -> Mapping[Kind, View]:
        if self.weight != "score":
            return views.likelihood(self.min_score)
        return {**dict.fromkeys(ANSWERED, views.pointwise), Kind.ROLLOUT: views.of_own(views.pointwise)}

    @property
    def length_convention(self) -> str:
        return CONVENTION[self.reduction]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        units = terms.reduced_count(batch, self.reduction, torch.ones_like(batch.good))
        kl = {"kl": units} if self.alpha > 0 else {}
        return {"sft": units, **kl, "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        scores = policy(batch, ForwardRequest(anchor=reference) if self.alpha > 0 else PLAIN)
        log_probs = terms.promote(scores.log_probs)
        every = torch.ones_like(batch.good)
        if self.weight == "score":
            weights = torch.exp(terms.promote(batch.target) / self.tau).clamp(max=self.cap or math.inf)[batch.sequence]
        else:
            weights = WEIGHTS[self.weight](log_probs.detach())
        weighted = -weights * log_probs
        totals = {
            "sft": terms.reduced_total(batch, weighted, self.reduction, every),
            "nll": terms.nll_total(batch, log_probs),
        }
        if self.alpha > 0:
            assert scores.divergence is not None
            totals["kl"] = terms.reduced_total(batch, terms.promote(scores.divergence), self.reduction, every)
        return terms.assemble(totals, self.counts(batch), {"sft": 1.0, "kl": self.alpha})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"kl": torch.zeros_like(batch.target[:0].sum())} if self.alpha > 0 else {}


MARGIN = 1e-3
"""How far from the edge of a divergence's domain the reward is clamped."""


class Divergence(NamedTuple):
    """phi(r) = -f*(-r), concave with phi(0) = 0 and phi'(0) = 1, for r above `edge`."""

    phi: Callable[[Tensor], Tensor]
    edge: float = -math.inf


DIVERGENCES: dict[str, Divergence] = {
    "total_variation": Divergence(lambda r: r),
    "pearson": Divergence(lambda r: r - r**2 / 4),
    "hellinger": Divergence(lambda r: r / (1 + r), -1.0),
    "reverse_kl": Divergence(lambda r: -torch.expm1(-r), -30.0),  # KL(pi || expert); see below
    "forward_kl": Divergence(torch.log1p, -1.0),  # KL(expert || pi)
    "jensen_shannon": Divergence(lambda r: torch.log1p(-torch.expm1(-r)), -math.log(2)),
}
"""The domain of `reverse_kl` has no edge, but the squared norm of the gradient has to be a float32: the slope exp(30)
squared is 1e26, which leaves a factor of 1e12 for the weights; from exp(44) on it is infinite."""


@dataclass(frozen=True)
class FSFT(Objective):
    """f-divergence SFT: demonstrations as the optimum of min D_f(pi || expert) + beta KL(pi || reference).

    -phi(r), r = beta (log pi(y|x) - log pi_ref(y|x)) (S,), mean over completions. After "implicit reward as the bridge"
    (arXiv 2507.00018), in which SFT is the total-variation member of a family; *derived* from that framework
    (variational dual with the closed form of the inner minimum, offset v = 0), not copied from the paper's table, and
    the two may differ.

    The gradient is SFT's, summed over each completion, times beta phi'(r): less and less for what became likely, where
    plain SFT has no reason to stop. At policy = reference it equals beta times SFT's for every divergence, and the loss
    is 0. `total_variation` is beta times SFT throughout, and needs no reference: without one the value lacks its
    constant. r is clamped to the domain of phi; the share of clamped completions is logged.
    """

    reduction: str = key("sequence", "completions count once", choices=("token", "sequence"))
    beta: float = key(0.1, "strength of the anchor to the reference", gt=0)
    f: str = key("pearson", "the divergence between policy and expert", choices=tuple(DIVERGENCES))
    ratio: str = key("sum", "log-ratio summed or averaged over the completion", choices=("sum", "mean"))
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.f != "total_variation")

    @property
    def views(self) -> Mapping[Kind, View]:
        return views.likelihood(self.min_score)

    @property
    def length_convention(self) -> str:
        return f"every completion counts once; log-ratios are {'summed' if self.ratio == 'sum' else 'averaged'}"

    def problems(self) -> list[tuple[str, str]]:
        return terms.sequences_only(self.reduction)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        rows = terms.units(batch, terms.present(batch))
        return {"f_sft": rows, "implicit_reward": rows, "clamped": rows, "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        anchor = terms.reference_log_probs(batch, reference) if self.needs.reference or reference else 0.0
        r = self.beta * (batch.sum if self.ratio == "sum" else batch.mean)(log_probs - anchor)
        phi, edge = DIVERGENCES[self.f]
        inside = r.clamp(min=edge + MARGIN)
        totals = {
            "f_sft": -torch.where(terms.present(batch), phi(inside), 0.0).sum(),
            "implicit_reward": r.sum(),
            "clamped": (r < edge + MARGIN).to(r.dtype).sum(),
            "nll": terms.nll_total(batch, log_probs),
        }
        return terms.assemble(totals, self.counts(batch), {"f_sft": 1.0})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"f_sft": torch.zeros_like(batch.target[:0].sum())} if self.needs.reference else {}


@dataclass(frozen=True)
class PoFT(Objective):
    """Preference-oriented SFT (arXiv 2412.12865): a Bradley-Terry comparison with M frozen models on a demonstration.

    -log sigmoid(beta (mu - b) + gamma), mu (S,) the mean log-prob of a completion's tokens and b (S,) that of the
    frozen models, written beforehand by `uft annotate baseline_logp`.

    b is the mean over models of their own mean log-probs, each under its own tokenizer and template (eq. 5 and code;
    the paper has beta = 1 and gamma = 0). The gradient is that of per-completion SFT times sigmoid(b - mu): completions
    that the others find unlikely count for less. The released trainer averages over the prompt's tokens too; this
    follows the paper.
    """

    reduction: str = key("sequence", "completions count once", choices=("token", "sequence"))
    beta: float = key(1.0, "scale of the difference", gt=0)
    gamma: float = key(0.0, "added to the scaled difference")
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(annotations=frozenset({BASELINE}))

    @property
    def views(self) -> Mapping[Kind, View]:
        return views.likelihood(self.min_score)

    @property
    def length_convention(self) -> str:
        return "every completion counts once; log-probs are averaged over its tokens"

    def problems(self) -> list[tuple[str, str]]:
        return terms.sequences_only(self.reduction)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        rows = terms.units(batch, terms.present(batch))
        return {"poft": rows, "tau": rows, "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        ahead = self.beta * (batch.mean(log_probs) - terms.annotation(batch, BASELINE)) + self.gamma
        present = terms.present(batch)
        totals = {
            "poft": torch.where(present, softplus(-ahead), 0.0).sum(),
            "tau": torch.where(present, torch.sigmoid(-ahead), 0.0).sum(),
            "nll": terms.nll_total(batch, log_probs),
        }
        return terms.assemble(totals, self.counts(batch), {"poft": 1.0})


@dataclass(frozen=True)
class Distill(Objective):
    """Generalised knowledge distillation (GKD, arXiv 2306.13649, eq. 1) on the completions of the data: Jensen-Shannon
    divergence JSD(beta) (N,) of teacher and policy over the whole vocabulary, at every target of a good completion.

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
        return dict.fromkeys(ANSWERED, partial(views.positives, min_score=self.min_score))

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
