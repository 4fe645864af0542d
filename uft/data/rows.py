"""Row: one prompt, one or more completions, and whatever feedback they carry.

One frozen record serves every kind of feedback; its kind is derived from what the completions carry, never stored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any, Protocol, runtime_checkable

BASELINE, SOFT_LABEL = "baseline_logp", "soft_label"
ANNOTATIONS = (BASELINE, SOFT_LABEL)
"""Numbers that an annotation wrote beside a completion: its mean log-prob under other models; how likely it is the
better one of its pair."""


class Kind(Enum):
    """What a row knows about its completions."""

    DEMONSTRATION = "demonstration"  # one completion, shown as right
    PREFERENCE = "preference"  # a chosen and a rejected completion
    BINARY = "binary"  # one completion, labelled good or bad
    SCORED = "scored"  # completions with scores in [0, 1]
    NEGATIVES = "negatives"  # a demonstration and completions that some model sampled


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant", ...
    content: str


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt: usually one assistant turn; a multi-turn demonstration has several.

    Every assistant turn in `turns` is supervised. At most one of the feedback fields is set.
    """

    turns: tuple[Message, ...]  # the first is an assistant turn
    preferred: bool | None = None  # True: chosen, False: rejected
    label: bool | None = None  # True: good, False: bad
    score: float | None = None  # in [0, 1]
    sampled_by: str | None = None  # the model that sampled it: a negative
    log_prob: float | None = None  # of a sampled one with its end token, under the prompt it was sampled with
    annotations: Mapping[str, float] = field(default_factory=dict)  # by a name of ANNOTATIONS

    @property
    def text(self) -> str:
        """The last turn's content: the reply."""
        return self.turns[-1].content


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its completions. `source` and `index` name it for ever: the order of a file is its identity."""

    source: str
    index: int  # 0-based among the rows of the source
    prompt: tuple[Message, ...]
    completions: tuple[Completion, ...]
    answer: str | None = None  # the gold answer that a checker compares with
    task: str | None = None  # what family of prompt this is, for reports

    @property
    def id(self) -> str:
        return f"{self.source}:{self.index}"

    @property
    def kind(self) -> Kind:
        return kind_of(self.completions)


def kind_of(completions: Sequence[Completion]) -> Kind:
    """The kind of a row with these completions."""
    if any(c.sampled_by is not None for c in completions):
        return Kind.NEGATIVES
    first = completions[0]
    if first.preferred is not None:
        return Kind.PREFERENCE
    if first.label is not None:
        return Kind.BINARY
    if first.score is not None:
        return Kind.SCORED
    return Kind.DEMONSTRATION


# --- Views: what an objective uses of a row.
#
# Every objective sees the same rows in the same order; a view says which completions it takes, in which role, and
# with
# which explicit reward. A view is a pure function of the row and of how often the row was visited before, and looks
# at no
# text: rows whose completions have the same feedback look alike (`uft.data.table.grouped`). It returns `None` when
# the
# objective cannot use such a row at all (the run stops before step 0), and an empty tuple when the method by its own
# rule
# takes nothing from this one (a bad completion under supervised fine-tuning).


class Role(IntEnum):
    """On which side of the loss a completion stands."""

    POSITIVE = 1
    NEGATIVE = 0


@dataclass(frozen=True, slots=True)
class Selected:
    """One completion of a row, as an objective uses it."""

    completion: int  # index into row.completions
    role: Role = Role.POSITIVE
    target: float = math.nan  # explicit reward in [0, 1]; NaN: none


Selection = tuple[Selected, ...]
View = Callable[[Row, int], Selection | None]  # (row, how often it was visited before) -> parts


# --- What a row is, apart from where it lies: hashes of its content and of its prompt.
#
# Digests prove that two runs saw the same rows; the prompt's hash chooses held-out rows, so that a prompt of one
# source
# never sits on both sides and the choice depends neither on the order of a file nor on a seed.


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
