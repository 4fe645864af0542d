"""Feed: the rows of each optimiser step, as the objective sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from uft.data.batches import Item, make_item, mismatched
from uft.data.mixture import Draw, Mixture
from uft.data.rows import Kind, Row
from uft.data.templates import Encoded
from uft.data.tokens import Tokenized
from uft.data.views import Parts, View

ReferenceColumn = Callable[[Encoded], np.ndarray]


class Feed:
    """Draws rows from the mixture and shows them through the objective's views.

    A row of which the objective takes nothing still counts as drawn: every objective sees the same rows in the same
    order, and a step of `batch_size` rows is the same rows under all of them.
    """

    def __init__(
        self, sources: Sequence[Tokenized], mixture: Mixture, views: Mapping[Kind, View], max_length: int
    ) -> None:
        self.sources = sources
        self.mixture = mixture
        self.views = views
        self.max_length = max_length
        self.first_example = [0, *accumulate(len(source.rows) for source in sources)]
        self.reference: ReferenceColumn | None = None

    @property
    def examples(self) -> int:
        """Rows in the whole mixture."""
        return self.first_example[-1]

    def take(self, rows: int) -> list[Item]:
        """The next `rows` rows; those of which the objective takes nothing are left out."""
        return self.items(self.mixture.take(rows))

    def items(self, draws: Sequence[Draw]) -> list[Item]:
        found = (self._item(draw) for draw in draws)
        return [item for item in found if item is not None]

    def mismatched(self, items: Sequence[Item]) -> list[Item]:
        """Completions of a step under other rows' prompts."""
        others = mismatched(items, self.max_length)
        if self.reference is None:
            return others
        return [replace(item, reference=(self.reference(item.encoded[0]),)) for item in others]

    def _item(self, draw: Draw) -> Item | None:
        source = self.sources[draw.source]
        row = source.rows[draw.index]
        example = self.first_example[draw.source] + draw.index
        item = make_item(row, source.encoded[draw.index], example, draw.visit, self._view)
        if item is None or self.reference is None:
            return item
        return replace(item, reference=tuple(self.reference(encoded) for encoded in item.encoded))

    def _view(self, row: Row, visit: int) -> Parts | None:
        view = self.views.get(row.kind)
        return view(row, visit) if view else None

    def unusable(self) -> dict[str, dict[Kind, list[str]]]:
        """Rows the objective cannot use at all: source -> kind -> row ids. A source that is never drawn is left out."""
        found: dict[str, dict[Kind, list[str]]] = {}
        for source, weight in zip(self.sources, self.mixture.weights, strict=True):
            for row in source.rows if weight else ():
                if self._view(row, 0) is None:
                    found.setdefault(source.source, {}).setdefault(row.kind, []).append(row.id)
        return found

    def takes_anything(self) -> bool:
        """Whether there is a row to draw of which the objective takes a completion."""
        drawn = (s.rows for s, weight in zip(self.sources, self.mixture.weights, strict=True) if weight)
        return any(self._view(row, 0) for rows in drawn for row in rows)

    def preview(self, rows: int) -> list[Draw]:
        """What the next `rows` draws will be, without drawing them."""
        state = self.mixture.state_dict()
        draws = self.mixture.take(rows)
        self.mixture.load_state_dict(state)
        return draws

    def state_dict(self) -> dict[str, Any]:
        return self.mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state)
