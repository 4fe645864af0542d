"""Intuitive Fine-Tuning (arXiv 2405.11870): learn from states the policy itself would visit, without negatives.

Two ideas. *Temporal residual connection* (eq. 17): a second forward reads (1 - lam) E[target] + lam E[guess], where the
guess is the policy's own most likely token in that place. *Relation propagation*: the loss of a token also answers for
those that follow it, through weights made of the losses themselves.

The paper's main text (eq. 21), its Algorithm 1 and the published code propagate by three different formulas. The runs
were made by the code's, which is the default (`normalized`); the others are named modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from uft.data.batch import Batch
from uft.data.rows import Kind, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, ForwardOutput, ForwardRequest, Loss, Needs, Objective, StepContext, key
from uft.objectives.likelihood import CONVENTION

Tensor = torch.Tensor

VANISHING = 1e-30
"""Below this sum of losses a sequence has nothing to propagate: all weights are 1."""


def discounted(values: Tensor, gamma: float) -> Tensor:
    """(S, T) -> (S, T): C[t] = sum over i >= t of gamma^(i - t) values[i].

    Doubling: after step k each cell holds the sum of the next 2^k ones. Elementwise, so no reduced-precision matrix
    product can touch it, and no gamma^(-t), which loses every digit within a thousand tokens.
    """
    span = 1
    while span < values.shape[1]:
        values = values + gamma**span * pad(values[:, span:], (0, span))
        span *= 2
    return values


def following(batch: Batch, values: Tensor, gamma: float, *, reverse: bool = False) -> Tensor:
    """(N,) -> (N,): discounted sums over a target and those after it in its sequence (`reverse`: before it).

    The discount runs over absolute positions: a user's turn between two assistant turns costs its length in powers of
    gamma, as in the published code.
    """
    if values.numel() == 0:
        return values
    first = torch.full_like(batch.row, torch.iinfo(torch.int64).max)
    first = first.scatter_reduce(0, batch.sequence, batch.offset, "amin")
    column = batch.offset - first[batch.sequence]
    cells = (batch.sequence, column)
    grid = values.new_zeros(batch.row.numel(), int(column.max()) + 1).index_put(cells, values)
    sums = discounted(grid.flip(1), gamma).flip(1) if reverse else discounted(grid, gamma)
    return sums[cells]


def ordinal(batch: Batch) -> Tensor:
    """(N,) int64: 1 for the first supervised target of a sequence, 2 for the second, ..."""
    start = batch.lengths.cumsum(0) - batch.lengths
    return torch.arange(1, batch.sequence.numel() + 1, device=batch.sequence.device) - start[batch.sequence]


def normalized(batch: Batch, nll: Tensor, gamma: float) -> Tensor:
    """Published code: w_t = N C_t / sum_s C_s with C_t = sum_{i>=t} gamma^(i-t) l_i; the mean weight is 1.

    gamma = 0 means w = 1, on purpose not the limit: that is sum l^2 / sum l.
    """
    if gamma == 0:
        return torch.ones_like(nll)
    sums = following(batch, nll, gamma)
    whole = batch.sum(sums)
    vanishing = whole < VANISHING
    scale = batch.lengths / torch.where(vanishing, 1.0, whole)
    return torch.where(vanishing[batch.sequence], 1.0, sums * scale[batch.sequence])


def algorithm_1(batch: Batch, nll: Tensor, gamma: float) -> Tensor:
    """Algorithm 1: w_t = gamma^(N - t) sum_{i>=t} l_i."""
    left = (batch.lengths[batch.sequence] - ordinal(batch)).to(nll.dtype)
    return torch.full_like(nll, gamma) ** left * following(batch, nll, 1.0)


class Propagation(NamedTuple):
    weights: Callable[[Batch, Tensor, float], Tensor]  # (batch, nll (N,), gamma) -> (N,)
    normalised: bool  # else the formula is a sum over the sequence, not a mean


PROPAGATION: dict[str, Propagation] = {
    "normalized": Propagation(normalized, True),
    # sum_n sum_{i>=n} l_i = sum_i i l_i, so w_i = i: late tokens weigh more; gamma has no part in it
    "eq21": Propagation(lambda batch, nll, gamma: ordinal(batch).to(nll.dtype), False),
    "alg1": Propagation(algorithm_1, False),
    "none": Propagation(lambda batch, nll, gamma: torch.ones_like(nll), True),  # eq. 20
}


def coefficients(batch: Batch, nll: Tensor, gamma: float) -> Tensor:
    """(N,) dL/dl_k of the normalized form per sequence: (C_k + P_k - L G_k) / sum C.

    P_k and G_k are the discounted sums of l and of 1 up to k. Negative where a token is predicted so much better than
    its neighbours that the weights gain more by making it less likely.
    """
    after = following(batch, nll, gamma)
    before = following(batch, nll, gamma, reverse=True)
    ones = following(batch, torch.ones_like(nll), gamma, reverse=True)
    whole = batch.sum(after).clamp(min=VANISHING)
    loss = batch.sum(nll * after) / whole
    return (after + before - loss[batch.sequence] * ones) / whole[batch.sequence]


@dataclass(frozen=True)
class IFT(Objective):
    """Intuitive Fine-Tuning (arXiv 2405.11870, eqs. 17-21): weighted NLL on mixed embeddings, (1/N) sum_t w_t l_t.

    1. Pass 1, no gradient: the policy's guess for every supervised place.
    2. Pass 2, with gradient, on (1 - lam) E[target] + lam E[guess]: l (N,) >= 0, the NLL of the original targets.
    3. Weights w (N,) from l by `propagation`; the gradient flows through them unless `detach_weights`.

    `eq21` and `alg1` are sums over a sequence, unnormalised as printed: under `sequence` long completions count more.
    With lam = 0 the one forward is plain and pass 1 is skipped; with gamma = 0 too this is per-sequence SFT, but for
    the input embeddings, which receive no gradient unless `embed_grad` (the published code mixes a frozen copy). A
    single token gives the SFT loss whatever lam and gamma; losses that are all 0 give weight 1.
    """

    reduction: str = key("sequence", "what counts once in the mean", choices=("token", "sequence"))
    lam: float = key(0.2, "share of the policy's guess in an input embedding", ge=0, le=1)
    lam_start: float | None = key(
        None, "lam at step 0, rising linearly over the warm-up; null: lam throughout", ge=0, le=1
    )
    lam_noise: float = key(0.0, "noise on lam, one draw a step: lam (1 + lam_noise x), clamped to [0, 1]", ge=0)
    gamma: float = key(0.95, "how far a token's loss reaches back; 0: not at all", ge=0, le=1)
    propagation: str = key("normalized", "formula of the weights", choices=tuple(PROPAGATION))
    detach_weights: bool = key(False, "no gradient through the weights")
    embed_grad: bool = key(False, "train the input embeddings through the mixture")
    min_score: float = key(views.GOOD_ENOUGH, "scored completions from here on are learnt from", ge=0, le=1)

    @property
    def needs(self) -> Needs:
        return Needs(embeddings=self.lam > 0 or not self.embed_grad)

    @property
    def views(self) -> Mapping[Kind, View]:
        return views.likelihood(self.min_score)

    @property
    def length_convention(self) -> str:
        if self.reduction == "sequence" and not PROPAGATION[self.propagation].normalised:
            return "every completion counts once: sum over its tokens, then mean over completions"
        return CONVENTION[self.reduction]

    def problems(self) -> list[tuple[str, str]]:
        if self.lam_start is not None and self.lam_start > self.lam:
            return [("lam_start", f"the ramp goes up: lam_start={self.lam_start} is above lam={self.lam}")]
        return []

    def mix(self, context: StepContext) -> float:
        """lam at this step: ramp, then noise, then clamp. The same for all micro-batches of a step."""
        lam = self.lam
        if self.lam_start is not None and context.step < context.warmup:
            lam = self.lam_start + (self.lam - self.lam_start) * context.step / context.warmup
        return min(max(lam * (1 + self.lam_noise * context.noise), 0.0), 1.0)

    def forwards(self, batch: Batch, policy: Forward, lam: float) -> tuple[ForwardOutput, ForwardOutput]:
        """(pass 1 without gradient, pass 2 with); one and the same forward when lam = 0."""
        if lam == 0:
            plain = policy(batch, ForwardRequest(argmax=True, embed_grad=self.embed_grad))
            return plain, plain
        with torch.no_grad():
            plain = policy(batch, ForwardRequest(argmax=True))
        return plain, policy(batch, ForwardRequest(replace=plain.argmax, mix=lam, embed_grad=self.embed_grad))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        every = torch.ones_like(batch.good)
        targets = terms.units(batch, batch.target_ids.numel())
        return {
            "ift": terms.reduced_count(batch, self.reduction, every),
            "nll": terms.nll_count(batch),
            "negative_share": targets,
            "guess_accuracy": targets,
            "lam": terms.units(batch, terms.present(batch)),
        }

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        lam, counts = self.mix(context), self.counts(batch)
        plain, mixed = self.forwards(batch, policy, lam)
        assert plain.argmax is not None
        nll = -terms.promote(mixed.log_probs)
        formula = PROPAGATION[self.propagation]
        weighted = formula.weights(batch, nll.detach() if self.detach_weights else nll, self.gamma) * nll
        whole = batch.mean(weighted) if self.reduction == "sequence" and formula.normalised else weighted
        totals = {
            "ift": whole.sum(),
            "nll": terms.nll_total(batch, terms.promote(plain.log_probs)),
            "negative_share": self.negatives(batch, nll.detach()),
            "guess_accuracy": (plain.argmax == batch.target_ids).to(nll.dtype).sum(),
            "lam": counts["lam"].to(nll.dtype) * lam,
        }
        return terms.assemble(totals, counts, {"ift": 1.0})

    def negatives(self, batch: Batch, nll: Tensor) -> Tensor:
        """() number of targets whose loss the gradient raises: only through the normalised weights."""
        if self.propagation != "normalized" or self.detach_weights or self.gamma == 0:
            return nll.new_zeros(())
        return (coefficients(batch, nll, self.gamma) < 0).to(nll.dtype).sum()
