"""The rows of each optimiser step: drawn from the mixture, shared out over ranks, collated into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from uft.data.batch import Batch, Example, Layout, make_example, micro_batches, mismatched
from uft.data.mixture import Mixture, RowIndex
from uft.data.rows import Kind, Row, Selection, Tokens, View
from uft.data.table import grouped
from uft.data.tokens import TokenizedSource
from uft.distributed import balanced_shards, ranks

ReferenceColumn = Callable[[Tokens], np.ndarray]


class Unusable(NamedTuple):
    """Rows that an objective cannot use: their number and the id of the first."""

    rows: int
    first: str


class RowSampler:
    """Draws rows from the mixture and turns them into examples through the objective's views.

    A row of which the objective takes nothing still counts as drawn: every objective draws the same rows in the same
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
        self.reference: ReferenceColumn | None = None  # cached log-probs, added to every example

    @property
    def row_count(self) -> int:
        """Rows in the whole mixture."""
        return self.first_example[-1]

    def take(self, rows: int) -> list[Example]:
        """The examples of the next `rows` rows, without those of which the objective takes nothing."""
        return self.examples_of(self.mixture.take(rows))

    def examples_of(self, draws: Iterable[RowIndex]) -> list[Example]:
        """The examples of these draws, without those of which the objective takes nothing."""
        return [item for draw in draws if (item := self._example(draw)) is not None]

    def preview(self, rows: int) -> Iterator[RowIndex]:
        """The next `rows` draws, without drawing them."""
        return self.mixture.fork().draws(rows)

    def distinct_tokens(self, draws: Iterable[RowIndex]) -> Iterator[tuple[Tokens, ...]]:
        """The tokens of every row among these draws, each row once, by source and then by index."""
        seen = [bytearray(len(source.rows)) for source in self.sources]
        for draw in draws:
            seen[draw.source][draw.index] = 1
        for source, drawn in zip(self.sources, seen, strict=True):
            yield from (source.encoded[index] for index, is_drawn in enumerate(drawn) if is_drawn)

    def longest(self, draws: Iterable[RowIndex], count: int) -> list[Example]:
        """The `count` longest examples of these draws, longest first, ties by order; makes few of the others."""
        heap: list[tuple[int, int, Example]] = []  # (length, -order, example)
        for order, draw in enumerate(draws):
            bound = self.sources[draw.source].encoded.longest[draw.index]
            if len(heap) == count and bound <= heap[0][0]:
                continue
            item = self._example(draw)
            if item is not None and (len(heap) < count or item.length > heap[0][0]):
                (heappush if len(heap) < count else heapreplace)(heap, (item.length, -order, item))
        return [item for _, _, item in sorted(heap, key=lambda one: one[:2], reverse=True)]

    def is_usable(self, draw: RowIndex) -> bool:
        """Whether the objective can use the row, though it may take nothing of it."""
        return self._view(self.sources[draw.source].rows[draw.index], draw.visit) is not None

    def mismatched(self, examples: Sequence[Example]) -> list[Example]:
        """The completions of a step under other rows' prompts (for `Objective.baseline_terms`)."""
        others = mismatched(examples, self.max_length)
        if self.reference is None:
            return others
        return [replace(item, reference=(self.reference(item.encoded[0]),)) for item in others]

    def unusable(self) -> dict[str, dict[Kind, Unusable]]:
        """Rows that the objective cannot use at all, by source and kind; only of sources that are drawn from."""
        by_source: dict[str, dict[Kind, Unusable]] = {}
        for source in self.drawn:
            for row, count in grouped(source.rows):
                if self._view(row, 0) is None:
                    kinds = by_source.setdefault(source.source, {})
                    before = kinds.get(row.kind, Unusable(0, row.id))
                    kinds[row.kind] = Unusable(before.rows + count, before.first)
        return by_source

    @property
    def drawn(self) -> list[TokenizedSource]:
        """The sources that have a share of the mixture."""
        return [s for s, weight in zip(self.sources, self.mixture.weights, strict=True) if weight]

    def takes_anything(self) -> bool:
        """Whether the objective takes a completion of any row that can be drawn."""
        return any(self._view(row, 0) for source in self.drawn for row, _ in grouped(source.rows))

    def state_dict(self) -> dict[str, Any]:
        return self.mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state)

    def _example(self, draw: RowIndex) -> Example | None:
        source = self.sources[draw.source]
        number = self.first_example[draw.source] + draw.index
        item = make_example(source.rows[draw.index], source.encoded[draw.index], number, draw.visit, self._view)
        if item is None or self.reference is None:
            return item
        return replace(item, reference=tuple(self.reference(encoded) for encoded in item.encoded))

    def _view(self, row: Row, visit: int) -> Selection | None:
        view = self.views.get(row.kind)
        return view(row, visit) if view else None


def local_shard(examples: Sequence[Example]) -> list[Example]:
    """This rank's part of a step's examples: about as many tokens as every other rank has.

    Visits of the same example stay together and in order, since the rank that has them owns its state.
    """
    group = ranks()
    if group.size == 1:
        return list(examples)
    sizes = [sum(encoded.length for encoded in item.encoded) for item in examples]
    return [examples[i] for i in balanced_shards(sizes, [item.example for item in examples], group.size)[group.rank]]


@dataclass(frozen=True)
class StepBatches:
    """The examples of a step on all ranks, and this rank's share of them as micro-batches on the CPU."""

    examples: Sequence[Example]
    micro_batches: Sequence[Batch]
    mismatched: Sequence[Batch] = ()  # completions under other rows' prompts, for objectives that need them
    padding: Sequence[Batch] = ()  # sharded: one batch to repeat where another rank makes more passes


@dataclass(frozen=True)
class Collator:
    """Examples -> micro-batches of a layout."""

    micro_batch_tokens: int
    pad_id: int
    layout: Layout = Layout.PADDED
    pinned: bool = False  # in page-locked memory, from which a GPU copies asynchronously

    def __call__(self, examples: Sequence[Example], mismatched: Sequence[Example] = ()) -> StepBatches:
        padding = self._batches(examples[:1]) if ranks().sharded else ()
        own, others = self._batches(local_shard(examples)), self._batches(local_shard(mismatched))
        return StepBatches(examples, own, others, padding)

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        made = micro_batches(examples, self.micro_batch_tokens, self.pad_id, self.layout)
        return [batch.pinned() for batch in made] if self.pinned else made


class Feed(Protocol):
    """Where the examples of each step come from: rows as they are, or with completions that the policy samples."""

    def take(self, rows: int) -> list[Example]: ...

    def mismatched(self, examples: Sequence[Example]) -> list[Example]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetcher:
    """Draws and collates the rows of each step; with `threaded`, those of the next step while this one runs.

    The order of the rows does not depend on the thread, and no random generator of the run is touched. `cursor` is the
    sampler's state after the last step that was taken, whatever was drawn ahead of it: checkpoints keep that.
    """

    def __init__(self, sampler: Feed, collator: Collator, *, mismatched: bool, threaded: bool) -> None:
        self.sampler, self.collator, self.mismatched = sampler, collator, mismatched
        self.cursor = sampler.state_dict()
        self._thread = ThreadPoolExecutor(1, "uft-prefetch") if threaded else None
        self._next: Future[tuple[StepBatches, dict[str, Any]]] | None = None

    def take(self, rows: int, then: int) -> StepBatches:
        """The batches of the next `rows` rows; begins the `then` rows after them."""
        batches, self.cursor = self._next.result() if self._next else self._make(rows)
        self._next = self._thread.submit(self._make, then) if self._thread and then else None
        return batches

    def rewind(self, cursor: dict[str, Any]) -> None:
        """Discard the rows drawn ahead and go on from `cursor`."""
        if self._next is not None:
            self._next.exception()  # wait: the thread has the sampler until it is done
            self._next = None
        self.sampler.load_state_dict(cursor)
        self.cursor = cursor

    def close(self) -> None:
        """End the thread and leave the sampler after the last step that was taken."""
        self.rewind(self.cursor)
        if self._thread is not None:
            self._thread.shutdown()

    def _make(self, rows: int) -> tuple[StepBatches, dict[str, Any]]:
        examples = self.sampler.take(rows)
        batches = self.collator(examples, self.sampler.mismatched(examples) if self.mismatched else ())
        return batches, self.sampler.state_dict()


def use_prefetch_thread(asked: bool | None, device: torch.device) -> bool:
    """`train.prefetch`; null: only beside a GPU, since on a CPU the thread would share the step's cores."""
    return device.type == "cuda" if asked is None else asked
