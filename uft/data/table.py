"""Tables on disk: Arrow files, memory-mapped and cached, and the rows of a large source in one of them.

A few rows are a tuple in memory. Of many, memory holds about thirty bytes for each: their canonical content (see
`uft.data.rows`) is a column of an Arrow file, beside columns for the questions that are asked of every row (its kind,
its prompt's hash, its feedback). A row is decoded when it is asked for. Token ids lie in files of the same make
(`uft.data.tokens`).

Arrow files are read and written by pyarrow, not through `datasets.Dataset`, whose import takes seven times as long and
whose access to one row forty times.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from uft.data.formats import ParsedRecord
from uft.data.rows import Completion, Kind, Row, RowContent, decode_row, encode_row, kind_of, prompt_hash
from uft.heartbeat import beat
from uft.runs import clear_left, writing

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# --- Questions asked of many rows at once, in memory or on disk; rows on disk answer most without being read.


def pick(rows: Sequence[Row], places: Sequence[int]) -> Sequence[Row]:
    """The rows at `places`, in that order."""
    return rows.select(places) if isinstance(rows, RowTable) else tuple(rows[place] for place in places)


def kinds(rows: Sequence[Row]) -> dict[Kind, int]:
    """How many rows there are of each kind, in the order in which the kinds come."""
    return rows.kinds() if isinstance(rows, RowTable) else dict(Counter(row.kind for row in rows))


def prompt_words(rows: Sequence[Row]) -> array[int]:
    """Per row the first 64 bits of its prompt's hash, unsigned.

    Among a million prompts two share theirs by chance in one of forty million data sets.
    """
    return rows.prompt_words() if isinstance(rows, RowTable) else array("Q", map(_prompt_word, rows))


def grouped(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """(a row, how many rows with its very feedback it stands for), in the order of the first of each.

    The views of objectives depend on the feedback alone, so one row answers for its group. The counts sum up to the
    rows; equal ones may come apart.
    """
    return rows.grouped() if isinstance(rows, RowTable) else ((row, 1) for row in rows)


def like(rows: Sequence[Row], place: int) -> Row:
    """A row with the feedback of the one at `place`, if not that one; it need not be read each time."""
    return rows.like(place) if isinstance(rows, RowTable) else rows[place]


def _prompt_word(row: RowContent) -> int:
    return int(prompt_hash(row.prompt)[:16], 16)


# --- Arrow files: one folder per table, written beside and published by rename, with a checksum and notes.


SPILL = 8 << 20
"""Bytes of batches from which on they are written to disk as they come."""
_TABLE, _ABOUT = "table.arrow", "about.json"


class Corrupt(Exception):
    """A cached table that is not what was written."""


@dataclass(frozen=True)
class TableFile:
    """The record batches of a table, in memory or in a memory-mapped file."""

    batches: Sequence[pa.RecordBatch]
    memory: mmap.mmap | None = None

    @classmethod
    def mapped(cls, file: Path) -> TableFile:
        import pyarrow as pa

        with open(file, "rb") as handle:
            memory = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        table = cls(list(pa.ipc.open_stream(pa.py_buffer(memory))), memory)
        table.release()
        return table

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, copied."""
        import numpy as np

        parts = [batch.column(name).to_numpy() for batch in self.batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def starts(self) -> list[int]:
        """The number of each batch's first row, and of all rows at the end."""
        starts = [0]
        for batch in self.batches:
            starts.append(starts[-1] + batch.num_rows)
        return starts

    def find(self, number: int) -> tuple[int, int]:
        """(batch, row within it) of a row."""
        batch = bisect_right(self.starts, number) - 1
        return batch, number - self.starts[batch]

    def release(self) -> None:
        """Give pages of the file that were read back to the system; they come again when they are touched."""
        if self.memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED)


def open_table(folder: Path) -> tuple[TableFile, dict[str, Any]]:
    """A published table, memory-mapped, and its notes.

    Raises FileNotFoundError where there is none, :class:`Corrupt` where it is not what was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if _checksum(folder / _TABLE) != about["checksum"]:
            raise Corrupt(f"{_TABLE} is not what was written")
        return TableFile.mapped(folder / _TABLE), dict(about["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{type(error).__name__}: {error}") from error


class TableWriter:
    """Writes a table batch by batch: in memory, and to disk beside `folder` once it is large (SPILL).

    As a context it removes what was not published. `folder` None: all in memory. `elsewhere`: where nothing can be
    written beside `folder`, a large table goes to the system's temporary folder.
    """

    def __init__(self, folder: Path | None, schema: pa.Schema, elsewhere: bool = False) -> None:
        self.folder, self.schema, self.elsewhere = folder, schema, elsewhere
        self.refused: OSError | None = None  # the error of a disk that took no more; all batches are then in memory
        self.beside: Path | None = None  # the folder that is written to
        self._temporary: tempfile.TemporaryDirectory[str] | None = None  # the same
        self._handle: BinaryIO | None = None
        self._waiting: list[pa.RecordBatch] = []  # not on disk
        self._bytes = self._spilled = 0  # of those waiting; batches on disk

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._discard()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._bytes += batch.nbytes
        if self.folder is not None and self.refused is None and self._bytes > SPILL:
            try:
                self._flush(self.folder)
            except OSError as error:
                self.refused = error
                self._recall()

    def publish(self, notes: dict[str, Any]) -> TableFile:
        """Put the table at `folder`, whole or not at all; that of a large one is memory-mapped. Raises OSError.

        Of two processes that write the same key one wins; both wrote the same.
        """
        assert self.folder is not None
        if self.refused is not None:
            raise self.refused
        small = None if self._spilled else TableFile(tuple(self._waiting))
        try:
            beside = self._flush(self.folder)
            about = {"checksum": _checksum(beside / _TABLE), "notes": notes}
            (beside / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
            try:
                beside.rename(self.folder)
            except OSError:
                if not self.folder.is_dir():
                    raise
        except OSError:
            if small is not None:
                self._recall()
            raise
        return TableFile.mapped(self.folder / _TABLE) if small is None else small

    def unpublished(self, in_memory: bool = False) -> TableFile:
        """The table for this process alone; a large one lies in a file without a name, unless it is to be in memory."""
        if in_memory or not self._spilled:
            self._recall()
            return TableFile(tuple(self._waiting))
        assert self.folder is not None
        return TableFile.mapped(self._flush(self.folder) / _TABLE)

    def _flush(self, folder: Path) -> Path:
        """Append the waiting batches to the file. Raises OSError; batches that are not whole in it wait on."""
        if self.beside is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                clear_left(folder.parent, ".*")
                self._temporary = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
            except OSError:
                if not self.elsewhere:
                    raise
                self._temporary = tempfile.TemporaryDirectory()
            self.beside = Path(self._temporary.name)
        if self._handle is None:
            self._handle = open(self.beside / _TABLE, "wb")  # noqa: SIM115
            self._handle.write(memoryview(self.schema.serialize()))
        while self._waiting:
            self._handle.write(memoryview(self._waiting[0].serialize()))
            self._handle.flush()
            self._spilled += 1
            self._bytes -= self._waiting.pop(0).nbytes
        self._handle.flush()
        return self.beside

    def _recall(self) -> None:
        """Read batches on disk back into memory, and remove the file."""
        import pyarrow as pa

        if self._spilled:
            assert self.beside is not None
            with open(self.beside / _TABLE, "rb") as handle:
                reader = pa.ipc.open_stream(handle)
                self._waiting = [*(reader.read_next_batch() for _ in range(self._spilled)), *self._waiting]
            self._spilled = 0
        self._discard()

    def _discard(self) -> None:
        if self._handle is not None:
            with suppress(OSError):  # of a full disk, which was told of when it was written to
                self._handle.close()
            self._handle = None
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.cleanup()
            self._temporary = self.beside = None


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 16):
            value = zlib.crc32(block, value)
            beat()
    return value


# --- Rows in a table.


BATCH_ROWS, BATCH_BYTES = 1024, 1 << 22  # of one record batch, whichever comes first
PART = 4096  # rows after which pages that were read are released
FEEDBACKS = 1000  # of a table that are numbered; a row with any further one counts as unlike all others
_KINDS = tuple(Kind)


@dataclass(frozen=True)
class RowColumns:
    """A table of R rows, and its columns of numbers in memory."""

    source: str
    table: TableFile
    kinds: np.ndarray  # (R,) int8, places in Kind
    prompts: np.ndarray  # (R,) uint64, see prompt_words
    feedback: np.ndarray  # (R,) int16: rows with the same number have the same feedback; -1: unlike all others
    examples: dict[int, Row] = field(default_factory=dict)  # a row of each feedback that was asked for

    @cached_property
    def contents(self) -> list[tuple[np.ndarray, memoryview]]:
        """Per batch its rows' canonical contents, one after another, and where each begins and the last ends."""
        import numpy as np

        buffers = (batch.column("row").buffers() for batch in self.table.batches)
        return [(np.frombuffer(offsets, np.int64), memoryview(data)) for _, offsets, data in buffers]

    def row(self, number: int) -> Row:
        batch, place = self.table.find(number)
        offsets, data = self.contents[batch]
        return decode_row(data[offsets[place] : offsets[place + 1]].tobytes(), self.source, number)


class RowTable(Sequence[Row]):
    """The rows of a table, or a selection of them: `numbers` (n,) int64 are theirs, in the order they have here."""

    def __init__(self, columns: RowColumns, numbers: np.ndarray) -> None:
        self.columns, self.numbers = columns, numbers

    @classmethod
    def of(cls, source: str, table: TableFile) -> RowTable:
        import numpy as np

        columns = RowColumns(
            source,
            table,
            table.column("kind"),
            table.column("prompt"),
            table.column("feedback"),
        )
        return cls(columns, np.arange(table.starts[-1]))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return RowTable(self.columns, self.numbers[index])
        return self.columns.row(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        return (decode_row(encoded, self.columns.source, number) for number, encoded in self._numbered_contents())

    def encoded(self) -> Iterator[bytes]:
        """The canonical content of all rows in their order."""
        return (encoded for _, encoded in self._numbered_contents())

    def _numbered_contents(self) -> Iterator[tuple[int, bytes]]:
        table, first, after = self.columns.table, 0, 0  # the rows of the batch in hand
        for start in range(0, len(self), PART):
            for number in self.numbers[start : start + PART].tolist():
                if not first <= number < after:
                    batch, place = table.find(number)
                    first, after = number - place, table.starts[batch + 1]
                    starts, data = self.columns.contents[batch][0].tolist(), self.columns.contents[batch][1]
                yield number, data[starts[number - first] : starts[number - first + 1]].tobytes()
            table.release()

    def select(self, places: Sequence[int]) -> RowTable:
        import numpy as np

        chosen = np.asarray(places, np.int64)
        everything = len(chosen) == len(self) and bool((chosen == np.arange(len(self))).all())
        return self if everything else RowTable(self.columns, self.numbers[chosen])

    def kinds(self) -> dict[Kind, int]:
        import numpy as np

        found, first, counts = np.unique(self.columns.kinds[self.numbers], return_index=True, return_counts=True)
        return {_KINDS[found[n]]: int(counts[n]) for n in np.argsort(first)}

    def prompt_words(self) -> array[int]:
        words = array("Q")
        words.frombytes(self.columns.prompts[self.numbers].tobytes())
        return words

    def grouped(self) -> Iterator[tuple[Row, int]]:
        import numpy as np

        numbers = self.columns.feedback[self.numbers]
        known, unlike = np.flatnonzero(numbers >= 0), np.flatnonzero(numbers < 0)
        _, first, counts = np.unique(numbers[known], return_index=True, return_counts=True)
        places = np.concatenate([known[first], unlike])
        counts = np.concatenate([counts, np.ones(len(unlike), np.int64)])
        for number in np.argsort(places):
            yield self[int(places[number])], int(counts[number])

    def like(self, place: int) -> Row:
        number, examples = int(self.columns.feedback[self.numbers[place]]), self.columns.examples
        if number < 0:
            return self[place]
        if number not in examples:
            examples[number] = self[place]
        return examples[number]


class RowWriter:
    """Writes rows to a table, one after the other. Raises UftError where the disk refuses them."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        types = {"row": pa.large_binary(), "kind": pa.int8(), "prompt": pa.uint64(), "feedback": pa.int16()}
        self.table = TableWriter(folder, pa.schema(list(types.items())), elsewhere=True)
        self.rows = self._bytes = 0  # written; of the rows that no batch holds yet
        self._encoded: list[bytes] = []
        self._kinds, self._prompts, self._feedback = (array(code) for code in "bQh")
        self._known: dict[object, int] = {}  # feedback -> its number

    def add(self, row: RowContent) -> None:
        encoded = encode_row(row)
        feedback = tuple(
            (c.preferred, c.label, c.score, c.sampled_by, c.log_prob, *sorted(c.annotations.items()))
            for c in row.completions
        )
        number = self._known.get(feedback, -1)
        if number < 0 and len(self._known) < FEEDBACKS:
            number = self._known[feedback] = len(self._known)
        self._encoded.append(encoded)
        self._kinds.append(_KINDS.index(kind_of(row.completions)))
        self._prompts.append(_prompt_word(row))
        self._feedback.append(number)
        self.rows += 1
        self._bytes += len(encoded)
        if len(self._encoded) >= BATCH_ROWS or self._bytes > BATCH_BYTES:
            self._write_batch()

    def to_table(self, notes: dict[str, Any] | None) -> TableFile:
        """The rows written; with `notes` they are also published, where the disk takes them."""
        self._write_batch()
        if notes is not None:
            try:
                return self.table.publish(notes)
            except OSError:  # a cache that cannot be written is no reason to stop
                pass
        with writing(self._place):
            return self.table.unpublished()

    def _write_batch(self) -> None:
        import pyarrow as pa

        if self._encoded:
            columns = [self._encoded, self._kinds, self._prompts, self._feedback]
            types = self.table.schema.types
            self.table.write(
                pa.record_batch([pa.array(c, t) for c, t in zip(columns, types, strict=True)], schema=self.table.schema)
            )
        if self.table.refused is not None:
            with writing(self._place):
                raise self.table.refused
        self._encoded, self._bytes = [], 0
        self._kinds, self._prompts, self._feedback = (array(code) for code in "bQh")

    @property
    def _place(self) -> Path:
        folder = self.table.beside or self.table.folder
        assert folder is not None
        return folder.parent


# --- Collecting the records of a source as its rows: in memory, and in a table once they are many.
#
# Scored completions of one prompt become one row, at the place of the first of them, since pairwise objectives compare
# the best with the worst completion of a prompt. Every other record is a row.


LARGE_ROWS = 5_000  # rows that a source may have in memory
LARGE_TEXT = 5_000_000  # characters of all of them


class RowCollector:
    """Collects the rows of the source `name`, at most `limit` of them.

    A table of many rows is written in `folder` (a cached one under `key`). Raises UftError where the disk refuses it.
    """

    def __init__(self, name: str, limit: int | None, folder: Path, key: str | None = None) -> None:
        self.name, self.limit, self.folder, self.key = name, limit, folder, key
        self._records: list[ParsedRecord] = []  # in memory, until they are too many
        self._text = self._alone = 0  # characters in memory; records so far that are a row each
        self._writer: RowWriter | None = None
        self._scored, self._prompts = array("q"), bytearray()  # records with a score; 16 bytes of each one's prompt

    def add(self, record: ParsedRecord) -> None:
        """The next record."""
        if record.completions[0].score is None:
            if self.limit is not None and self._alone >= self.limit:
                return
            self._alone += 1
        if self._writer is not None:
            self._write(self._writer, record)
            return
        self._records.append(record)
        turns = (turn for one in record.completions for turn in one.turns)
        self._text += sum(len(turn.content) for turn in (*record.prompt, *turns))
        if len(self._records) > LARGE_ROWS or self._text > LARGE_TEXT:
            self._writer = RowWriter(self.folder / (self.key or "rows"))
            for one in self._records:
                self._write(self._writer, one)
            self._records.clear()

    def rows(self, notes: dict[str, Any]) -> Sequence[Row]:
        """All of them, once everything was added; `notes` are published with a cached table."""
        if self._writer is None:
            joined = enumerate(_join_scored(self._records)[: self.limit])
            return tuple(Row(self.name, n, one.prompt, one.completions, one.answer, one.task) for n, one in joined)
        import numpy as np

        published = None if self.key is None else notes
        with self._writer.table:
            leaders = _leaders(
                self._writer.rows, np.asarray(self._scored), np.frombuffer(bytes(self._prompts), np.uint64)
            )
            if (leaders == np.arange(len(leaders))).all():
                return RowTable.of(self.name, self._writer.to_table(published))[: self.limit]
            records = RowTable.of(self.name, self._writer.to_table(None))
        writer = RowWriter(self.folder / (self.key or "rows"))
        with writer.table:
            order = np.argsort(leaders, kind="stable")
            starts = np.flatnonzero(np.diff(leaders[order], prepend=-1))[: self.limit].tolist()
            ends = [*(np.flatnonzero(np.diff(leaders[order])) + 1).tolist(), len(order)]
            for start, end in zip(starts, ends, strict=False):
                first, *others = (records[int(number)] for number in order[start:end])
                completions = (*first.completions, *(c for one in others for c in one.completions))
                writer.add(replace(first, completions=completions))
            return RowTable.of(self.name, writer.to_table(published))

    def _write(self, writer: RowWriter, record: ParsedRecord) -> None:
        if record.completions[0].score is not None:
            self._scored.append(writer.rows)
            turns = json.dumps([[turn.role, turn.content] for turn in record.prompt])
            self._prompts += hashlib.blake2b(turns.encode("utf-8"), digest_size=16).digest()
        writer.add(record)


def _join_scored(records: Sequence[ParsedRecord]) -> list[ParsedRecord]:
    """Records in memory, scored ones of one prompt as one, at the place of the first."""
    joined: list[ParsedRecord] = []
    completions: dict[Any, list[Completion]] = {}
    places: dict[Any, int] = {}
    for record in records:
        if record.completions[0].score is None:
            joined.append(record)
        elif record.prompt in places:
            completions[record.prompt] += record.completions
        else:
            places[record.prompt], completions[record.prompt] = len(joined), [*record.completions]
            joined.append(record)
    for prompt, place in places.items():
        joined[place] = replace(joined[place], completions=tuple(completions[prompt]))
    return joined


def _leaders(count: int, scored: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(count,) int64: for every record the first with its prompt, if it is scored, else itself.

    `scored` (S,) are the numbers of the scored records in rising order, `prompts` (2 S,) uint64 the hashes of theirs.
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
