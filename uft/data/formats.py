"""Row formats: what the columns of a data set mean.

Each format is one line of :data:`FORMATS` and one short function of `parsing`. A file's format is recognised by its
columns; `columns` in the configuration maps other names to these first. A format that explains all the columns of
another, and more, wins over it; two that do not are ambiguous, and that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from uft.data import messages, parsing
from uft.data.annotations import SIDES, annotated
from uft.data.parsing import Fields, Range, Record
from uft.data.rows import ANNOTATIONS, Kind
from uft.errors import Problem, UftError

COMMON = frozenset({"answer", "task", "system", *ANNOTATIONS})
"""Columns any format may have: the gold answer for a checker, the family of the prompt, a system prompt, numbers that
`uft annotate` writes."""

ALIASES = {"response": "completion", "output": "completion"}
"""Other names of our fields, used where the field itself is absent."""

NUMERIC = frozenset(
    {"label", "score", "score_min", "score_max", "helpfulness", "correctness", "coherence", *SIDES, *ANNOTATIONS}
)
"""Fields that a file of bare text cells (CSV) must have turned into numbers."""


@dataclass(frozen=True)
class Format:
    """One shape of record: the columns it must have, those it also explains, and how it is read."""

    name: str
    kind: Kind
    required: frozenset[str]
    parse: Callable[[Record, Range], Fields]
    optional: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return self.required | self.optional

    def beats(self, other: Format) -> bool:
        """Whether this format explains everything the other does, and more."""
        return other.required <= self.columns and not self.required <= other.columns

    def read(self, record: Record, score_range: Range = None) -> Fields:
        """The record's prompt and completions. Raises :class:`Unreadable` with the reason."""
        fields = self.parse(record, score_range)
        answer = fields.answer if fields.answer is not None else parsing.plain(record.get("answer"), "answer")
        return replace(
            fields,
            prompt=messages.with_system(fields.prompt, record.get("system")),
            completions=annotated(record, fields.completions),
            answer=answer,
            task=parsing.plain(record.get("task"), "task"),
        )


def _format(
    name: str, kind: Kind, parse: Callable[[Record, Range], Fields], required: str, optional: str = ""
) -> Format:
    return Format(name, kind, frozenset(required.split()), parse, frozenset(optional.split()))


FORMATS = (
    _format("prompt and completion", Kind.DEMONSTRATION, parsing.demonstration, "prompt completion"),
    _format("alpaca", Kind.DEMONSTRATION, parsing.alpaca, "instruction completion", "input context"),
    _format("messages", Kind.DEMONSTRATION, parsing.conversation("messages"), "messages"),
    _format("sharegpt", Kind.DEMONSTRATION, parsing.conversation("conversations"), "conversations"),
    _format("question and answer", Kind.DEMONSTRATION, parsing.question, "question answer"),
    _format(
        "preference",
        Kind.PREFERENCE,
        parsing.preference,
        "prompt chosen rejected",
        "messages score_chosen score_rejected",
    ),
    _format("preference, prompt inside", Kind.PREFERENCE, parsing.preference, "chosen rejected"),
    _format("binary", Kind.BINARY, parsing.binary, "prompt completion label"),
    _format("scored", Kind.SCORED, parsing.scored, "prompt completion score", "score_min score_max"),
    _format("helpsteer2", Kind.SCORED, parsing.helpsteer2, "prompt completion helpfulness correctness coherence"),
    _format("ultrafeedback", Kind.SCORED, parsing.ultrafeedback, "instruction completions", "ratings"),
    _format("negatives", Kind.NEGATIVES, parsing.negatives, "prompt completion negatives", "sampled_by"),
)

FIELDS = frozenset().union(*(f.columns for f in FORMATS)) | COMMON | frozenset(ALIASES)
"""Every name that `columns` can map to."""


def recognise(
    columns: Collection[str], kind: str | None = None, mapped: Collection[str] = (), source: str = "NAME"
) -> Format:
    """The format of a data set with these columns (after mapping).

    `kind` keeps to formats of that kind, `mapped` (fields that the user named himself) to formats that use them.
    Raises :class:`UftError` naming the columns, the formats near to them and how to map.
    """
    known = {*columns, *(ours for theirs, ours in ALIASES.items() if theirs in columns)}
    named = {ALIASES.get(name, name) for name in mapped} - COMMON
    allowed = [f for f in FORMATS if (kind is None or f.kind.value == kind) and named <= f.columns | COMMON]
    fitting = [f for f in allowed if f.required <= known]
    best = [f for f in fitting if not any(other.beats(f) for other in fitting)]
    if len(best) == 1:
        return best[0]
    raise UftError(_unclear(best, source) if best else _unknown(columns, known, allowed, kind, source))


def rename(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under our field names: mapped columns first, then aliases; what was mapped away is gone."""
    taken = set(columns.values())
    fields = {name: value for name, value in record.items() if name not in taken}
    fields.update({ours: record.get(theirs) for ours, theirs in columns.items()})
    for theirs, ours in ALIASES.items():
        if ours not in fields and theirs in fields:
            fields[ours] = fields.pop(theirs)
    return fields


def check_mapping(columns: Mapping[str, str], source: str) -> list[Problem]:
    """What is wrong with a `columns` mapping whatever the file: names that are no field of ours."""
    where = f"data.sources.{source}.columns"
    return [
        Problem(
            f"{where}.{name}",
            "no such field",
            advice=(*nearest(f"{where}.{{}}", name, FIELDS), f"fields: {', '.join(sorted(FIELDS))}"),
        )
        for name in columns
        if name not in FIELDS
    ]


def from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a text cell format (CSV) with numbers where we expect them; empty cells are missing values."""
    return {name: _number(value) if name in NUMERIC else (value or None) for name, value in fields.items()}


def _number(cell: Any) -> Any:
    """A text cell as a number or truth value; as it is where it is neither, so that the row's error can quote it."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    word = cell.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return cell


def nearest(pattern: str, name: str, known: Collection[str]) -> tuple[str, ...]:
    close = get_close_matches(name, sorted(known), n=1)
    return (f"did you mean  {pattern.format(close[0])} ?",) if close else ()


def _unclear(best: Sequence[Format], source: str) -> Problem:
    kinds = sorted({f.kind.value for f in best})
    names = " and ".join(f"{f.name} ({', '.join(sorted(f.required))})" for f in best)
    say = (
        f"say which:  data.sources.{source}.kind={'|'.join(kinds)}"
        if len(kinds) > 1
        else f"say which:  data.sources.{source}.columns.{min(best[0].required)}=COLUMN"
    )
    return Problem(f"data.sources.{source}", f"its columns fit {names}", advice=(say,))


def _unknown(
    columns: Collection[str], known: Collection[str], allowed: Sequence[Format], kind: str | None, source: str
) -> Problem:
    """Columns that fit nothing: what was found, the formats that lack least, and how to map the rest."""
    near = sorted(allowed, key=lambda f: (len(f.required - set(known)), -len(f.required & set(known))))[:3]
    lines = [f"{f.name} lacks {', '.join(sorted(f.required - set(known)))}" for f in near]
    first = min(near[0].required - set(known)) if near else "prompt"
    return Problem(
        f"data.sources.{source}",
        f"no known {'row' if kind is None else kind} format has the columns {', '.join(sorted(columns)) or '(none)'}",
        advice=(*lines, f"map them:  data.sources.{source}.columns.{first}=THEIR_COLUMN"),
    )
