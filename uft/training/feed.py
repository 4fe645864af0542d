"""Feed: the rows of each optimiser step, as the objective sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heappush, heapreplace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from uft.data.batches import Item, make_item, mismatched
from uft.data.many import alike
from uft.data.mixture import Draw, Mixture
from uft.data.rows import Kind, Row
from uft.data.templates import Encoded
from uft.data.tokens import Tokenized
from uft.data.views import Parts, View

ReferenceColumn = Callable[[Encoded], np.ndarray]


class Unusable(NamedTuple):
    """Rows that an objective cannot use: how many, and the id of the first."""

    rows: int
    first: str


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

    def items(self, draws: Iterable[Draw]) -> list[Item]:
        found = (self._item(draw) for draw in draws)
        return [item for item in found if item is not None]

    def met(self, draws: Iterable[Draw]) -> Iterator[tuple[Encoded, ...]]:
        """The tokens of every row among these draws, each once, source by source in the order of the rows."""
        seen = [bytearray(len(source.rows)) for source in self.sources]
        for draw in draws:
            seen[draw.source][draw.index] = 1
        return (
            source.encoded[n] for source, of in zip(self.sources, seen, strict=True) for n, one in enumerate(of) if one
        )

    def longest(self, draws: Iterable[Draw], count: int) -> list[Item]:
        """The `count` longest items of these draws, the longest first and of equals the earlier; few are made."""
        kept: list[tuple[int, int, Item]] = []  # a heap of (length, -order, item)
        for order, draw in enumerate(draws):
            bound = self.sources[draw.source].encoded.longest[draw.index]
            if len(kept) == count and bound <= kept[0][0]:
                continue
            item = self._item(draw)
            if item is not None and (len(kept) < count or item.length > kept[0][0]):
                (heappush if len(kept) < count else heapreplace)(kept, (item.length, -order, item))
        return [item for _, _, item in sorted(kept, key=lambda one: one[:2], reverse=True)]

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

    def unusable(self) -> dict[str, dict[Kind, Unusable]]:
        """Rows the objective cannot use at all, by source and kind. A source that is never drawn is left out."""
        found: dict[str, dict[Kind, Unusable]] = {}
        for source in self.drawn:
            for row, count in alike(source.rows):
                if self._view(row, 0) is None:
                    kinds = found.setdefault(source.source, {})
                    before = kinds.get(row.kind, Unusable(0, row.id))
                    kinds[row.kind] = Unusable(before.rows + count, before.first)
        return found

    @property
    def drawn(self) -> list[Tokenized]:
        """The sources that have a share."""
        return [s for s, weight in zip(self.sources, self.mixture.weights, strict=True) if weight]

    def takes_anything(self) -> bool:
        """Whether there is a row to draw of which the objective takes a completion."""
        return any(self._view(row, 0) for source in self.drawn for row, _ in alike(source.rows))

    def preview(self, rows: int) -> Iterator[Draw]:
        """What the next `rows` draws will be, without drawing them."""
        return self.mixture.fork().draws(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state)
