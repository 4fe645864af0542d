"""Preference losses: on the log-ratio to a reference (DPO and what differs from it by a link), or without a reference.

`Pairwise`, DPO (arXiv 2305.18290, eq. 7) and its kin.

A completion's score is a = log pi(y|x) - log pi_ref(y|x) (S,); a pair has a_w, a_l and h = a_w - a_l (P,); n is a
length in tokens.

| preset | loss of a pair, m = beta h unless said |
|---|---|
| `dpo`, `cdpo` | -(1 - e) log sigmoid(m) - e log sigmoid(-m), e = `label_smoothing` |
| `robust_dpo` (2403.00409) | [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2e) |
| `hinge` (SLiC) | max(0, 1 - m) |
| `ipo` (2310.12036) | (h - 1/(2 tau))^2 |
| `rdpo_length` (2403.19159) | DPO, m = beta h + alpha (n_w - n_l) |
| `ld_dpo` (2409.06411) | DPO, tokens beyond min(n_w, n_l) counted alpha times in a |
| `dpop` (2402.13228) | DPO, m = beta (h - lam max(0, -a_w)) |
| `rpo` (2405.16436) | DPO - eta beta log pi(y_w|x), or + eta (-mean log pi(y_w|x)) |
| `nca` (2402.05369) | -log sigmoid(beta a_w) - .5 log sigmoid(-beta a_w) - .5 log sigmoid(-beta a_l) |
| `irft` (2405.17888) | DPO, hinge or -m against the model's own samples |
| `apo_zero` (2408.06266, eq. 7) | sigmoid(-beta a_w) + sigmoid(beta a_l) |
| `apo_down` (2408.06266, eq. 8) | sigmoid(beta a_w) + sigmoid(-m) |
| `sppo_hard` (2405.00675, eq. 4.7) | (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2 |
| `exo_pair` (2402.00856, eq. 16) | KL(q, e) of the two shares q = sigmoid(m), 1 - q against 1 - e, e |
| `bco_pair` (2404.04656) | -log sigmoid(beta a_w) - log sigmoid(-beta a_l) |
| `discopop` (2406.08414, eq. 5) | (1 - g)(-log sigmoid(m)) + g exp(-m), g = sigmoid(m / temperature) |
| `wpo` (2406.11827, eq. 2) | DPO times sg[v_w v_l], v the length-normalised likelihood of a side |
| `aot`, `aot_unpaired` (2406.05882) | DPO, h the difference of the k-th largest margins, or log-ratios, of the step |
| `gdpo_soft`, `gipo_soft`, `gropo_soft` (2409.06691) | DPO, IPO, ROPO with h -> (2p - 1) h, p the soft label |

`Contrastive`, a likelihood term and a comparison of the policy's own scores. S and mu are the sum and the mean of a
completion's log-probs, odds(mu) = mu - log(1 - exp(mu)).

| preset | loss of a pair |
|---|---|
| `simpo` (2405.14734) | -log sigmoid(beta (mu_w - mu_l) - gamma) |
| `cpo` (2401.08417) | alpha (-mu_w) - log sigmoid(beta (S_w - S_l)) |
| `orpo` (2403.07691) | -mu_w - lam log sigmoid(odds(mu_w) - odds(mu_l)) |
| `asft` (2409.10571) | -mu_w + lam (-log sigmoid(beta odds(mu_w)) - log sigmoid(-beta odds(mu_l))) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import softplus

from uft.data.batch import Batch
from uft.data.rows import SOFT_LABEL, Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import MATCHED, Forward, ForwardRequest, Loss, Needs, Objective, StepContext, key
from uft.objectives.likelihood import CONVENTION

Tensor = torch.Tensor


OWN_PAIRS: dict[str, View] = {"ranked": views.of_own(views.best_against_worst), "negatives": views.against_own}
"""The pairs of a row with completions that the policy sampled."""


@dataclass(frozen=True)
class PairLoss(Objective):
    """Base of all losses over pairs, with a reference (`Pairwise`) or without (`Contrastive`): a score of a completion,
    and a link from two scores to a loss. Every pair counts once; a row of one positive and K negatives is K pairs.

    With `sft_weight` the NLL of the positives is added under `reduction`, each positive once however many pairs it
    stands in, and demonstrations join that term.
    """

    reduction: str = key("sequence", "what counts once in the sft term", choices=("token", "sequence"))
    sft_weight: float = key(0.0, "weight of the NLL of chosen completions and demonstrations", ge=0)
    own: str = key(
        "ranked", "own completions: best against worst, or negatives of the demonstration", choices=tuple(OWN_PAIRS)
    )

    @property
    def views(self) -> Mapping[Kind, View]:
        taken: dict[Kind, View] = {
            Kind.PREFERENCE: views.against_each,
            Kind.SCORED: views.best_against_worst,
            Kind.NEGATIVES: views.against_each,
            Kind.ROLLOUT: OWN_PAIRS[self.own],
        }
        return {Kind.DEMONSTRATION: views.positives, **taken} if self.sft_weight > 0 else taken

    def convention(self, score: str) -> str:
        joined = f"every pair counts once; {score}"
        return f"{joined}; sft term: {CONVENTION[self.reduction]}" if self.sft_weight > 0 else joined

    def shared_counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {"pair": terms.units(batch, batch.pairs.shape[0]), "nll": terms.nll_count(batch)}
        if self.sft_weight > 0:
            counts["sft"] = terms.reduced_count(batch, self.reduction, batch.role == Role.POSITIVE)
        return {**counts, **terms.reward_counts(batch)}

    def shared_totals(self, batch: Batch, log_probs: Tensor, rewards: Tensor, beta: float) -> dict[str, Tensor]:
        """All but the pairs; `rewards` (S,), in units of `beta`, are what is shown of both sides."""
        totals = {"nll": terms.nll_total(batch, log_probs), **terms.reward_totals(batch, rewards, beta)}
        if self.sft_weight > 0:
            totals["sft"] = terms.reduced_total(batch, -log_probs, self.reduction, batch.role == Role.POSITIVE)
        return totals


class Pairs(NamedTuple):
    """P pairs, (P,) each."""

    chosen: Tensor  # a_w
    rejected: Tensor  # a_l
    longer: Tensor  # n_w - n_l
    certainty: Tensor  # 2p - 1; 1 where labels are hard


def smoothed(m: Tensor, e: float) -> Tensor:
    """-log sigmoid(m); a share e of the labels is taken to be the wrong way round."""
    return (1 - e) * softplus(-m) + e * softplus(m)


def robust(pairs: Pairs, o: Pairwise) -> Tensor:
    """Unbiased under a share e of flipped labels: its expectation is DPO on clean ones. May be negative."""
    m, e = o.margin(pairs), o.label_smoothing
    return ((1 - e) * softplus(-m) - e * softplus(m)) / (1 - 2 * e)


def squared(pairs: Pairs, o: Pairwise) -> Tensor:
    """(h - 1/(2 tau))^2. Soft labels: `scaled` weighs the whole by (2p - 1)^2, `substitute` scales h alone, and so asks
    larger margins of less certain pairs."""
    h, wanted = pairs.chosen - pairs.rejected, 1 / (2 * o.strength)
    if o.form == "substitute":
        return (pairs.certainty * h - wanted) ** 2
    return pairs.certainty**2 * (h - wanted) ** 2


def ropo(pairs: Pairs, o: Pairwise) -> Tensor:
    """4A/(1 + A)^2 (-log sigmoid(m) + A sigmoid(-m)), A = `alpha` (ROPO eq. 9): bounded pull on pairs far on the wrong
    side, which are probably mislabelled."""
    m = o.margin(pairs)
    return 4 * o.alpha / (1 + o.alpha) ** 2 * (softplus(-m) + o.alpha * torch.sigmoid(-m))


def nca(pairs: Pairs, o: Pairwise) -> Tensor:
    """Each side by itself, so that the chosen one's likelihood is not free to fall."""
    chosen, rejected = o.beta * pairs.chosen, o.beta * pairs.rejected
    return softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)


def sppo(pairs: Pairs, o: Pairwise) -> Tensor:
    """Self-play with hard labels: each log-ratio should be 1/(2 beta) above or below 0."""
    wanted = 1 / (2 * o.beta)
    return (pairs.chosen - wanted) ** 2 + (pairs.rejected + wanted) ** 2


def exo(pairs: Pairs, o: Pairwise) -> Tensor:
    """Reverse KL of the policy's shares of the pair (sigmoid(m), sigmoid(-m)) from those of the labels (1 - e, e)."""
    m, e = o.margin(pairs), o.label_smoothing
    ahead = torch.sigmoid(m) * (-softplus(-m) - math.log1p(-e))
    return ahead + torch.sigmoid(-m) * (-softplus(m) - math.log(e))


def discopop(pairs: Pairs, o: Pairwise) -> Tensor:
    """Logistic where m is negative, exponential where it is positive, blended by g = sigmoid(m / temperature)."""
    m = o.margin(pairs)
    gate = m / o.temperature
    # g exp(-m) in one exponential: exp(-m) alone overflows where g is 0
    return torch.sigmoid(-gate) * softplus(-m) + torch.exp(-softplus(-gate) - m)


LINKS: dict[str, Callable[[Pairs, Pairwise], Tensor]] = {
    "sigmoid": lambda pairs, o: smoothed(o.margin(pairs), o.label_smoothing),
    "robust": robust,
    "hinge": lambda pairs, o: torch.relu(1 - o.margin(pairs)),
    "linear": lambda pairs, o: -o.margin(pairs),  # the bare gradient of inverse reinforcement learning, unbounded below
    "squared": squared,
    "ropo": ropo,
    "nca": nca,
    # the chosen side likelier than under the reference, the rejected one less likely, both bounded
    "apo_zero": lambda pairs, o: torch.sigmoid(-o.beta * pairs.chosen) + torch.sigmoid(o.beta * pairs.rejected),
    # both sides less likely than under the reference, the rejected one more so
    "apo_down": lambda pairs, o: torch.sigmoid(o.beta * pairs.chosen) + torch.sigmoid(-o.margin(pairs)),
    "sppo": sppo,
    "exo": exo,
    # a classifier of good and bad completions, each side by itself
    "bco": lambda pairs, o: softplus(-o.beta * pairs.chosen) + softplus(o.beta * pairs.rejected),
    "discopop": discopop,
}
BY_MARGIN = ("sigmoid", "robust", "hinge", "linear", "squared", "ropo", "exo", "discopop")
"""Links of the difference of both sides alone."""
CAUTIONS = {
    "linear": "link=linear has no lower bound: the loss falls for as long as one trains; stop early",
    "apo_down": "link=apo_down makes chosen completions less likely too: for pairs whose chosen side is worse than "
    "what the model says by itself",
    "discopop": "link=discopop is not convex: at temperatures below 0.1 its slope around m = 0, where a run begins, is "
    "that of pairs the wrong way round",
}
LENGTHS = {
    "sum": "log-ratios are summed over tokens",
    "mean": "log-ratios are averaged over tokens",
    "penalised": "log-ratios are summed over tokens, and the longer side pays alpha a token",
    "discounted": "log-ratios are summed, tokens beyond the shorter side's length counted alpha times",
}


@dataclass(frozen=True)
class Pairwise(PairLoss):
    """Preference loss with a reference (DPO, arXiv 2305.18290, eq. 7, and its kin): `link` of the log-ratios (P,) of
    every pair, plus `eta` times the likelihood of the chosen completion. The table above has the equations.

    The log-ratio is differenced per target and then summed: two sums of a thousand log-probs would lose four digits.
    A file of conf/objective names the keys its method has; the others keep the value at which they do nothing.

    Where others differ. TRL's IPO averages log-ratios over tokens (`length: mean` here; the paper and this default
    sum). TRL's `[sigmoid, sft]`, once `rpo_alpha`, adds the token mean of the whole batch (here `sft_weight` with
    `reduction: token`), `eta` one mean per completion or, as the paper, a sum times beta. TRL's `sigmoid` ignores
    `label_smoothing`, so that it has no cDPO but its `aot` on one pair at a time. LLaMA-Factory's LD-DPO leaves the
    reference undiscounted; the paper and TRL discount both. BCO's paper shifts both rewards by their running mean,
    which TRL's `bco_pair` and this one do not. TRL's `aot` sorts the pairs of a micro-batch on one device, `matching`
    those of the whole step, so that neither accumulation nor the number of ranks changes the loss.
    """

    beta: float = key(0.1, "strength of the anchor to the reference", gt=0)
    link: str = key("sigmoid", "from a pair's log-ratios to its loss", choices=tuple(LINKS))
    length: str = key("sum", "what length does to the log-ratios of a pair", choices=tuple(LENGTHS))
    label_smoothing: float = key(0.0, "share of pairs taken to be labelled the wrong way round", ge=0, le=0.5)
    tau: float | None = key(None, "IPO's regularisation: the wanted margin is 1/(2 tau); null: beta", gt=0)
    lam: float = key(0.0, "penalty on chosen completions below the reference", ge=0)
    alpha: float = key(1.0, "strength of the length rule; weight of ROPO's bounded part", ge=0)
    eta: float = key(0.0, "weight of the chosen completion's likelihood", ge=0)
    nll_norm: str = key("sum", "that likelihood: sum (times beta) or mean over tokens", choices=("sum", "mean"))
    soft: bool = key(False, "scale margins by 2p - 1, p the label's certainty")
    form: str = key("scaled", "soft labels in the squared link", choices=("scaled", "substitute"))
    temperature: float = key(
        1.0, "of soft labels from scores, p = sigmoid((s_w - s_l) / temperature), or of DiscoPOP's blend", gt=0
    )
    matching: str = key(
        "none",
        "by rank over the step: nothing, margins of policy and reference, or log-ratios of chosen and rejected sides",
        choices=("none", "margins", "sides"),
    )
    wpo: bool = key(False, "weigh pairs by the policy's length-normalised likelihood of both sides")

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, matched=self.matching != "none")

    @property
    def strength(self) -> float:
        """Strength of the anchor to the reference, the unit of rewards: IPO's tau where it is given, else beta."""
        return self.beta if self.tau is None else self.tau

    def refined_by(self, kind: Kind) -> frozenset[str]:
        return frozenset({SOFT_LABEL} if self.soft and kind is Kind.PREFERENCE else ())

    @property
    def length_convention(self) -> str:
        return self.convention(LENGTHS[self.length])

    def problems(self) -> list[tuple[str, str]]:
        if self.link == "robust" and self.label_smoothing >= 0.5:
            return [("label_smoothing", "must be below 0.5: at a half, labels say nothing")]
        if self.link == "exo" and self.label_smoothing == 0:
            return [("label_smoothing", "must be above 0: the divergence from certain labels is infinite")]
        if self.matching == "margins" and (self.link not in BY_MARGIN or self.lam):
            return [("matching", "margins needs a link of the margin alone and no lam; sides takes any link")]
        if self.matching != "none" and self.wpo:
            return [("wpo", "weighs pairs, which matching takes apart")]
        return []

    def cautions(self) -> list[str]:
        return [CAUTIONS[self.link]] if self.link in CAUTIONS else []

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        extra = {"chosen_nll": self.eta > 0, "weight": self.wpo}
        pairs = terms.units(batch, batch.pairs.shape[0])
        return {**self.shared_counts(batch), **{name: pairs for name, is_there in extra.items() if is_there}}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        scores = policy(batch, ForwardRequest(collision=self.wpo))
        log_probs = terms.promote(scores.log_probs)
        ratios = log_probs - terms.reference_log_probs(batch, reference)
        rewards = self.strength * (batch.mean if self.length == "mean" else batch.sum)(ratios)
        losses = self.losses(batch, ratios)
        weight = self.weight(batch, log_probs, scores.collision)
        totals = {"pair": (weight * losses).sum(), **self.shared_totals(batch, log_probs, rewards, self.strength)}
        if self.wpo:
            totals["weight"] = weight.sum()
        if self.eta > 0:
            joined = self.beta * batch.sum(log_probs) if self.nll_norm == "sum" else batch.mean(log_probs)
            totals["chosen_nll"] = -joined[batch.pairs[:, 0]].sum()
        weights = {"pair": 1.0, "sft": self.sft_weight, "chosen_nll": self.eta}
        return terms.assemble(totals, self.counts(batch), weights)

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        zeros = torch.zeros(batch.target_ids.shape, device=batch.target_ids.device)
        # WPO's weights depend on the policy, the margin does not
        return {"margin": zeros.sum()} if self.wpo else {"pair": self.losses(batch, zeros).sum()}

    def weight(self, batch: Batch, log_probs: Tensor, collision: Tensor | None) -> Tensor:
        """(P,) WPO's weight v_w v_l, a constant to the gradient; 1 without `wpo`. log v is the mean over tokens of
        log p - log sum over the vocabulary of p^2; of tokens that the policy samples, p / sum p^2 is 1 on average."""
        if collision is None:
            return torch.ones(batch.pairs.shape[0], device=batch.pairs.device)
        return batch.mean(log_probs.detach() - collision).exp()[batch.pairs].prod(1)

    def losses(self, batch: Batch, ratios: Tensor) -> Tensor:
        """(P,) from the log-ratios of the targets (N,)."""
        chosen, rejected = self.scores(batch, ratios).unbind(-1)
        n_w, n_l = batch.lengths[batch.pairs].to(ratios.dtype).unbind(-1)
        longer, certainty = n_w - n_l, self.certainty(batch).to(ratios.dtype)

        def link(chosen: Tensor, rejected: Tensor) -> Tensor:
            return LINKS[self.link](Pairs(chosen, rejected, longer, certainty), self)

        if self.matching == "none" or MATCHED[0] not in batch.annotations:  # evaluated, a pair stands for itself
            return link(chosen, rejected)
        below, above = (batch.annotations[name][batch.pairs[:, 1]].to(ratios.dtype) for name in MATCHED)
        if self.matching == "margins":
            return link(chosen + below, rejected)
        # a summand gets its gradient in two pairs, those of its chosen and of its rejected side; its value counts once
        twice = link(chosen.detach() + above, rejected)
        return link(chosen, rejected.detach() - below) + twice - twice.detach()

    def matched_values(self, batch: Batch, policy: Forward, reference: Forward | None) -> Tensor:
        """Margins of the policy and of the reference; or the log-ratios of both sides."""
        log_probs, known = terms.promote(policy(batch).log_probs), terms.reference_log_probs(batch, reference)
        if self.matching == "sides":
            return self.scores(batch, log_probs - known)
        margins = (self.scores(batch, one) for one in (log_probs, known))
        return torch.stack([sides[:, 0] - sides[:, 1] for sides in margins], 1)

    def scores(self, batch: Batch, ratios: Tensor) -> Tensor:
        """(P, 2) log-ratio of both sides of every pair."""
        if self.length == "discounted":
            shorter = batch.lengths[batch.pairs].amin(1, keepdim=True).expand_as(batch.pairs)
            return terms.discounted_sums(batch, ratios, batch.pairs, shorter, self.alpha)
        return (batch.mean if self.length == "mean" else batch.sum)(ratios)[batch.pairs]

    def margin(self, pairs: Pairs) -> Tensor:
        """(P,) m."""
        h = pairs.chosen - pairs.rejected - self.lam * torch.relu(-pairs.chosen)
        m = self.beta * pairs.certainty * h
        return m + self.alpha * pairs.longer if self.length == "penalised" else m

    def certainty(self, batch: Batch) -> Tensor:
        """(P,) 2p - 1: from the column, else from scores, else 1."""
        certain = torch.ones(batch.pairs.shape[0], device=batch.pairs.device)
        if not self.soft:
            return certain
        if "score" in batch.annotations:
            s_w, s_l = batch.annotations["score"][batch.pairs].unbind(-1)
            scored = torch.tanh((s_w - s_l) / (2 * self.temperature))  # 2 sigmoid(x) - 1
            certain = torch.where(scored.isnan(), certain, scored)
        if SOFT_LABEL in batch.annotations:
            label = 2 * batch.annotations[SOFT_LABEL][batch.pairs[:, 0]] - 1
            certain = torch.where(label.isnan(), certain, label)
        return certain.detach()


# --- without a reference


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


CONTRASTS: dict[str, Callable[[Tensor, Tensor, Contrastive], Tensor]] = {
    "sigmoid": lambda chosen, rejected, o: smoothed(o.beta * (chosen - rejected) - o.gamma, o.label_smoothing),
    # each side by itself: likely if chosen, unlikely if rejected; which rejected stands with which chosen is alike
    "absolute": lambda chosen, rejected, o: softplus(-o.beta * chosen) + softplus(o.beta * rejected),
}


@dataclass(frozen=True)
class Contrastive(PairLoss):
    """Preference loss without a reference (SimPO, CPO, ORPO, ASFT): alpha (-mu_w) + lam `link`(s_w, s_l) (P,), mean
    over pairs. The table above has the equations.

    Where others differ. TRL's ORPO takes its likelihood over prompt and completion and averages it over the batch's
    tokens, as its CPO does over those of completions; here every pair counts once, as in the papers (TRL's CPO is
    `alpha: 0`, `sft_weight: 1`, `reduction: token`). TRL's SimPO adds CPO's likelihood unless its `cpo_alpha` is 0; the
    paper has none. ASFT at beta = 1 is -(1 + lam) mu_w - lam log(1 - exp(mu_l)).
    """

    score: str = key(
        "mean", "of a completion: sum or mean of its log-probs, or log odds of the mean", choices=tuple(SCORES)
    )
    link: str = key("sigmoid", "comparison of a pair, or each side by itself", choices=tuple(CONTRASTS))
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
            "pair": CONTRASTS[self.link](chosen, rejected, self).sum(),
            **self.shared_totals(batch, log_probs, self.beta * scores, self.beta),
        }
        if self.alpha > 0:
            totals["chosen_nll"] = -batch.mean(log_probs)[batch.pairs[:, 0]].sum()
        weights = {"pair": self.lam, "sft": self.sft_weight, "chosen_nll": self.alpha}
        return terms.assemble(totals, self.counts(batch), weights)
