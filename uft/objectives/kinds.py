"""What each objective does with each kind of row: asked of the views themselves, so that the table cannot lie."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from uft.data.rows import Completion, Kind, Message, Row
from uft.data.views import Part, Role
from uft.objectives.base import Objective

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


def _use(part: Part) -> str:
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
