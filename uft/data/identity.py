"""What a row is, apart from where it lies: hashes of its content and of its prompt.

Digests prove that two runs saw the same rows; the prompt's hash chooses held-out rows, so that a prompt of one source
never sits on both sides and the choice depends neither on the order of a file nor on a seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from uft.data.rows import Completion, Message, Row


def content(row: Row) -> list[Any]:
    """Everything a row says, without its name and number, as plain JSON values."""
    return [_turns(row.prompt), [_completion(c) for c in row.completions], row.answer, row.task]


def content_digest(rows: Iterable[Row]) -> str:
    """sha256 over the canonical content of the rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(content(row), ensure_ascii=False, separators=(",", ":")).encode("utf-8"))
        digest.update(b"\n")
    return digest.hexdigest()


def prompt_hash(prompt: Sequence[Message]) -> str:
    """sha256 of a prompt, blind to white space at the ends of its turns."""
    turns = [[turn.role, turn.content.strip()] for turn in prompt]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode("utf-8")).hexdigest()


def _completion(c: Completion) -> list[Any]:
    feedback = [c.preferred, c.label, c.score, c.sampled_by, c.log_prob]
    return [_turns(c.turns), *feedback, *([sorted(c.annotations.items())] if c.annotations else [])]


def _turns(turns: Sequence[Message]) -> list[list[str]]:
    return [[turn.role, turn.content] for turn in turns]
