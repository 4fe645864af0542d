"""Batches: rows as an objective uses them, laid out as tensors under a budget of tokens.

Objectives see only the flat targets of a :class:`Batch` and never know its layout.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from uft.data.batch import Batch
from uft.data.packing import Layout, Line, forwarded, lay_out
from uft.data.rows import Completion, Kind, Row
from uft.data.templates import Encoded
from uft.data.views import Part, Parts, Role, View

_KINDS = {kind: number for number, kind in enumerate(Kind)}
_GOOD_SCORE = 0.5


@dataclass(frozen=True)
class Item:
    """A row as an objective uses it: `encoded[i]` is the completion of `parts[i]`."""

    example: int  # the row's number in the whole mixture
    row: Row
    parts: Parts
    encoded: tuple[Encoded, ...]
    reference: tuple[np.ndarray, ...] | None = None  # per part (targets,) float32: the reference's log-probs

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return max(encoded.length for encoded in self.encoded)


def make_item(row: Row, encoded: Sequence[Encoded], example: int, visit: int, view: View) -> Item | None:
    """What `view` takes of a row; None when it takes nothing. `encoded` has one entry per completion of the row."""
    parts = view(row, visit)
    if not parts:
        return None
    return Item(example, row, parts, tuple(encoded[part.completion] for part in parts))


def mismatched(items: Sequence[Item], max_length: int) -> list[Item]:
    """Every completion of a step under the prompt of the next other row of it, for statistics of unrelated answers.

    Cut at `max_length` tokens. Nothing for a single row.
    """
    sides = [(item, part, encoded) for item in items for part, encoded in zip(item.parts, item.encoded, strict=True)]
    found = []
    for number, (item, _, _) in enumerate(sides):
        following = (sides[(number + k) % len(sides)] for k in range(1, len(sides)))
        other = next((side for side in following if side[0].example != item.example), None)
        if other is not None:
            found.append(_under(other, sides[number], max_length))
    return [item for item in found if item.encoded[0].targets]


def _under(side: tuple[Item, Part, Encoded], other: tuple[Item, Part, Encoded], max_length: int) -> Item:
    """The completion of `other` under the prompt of `side`."""
    item, _, prompt = side
    _, part, completion = other
    ids = np.concatenate([prompt.ids[: prompt.prompt_length], completion.ids[completion.prompt_length :]])
    supervised = np.zeros(len(ids), bool)
    supervised[prompt.prompt_length :] = completion.supervised[completion.prompt_length :]
    encoded = Encoded(ids[:max_length], supervised[:max_length], prompt.prompt_length)
    return replace(item, row=other[0].row, parts=(part,), encoded=(encoded,), reference=None)


def is_good(completion: Completion) -> bool:
    """Whether a completion is one to learn from: demonstrations, chosen, good labels, scores of a half and more."""
    if completion.sampled_by is not None:
        return False
    if completion.score is not None:
        return completion.score >= _GOOD_SCORE
    verdict = completion.label if completion.preferred is None else completion.preferred
    return verdict is not False


def micro_batches(items: Sequence[Item], budget: int, pad_id: int, layout: Layout = Layout.PADDED) -> list[Batch]:
    """The items in batches of at most `budget` tokens as the model meets them; the longest rows first.

    Rows are never divided: one that exceeds the budget alone is a batch alone. Sorting by length keeps padding low, and
    a step that will not fit in memory fails on its first batch.
    """
    groups = _rectangles(items, budget) if layout is Layout.PADDED else _packs(items, budget, layout)
    return [collate(group, pad_id, layout) for group in groups]


def _rectangles(items: Sequence[Item], budget: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    width = sequences = 0
    for length, item in _largest_first(items, [item.length for item in items]):
        if group and (sequences + len(item.parts)) * width > budget:
            yield group
            group, sequences = [], 0
        if not group:
            width = length
        group.append(item)
        sequences += len(item.parts)
    if group:
        yield group


def _packs(items: Sequence[Item], budget: int, layout: Layout) -> Iterator[list[Item]]:
    group: list[Item] = []
    tokens = 0
    sizes = [forwarded([Line(one.ids, one.supervised) for one in item.encoded], layout) for item in items]
    for size, item in _largest_first(items, sizes):
        if group and tokens + size > budget:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += size
    if group:
        yield group


def _largest_first(items: Sequence[Item], sizes: Sequence[int]) -> list[tuple[int, Item]]:
    """(size, item), the items of one example in the order in which they were drawn, each as large as the largest of
    them: what an objective remembers of an example depends on that order, which no layout may change."""
    largest: dict[int, int] = {}
    for size, item in zip(sizes, items, strict=True):
        largest[item.example] = max(size, largest.get(item.example, 0))
    return sorted(((largest[item.example], item) for item in items), key=lambda pair: -pair[0])


def collate(items: Sequence[Item], pad_id: int, layout: Layout = Layout.PADDED) -> Batch:
    """Items as one batch. An item twice in it is two rows."""
    lines = [
        _Line(row, item, *line) for row, item in enumerate(items) for line in zip(item.parts, item.encoded, strict=True)
    ]
    laid = lay_out([Line(line.encoded.ids, line.encoded.supervised, line.row) for line in lines], layout, pad_id)
    return Batch(
        **laid,
        row=_integers(line.row for line in lines),
        role=_integers(line.part.role for line in lines),
        target=torch.tensor([line.part.target for line in lines], dtype=torch.float32),
        good=torch.tensor(
            [is_good(line.item.row.completions[line.part.completion]) for line in lines], dtype=torch.bool
        ),
        pairs=_pairs(lines),
        example=_integers(item.example for item in items),
        kind=_integers(_KINDS[item.row.kind] for item in items),
        columns=_columns(items, lines, laid["sequence"].numpy()),
        annotations=_annotations(lines),
    )


class _Line(NamedTuple):
    """One sequence of a batch."""

    row: int
    item: Item
    part: Part
    encoded: Encoded


def _pairs(lines: Sequence[_Line]) -> torch.Tensor:
    """(P, 2): every positive with every negative of its row."""
    sides: dict[tuple[int, Role], list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        sides[line.row, line.part.role].append(number)
    rows = dict.fromkeys(line.row for line in lines)
    pairs = [pair for row in rows for pair in product(sides[row, Role.POSITIVE], sides[row, Role.NEGATIVE])]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _columns(items: Sequence[Item], lines: Sequence[_Line], sequence: np.ndarray) -> dict[str, torch.Tensor]:
    """Per target: the reference's log-probs and those under the samplers, where the items bring them."""
    columns = {}
    if items and all(item.reference is not None for item in items):
        values = np.concatenate([column for item in items for column in item.reference or ()])
        assert len(values) == len(sequence), f"{len(values)} reference log-probs for {len(sequence)} targets"
        columns["reference"] = torch.from_numpy(values.astype(np.float32))
    sampled = [line.item.row.completions[line.part.completion].log_prob for line in lines]
    if any(log_prob is not None for log_prob in sampled):
        columns["sampling_log_probs"] = torch.from_numpy(_at_first_target(sampled, sequence))
    return columns


def _annotations(lines: Sequence[_Line]) -> dict[str, torch.Tensor]:
    """Per sequence: scores and whatever else was written beside completions; NaN where one has none."""
    completions = [line.item.row.completions[line.part.completion] for line in lines]
    known = [{**({} if c.score is None else {"score": c.score}), **c.annotations} for c in completions]
    names = dict.fromkeys(name for numbers in known for name in numbers)
    return {name: torch.tensor([n.get(name, math.nan) for n in known], dtype=torch.float32) for name in names}


def _at_first_target(totals: Sequence[float | None], sequence: np.ndarray) -> np.ndarray:
    """(N,) float32 whose sums over sequences are `totals`: only those are known, and only they are asked for."""
    spread = np.zeros(len(sequence), np.float32)
    firsts, where = np.unique(sequence, return_index=True)
    spread[where] = [totals[number] or 0.0 for number in firsts]
    return spread


def _integers(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)
