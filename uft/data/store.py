"""Stored rows: a sequence of rows that lies on disk, so that memory holds a few dozen bytes for each.

A row is one line of its canonical content, what its digest is taken of, in a file without a name that is gone with the
process. A row is made of its line when it is asked for. What many ask of every row (its kind, its prompt's hash, its
feedback) is noted when it is written.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast, overload

import numpy as np

from uft.data.identity import Says, line, said
from uft.data.many import Kept, prompt_word
from uft.data.rows import Completion, Kind, Row, kind_of
from uft.disk import writing

BLOCK = 1 << 20  # bytes that are read or written at once
PART = 4096  # rows whose places in the file are looked at together
FEEDBACKS = 1000  # of a store that are numbered; a row with any further one counts as unlike all others
_KINDS = tuple(Kind)


class Unnamed:
    """A file in `folder` that has no name, or where temporary files go if none can be had there; gone with this object.

    Raises UftError where neither takes one.
    """

    def __init__(self, folder: Path) -> None:
        self.place, self.handle = _opened(folder)
        weakref.finalize(self, _close, self.handle)


@dataclass(frozen=True)
class Lines:
    """The file of a store and what is known of its R rows without reading it."""

    source: str
    file: Unnamed
    offsets: np.ndarray  # (R + 1,) int64; row r is bytes offsets[r] to offsets[r + 1]
    kinds: np.ndarray  # (R,) int8, places in Kind
    prompts: np.ndarray  # (R,) uint64, see many.prompt_words
    feedback: np.ndarray  # (R,) int16: rows with the same number have the same feedback; -1: unlike all others
    examples: dict[int, Row] = field(default_factory=dict)  # a row of each feedback that was asked for

    def read(self, first: int, after: int) -> bytes:
        """The lines of rows [first, after)."""
        start, end = int(self.offsets[first]), int(self.offsets[after])
        return os.pread(self.file.handle.fileno(), end - start, start)

    def row(self, number: int) -> Row:
        return said(self.read(number, number + 1), self.source, number)

    def pieces(self, first: int, after: int) -> Iterator[tuple[int, int]]:
        """[first, after) in pieces of about a block, of a row at least."""
        while first < after:
            fits = int(np.searchsorted(self.offsets, self.offsets[first] + BLOCK, "right")) - 1
            until = min(max(fits, first + 1), after)
            yield first, until
            first = until


class StoredRows(Kept):
    """The rows of a store, or some of them: `numbers` (n,) int64 are theirs, in the order they have here."""

    def __init__(self, lines: Lines, numbers: np.ndarray) -> None:
        self.lines, self.numbers = lines, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> Row | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self.lines, self.numbers[index])
        return self.lines.row(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        for first, after in self._pieces():
            block, ends = self.lines.read(first, after), self.lines.offsets[first : after + 1].tolist()
            for number, left, right in zip(range(first, after), ends, ends[1:], strict=False):
                yield said(block[left - ends[0] : right - ends[0]], self.lines.source, number)

    def blocks(self) -> Iterator[bytes]:
        """The lines of all rows in their order, many at once."""
        return (self.lines.read(first, after) for first, after in self._pieces())

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """[first, after) of rows that follow each other here as they do in the file."""
        for start in range(0, len(self), PART):
            part = self.numbers[start : start + PART]
            ends = np.flatnonzero(np.diff(part, append=-1) != 1).tolist()
            firsts = [0, *(end + 1 for end in ends[:-1])]
            for first, last in zip(part[firsts].tolist(), part[ends].tolist(), strict=True):
                yield from self.lines.pieces(first, last + 1)

    # --- see uft.data.many

    def pick(self, places: Sequence[int]) -> StoredRows:
        chosen = np.asarray(places, np.int64)
        whole = len(chosen) == len(self) and bool((chosen == np.arange(len(self))).all())
        return self if whole else StoredRows(self.lines, self.numbers[chosen])

    def kinds(self) -> dict[Kind, int]:
        found, first, counts = np.unique(self.lines.kinds[self.numbers], return_index=True, return_counts=True)
        return {_KINDS[found[n]]: int(counts[n]) for n in np.argsort(first)}

    def prompt_words(self) -> array[int]:
        words = array("Q")
        words.frombytes(self.lines.prompts[self.numbers].tobytes())
        return words

    def alike(self) -> Iterator[tuple[Row, int]]:
        numbers = self.lines.feedback[self.numbers]
        known, unlike = np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)
        _, first, counts = np.unique(numbers[known], return_index=True, return_counts=True)
        places = np.concatenate([known[first], unlike])
        counts = np.concatenate([counts, np.ones(len(unlike), np.int64)])
        for number in np.argsort(places):
            yield self[int(places[number])], int(counts[number])

    def like(self, place: int) -> Row:
        number, examples = int(self.lines.feedback[self.numbers[place]]), self.lines.examples
        if number < 0:
            return self[place]
        if number not in examples:
            examples[number] = self[place]
        return examples[number]


class Writer:
    """Writes rows to a store, one after the other. Raises UftError where the disk refuses them."""

    def __init__(self, source: str, folder: Path) -> None:
        self.source = source
        self._file = Unnamed(folder)
        self._offsets, self._kinds, self._prompts, self._feedback = (array(code) for code in "qbQh")
        self._offsets.append(0)
        self._known: dict[object, int] = {}  # feedback -> its number

    def __len__(self) -> int:
        return len(self._kinds)

    def add(self, row: Says) -> None:
        written = line(row)
        with writing(self._file.place):
            self._file.handle.write(written)
        self._offsets.append(self._offsets[-1] + len(written))
        self._kinds.append(_KINDS.index(kind_of(row.completions)))
        self._prompts.append(prompt_word(row))
        self._feedback.append(self._number(_feedback(row.completions)))

    def done(self) -> StoredRows:
        """The rows written; nothing can be added to them."""
        with writing(self._file.place):
            self._file.handle.flush()
        lines = Lines(
            self.source,
            self._file,
            offsets=np.asarray(self._offsets),
            kinds=np.asarray(self._kinds),
            prompts=np.asarray(self._prompts),
            feedback=np.asarray(self._feedback),
        )
        return StoredRows(lines, np.arange(len(self)))

    def _number(self, feedback: object) -> int:
        known = self._known.get(feedback, -1)
        if known < 0 and len(self._known) < FEEDBACKS:
            known = self._known[feedback] = len(self._known)
        return known


def _feedback(completions: Sequence[Completion]) -> object:
    return tuple(
        (c.preferred, c.label, c.score, c.sampled_by, c.log_prob, *sorted(c.annotations.items())) for c in completions
    )


def _close(handle: BinaryIO) -> None:
    with suppress(OSError):  # of a full disk, which was told of when it was written to
        handle.close()


def _opened(folder: Path) -> tuple[Path, BinaryIO]:
    def made(place: Path) -> BinaryIO:
        place.mkdir(parents=True, exist_ok=True)
        return cast(BinaryIO, tempfile.TemporaryFile(dir=place, buffering=BLOCK))

    try:
        return folder, made(folder)
    except OSError:  # a cache that cannot be written is no reason to stop
        elsewhere = Path(tempfile.gettempdir())
    with writing(elsewhere):
        return elsewhere, made(elsewhere)
