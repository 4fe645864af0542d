"""What every objective must log: the formulas as the papers and this project's documentation print them, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from plain_model import Answer, Model, Row, Tensor, Tokens
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Expected:
    """What is differentiated, what is logged, and what else the metric line must say."""

    objective: Tensor
    loss: float
    terms: dict[str, float] = field(default_factory=dict)


def number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def of(objective: Tensor, **terms: Any) -> Expected:
    return Expected(objective, number(objective), {name: number(value) for name, value in terms.items()})


def mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def positives(rows: Sequence[Row], least: float = 0.5) -> list[tuple[Row, Answer]]:
    return [(row, answer) for row in rows for answer in row.answers if answer.reward >= least]


def nll(model: Model, seen: Iterable[tuple[Row, Answer]]) -> Tensor:
    """Per token of the good answers among those that an objective looks at."""
    return -torch.cat([model.log_probs(row, answer) for row, answer in seen if answer.good]).mean()


# --- objectives


def sft(model: Model, rows: Sequence[Row], reduction: str = "token", min_score: float = 0.5) -> Expected:
    seen = positives(rows, min_score)
    found = [-model.log_probs(row, answer) for row, answer in seen]
    loss = torch.cat(found).mean() if reduction == "token" else mean(one.mean() for one in found)
    return of(loss, nll=nll(model, seen))


def two_passes(model: Model, tokens: Tokens, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """IFT: losses (T-1,) of the second pass, where they are learned, and which guesses of the first were right (N,)."""
    ids, learned = torch.tensor(tokens.ids), torch.tensor(tokens.learned)
    embed = model.lm.get_input_embeddings()
    with torch.no_grad():
        logits = model.lm(inputs_embeds=embed(ids)[None]).logits[0]
        guess = torch.cat([ids[:1], logits.argmax(-1)[:-1]])
        mixed = (1 - lam) * embed(ids) + lam * embed(torch.where(learned, guess, ids))
    again = model.lm(inputs_embeds=mixed[None]).logits[0]
    losses = -torch.log_softmax(again[:-1], -1).gather(1, ids[1:, None])[:, 0]
    return losses, learned[1:], (guess == ids)[learned]


def normalized(losses: Tensor, learned: Tensor, gamma: float) -> Tensor:
    """sum_t l_t C_t / sum_t C_t, C_t = sum_{i>=t} gamma^(i-t) l_i over absolute positions, 0 where not learned."""
    l_t = torch.where(learned, losses, 0.0)
    t = torch.arange(len(l_t))
    ahead = torch.where(t[None] >= t[:, None], gamma ** (t[None] - t[:, None]).clamp(min=0).double(), 0.0)
    c = torch.where(learned, ahead @ l_t, 0.0)
    return (l_t * c).sum() / c.sum()


def equation_21(losses: Tensor, learned: Tensor, gamma: float) -> Tensor:
    """sum_n sum_{i>=n} l_i."""
    l_n = losses[learned]
    return torch.stack([l_n[n:].sum() for n in range(len(l_n))]).sum()


def algorithm_1(losses: Tensor, learned: Tensor, gamma: float) -> Tensor:
    """sum_t w_t l_t, w_t = sum_{i=t..N} gamma^(N-t) l_i."""
    l_t, count = losses[learned], int(learned.sum())
    weights = [sum(gamma ** (count - t) * l_t[i - 1] for i in range(t, count + 1)) for t in range(1, count + 1)]
    return (torch.stack(weights) * l_t).sum()


def unpropagated(losses: Tensor, learned: Tensor, gamma: float) -> Tensor:
    return losses[learned].mean()


PROPAGATION = {"normalized": normalized, "eq21": equation_21, "alg1": algorithm_1, "none": unpropagated}


def ift(
    model: Model,
    rows: Sequence[Row],
    propagation: str = "normalized",
    lam: float = 0.2,
    gamma: float = 0.95,
    reduction: str = "sequence",
) -> Expected:
    seen = positives(rows)
    passes = [two_passes(model, model.tokens(row, answer), lam) for row, answer in seen]
    found = torch.stack([PROPAGATION[propagation](losses, learned, gamma) for losses, learned, _ in passes])
    lengths = torch.tensor([int(learned.sum()) for _, learned, _ in passes])
    loss = found.mean() if reduction == "sequence" else (lengths * found).sum() / lengths.sum()
    slopes = torch.autograd.grad(loss, [losses for losses, _, _ in passes], retain_graph=True)
    raised = [slope[learned] < 0 for slope, (_, learned, _) in zip(slopes, passes, strict=True)]
    right = torch.cat([right for _, _, right in passes])
    negative_share = torch.cat(raised).double().mean() if propagation == "normalized" else 0.0
    terms = {"guess_accuracy": right.double().mean(), "negative_share": negative_share, "lam": lam}
    return of(loss, nll=nll(model, seen), **{f"objective/{name}": value for name, value in terms.items()})


def log_ratio(model: Model, reference: Model, row: Row, answer: Answer, average: bool = False) -> Tensor:
    with torch.no_grad():
        anchor = reference.log_probs(row, answer)
    difference = model.log_probs(row, answer) - anchor
    return difference.mean() if average else difference.sum()


def uft(
    model: Model,
    rows: Sequence[Row],
    reference: Model,
    beta: float = 0.01,
    loss: str = "mse",
    pairs: str = "pairwise",
    average: bool = False,
    demonstration_score: float = 1.0,
    weights: Mapping[str, float] | None = None,
) -> Expected:
    """One mean over all completions with a reward and all pairs; weights multiply the terms and are not divided by."""
    found = []
    for row in rows:
        z = [beta * log_ratio(model, reference, row, answer, average) for answer in row.answers]
        if row.kind == "pairs" and pairs == "pairwise":
            of_row = [-logsigmoid(z[0] - z[1])]
        else:
            shown = row.kind in ("demonstrations", "conversations")
            rewards = [demonstration_score if shown else answer.reward for answer in row.answers]
            of_row = [POINTWISE[loss](one, reward) for one, reward in zip(z, rewards, strict=True)]
        found += [(weights or {}).get(row.kind, 1.0) * term for term in of_row]
    return of(mean(found), nll=nll(model, [(row, answer) for row in rows for answer in row.answers]))


POINTWISE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mse": lambda z, reward: (torch.sigmoid(z) - reward) ** 2,
    "bce": lambda z, reward: -reward * logsigmoid(z) - (1 - reward) * logsigmoid(-z),
}


def dpo(
    model: Model,
    rows: Sequence[Row],
    reference: Model,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    reduction: str = "sequence",
) -> Expected:
    """The mean over pairs, and sft_weight times the likelihood loss of the better sides and the demonstrations."""
    better: list[tuple[Row, Answer]] = []
    worse: list[tuple[Row, Answer]] = []
    found, margins = [], []
    for row in rows:
        by_reward = sorted(row.answers, key=lambda answer: -answer.reward)
        best, rest = by_reward[0], by_reward[1:]
        if best.scored:
            rest = rest[-1:]
        better.append((row, best))
        worse += [(row, answer) for answer in rest]
        for answer in rest:
            z = beta * (log_ratio(model, reference, row, best) - log_ratio(model, reference, row, answer))
            found.append(-(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z))
            margins.append(z)
    pairs = mean(found)
    terms = {"pair": pairs, "margin": mean(margins), "accuracy": mean((z > 0).double() for z in margins)}
    total = pairs
    if sft_weight:
        terms["sft"] = likelihood = mean(-model.mean(row, answer) for row, answer in better)
        if reduction == "token":
            terms["sft"] = likelihood = -torch.cat([model.log_probs(row, answer) for row, answer in better]).mean()
        total = pairs + sft_weight * likelihood
    return of(total, nll=nll(model, better + worse), **{f"objective/{name}": value for name, value in terms.items()})


@dataclass
class DFT:
    """Keeps u of every row from step to step."""

    tau: float = 1.0
    gamma: float = 0.85
    negatives: int = 2
    average: bool = False  # DFT2
    log_u_init: float = 0.0
    sampling: bool = False  # divide by how likely a negative was where it was sampled
    u: dict[int, Tensor] = field(default_factory=dict)  # by position among the rows

    def __call__(self, model: Model, rows: Sequence[Row], reference: Model, visit: int) -> Expected:
        surrogates, estimates, logs, weights, seen = [], [], [], [], []
        for place, row in enumerate(rows):
            shown = self.shown(row, visit)
            seen += [(row, answer) for answer in (*positives_of(row), *shown)]
            join = model.mean if self.average else model.sum
            losses = [-join(row, answer) for answer in positives_of(row)]
            if not shown:
                surrogates += losses
                estimates += losses
                continue
            s = torch.stack([join(row, answer) for answer in shown])
            a = s.detach() / self.tau
            if self.sampling:
                a = a - torch.tensor([answer.sampling for answer in shown])
            elif not self.average:
                a = a - torch.stack([reference.sum(row, answer).detach() for answer in shown])
            old = self.u.get(place, torch.tensor(self.log_u_init, dtype=torch.float64).exp())
            u = self.u[place] = (1 - self.gamma) * old + self.gamma * a.exp().mean()
            w = a.exp() / u
            (loss,) = losses
            surrogates.append(loss + (w * s).mean())
            estimates.append(loss + self.tau * u.log())
            logs.append(u.log())
            weights += w.unbind()
        terms = {"log_u": mean(logs), "weight": mean(weights), "surrogate": mean(surrogates)}
        logged = {f"objective/{name}": number(value) for name, value in terms.items()}
        return Expected(mean(surrogates), number(mean(estimates)), {"nll": number(nll(model, seen)), **logged})

    def shown(self, row: Row, visit: int) -> list[Answer]:
        """The rejected, or B of the sampled ones: other columns at every visit, around in a circle."""
        if row.kind not in ("pairs", "negatives"):
            return []
        pool = row.answers[1:]
        take = min(self.negatives, len(pool))
        return [pool[(visit * take + j) % len(pool)] for j in range(take)]


def positives_of(row: Row) -> list[Answer]:
    return [answer for answer in row.answers if answer.good]
