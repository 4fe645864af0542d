"""The next step's rows, drawn and laid out by a thread while this step runs.

What is drawn does not depend on when: there is one order, and nothing here touches a random generator of the run. The
cursors of the data that a checkpoint keeps are those of the rows that were used, not of those made ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from uft.data.batch import Batch
from uft.data.batches import Item, micro_batches
from uft.data.packing import Layout
from uft.parallel.ranks import ranks
from uft.training.feed import Feed
from uft.training.together import owned


@dataclass(frozen=True)
class Laid:
    """The rows of a step, and those that this process takes of them as micro-batches in the machine's own memory."""

    items: Sequence[Item]
    batches: Sequence[Batch]
    mismatched: Sequence[Batch] = ()  # completions under other rows' prompts, for objectives that need them
    blank: Sequence[Batch] = ()  # one for passes that this process makes for others' sake, of a model in pieces


@dataclass(frozen=True)
class Plan:
    """How rows are laid out."""

    micro_batch_tokens: int
    pad_id: int
    layout: Layout = Layout.PADDED
    pinned: bool = False  # in memory that a GPU copies from while it works

    def __call__(self, items: Sequence[Item], mismatched: Sequence[Item] = ()) -> Laid:
        blank = self._batches(items[:1]) if ranks().in_step else ()
        return Laid(items, self._batches(owned(items)), self._batches(owned(mismatched)), blank)

    def _batches(self, items: Sequence[Item]) -> list[Batch]:
        made = micro_batches(items, self.micro_batch_tokens, self.pad_id, self.layout)
        return [batch.pinned() for batch in made] if self.pinned else made


class Ahead:
    """Steps of a feed. `cursor` is the state of the feed after the last step that was taken."""

    def __init__(self, feed: Feed, lay_out: Plan, *, mismatched: bool, threaded: bool) -> None:
        self.feed, self.lay_out, self.mismatched = feed, lay_out, mismatched
        self.cursor = feed.state_dict()
        self._thread = ThreadPoolExecutor(1, "uft-ahead") if threaded else None
        self._next: Future[tuple[Laid, dict[str, Any]]] | None = None

    def take(self, rows: int, then: int) -> Laid:
        """The next `rows` rows; the `then` rows after them are begun."""
        laid, self.cursor = self._next.result() if self._next else self._make(rows)
        self._next = self._thread.submit(self._make, then) if self._thread and then else None
        return laid

    def go_back(self, cursor: dict[str, Any]) -> None:
        """Drop what was made ahead and go on from `cursor`."""
        if self._next is not None:
            self._next.exception()  # whatever became of it: the feed is nobody's until it is done
            self._next = None
        self.feed.load_state_dict(cursor)
        self.cursor = cursor

    def close(self) -> None:
        """End the thread; the feed stands after the last step that was taken."""
        self.go_back(self.cursor)
        if self._thread is not None:
            self._thread.shutdown()

    def _make(self, rows: int) -> tuple[Laid, dict[str, Any]]:
        items = self.feed.take(rows)
        laid = self.lay_out(items, self.feed.mismatched(items) if self.mismatched else ())
        return laid, self.feed.state_dict()


def worth_a_thread(asked: bool | None, device: torch.device) -> bool:
    """As asked; by itself only beside a GPU: on a CPU the thread would share the step's cores."""
    return device.type == "cuda" if asked is None else asked
