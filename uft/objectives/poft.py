"""PoFT, preference-oriented supervised fine-tuning (arXiv 2412.12865): be likelier than other aligned models are.

A Bradley-Terry comparison of the policy with M frozen models on the same demonstration. What they say of it is one
number a completion, written beforehand by `uft annotate baseline_logp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.data.rows import BASELINE, Kind, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, Loss, Needs, Objective, StepContext, key

Tensor = torch.Tensor


@dataclass(frozen=True)
class PoFT(Objective):
    """-log sigmoid(beta (mu - b) + gamma), mu the mean log-prob of the completion's tokens and b the baseline's.

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
