"""Feed: the rows of each optimiser step, as the objective sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from uft.data.batch import Batch, Example, Layout, make_example, micro_batches, mismatched
from uft.data.chat import Tokens
from uft.data.mixture import Mixture, RowIndex
from uft.data.rows import Kind, Row, Selection, View
from uft.data.table import grouped
from uft.data.tokens import TokenizedSource
from uft.distributed import balanced_shards, ranks

ReferenceColumn = Callable[[Tokens], np.ndarray]


class Unusable(NamedTuple):
    """Rows that an objective cannot use: how many, and the id of the first."""

    rows: int
    first: str


class RowSampler:
    """Draws rows from the mixture and shows them through the objective's views.

    A row of which the objective takes nothing still counts as drawn: every objective sees the same rows in the same
    order, and a step of `batch_size` rows is the same rows under all of them.
    """

    def __init__(
        self, sources: Sequence[TokenizedSource], mixture: Mixture, views: Mapping[Kind, View], max_length: int
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

    def take(self, rows: int) -> list[Example]:
        """The next `rows` rows; those of which the objective takes nothing are left out."""
        return self.items(self.mixture.take(rows))

    def items(self, draws: Iterable[RowIndex]) -> list[Example]:
        found = (self._item(draw) for draw in draws)
        return [item for item in found if item is not None]

    def met(self, draws: Iterable[RowIndex]) -> Iterator[tuple[Tokens, ...]]:
        """The tokens of every row among these draws, each once, source by source in the order of the rows."""
        seen = [bytearray(len(source.rows)) for source in self.sources]
        for draw in draws:
            seen[draw.source][draw.index] = 1
        return (
            source.encoded[n] for source, of in zip(self.sources, seen, strict=True) for n, one in enumerate(of) if one
        )

    def longest(self, draws: Iterable[RowIndex], count: int) -> list[Example]:
        """The `count` longest items of these draws, the longest first and of equals the earlier; few are made."""
        kept: list[tuple[int, int, Example]] = []  # a heap of (length, -order, item)
        for order, draw in enumerate(draws):
            bound = self.sources[draw.source].encoded.longest[draw.index]
            if len(kept) == count and bound <= kept[0][0]:
                continue
            item = self._item(draw)
            if item is not None and (len(kept) < count or item.length > kept[0][0]):
                (heappush if len(kept) < count else heapreplace)(kept, (item.length, -order, item))
        return [item for _, _, item in sorted(kept, key=lambda one: one[:2], reverse=True)]

    def mismatched(self, items: Sequence[Example]) -> list[Example]:
        """Completions of a step under other rows' prompts."""
        others = mismatched(items, self.max_length)
        if self.reference is None:
            return others
        return [replace(item, reference=(self.reference(item.encoded[0]),)) for item in others]

    def _item(self, draw: RowIndex) -> Example | None:
        source = self.sources[draw.source]
        row = source.rows[draw.index]
        example = self.first_example[draw.source] + draw.index
        item = make_example(row, source.encoded[draw.index], example, draw.visit, self._view)
        if item is None or self.reference is None:
            return item
        return replace(item, reference=tuple(self.reference(encoded) for encoded in item.encoded))

    def _view(self, row: Row, visit: int) -> Selection | None:
        view = self.views.get(row.kind)
        return view(row, visit) if view else None

    def unusable(self) -> dict[str, dict[Kind, Unusable]]:
        """Rows the objective cannot use at all, by source and kind. A source that is never drawn is left out."""
        found: dict[str, dict[Kind, Unusable]] = {}
        for source in self.drawn:
            for row, count in grouped(source.rows):
                if self._view(row, 0) is None:
                    kinds = found.setdefault(source.source, {})
                    before = kinds.get(row.kind, Unusable(0, row.id))
                    kinds[row.kind] = Unusable(before.rows + count, before.first)
        return found

    @property
    def drawn(self) -> list[TokenizedSource]:
        """The sources that have a share."""
        return [s for s, weight in zip(self.sources, self.mixture.weights, strict=True) if weight]

    def takes_anything(self) -> bool:
        """Whether there is a row to draw of which the objective takes a completion."""
        return any(self._view(row, 0) for source in self.drawn for row, _ in grouped(source.rows))

    def preview(self, rows: int) -> Iterator[RowIndex]:
        """What the next `rows` draws will be, without drawing them."""
        return self.mixture.fork().draws(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state)


# --- Rows of a step by rank.


def local_shard(items: Sequence[Example]) -> list[Example]:
    """The rows of a step that this process takes: about as many tokens as every other. An example is never divided,
    and visits of the same example stay together in their order: it has one owner, who keeps its state."""
    group = ranks()
    if group.size == 1:
        return list(items)
    sizes = [sum(encoded.length for encoded in item.encoded) for item in items]
    return [items[i] for i in balanced_shards(sizes, [item.example for item in items], group.size)[group.rank]]


# --- The next step's rows, drawn and laid out by a thread while this step runs.
#
# What is drawn does not depend on when: there is one order, and nothing here touches a random generator of the run.
# The
# cursors of the data that a checkpoint keeps are those of the rows that were used, not of those made ahead.


@dataclass(frozen=True)
class StepBatches:
    """The rows of a step, and those that this process takes of them as micro-batches in the machine's own memory."""

    items: Sequence[Example]
    batches: Sequence[Batch]
    mismatched: Sequence[Batch] = ()  # completions under other rows' prompts, for objectives that need them
    blank: Sequence[Batch] = ()  # one for passes that this process makes for others' sake, of a model in pieces


@dataclass(frozen=True)
class Collator:
    """How rows are laid out."""

    micro_batch_tokens: int
    pad_id: int
    layout: Layout = Layout.PADDED
    pinned: bool = False  # in memory that a GPU copies from while it works

    def __call__(self, items: Sequence[Example], mismatched: Sequence[Example] = ()) -> StepBatches:
        blank = self._batches(items[:1]) if ranks().sharded else ()
        return StepBatches(items, self._batches(local_shard(items)), self._batches(local_shard(mismatched)), blank)

    def _batches(self, items: Sequence[Example]) -> list[Batch]:
        made = micro_batches(items, self.micro_batch_tokens, self.pad_id, self.layout)
        return [batch.pinned() for batch in made] if self.pinned else made


class Prefetcher:
    """Steps of a sampler. `cursor` is the state of the feed after the last step that was taken."""

    def __init__(self, sampler: RowSampler, lay_out: Collator, *, mismatched: bool, threaded: bool) -> None:
        self.sampler, self.lay_out, self.mismatched = sampler, lay_out, mismatched
        self.cursor = sampler.state_dict()
        self._thread = ThreadPoolExecutor(1, "uft-ahead") if threaded else None
        self._next: Future[tuple[StepBatches, dict[str, Any]]] | None = None

    def take(self, rows: int, then: int) -> StepBatches:
        """The next `rows` rows; the `then` rows after them are begun."""
        laid, self.cursor = self._next.result() if self._next else self._make(rows)
        self._next = self._thread.submit(self._make, then) if self._thread and then else None
        return laid

    def go_back(self, cursor: dict[str, Any]) -> None:
        """Drop what was made ahead and go on from `cursor`."""
        if self._next is not None:
            self._next.exception()  # whatever became of it: the feed is nobody's until it is done
            self._next = None
        self.sampler.load_state_dict(cursor)
        self.cursor = cursor

    def close(self) -> None:
        """End the thread; the feed stands after the last step that was taken."""
        self.go_back(self.cursor)
        if self._thread is not None:
            self._thread.shutdown()

    def _make(self, rows: int) -> tuple[StepBatches, dict[str, Any]]:
        items = self.sampler.take(rows)
        laid = self.lay_out(items, self.sampler.mismatched(items) if self.mismatched else ())
        return laid, self.sampler.state_dict()


def use_prefetch_thread(asked: bool | None, device: torch.device) -> bool:
    """As asked; by itself only beside a GPU: on a CPU the thread would share the step's cores."""
    return device.type == "cuda" if asked is None else asked
