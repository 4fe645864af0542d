"""Preference losses without a reference: a likelihood term and a comparison of the policy's own scores.

S and mu are the sum and the mean of a completion's log-probs, odds(mu) = mu - log(1 - exp(mu)).

| preset | loss of a pair |
|---|---|
| `simpo` (2405.14734) | -log sigmoid(beta (mu_w - mu_l) - gamma) |
| `cpo` (2401.08417) | alpha (-mu_w) - log sigmoid(beta (S_w - S_l)) |
| `orpo` (2403.07691) | -mu_w - lam log sigmoid(odds(mu_w) - odds(mu_l)) |
| `asft` (2409.10571) | -mu_w + lam (-log sigmoid(beta odds(mu_w)) - log sigmoid(-beta odds(mu_l))) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.objectives import terms
from uft.objectives.base import Forward, Loss, StepContext, key
from uft.objectives.pairwise import PairLoss

Tensor = torch.Tensor

CERTAIN = -1e-6
"""Mean log-probs are kept below this: the odds of a certain completion have no end."""


def odds(mu: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mu), mu <= 0. log(1 - exp(mu)) is taken by whichever form keeps its digits."""
    mu = mu.clamp(max=CERTAIN)
    near_one = mu > -0.6931472
    # both branches are computed: each is kept finite where the other one counts
    small = torch.log(-torch.expm1(torch.where(near_one, mu, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_one, -1.0, mu)))
    return mu - torch.where(near_one, small, large)


SCORES: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "sum": lambda batch, log_probs: batch.sum(log_probs),
    "mean": lambda batch, log_probs: batch.mean(log_probs),
    "odds": lambda batch, log_probs: odds(batch.mean(log_probs)),
}
"""From log-probs (N,) to a score (S,)."""


def sigmoid(chosen: Tensor, rejected: Tensor, o: Contrastive) -> Tensor:
    """-log sigmoid(m), smoothed, m = beta (s_w - s_l) - gamma."""
    m = o.beta * (chosen - rejected) - o.gamma
    return (1 - o.label_smoothing) * softplus(-m) + o.label_smoothing * softplus(m)


def absolute(chosen: Tensor, rejected: Tensor, o: Contrastive) -> Tensor:
    """Each side by itself: likely if chosen, unlikely if rejected. Which rejected stands with which chosen is alike."""
    return softplus(-o.beta * chosen) + softplus(o.beta * rejected)


LINKS: dict[str, Callable[[Tensor, Tensor, Contrastive], Tensor]] = {"sigmoid": sigmoid, "absolute": absolute}


@dataclass(frozen=True)
class Contrastive(PairLoss):
    """alpha (-mu_w) + lam `link`(s_w, s_l), mean over pairs; no reference.

    Where others differ. TRL's ORPO takes its likelihood over prompt and completion and averages it over the batch's
    tokens, as its CPO does over those of completions; here every pair counts once, as in the papers (TRL's CPO is
    `alpha: 0`, `sft_weight: 1`, `reduction: token`). TRL's SimPO adds CPO's likelihood unless its `cpo_alpha` is 0; the
    paper has none. ASFT at beta = 1 is -(1 + lam) mu_w - lam log(1 - exp(mu_l)).
    """

    score: str = key(
        "mean", "of a completion: sum or mean of its log-probs, or log odds of the mean", choices=tuple(SCORES)
    )
    link: str = key("sigmoid", "comparison of a pair, or each side by itself", choices=tuple(LINKS))
    beta: float = key(1.0, "scale of the scores", gt=0)
    gamma: float = key(0.0, "margin by which the chosen one should be ahead")
    label_smoothing: float = key(0.0, "share of pairs taken to be labelled the wrong way round", ge=0, le=0.5)
    lam: float = key(1.0, "weight of the comparison", ge=0)
    alpha: float = key(0.0, "weight of the chosen completion's likelihood", ge=0)

    @property
    def length_convention(self) -> str:
        return self.convention(f"log-probs are {'summed' if self.score == 'sum' else 'averaged'} over tokens")

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        chosen = {"chosen_nll": terms.units(batch, batch.pairs.shape[0])} if self.alpha > 0 else {}
        return {**self.shared_counts(batch), **chosen}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        scores = SCORES[self.score](batch, log_probs)
        chosen, rejected = scores[batch.pairs].unbind(-1)
        totals = {
            "pair": LINKS[self.link](chosen, rejected, self).sum(),
            **self.shared_totals(batch, log_probs, self.beta * scores, self.beta),
        }
        if self.alpha > 0:
            totals["chosen_nll"] = -batch.mean(log_probs)[batch.pairs[:, 0]].sum()
        weights = {"pair": self.lam, "sft": self.sft_weight, "chosen_nll": self.alpha}
        return terms.assemble(totals, self.counts(batch), weights)
