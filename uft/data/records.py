"""Rows as records: annotations of completions as columns and back, and rows as JSON Lines that
:mod:`uft.data.sources` reads back without loss.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from uft.data.messages import Record, Unreadable, is_number, type_name
from uft.data.rows import BASELINE, SCORE, SOFT_LABEL, Completion, Kind, Message, Row
from uft.runs import write_atomically, writing

SIDES = ("score_chosen", "score_rejected")

# --- Annotations: numbers written beside completions, as columns of a record and back.
#
# `baseline_logp` is a number where a row has one completion, else a list with one for each: [chosen, rejected] of a
# pair. `soft_label` is likewise, but a pair has one number, the probability that the chosen one is better; the rejected
# one has the rest. null, also within a list, is an absent number. Ratings of both sides of a pair (`score_chosen` and
# `score_rejected`, as binarized UltraFeedback has them) are kept as `score`, on their own scale.


Numbers = Sequence[float | None]  # one per completion
LARGEST = sys.float_info.max


class Rule(NamedTuple):
    """The values that a column may hold. `shared`: one number says both sides of a pair."""

    low: float
    high: float
    meaning: str
    shared: bool = False


ANNOTATION_RULES = {
    BASELINE: Rule(-LARGEST, 0.0, "a mean log-probability, at most 0"),
    SOFT_LABEL: Rule(0.0, 1.0, "a probability from 0 to 1", shared=True),
}


def with_annotations(record: Record, completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The completions with the numbers of the record's columns. Raises :class:`Unreadable` with the reason."""
    given = [name for name in ANNOTATION_RULES if record.get(name) is not None]
    columns = {name: _per_completion(record[name], name, completions) for name in given}
    if _is_pair(completions):
        columns[SCORE] = [rating(record.get(side)) for side in SIDES]
    return tuple(
        with_numbers(c, {name: column[n] for name, column in columns.items()}) for n, c in enumerate(completions)
    )


def with_numbers(completion: Completion, numbers: Mapping[str, float | None]) -> Completion:
    """The completion with these numbers in the place of its own of those names; None: without."""
    known = {name: value for name, value in completion.annotations.items() if name not in numbers}
    known |= {name: value for name, value in numbers.items() if value is not None}
    return completion if known == completion.annotations else replace(completion, annotations=known)


def _per_completion(value: Any, name: str, completions: Sequence[Completion]) -> Numbers:
    rule = ANNOTATION_RULES[name]
    if rule.shared and _is_pair(completions):
        likely = _bounded_number(value, name, rule)
        return [likely, 1 - likely]
    if len(completions) == 1:
        return [_bounded_number(value, name, rule)]
    if not isinstance(value, list) or len(value) != len(completions):
        found = f"{len(value)} of them" if isinstance(value, list) else type_name(value)
        raise Unreadable(f"{name} is {found}, not a list of {len(completions)} numbers, one per completion")
    return [None if one is None else _bounded_number(one, f"{name}[{n}]", rule) for n, one in enumerate(value)]


def _bounded_number(value: Any, field: str, rule: Rule) -> float:
    if not is_number(value):
        raise Unreadable(f"{field} is {type_name(value)}, not a number")
    if not rule.low <= value <= rule.high:  # NaN is in no range
        raise Unreadable(f"{field} is {str(value)[:24]}, not {rule.meaning}")
    return float(value)


def rating(value: Any) -> float | None:
    """A side's rating as a number, also of a text. Few objectives use ratings: one that is no number is left unread."""
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return float(value) if is_number(value) and -LARGEST <= value <= LARGEST else None


def _is_pair(completions: Sequence[Completion]) -> bool:
    return len(completions) == 2 and completions[0].preferred is not None


# --- Rows as JSON Lines.
#
# Every kind has the plainest of the formats that hold it, one line per row; scored completions have one line each and
# meet again in one row. All lines of a file must have one format, so all its rows must be of one kind.


START = '{"row": "'
"""The beginning of every line: the name of the row it was made from."""


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write these rows to `path`, replacing it whole by rename. Raises UftError where the disk refuses it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for row in rows for record in to_records(row))
    write_atomically(path, (line.encode("utf-8") for line in lines))


def append_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records as JSON Lines to `path`, whose folder is made. Raises UftError where the disk refuses it."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with writing(path, sum(map(len, lines))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as handle:
            handle.writelines(lines)


def is_rows_file(path: Path) -> bool:
    """Whether a file begins as those of :func:`write_rows` do."""
    with open(path, "rb") as handle:
        return handle.read(len(START)) == START.encode()


def turns_column(turns: Sequence[Message], role: str) -> str | list[dict[str, Any]]:
    """A prompt or a reply as a column: text where it is a single turn of `role` and nothing else, else messages."""
    if len(turns) == 1 and turns[0] == Message(role, turns[0].content):
        return turns[0].content
    return [
        {"role": turn.role, "content": turn.content}
        | (json.loads(turn.extra) if turn.extra else {})
        | ({} if turn.learned is None else {"weight": int(turn.learned)})
        for turn in turns
    ]


def to_records(row: Row) -> list[dict[str, Any]]:
    """The records (lines) of one row: one, or one per scored completion."""
    replies, kind = [turns_column(c.turns, "assistant") for c in row.completions], row.kind
    start = {"row": row.id, "prompt": turns_column(row.prompt, "user")}
    columns: dict[str, Any] = {"completion": replies[0]} if replies else {}
    if kind is Kind.PROMPT:  # as messages: beside a prompt an answer would be read as its reply
        start = {"row": row.id, "messages": turns_column(row.prompt, "")}
    elif kind is Kind.BINARY:
        columns["label"] = row.completions[0].label
    elif kind is Kind.PREFERENCE:
        assert row.completions[0].preferred, "a pair is (chosen, rejected)"
        columns = {"chosen": replies[0], "rejected": replies[1]}
    elif kind is Kind.NEGATIVES:
        sampled = row.completions[1:]
        columns = {"response": replies[0], "negatives": replies[1:], "sampled_by": [c.sampled_by for c in sampled]}
        if any(c.log_prob is not None for c in sampled):
            columns["negative_log_probs"] = [c.log_prob for c in sampled]
    lines: list[tuple[dict[str, Any], Sequence[Completion]]] = [(columns, row.completions)]
    if kind is Kind.SCORED:
        lines = [({"completion": r, "score": c.score}, (c,)) for r, c in zip(replies, row.completions, strict=True)]
    end = {name: value for name, value in (("answer", row.answer), ("task", row.task)) if value is not None}
    own = ({**columns, **_annotation_columns(completions)} for columns, completions in lines)
    return [{**start, **columns, **end, **row.facts} for columns in own]


def _annotation_columns(completions: Sequence[Completion]) -> dict[str, Any]:
    """The columns from which :func:`with_annotations` reads the same numbers."""
    found: dict[str, Any] = {}
    for name, rule in ANNOTATION_RULES.items():
        values = [completion.annotations.get(name) for completion in completions]
        if any(value is not None for value in values):
            alone = len(values) == 1 or (rule.shared and _is_pair(completions))
            found[name] = values[0] if alone else values
    ratings = zip(SIDES, completions, strict=False) if _is_pair(completions) else ()
    return found | {side: c.annotations[SCORE] for side, c in ratings if SCORE in c.annotations}
