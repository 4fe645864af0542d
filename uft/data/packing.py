"""Layouts: sequences as one rectangle with padding, or one after another without.

Packed, all sequences of a batch are one line of tokens. Positions start anew with each, attention stays within it, and
the last token of each is left out: nothing is predicted from it. Sequences of one group (the completions of a row) may
share their prompt: it stands once, before the first of them; the others attend to it from where they are, and their
first target is predicted from its last position.

Both layouts give the same targets in the same order, so what is asked of the model does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from uft.data.batch import NOT_AN_INPUT, Segments, Span

PER_TARGET = ("target_ids", "predictor", "place", "offset", "sequence")


class Layout(Enum):
    """How the sequences of a batch lie in the model's input."""

    PADDED = "padded"  # a rectangle, filled up on the right
    PACKED = "packed"  # one after another, each with its own prompt
    SHARED = "shared"  # one after another, completions of a group after their common prompt


class Line(NamedTuple):
    """One sequence to be laid out. Lines of one group stand next to each other."""

    ids: np.ndarray  # (L,) int
    supervised: np.ndarray  # (L,) bool
    group: int = 0

    @property
    def targets(self) -> np.ndarray:
        """Positions that are asked for: the supervised ones but for the first token, which has no predictor."""
        return np.flatnonzero(self.supervised[1:]) + 1


def lay_out(lines: Sequence[Line], layout: Layout, pad_id: int) -> dict[str, Any]:
    """The fields of a :class:`Batch` that describe the model's input and the targets."""
    return _padded(lines, pad_id) if layout is Layout.PADDED else _packed(lines, pad_id, layout is Layout.SHARED)


def forwarded(lines: Sequence[Line], layout: Layout) -> int:
    """Tokens that lines of one group put through the model when they are packed."""
    placed = [_Placed.of(line) for line in lines]
    shared = _common_prompt(placed) if layout is Layout.SHARED else 0
    fed = [one.fed for one in placed if one.fed]
    return sum(fed) - shared * max(0, len(fed) - 1)


def _padded(lines: Sequence[Line], pad_id: int) -> dict[str, Any]:
    length = max((len(line.ids) for line in lines), default=0)
    input_ids = np.full((len(lines), length), pad_id, np.int64)
    attention_mask = np.zeros((len(lines), length), np.int64)
    supervised = np.zeros((len(lines), length), bool)
    for number, line in enumerate(lines):
        real = len(line.ids)
        input_ids[number, :real] = line.ids
        attention_mask[number, :real] = 1
        supervised[number, :real] = line.supervised
    supervised[:, :1] = False  # the first token has no predictor
    place = np.flatnonzero(supervised)
    sequence, offset = np.divmod(place, max(length, 1))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "position_ids": torch.arange(length).expand(len(lines), length).contiguous(),
        "target_ids": torch.from_numpy(input_ids.reshape(-1)[place]),
        "predictor": torch.from_numpy(place - 1),
        "place": torch.from_numpy(place),
        "offset": torch.from_numpy(offset),
        "sequence": torch.from_numpy(sequence),
    }


class _Placed(NamedTuple):
    """A line with what of it is needed."""

    line: Line
    targets: np.ndarray  # positions within the line
    fed: int  # tokens that go into the model: those before its last target

    @classmethod
    def of(cls, line: Line) -> _Placed:
        targets = line.targets
        return cls(line, targets, int(targets[-1]) if len(targets) else 0)


def _common_prompt(group: Iterable[_Placed]) -> int:
    """Tokens that all lines of a group begin with, at most up to the first target of any; 0 for a line alone."""
    asked = [one for one in group if one.fed]
    if len(asked) < 2:
        return 0
    first = asked[0].line.ids
    shared = min(int(one.targets[0]) for one in asked)
    for other in asked[1:]:
        differs = np.flatnonzero(first[:shared] != other.line.ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


class _Pack:
    """A line of tokens as it grows."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.targets: dict[str, list[np.ndarray]] = {name: [] for name in PER_TARGET}

    def add_group(self, group: Sequence[tuple[int, _Placed]], shared: int) -> None:
        """Numbered lines, the first `shared` tokens of all of them put in once."""
        prompt, prompt_span, prefix = self.length, len(self.spans), 0
        for number, one in group:
            if not one.fed:
                continue
            own = self.length - prefix  # where its token 0 would stand
            self._add_span(one, prompt_span if prefix else len(self.spans), prefix)
            self._add_targets(one, number, prompt, own, prefix)
            prefix = shared

    def _add_span(self, one: _Placed, prompt_span: int, prefix: int) -> None:
        length = one.fed - prefix
        if length:
            self.spans.append(Span(length, prompt_span, prefix))
            self.ids.append(one.line.ids[prefix : one.fed])
            self.positions.append(np.arange(prefix, one.fed))
            self.length += length

    def _add_targets(self, one: _Placed, number: int, prompt: int, own: int, prefix: int) -> None:
        """Position j of the line stands at `prompt + j` within its prefix, at `own + j` after it."""
        before = one.targets - 1
        values = (
            one.line.ids[one.targets],
            before + np.where(before < prefix, prompt, own),
            np.where(one.targets < one.fed, one.targets + own, NOT_AN_INPUT),
            one.targets,
            np.full(len(one.targets), number),
        )
        for name, value in zip(PER_TARGET, values, strict=True):
            self.targets[name].append(value)

    def fields(self, pad_id: int, tokens: int) -> dict[str, Any]:
        if not self.spans:  # nothing is asked: a model still wants a token
            self.spans, self.ids, self.positions = [Span(1, 0, 0)], [np.array([pad_id])], [np.zeros(1, np.int64)]
        input_ids = _joined(self.ids)[None]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": _joined(self.positions)[None],
            **{name: _joined(values) for name, values in self.targets.items()},
            "segments": Segments(tuple(self.spans), tokens),
        }


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """(sum of lengths,) int64."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False))


def _packed(lines: Sequence[Line], pad_id: int, share: bool) -> dict[str, Any]:
    pack = _Pack()
    numbered = ((number, _Placed.of(line)) for number, line in enumerate(lines))
    for _, members in groupby(numbered, key=lambda pair: pair[1].line.group):
        group = list(members)
        pack.add_group(group, _common_prompt(one for _, one in group) if share else 0)
    return pack.fields(pad_id, sum(len(line.ids) for line in lines))
