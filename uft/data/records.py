"""Rows as JSON Lines that :mod:`uft.data.sources` reads back without loss.

Every kind has the plainest of the formats that hold it, one line per row; scored completions have one line each and
meet again in one row. All lines of a file must have one format, so all its rows must be of one kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uft.data.formats import ANNOTATION_RULES, SIDES, is_pair
from uft.data.rows import SCORE, Completion, Kind, Message, Row
from uft.runs import write_atomically, writing

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
    """The columns from which :func:`uft.data.formats.with_annotations` reads the same numbers."""
    given: dict[str, Any] = {}
    for name, rule in ANNOTATION_RULES.items():
        values = [completion.annotations.get(name) for completion in completions]
        if any(value is not None for value in values):
            alone = len(values) == 1 or (rule.shared and is_pair(completions))
            given[name] = values[0] if alone else values
    ratings = zip(SIDES, completions, strict=False) if is_pair(completions) else ()
    return given | {side: c.annotations[SCORE] for side, c in ratings if SCORE in c.annotations}
