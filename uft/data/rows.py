"""Row: one prompt, one or more completions, and whatever feedback they carry.

One frozen record serves every kind of feedback; its kind is derived from what the completions carry, never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

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
