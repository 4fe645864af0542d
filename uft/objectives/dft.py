"""Discriminative Fine-Tuning (arXiv 2502.18679): make the answer likelier than what the model would say instead.

Minimises F = mean_i [ -s(y_i, x_i) + tau log g_i ], g_i = sum over answers y' of exp(s(y', x_i) / tau), where the sum
is estimated from sampled negatives and a moving average u_i per example (compositional optimisation, as in SogCLR).
Not *Dynamic* Fine-Tuning (arXiv 2508.05629), which other libraries call `dft`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, Loss, Needs, Objective, StepContext, key

Tensor = torch.Tensor

SAMPLING = "sampling_log_probs"
"""Column (N,) of `denominator=sampling`: log-probs of negatives under the distribution that sampled them."""


def log_mean_exp(values: Tensor, mask: Tensor, group: Tensor, groups: int) -> Tensor:
    """(S,) -> (groups,): log of the mean of exp(values) over the masked members of each group; 0 for an empty one."""
    values = torch.where(mask, values, -math.inf)
    peak = torch.full((groups,), -math.inf, dtype=values.dtype, device=values.device)
    peak = peak.scatter_reduce(0, group, values, "amax")
    members = torch.zeros_like(peak).index_add(0, group, mask.to(values.dtype))
    peak = torch.where(members > 0, peak, 0.0)
    total = torch.zeros_like(peak).index_add(0, group, torch.exp(values - peak[group]))
    return torch.where(members > 0, peak + torch.log(total / members), 0.0)


@dataclass(frozen=True)
class DFT(Objective):
    """Discriminative likelihood of a row against sampled negatives (arXiv 2502.18679), by compositional optimisation.

    Per row: -s_pos + (1/B) sum_j w_j s_neg_j, w_j = exp(a_j) / u constant; s (S,) is a sequence's log-prob, u (R,) the
    moving average of the row.

    a_j = s_neg_j / tau - log P(y_j) (S,). DFT divides by how likely the negative was; DFT2 (`length_normalize`) takes
    mean log-probs and P constant, and needs no reference. u <- (1 - gamma) u + gamma mean_j exp(a_j), and w uses the
    new u, so mean_j w_j <= 1 / gamma. All of it in logs.

    `denominator=plain` (published code): P is the reference on the training prompt. `sampling` (theory): P is the
    distribution that sampled the negative, given as a column.

    The differentiated term (`surrogate`) has the gradient of F but not its value, and may be negative; the logged loss
    is `estimate` = -s_pos + tau log u. A row without negatives is -s_pos: SFT. Evaluation computes with u but never
    writes it. The same example twice in a batch updates its u twice, in order.

    With tau = 1 and the exact sum, F is SFT's loss: DFT departs from it only through where its negatives come from,
    how few they are, and the moving average.
    """

    headline = "estimate"

    reduction: str = key("sequence", "what counts once in the mean: rows", choices=("token", "sequence"))
    tau: float = key(1.0, "temperature of the discriminative likelihood", gt=0)
    gamma: float = key(0.85, "weight of the new estimate in the moving average of u; 1: no memory", gt=0, le=1)
    negatives: int = key(2, "negatives per row and visit, other ones at every visit", ge=0)
    length_normalize: bool = key(False, "mean instead of summed log-probs, and no reference (DFT2)")
    u_init: float = key(0.0, "log u before the first visit")
    denominator: str = key(
        "plain", "how likely a negative was: reference, or its sampler", choices=("plain", "sampling")
    )
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        if self.denominator == "sampling":
            return Needs(columns=frozenset({SAMPLING}))
        return Needs(reference=not self.length_normalize)

    @property
    def views(self) -> Mapping[Kind, View]:
        own: View = partial(views.against_own, negatives=self.negatives)
        taken: dict[Kind, View] = {**views.likelihood(self.min_score), Kind.ROLLOUT: own}
        if self.denominator == "sampling":
            del taken[Kind.PREFERENCE]  # a rejected answer has no known sampling probability
            return {**taken, Kind.NEGATIVES: partial(views.against_each_known, negatives=self.negatives)}
        versus: View = partial(views.against_each, negatives=self.negatives)
        return {**taken, Kind.NEGATIVES: versus, Kind.PREFERENCE: versus}

    @property
    def length_convention(self) -> str:
        joined = "averaged" if self.length_normalize else "summed"
        return f"every row counts once; log-probs are {joined} over tokens"

    def problems(self) -> list[tuple[str, str]]:
        found = terms.sequences_only(self.reduction)
        if self.length_normalize and self.denominator == "sampling":
            found.append(("denominator", "length_normalize drops the denominator; sampling has nothing to divide"))
        return found

    def start(self, examples: int) -> None:
        self.state["log_u"] = torch.full((examples,), self.u_init, dtype=torch.float32)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        positive, negative = self.sides(batch)
        rows = terms.units(batch, positive)
        return {
            "surrogate": rows,
            "estimate": rows,
            "nll": terms.nll_count(batch),
            "log_u": terms.units(batch, self.negatives_of(batch) > 0),
            "weight": terms.units(batch, negative),
        }

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        log_probs = terms.promote(policy(batch).log_probs)
        positive, negative = self.sides(batch)
        score = (batch.mean if self.length_normalize else batch.sum)(log_probs)
        a = self.ratios(batch, log_probs.detach(), reference)
        members = self.negatives_of(batch)
        log_g = log_mean_exp(a, negative, batch.row, members.numel())
        log_u = self.moving_average(batch.example, log_g, members > 0, context.learning)
        weight = torch.where(negative, torch.exp(a - log_u[batch.row]), 0.0)
        # where, not multiply: a sequence that takes no part must not bring in its NaN
        pulled = torch.where(positive, -score, 0.0)
        pushed = torch.where(negative, weight / members.clamp(min=1)[batch.row] * score, 0.0)
        totals = {
            "surrogate": pulled.sum() + pushed.sum(),
            "estimate": (pulled.detach() + torch.where(positive, self.tau * log_u[batch.row], 0.0)).sum(),
            "nll": terms.nll_total(batch, log_probs),
            "log_u": log_u.sum(),
            "weight": weight.sum(),
        }
        return terms.assemble(totals, self.counts(batch), {"surrogate": 1.0})

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        """With tau = 1 and u = 1, a = 0 and w = 1 exactly, until the first update."""
        if self.length_normalize or self.denominator != "plain" or self.tau != 1 or self.u_init != 0:
            return {}
        negatives = self.counts(batch)["weight"]
        return {"log_u": torch.zeros_like(negatives), "weight": negatives}

    def sides(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(S,) bool each: positives and negatives; an empty completion is on neither side."""
        present = terms.present(batch)
        return present & (batch.role == Role.POSITIVE), present & (batch.role == Role.NEGATIVE)

    def negatives_of(self, batch: Batch) -> Tensor:
        """(R,) int64: negatives of each row, B."""
        return torch.zeros_like(batch.example).index_add(0, batch.row, self.sides(batch)[1].to(torch.int64))

    def ratios(self, batch: Batch, log_probs: Tensor, reference: Forward | None) -> Tensor:
        """(S,) a = s / tau - log P, differenced per target so that long sequences keep their digits; no gradient."""
        if self.length_normalize:
            return batch.mean(log_probs) / self.tau
        if self.denominator == "sampling":
            return batch.sum(log_probs / self.tau - self.sampling_log_probs(batch))
        return batch.sum(log_probs / self.tau - terms.reference_log_probs(batch, reference))

    def sampling_log_probs(self, batch: Batch) -> Tensor:
        """(N,) the column; zeros for a batch without negatives, which brings none."""
        if SAMPLING in batch.columns:
            return terms.promote(batch.columns[SAMPLING].detach())
        assert not self.negatives_of(batch).any(), "negatives without sampling log-probs"
        return torch.zeros_like(batch.target_ids, dtype=torch.float32)

    @torch.no_grad()
    def moving_average(self, example: Tensor, log_g: Tensor, update: Tensor, learning: bool) -> Tensor:
        """(R,) log u after each row's update; 0 where `update` (R,) is False. Written to the state when learning."""
        keep = math.log1p(-self.gamma) if self.gamma < 1 else -math.inf
        self.state["log_u"] = self.state["log_u"].to(example.device)
        table = self.state["log_u"] if learning else self.state["log_u"].clone()
        log_u = torch.zeros_like(log_g)
        turn = (example[:, None] == example[None, :]).tril(-1).sum(1)  # how often it stood earlier in the batch
        for wave in turn.unique():
            now = update & (turn == wave)
            new = torch.logaddexp(keep + table[example[now]].to(log_g.dtype), math.log(self.gamma) + log_g[now])
            table[example[now]] = new.to(table.dtype)
            log_u[now] = new
        return log_u
