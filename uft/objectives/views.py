"""The views that objectives share: which completions of a row a method takes, and on which side of its loss.

All rest on one reading of feedback, :func:`reward`. A function here is a :data:`uft.data.rows.View` once its keywords
are bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from uft.data.rows import Completion, Kind, Message, Role, Row, Selected, Selection, View
from uft.objectives.base import Objective

GOOD_ENOUGH = 0.5
"""Score from which a completion counts as good."""


def reward(completion: Completion) -> float:
    """Explicit reward of a completion by its feedback, in [0, 1]: shown, chosen and good are 1, sampled ones are 0."""
    if completion.sampled_by is not None:
        return 0.0
    if completion.preferred is not None:
        return float(completion.preferred)
    if completion.label is not None:
        return float(completion.label)
    return 1.0 if completion.score is None else completion.score


def every_kind(view: View) -> Mapping[Kind, View]:
    return dict.fromkeys(Kind, view)


def positives(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Selection:
    """The good completions only; nothing of a row that has none."""
    return tuple(Selected(i) for i, completion in enumerate(row.completions) if reward(completion) >= min_score)


def pointwise(row: Row, visit: int, *, demonstration_score: float = 1.0) -> Selection:
    """Every completion with its explicit reward."""

    def part(index: int, target: float) -> Selected:
        return Selected(index, Role.POSITIVE if target >= GOOD_ENOUGH else Role.NEGATIVE, target)

    if row.kind is Kind.DEMONSTRATION:
        return tuple(Selected(i, Role.POSITIVE, demonstration_score) for i in range(len(row.completions)))
    return tuple(part(i, reward(completion)) for i, completion in enumerate(row.completions))


def judged(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Selection:
    """Every completion as good or bad."""
    rewards = [reward(completion) for completion in row.completions]
    return tuple(Selected(i, Role.POSITIVE if r >= min_score else Role.NEGATIVE) for i, r in enumerate(rewards))


def against_each(row: Row, visit: int, *, negatives: int | None = None) -> Selection:
    """The positive, and the others as its negatives: all, or `negatives` of them, other ones at every visit.

    Visit e takes columns [e B, (e + 1) B) modulo what is there, as DFT's recipe does (arXiv 2502.18679, code).
    """
    good = [i for i, completion in enumerate(row.completions) if reward(completion) >= GOOD_ENOUGH]
    bad = [i for i in range(len(row.completions)) if i not in good]
    take = len(bad) if negatives is None else min(negatives, len(bad))
    chosen = [bad[(visit * take + j) % len(bad)] for j in range(take)]
    return (*(Selected(i) for i in good), *(Selected(i, Role.NEGATIVE) for i in chosen))


def against_each_known(row: Row, visit: int, *, negatives: int | None = None) -> Selection | None:
    """As :func:`against_each`; None if the sampling log-prob of a sampled one is unknown."""
    known = all(completion.log_prob is not None for completion in row.completions if completion.sampled_by is not None)
    return against_each(row, visit, negatives=negatives) if known else None


def best_against_worst(row: Row, visit: int) -> Selection | None:
    """The best-scored completion against the worst; None when no two scores differ. Of equals the first is taken."""
    rewards = [reward(completion) for completion in row.completions]
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return None if best == worst else (Selected(best), Selected(worst, Role.NEGATIVE))


# --- Table of kinds: each objective's use of each kind of row, computed by running its views on sample rows

_TURN = (Message("assistant", "a reply"),)


def _row(*completions: Completion) -> Row:
    return Row("sample", 0, (Message("user", "a prompt"),), completions)


# per kind: rows, each with a name for every completion
_SAMPLES: dict[Kind, list[tuple[Row, tuple[str, ...]]]] = {
    Kind.DEMONSTRATION: [(_row(Completion(_TURN)), ("shown",))],
    Kind.PREFERENCE: [
        (_row(Completion(_TURN, preferred=True), Completion(_TURN, preferred=False)), ("chosen", "rejected"))
    ],
    Kind.BINARY: [
        (_row(Completion(_TURN, label=True)), ("good",)),
        (_row(Completion(_TURN, label=False)), ("bad",)),
    ],
    Kind.SCORED: [
        (_row(*(Completion(_TURN, score=s) for s in (0.9, 0.6, 0.2))), ("high score", "middling score", "low score"))
    ],
    Kind.NEGATIVES: [
        (
            _row(Completion(_TURN), *[Completion(_TURN, sampled_by="model", log_prob=-1.0)] * 4),
            ("shown", *["sampled"] * 4),
        ),
    ],
}


def _use(part: Selected) -> str:
    if not math.isnan(part.target):
        return f"r={part.target:g}"
    return "positive" if part.role is Role.POSITIVE else "negative"


def _how_many(taken: int, of: int) -> str:
    if of == 1:
        return ""
    return "each " if taken == of else f"{taken} of {of} "


def _describe(objective: Objective, row: Row, names: tuple[str, ...]) -> list[str]:
    """A phrase per name and use: "chosen positive", "2 of 4 sampled negative"; ["stops"] if it cannot be used."""
    view = objective.views.get(row.kind)
    parts = view(row, 0) if view else None
    if parts is None:
        return ["stops"]
    uses = Counter((names[part.completion], _use(part)) for part in parts)
    of = Counter(names)
    return [f"{_how_many(taken, of[name])}{name} {use}" for (name, use), taken in uses.items()]


def kind_table(objectives: Mapping[str, Objective]) -> list[list[str]]:
    """A header and one line per named objective: what it takes of a sample row of each kind; the rest it leaves."""
    lines = [["objective", *(kind.value for kind in Kind)]]
    for name, objective in objectives.items():
        cells = [[p for row, names in _SAMPLES[kind] for p in _describe(objective, row, names)] for kind in Kind]
        lines.append([name, *(", ".join(dict.fromkeys(phrases)) or "nothing" for phrases in cells)])
    return lines
