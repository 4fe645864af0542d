"""Batches: rows as an objective uses them, laid out as tensors under a budget of tokens.

The layout today is padding on the right; objectives see only the flat targets of a :class:`Batch` and never know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from uft.data.batch import Batch
from uft.data.rows import Completion, Kind, Row
from uft.data.templates import Encoded
from uft.data.views import Parts, Role, View

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


def is_good(completion: Completion) -> bool:
    """Whether a completion is one to learn from: demonstrations, chosen, good labels, scores of a half and more."""
    if completion.sampled_by is not None:
        return False
    if completion.score is not None:
        return completion.score >= _GOOD_SCORE
    verdict = completion.label if completion.preferred is None else completion.preferred
    return verdict is not False


def micro_batches(items: Sequence[Item], budget: int, pad_id: int) -> list[Batch]:
    """The items in batches of at most `budget` tokens, padding counted; the longest rows first.

    Rows are never divided: one that exceeds the budget alone is a batch alone. Sorting by length keeps padding low, and
    a step that will not fit in memory fails on its first batch.
    """
    return [collate(group, pad_id) for group in _groups(items, budget)]


def _groups(items: Sequence[Item], budget: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    width = sequences = 0
    for item in sorted(items, key=lambda item: -item.length):
        if group and (sequences + len(item.parts)) * width > budget:
            yield group
            group, sequences = [], 0
        if not group:
            width = item.length
        group.append(item)
        sequences += len(item.parts)
    if group:
        yield group


def collate(items: Sequence[Item], pad_id: int) -> Batch:
    """Items as one batch, padded on the right. An item twice in it is two rows."""
    sequences = [(number, item, part, encoded) for number, item in enumerate(items) for part, encoded in _pairs(item)]
    length = max((encoded.length for *_, encoded in sequences), default=0)
    input_ids = np.full((len(sequences), length), pad_id, np.int64)
    mask = np.zeros((len(sequences), length), np.int64)
    supervised = np.zeros((len(sequences), length), bool)
    for number, (*_, encoded) in enumerate(sequences):
        input_ids[number, : encoded.length] = encoded.ids
        mask[number, : encoded.length] = 1
        supervised[number, : encoded.length] = encoded.supervised
    supervised[:, :1] = False  # the first token has no predictor
    sequence, offset = np.nonzero(supervised)
    place = sequence * length + offset
    completions = [item.row.completions[part.completion] for _, item, part, _ in sequences]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.arange(length).expand(len(sequences), length).contiguous(),
        target_ids=torch.from_numpy(input_ids.reshape(-1)[place]),
        predictor=torch.from_numpy(place - 1),
        place=torch.from_numpy(place),
        offset=torch.from_numpy(offset),
        sequence=torch.from_numpy(sequence),
        row=_integers([number for number, *_ in sequences]),
        role=_integers([part.role for _, _, part, _ in sequences]),
        target=torch.tensor([part.target for _, _, part, _ in sequences], dtype=torch.float32),
        good=torch.tensor([is_good(completion) for completion in completions], dtype=torch.bool),
        pairs=_integers([pair for group in _by_row(sequences) for pair in group]).reshape(-1, 2),
        example=_integers([item.example for item in items]),
        kind=_integers([_KINDS[item.row.kind] for item in items]),
        columns=_columns(items, len(place)),
    )
