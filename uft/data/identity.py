"""What a row is, apart from where it lies: hashes of its content and of its prompt.

Digests prove that two runs saw the same rows; the prompt's hash chooses held-out rows, so that a prompt of one source
never sits on both sides and the choice depends neither on the order of a file nor on a seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from uft.data.rows import Completion, Message, Row


class Says(Protocol):
    """What a row says, with or without a name and a number."""

    @property
    def prompt(self) -> tuple[Message, ...]: ...

    @property
    def completions(self) -> tuple[Completion, ...]: ...

    @property
    def answer(self) -> str | None: ...

    @property
    def task(self) -> str | None: ...


@runtime_checkable
class InLines(Protocol):
    """Rows that lie as their lines already: `blocks` gives their bytes, in the order of the rows."""

    def blocks(self) -> Iterator[bytes]: ...


def content(row: Says) -> list[Any]:
    """Everything a row says, without its name and number, as plain JSON values."""
    return [_turns(row.prompt), [_completion(c) for c in row.completions], row.answer, row.task]


def line(row: Says) -> bytes:
    """The canonical content of a row as a line of JSON in UTF-8; :func:`said` takes it back."""
    return json.dumps(content(row), ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


def said(written: bytes, source: str, index: int) -> Row:
    """The row of a :func:`line`, under its name and number: equal to what was written, to the last digit."""
    prompt, completions, answer, task = json.loads(written)
    return Row(source, index, _messages(prompt), tuple(_as_completion(*c) for c in completions), answer, task)


def content_digest(rows: Iterable[Row]) -> str:
    """sha256 over the canonical content of the rows, in their order."""
    digest = hashlib.sha256()
    for block in rows.blocks() if isinstance(rows, InLines) else map(line, rows):
        digest.update(block)
    return digest.hexdigest()


def prompt_hash(prompt: Sequence[Message]) -> str:
    """sha256 of a prompt, blind to white space at the ends of its turns."""
    turns = [[turn.role, turn.content.strip()] for turn in prompt]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8")).hexdigest()


def _completion(c: Completion) -> list[Any]:
    feedback = [c.preferred, c.label, c.score, c.sampled_by, c.log_prob]
    return [_turns(c.turns), *feedback, *([sorted(c.annotations.items())] if c.annotations else [])]


def _as_completion(
    turns: list[list[str]],
    preferred: bool | None,
    label: bool | None,
    score: float | None,
    sampled_by: str | None,
    log_prob: float | None,
    annotations: Sequence[tuple[str, float]] = (),
) -> Completion:
    return Completion(_messages(turns), preferred, label, score, sampled_by, log_prob, dict(annotations))


def _messages(turns: list[list[str]]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in turns)


def _turns(turns: Sequence[Message]) -> list[list[str]]:
    return [[turn.role, turn.content] for turn in turns]
