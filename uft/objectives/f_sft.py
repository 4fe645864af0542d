"""f-divergence SFT: demonstrations as the optimum of min D_f(pi || expert) + beta KL(pi || reference).

After "implicit reward as the bridge" (arXiv 2507.00018), in which SFT is the total-variation member of a family. The
losses below are *derived* from that framework (variational dual with the closed form of the inner minimum, offset
v = 0); they are not copied from the paper's table, and the two may differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, Loss, Needs, Objective, StepContext, key

Tensor = torch.Tensor

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
    """-phi(r), r = beta (log pi(y|x) - log pi_ref(y|x)), mean over completions.

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
