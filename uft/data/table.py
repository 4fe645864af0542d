"""Stored rows: a sequence of rows that lies on disk, so that memory holds a few dozen bytes for each.

A row is one line of its canonical content, what its digest is taken of, in a file without a name that is gone with the
process. A row is made of its line when it is asked for. What many ask of every row (its kind, its prompt's hash, its
feedback) is noted when it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast, overload

import numpy as np

from uft.data.formats import ParsedRecord
from uft.data.rows import Completion, Kind, Row, RowContent, decode_row, encode_row, kind_of, prompt_hash
from uft.runs import writing

if TYPE_CHECKING:
    import numpy as np

# --- What is asked of many rows at once, wherever they lie: in memory, or on disk (:mod:`uft.data.table`).
#
# Both give the same; rows on disk answer most of it without being read.


class RowTable(Sequence[Row]):
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
    return rows.pick(places) if isinstance(rows, RowTable) else tuple(rows[place] for place in places)


def kinds(rows: Sequence[Row]) -> dict[Kind, int]:
    """How many rows there are of each kind, in the order in which the kinds come."""
    return rows.kinds() if isinstance(rows, RowTable) else dict(Counter(row.kind for row in rows))


def prompt_words(rows: Sequence[Row]) -> array[int]:
    """Per row the first 64 bits of its prompt's hash, unsigned.

    Among a million prompts two share theirs by chance in one of forty million data sets.
    """
    return rows.prompt_words() if isinstance(rows, RowTable) else array("Q", map(prompt_word, rows))


def grouped(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """(a row, how many rows with its very feedback it stands for), in the order of the first of each.

    What depends on nothing but kind, number and feedback of completions, as the views of objectives do, is the same for
    all of them. The counts sum up to the rows; equal ones may come apart.
    """
    return rows.alike() if isinstance(rows, RowTable) else ((row, 1) for row in rows)


def like(rows: Sequence[Row], place: int) -> Row:
    """A row with the feedback of the one at `place`, if not that one; it need not be read each time."""
    return rows.like(place) if isinstance(rows, RowTable) else rows[place]


def prompt_word(row: RowContent) -> int:
    return int(prompt_hash(row.prompt)[:16], 16)


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
        return decode_row(self.read(number, number + 1), self.source, number)

    def pieces(self, first: int, after: int) -> Iterator[tuple[int, int]]:
        """[first, after) in pieces of about a block, of a row at least."""
        while first < after:
            fits = int(np.searchsorted(self.offsets, self.offsets[first] + BLOCK, "right")) - 1
            until = min(max(fits, first + 1), after)
            yield first, until
            first = until


class StoredRows(RowTable):
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
                yield decode_row(block[left - ends[0] : right - ends[0]], self.lines.source, number)

    def encoded(self) -> Iterator[bytes]:
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

    # --- see uft.data.table

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

    def add(self, row: RowContent) -> None:
        written = encode_row(row)
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


# --- Gathering: what records say, made the rows of a source; on disk once it is much.
#
# Scored completions of one prompt become one row, where the first of them stood, since pairwise objectives compare
# the
# best with the worst completion of a prompt. Everything else is a row as it is.


LARGE_ROWS = 20_000  # rows that a source may have in memory: about 30 MB
LARGE_TEXT = 20_000_000  # characters of all of them


class RowCollector:
    """The rows of the source `name`, at most `limit` of them; `folder` is where they are stored if they are many.

    Its methods raise UftError where the disk refuses them.
    """

    def __init__(self, name: str, limit: int | None, folder: Path) -> None:
        self.name, self.limit, self.folder = name, limit, folder
        self._held: list[ParsedRecord] = []  # in memory, until they are too many
        self._text = self._alone = 0  # characters held; rows so far that nothing can be added to
        self._writer: Writer | None = None
        self._scored, self._prompts = array("q"), bytearray()  # records with a score; 16 bytes of each one's prompt

    def add(self, fields: ParsedRecord) -> None:
        """The next record."""
        if fields.completions[0].score is None:
            if self.limit is not None and self._alone >= self.limit:
                return
            self._alone += 1
        if self._writer is not None:
            self._write(self._writer, fields)
            return
        self._held.append(fields)
        self._text += _characters(fields)
        if len(self._held) > LARGE_ROWS or self._text > LARGE_TEXT:
            self._store()

    def rows(self) -> Sequence[Row]:
        """All of them, once everything was added."""
        if self._writer is None:
            grouped = enumerate(_grouped(self._held)[: self.limit])
            return tuple(Row(self.name, n, one.prompt, one.completions, one.answer, one.task) for n, one in grouped)
        import numpy as np

        stored = self._writer.done()
        leaders = _leaders(len(stored), np.asarray(self._scored), np.frombuffer(bytes(self._prompts), np.uint64))
        if (leaders == np.arange(len(stored))).all():
            return stored[: self.limit]
        return self._together(stored, leaders)

    def _store(self) -> None:
        """Go on on disk."""
        pass  # REGROUP  # with numpy, which small sources do without

        self._writer = Writer(self.name, self.folder)
        for one in self._held:
            self._write(self._writer, one)
        self._held.clear()

    def _write(self, writer: Writer, fields: ParsedRecord) -> None:
        if fields.completions[0].score is not None:
            self._scored.append(len(writer))
            self._prompts += _prompt_key(fields)
        writer.add(fields)

    def _together(self, stored: StoredRows, leaders: np.ndarray) -> StoredRows:
        """Records of one leader as one row, in the order of the leaders."""
        import numpy as np

        writer = Writer(self.name, self.folder)
        order = np.argsort(leaders, kind="stable")
        starts = np.flatnonzero(np.diff(leaders[order], prepend=-1))[: self.limit]
        ends = np.append(np.flatnonzero(np.diff(leaders[order])) + 1, len(order))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=False):
            first, *others = (stored[int(number)] for number in order[start:end])
            writer.add(_joined(first, others))
        return writer.done()


def _grouped(found: Sequence[ParsedRecord]) -> list[ParsedRecord]:
    """The same of records in memory."""
    grouped: list[ParsedRecord] = []
    places: dict[Any, int] = {}
    for fields in found:
        if fields.completions[0].score is None:
            grouped.append(fields)
            continue
        place = places.setdefault(fields.prompt, len(grouped))
        if place == len(grouped):
            grouped.append(fields)
        else:
            first = grouped[place]
            grouped[place] = replace(first, completions=first.completions + fields.completions)
    return grouped


def _joined(first: Row, others: Sequence[Row]) -> Row:
    more = (completion for one in others for completion in one.completions)
    return replace(first, completions=(*first.completions, *more)) if others else first


def _leaders(count: int, scored: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(count,) int64: for every record the first with its prompt, if it is scored, else itself.

    `scored` (S,) are the numbers of the scored records in rising order, `prompts` (2 S,) uint64 the keys of theirs.
    """
    import numpy as np

    leaders = np.arange(count)
    low, high = prompts[::2], prompts[1::2]
    order = np.lexsort((low, high))  # stable: of one prompt the first record stands first
    new = np.ones(len(order), bool)
    new[1:] = (low[order][1:] != low[order][:-1]) | (high[order][1:] != high[order][:-1])
    starts = np.flatnonzero(new)
    leaders[scored[order]] = np.repeat(scored[order][starts], np.diff(np.append(starts, len(order))))
    return leaders


def _prompt_key(fields: RowContent) -> bytes:
    """16 bytes that two different prompts do not share."""
    turns = json.dumps([[turn.role, turn.content] for turn in fields.prompt])
    return hashlib.blake2b(turns.encode("utf-8"), digest_size=16).digest()


def _characters(fields: RowContent) -> int:
    turns = (turn for one in fields.completions for turn in one.turns)
    return sum(len(turn.content) for turn in (*fields.prompt, *turns))
