"""Selection: which rows of a mixture to keep. `uft select`, and stages that `do: select`.

A score for every candidate, and the candidates with the highest scores, ties by their order. From top to bottom: what
needs no model (`random`, `top_score`), ActiveDPO (arXiv 2505.19241; no code of it is public), PDS (arXiv 2410.07064).
Nothing here is kept when it is stopped: the same request gives the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from uft.config.schema import Select
from uft.data.batch import batches_of, sequence_batch
from uft.data.chat import Tokens
from uft.data.rows import SCORE, Kind, Row, Selection
from uft.errors import FAILED, Problem, UftError
from uft.heartbeat import beat, report_progress
from uft.model.policy import Policy, evaluating
from uft.objectives.views import against_each, best_against_worst, positives, reward
from uft.sampling.generate import Interrupted, uniforms
from uft.sampling.negatives import number_of

Tensor = torch.Tensor
Vector = np.ndarray


@dataclass(frozen=True)
class Picked:
    """Which of the candidates are kept, and the score of each."""

    places: list[int]  # the best first
    scores: Vector  # (candidates,) float64
    features: Vector | None = None  # (kept, dim) float32: what later selections have to differ from


def count_of(rows: float, candidates: int) -> int:
    """How many to keep: `rows` a share below 1, or a count; all where there are fewer."""
    return min(candidates, max(1, round(rows * candidates)) if rows < 1 else int(rows))


def pick(scores: Vector, count: int) -> Picked:
    """The `count` highest scores; of equal ones the first."""
    return Picked(np.argsort(-scores, kind="stable")[:count].tolist(), scores)


# --- Without a model.


def random_scores(rows: Sequence[Row], seed: int) -> Vector:
    """(n,) in [0, 1): a function of the seed and a row's id alone, so that rows more or less reshuffle nothing."""
    return np.array([uniforms(seed, number_of(row), 1)[0] for row in rows])


def top_scores(rows: Sequence[Row]) -> Vector:
    """(n,) the mean feedback of a row's completions; of a pair with ratings their difference.

    Raises UftError where a row has none.
    """
    scores, without = [], []
    for row in rows:
        ratings = [completion.annotations.get(SCORE) for completion in row.completions]
        if row.kind in (Kind.SCORED, Kind.BINARY):
            scores.append(float(np.mean([reward(completion) for completion in row.completions])))
        elif len(ratings) == 2 and ratings[0] is not None and ratings[1] is not None:
            scores.append(ratings[0] - ratings[1])
        else:
            without.append(row)
    if without:
        why = f"orders rows by scores, and {len(without):,} rows have none ({without[0].kind.value})"
        advice = ("select.by=random", "pairs need columns  score_chosen, score_rejected")
        raise UftError(Problem("select.by=top_score", why, without[0].id, advice))
    return np.array(scores)


# --- What a method that runs the model takes of a row; () where the row is no candidate.


def pair_of(row: Row) -> Selection:
    """Two completions to tell apart: a pair, or the best and the worst of scored ones."""
    views = {Kind.PREFERENCE: against_each, Kind.SCORED: best_against_worst}
    view = views.get(row.kind)
    return (view(row, 0) or ()) if view else ()


TAKES: dict[str, Callable[[Row], Selection]] = {
    "active_dpo": pair_of,
    "pds": lambda row: positives(row, 0),  # which supervised fine-tuning learns
}
"""By `select.by`, of the methods that run the model."""


# --- ActiveDPO. A pair is worth asking about where phi = g(y1) - g(y2) is long in the metric of what was asked before:
# the largest sqrt(phi^T V^-1 phi), V = c I + sum of chosen phi phi^T. g(y) is the gradient of log pi(y|x), sketched and
# of unit length (long or likely replies would win otherwise). beta and the reference do not matter.


def most_uncertain(phi: Vector, c: float, picks: int, chosen_before: int = 0) -> tuple[list[int], Vector]:
    """Greedy choice of rows of `phi` (n, d), of which the first `chosen_before` are chosen already.

    Pivoted Cholesky: a pick costs one matrix-vector product, and nothing is of size d x d. Returns the new picks in
    their order, and (n,) the scores: of a pick when it was picked, of the others after the last one. A score never
    rises.
    """
    phi = phi.astype(np.float64)
    left, columns = (phi**2).sum(1), np.zeros((len(phi), chosen_before + picks))
    chosen: list[int] = []
    scores = np.full(len(phi), math.nan)
    for number in range(chosen_before + picks):
        free = left.copy()
        free[chosen] = -math.inf
        place = number if number < chosen_before else int(free.argmax())
        scores[place] = math.sqrt(max(left[place], 0.0) / c)
        before = columns[:, :number]
        columns[:, number] = (phi @ phi[place] - before @ before[place]) / math.sqrt(c + left[place])
        left = left - columns[:, number] ** 2
        chosen.append(place)
    scores = np.where(np.isnan(scores), np.sqrt(np.maximum(left, 0) / c), scores)
    return chosen[chosen_before:], scores


@dataclass(frozen=True)
class CountSketch:
    """A linear map to `dim` places that keeps inner products in the mean: every coordinate goes to one place, with a
    sign. One pass over a gradient, and no matrix."""

    dim: int
    maps: list[Tensor]  # per parameter (its size,) int64: twice the place, plus one for a minus

    @classmethod
    def of(cls, sizes: Sequence[int], dim: int, seed: int) -> CountSketch:
        draws = (np.random.Generator(np.random.Philox(key=[seed % 2**64, n])) for n in range(len(sizes)))
        maps = [torch.from_numpy(draw.integers(0, 2 * dim, size)) for draw, size in zip(draws, sizes, strict=True)]
        return cls(dim, maps)

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """(dim,) of gradients of any shape, one per parameter."""
        out = torch.zeros(self.dim)
        for places, gradient in zip(self.maps, gradients, strict=True):
            values = gradient.detach().flatten().float().cpu()
            out.index_add_(0, places >> 1, torch.where(places & 1 == 1, -values, values))
        return out


def pair_features(
    policy: Policy, pairs: Sequence[tuple[Tokens, Tokens]], settings: Select, should_stop: Callable[[], bool]
) -> Vector:
    """(n, dim) float32 phi: per pair the difference of its two sketched gradients of unit length."""
    parameters = list(policy.trainable().values())
    sketch = CountSketch.of([parameter.numel() for parameter in parameters], settings.dim, settings.seed)

    def unit(tokens: Tokens) -> Tensor:
        batch = sequence_batch([(tokens.ids, tokens.supervised)], 0).to(policy.device)
        total = policy(batch).log_probs.sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        gradient = sketch([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
        return gradient / gradient.norm().clamp(min=1e-30)

    features = np.zeros((len(pairs), settings.dim), np.float32)
    with evaluating(policy.module):
        for number, (one, other) in enumerate(pairs):
            report_progress(number, len(pairs), "pairs")
            if should_stop():
                raise Interrupted
            features[number] = (unit(one) - unit(other)).numpy()
    return features


def active_dpo(phi: Vector, past: Vector, settings: Select, count: int) -> Picked:
    """The pairs to ask about among those with features `phi` (n, d), given those of earlier selections (p, d)."""
    norms = (phi.astype(np.float64) ** 2).sum(1)
    c = settings.ridge * float(np.median(norms))
    if not c > 0:
        raise UftError(Problem("select.by=active_dpo", "most pairs are of two completions with the same gradient"))
    places, scores = most_uncertain(np.concatenate([past, phi]), c, count, len(past))
    places = [place - len(past) for place in places]
    return Picked(places, scores[len(past) :], phi[places])


# --- PDS. The score of a row is the derivative, by its weight, of the area under the dev loss along T steps of gradient
# descent, by Pontryagin's principle: lambda_T = grad J(theta_T), backwards lambda_t = grad J(theta_t) + lambda_{t+1} -
# eta H_t lambda_{t+1}, and a row gets eta <lambda_{t+1}, grad l(theta_t)>. Both products are differences along lambda,
# so ordinary passes are enough: no derivative of second order, any kernel.

TOLERANCE, HALVINGS, TRIED = 0.01, 3, 16  # of the differences; rows on which they are tried


def pds_scores(
    start: Tensor,
    losses: Callable[[Tensor, slice], Tensor],
    gradient: Callable[[Tensor, int], Tensor],
    dev_gradient: Callable[[Tensor], Tensor],
    settings: Select,
) -> Vector:
    """(n,) float64: the scores of all rows.

    `start` (D,) float32; `losses`: (D,), rows -> (rows,); `gradient`: (D,), t -> (D,) of step t's mean loss;
    `dev_gradient`: likewise of J. Raises UftError (code 1) where no length of the differences is right.
    """
    path = [start]
    for step in range(settings.steps):
        path.append(path[-1] - settings.lr * gradient(path[-1], step))
    lam, scores, eps = dev_gradient(path[-1]), np.zeros(0), settings.eps
    for step in reversed(range(settings.steps)):
        theta, size = path[step], float(lam.norm())
        if not (math.isfinite(size) and size > 0):
            why = "its loss has no gradient here, or one that is not finite"
            raise UftError(Problem("select.dev", why), code=FAILED)

        def along(eps: float, rows: slice, theta: Tensor = theta, lam: Tensor = lam, size: float = size) -> Tensor:
            h = eps / size
            return (losses(theta + h * lam, rows) - losses(theta - h * lam, rows)) / (2 * h)

        if step == settings.steps - 1:
            eps = fitting_eps(along, eps)
        found = along(eps, slice(None)).double().cpu().numpy()
        scores = settings.lr * found + (scores if len(scores) else 0.0)
        h = eps / size
        curved = (gradient(theta + h * lam, step) - gradient(theta - h * lam, step)) / (2 * h)
        lam = dev_gradient(theta) + lam - settings.lr * curved
    return scores


def fitting_eps(along: Callable[[float, slice], Tensor], eps: float) -> float:
    """The length of the differences, halved until half of it gives the same to one per cent on a few rows."""
    few = slice(TRIED)
    for _ in range(HALVINGS + 1):
        whole, half = along(eps, few), along(eps / 2, few)
        if float((whole - half).norm()) <= TOLERANCE * float(half.norm()):
            return eps
        eps /= 2
    why = (
        f"differences of this length and of its half disagree, down to {eps:g}: the loss is not smooth enough, or noisy"
    )
    raise UftError(Problem("select.eps", why), code=FAILED)


def pds(
    policy: Policy,
    shown: Sequence[Sequence[Tokens]],
    dev: Sequence[Sequence[Tokens]],
    settings: Select,
    batch_tokens: int,
    should_stop: Callable[[], bool],
) -> Vector:
    """(n,) PDS's scores of rows, each by its good completions. A row's loss is their mean NLL per token, averaged.

    Steps take `batch` rows each in an order by the seed; J is the mean loss of `dev`. The policy is left as it was.
    """
    parameters = list(policy.trainable().values())
    order = np.random.Generator(np.random.Philox(key=[settings.seed % 2**64, 1])).permutation(len(shown))

    def put(theta: Tensor) -> None:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(theta, parameters)

    def passes(rows: Sequence[Sequence[Tokens]]) -> Iterator[tuple[Tensor, Tensor]]:
        """(places in `rows`, parts of their losses), a batch of completions at a time."""
        flat = [(place, one, 1 / len(row)) for place, row in enumerate(rows) for one in row]
        for group in batches_of([one.length for _, one, _ in flat], batch_tokens):
            beat()
            if should_stop():
                raise Interrupted
            batch = sequence_batch([(flat[n][1].ids, flat[n][1].supervised) for n in group], 0).to(policy.device)
            shares = torch.tensor([flat[n][2] for n in group], device=policy.device)
            yield torch.tensor([flat[n][0] for n in group]), -batch.mean(policy(batch).log_probs) * shares

    @torch.no_grad()
    def losses(theta: Tensor, rows: slice) -> Tensor:
        put(theta)
        out = torch.zeros(len(shown[rows]))
        for places, parts in passes(shown[rows]):
            out.index_add_(0, places, parts.cpu())
        return out

    def mean_gradient(theta: Tensor, rows: Sequence[Sequence[Tokens]]) -> Tensor:
        put(theta)
        policy.module.zero_grad(set_to_none=True)
        for _, parts in passes(rows):
            (parts.sum() / len(rows)).backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.nn.utils.parameters_to_vector(found).detach()

    def step_gradient(theta: Tensor, step: int) -> Tensor:
        size = min(settings.batch, len(shown))
        return mean_gradient(theta, [shown[order[(step * size + n) % len(shown)]] for n in range(size)])

    start = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    with evaluating(policy.module):
        try:
            return pds_scores(start, losses, step_gradient, lambda theta: mean_gradient(theta, dev), settings)
        finally:
            put(start)
            policy.module.zero_grad(set_to_none=True)
