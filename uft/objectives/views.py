"""The views that objectives share: which completions of a row a method takes, and on which side of its loss.

All rest on one reading of feedback, :func:`reward`. A function here is a :data:`uft.data.views.View` once its keywords
are bound.
"""

from __future__ import annotations

from collections.abc import Mapping

from uft.data.rows import Completion, Kind, Row
from uft.data.views import Part, Parts, Role, View

GOOD_ENOUGH = 0.5
"""Score from which a completion counts as good."""


def reward(completion: Completion) -> float:
    """What the feedback on a completion says of it, in [0, 1]: shown, chosen and good are 1, sampled ones are 0."""
    if completion.sampled_by is not None:
        return 0.0
    if completion.preferred is not None:
        return float(completion.preferred)
    if completion.label is not None:
        return float(completion.label)
    return 1.0 if completion.score is None else completion.score


def every_kind(view: View) -> Mapping[Kind, View]:
    return dict.fromkeys(Kind, view)


def positives(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Parts:
    """The good completions only; nothing of a row that has none."""
    return tuple(Part(i) for i, completion in enumerate(row.completions) if reward(completion) >= min_score)


def pointwise(row: Row, visit: int, *, demonstration_score: float = 1.0) -> Parts:
    """Every completion with its explicit reward."""

    def part(index: int, target: float) -> Part:
        return Part(index, Role.POSITIVE if target >= GOOD_ENOUGH else Role.NEGATIVE, target)

    if row.kind is Kind.DEMONSTRATION:
        return tuple(Part(i, Role.POSITIVE, demonstration_score) for i in range(len(row.completions)))
    return tuple(part(i, reward(completion)) for i, completion in enumerate(row.completions))


def judged(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Parts:
    """Every completion as good or bad."""
    rewards = [reward(completion) for completion in row.completions]
    return tuple(Part(i, Role.POSITIVE if r >= min_score else Role.NEGATIVE) for i, r in enumerate(rewards))


def against_each(row: Row, visit: int, *, negatives: int | None = None) -> Parts:
    """The positive, and the others as its negatives: all, or `negatives` of them, other ones at every visit.

    Visit e takes columns [e B, (e + 1) B) modulo what is there, as DFT's recipe does (arXiv 2502.18679, code).
    """
    good = [i for i, completion in enumerate(row.completions) if reward(completion) >= GOOD_ENOUGH]
    bad = [i for i in range(len(row.completions)) if i not in good]
    take = len(bad) if negatives is None else min(negatives, len(bad))
    chosen = [bad[(visit * take + j) % len(bad)] for j in range(take)]
    return (*(Part(i) for i in good), *(Part(i, Role.NEGATIVE) for i in chosen))


def against_each_known(row: Row, visit: int, *, negatives: int | None = None) -> Parts | None:
    """As :func:`against_each`; None if nobody knows how likely a sampled one was where it came from."""
    known = all(completion.log_prob is not None for completion in row.completions if completion.sampled_by is not None)
    return against_each(row, visit, negatives=negatives) if known else None


def best_against_worst(row: Row, visit: int) -> Parts | None:
    """The best-scored completion against the worst; None when no two scores differ. Of equals the first is taken."""
    rewards = [reward(completion) for completion in row.completions]
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return None if best == worst else (Part(best), Part(worst, Role.NEGATIVE))
