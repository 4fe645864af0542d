"""Rows as JSON Lines that :mod:`uft.data.readers` takes back: what is read is what was written, to the last digit.

Every kind has the plainest of the formats that hold it, one line per row; scored completions have one line each, which
meet again in one row. All lines of a file must have one format, so all its rows must be of one kind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from uft.data.annotations import columns
from uft.data.rows import Completion, Kind, Message, Row
from uft.disk import writing

Record = dict[str, Any]
Part = tuple[Record, Sequence[Completion]]  # the columns of a line, and the completions it is about
START = '{"row": "'
"""How every line begins: the name of the row it was made from."""


def written(turns: Sequence[Message], role: str) -> str | list[dict[str, str]]:
    """A prompt or a reply as a column: text where it is a single turn of `role`, else messages."""
    if len(turns) == 1 and turns[0].role == role:
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def records(row: Row) -> list[Record]:
    """The lines of one row."""
    extras = {"answer": row.answer, "task": row.task}
    last = {name: value for name, value in extras.items() if value is not None}
    prompt = written(row.prompt, "user")
    parts = PARTS[row.kind](row.completions)
    return [{"row": row.id, "prompt": prompt, **fields, **columns(about), **last} for fields, about in parts]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A file of these rows in the place of what was there: it is whole or not there, whatever happens on the way.

    Raises UftError where the disk refuses it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", encoding="utf-8") as handle:
                for row in rows:
                    handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(row))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def written_here(path: Path) -> bool:
    """Whether a file begins as those of :func:`write_rows` do."""
    with open(path, "rb") as handle:
        return handle.read(len(START)) == START.encode()


# --- one function per kind of row


def _reply(completion: Completion) -> str | list[dict[str, str]]:
    return written(completion.turns, "assistant")


def _demonstration(completions: Sequence[Completion]) -> list[Part]:
    (shown,) = completions
    return [({"completion": _reply(shown)}, completions)]


def _preference(completions: Sequence[Completion]) -> list[Part]:
    chosen, rejected = completions
    assert chosen.preferred, "a pair is (chosen, rejected)"
    return [({"chosen": _reply(chosen), "rejected": _reply(rejected)}, completions)]


def _binary(completions: Sequence[Completion]) -> list[Part]:
    (labelled,) = completions
    return [({"completion": _reply(labelled), "label": labelled.label}, completions)]


def _scored(completions: Sequence[Completion]) -> list[Part]:
    return [({"completion": _reply(c), "score": c.score}, (c,)) for c in completions]


def _negatives(completions: Sequence[Completion]) -> list[Part]:
    shown, *sampled = completions
    fields: Record = {
        "response": _reply(shown),
        "negatives": [_reply(c) for c in sampled],
        "sampled_by": [c.sampled_by for c in sampled],
    }
    if any(c.log_prob is not None for c in sampled):
        fields["negative_log_probs"] = [c.log_prob for c in sampled]
    return [(fields, completions)]


PARTS: dict[Kind, Callable[[Sequence[Completion]], list[Part]]] = {
    Kind.DEMONSTRATION: _demonstration,
    Kind.PREFERENCE: _preference,
    Kind.BINARY: _binary,
    Kind.SCORED: _scored,
    Kind.NEGATIVES: _negatives,
}
