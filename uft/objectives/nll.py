"""Weighted negative log-likelihood: supervised fine-tuning and the methods that weigh its tokens.

| preset | weight of a token | beside it |
|---|---|---|
| `sft` | 1 | |
| `dynamic_ft` (arXiv 2508.05629, eq. 8; what other libraries call `dft`) | its own probability, detached | |
| `anchored_sft` (Anchored SFT, as LLaMA-Factory has it) | its own probability, detached | alpha KL(reference, policy) |
| `rwr` (reward-weighted regression, as arXiv 2404.14367 has it) | exp(score / tau), of all completions | |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, View
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
    """-w log pi(y_t | x, y_<t) on demonstrations, chosen, good and well-scored completions, w detached.

    `token`: sum over all N targets / N. `sequence`: sum over S sequences of their own mean / S. An empty sequence adds
    an exact 0 and is not counted.

    With w = p a token's gradient is p times that of SFT, which is that of -p; the value is not monotone in p (it rises
    while p goes from 0 to 1/e): watch `nll`.

    Under `token` TRL's SFT and its `dft` agree in value and gradient.

    `alpha` adds alpha KL(reference || policy), the sum over the whole vocabulary at every target.
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
        return {**dict.fromkeys(Kind, views.pointwise), Kind.ROLLOUT: views.of_own(views.pointwise)}

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
