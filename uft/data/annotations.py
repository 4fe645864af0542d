"""Annotations: numbers written beside completions, as columns of a record and back.

`baseline_logp` is a number where a row has one completion, else a list with one for each: [chosen, rejected] of a pair.
`soft_label` is likewise, but a pair has one number, the probability that the chosen one is better; the rejected one has
the rest. null, also within a list, is an absent number. Ratings of both sides of a pair (`score_chosen` and
`score_rejected`, as binarized UltraFeedback has them) are kept as `score`, on their own scale.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uft.data.messages import Unreadable, kind_of
from uft.data.rows import BASELINE, SOFT_LABEL, Completion

SCORE = "score"
SIDES = ("score_chosen", "score_rejected")
Numbers = Sequence[float | None]  # one per completion

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Rule:
    """What may stand in a column. `shared`: one number says both sides of a pair."""

    low: float
    high: float
    meaning: str
    shared: bool = False


RULES = {
    BASELINE: Rule(-_LARGEST, 0.0, "a mean log-probability, at most 0"),
    SOFT_LABEL: Rule(0.0, 1.0, "a probability from 0 to 1", shared=True),
}


def annotated(record: Mapping[str, Any], completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The completions with what the record's columns say of them. Raises :class:`Unreadable` with the reason."""
    columns = {name: _spread(record[name], name, completions) for name in RULES if record.get(name) is not None}
    if _is_pair(completions):
        columns[SCORE] = [_rating(record.get(side)) for side in SIDES]
    return tuple(
        with_numbers(c, {name: column[n] for name, column in columns.items()}) for n, c in enumerate(completions)
    )


def with_numbers(completion: Completion, numbers: Mapping[str, float | None]) -> Completion:
    """The completion with these numbers in the place of its own of those names; None: without."""
    known = {name: value for name, value in completion.annotations.items() if name not in numbers}
    known |= {name: value for name, value in numbers.items() if value is not None}
    return completion if known == completion.annotations else replace(completion, annotations=known)


def columns(completions: Sequence[Completion]) -> dict[str, Any]:
    """The columns from which :func:`annotated` reads the same numbers."""
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        values = [completion.annotations.get(name) for completion in completions]
        if any(value is not None for value in values):
            alone = len(values) == 1 or (rule.shared and _is_pair(completions))
            found[name] = values[0] if alone else values
    ratings = zip(SIDES, completions, strict=False) if _is_pair(completions) else ()
    return found | {side: c.annotations[SCORE] for side, c in ratings if SCORE in c.annotations}


def _spread(value: Any, name: str, completions: Sequence[Completion]) -> Numbers:
    if RULES[name].shared and _is_pair(completions):
        likely = _number(value, name)
        return [likely, 1 - likely]
    if len(completions) == 1:
        return [_number(value, name)]
    if not isinstance(value, list) or len(value) != len(completions):
        found = f"{len(value)} of them" if isinstance(value, list) else kind_of(value)
        raise Unreadable(f"{name} is {found}, not a list of {len(completions)} numbers, one per completion")
    return [None if one is None else _number(one, f"{name}[{n}]", RULES[name]) for n, one in enumerate(value)]


def _number(value: Any, field: str, rule: Rule | None = None) -> float:
    rule = rule or RULES[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unreadable(f"{field} is {kind_of(value)}, not a number")
    if not rule.low <= value <= rule.high:  # NaN is in no range
        raise Unreadable(f"{field} is {str(value)[:24]}, not {rule.meaning}")
    return float(value)


def _rating(value: Any) -> float | None:
    """Most who read these rows have no use for ratings: one that is no number is as if it were not there."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    return float(value) if usable else None


def _is_pair(completions: Sequence[Completion]) -> bool:
    return len(completions) == 2 and completions[0].preferred is not None
