"""What is asked of many rows at once, wherever they lie: in memory, or on disk (:mod:`uft.data.store`).

Both give the same; rows on disk answer most of it without being read.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

from uft.data.identity import Says, prompt_hash
from uft.data.rows import Kind, Row


class Kept(Sequence[Row]):
    """Rows that lie elsewhere than in memory; each method does what the function of its name does here."""

    @abstractmethod
    def pick(self, places: Sequence[int]) -> Sequence[Row]: ...

    @abstractmethod
    def kinds(self) -> dict[Kind, int]: ...

    @abstractmethod
    def prompt_words(self) -> array[int]: ...

    @abstractmethod
    def alike(self) -> Iterator[tuple[Row, int]]: ...

    @abstractmethod
    def like(self, place: int) -> Row: ...


def pick(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """The rows at `places`, in that order."""
    return rows.pick(places) if isinstance(rows, Kept) else tuple(rows[place] for place in places)


def kinds(rows: Sequence[Row]) -> dict[Kind, int]:
    """How many rows there are of each kind, in the order in which the kinds come."""
    return rows.kinds() if isinstance(rows, Kept) else dict(Counter(row.kind for row in rows))


def prompt_words(rows: Sequence[Row]) -> array[int]:
    """Per row the first 64 bits of its prompt's hash, unsigned.

    Among a million prompts two share theirs by chance in one of forty million data sets.
    """
    return rows.prompt_words() if isinstance(rows, Kept) else array("Q", map(prompt_word, rows))


def alike(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """(a row, how many rows with its very feedback it stands for), in the order of the first of each.

    What depends on nothing but kind, number and feedback of completions, as the views of objectives do, is the same for
    all of them. The counts sum up to the rows; equal ones may come apart.
    """
    return rows.alike() if isinstance(rows, Kept) else ((row, 1) for row in rows)


def like(rows: Sequence[Row], place: int) -> Row:
    """A row with the feedback of the one at `place`, if not that one; it need not be read each time."""
    return rows.like(place) if isinstance(rows, Kept) else rows[place]


def prompt_word(row: Says) -> int:
    return int(prompt_hash(row.prompt)[:16], 16)
