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
import sys
import tempfile
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, overload

import numpy as np

from uft.data.rows import Kind, Row, claim_word, decode_row, encode_row, prompt_hash
from uft.heartbeat import beat
from uft.runs import clear_left, writing

if TYPE_CHECKING:
    import pyarrow as pa

# --- Rows in a table, and questions asked of many rows at once, in memory or on disk.


PART = 4096  # rows after which pages that were read are released
_KINDS = tuple(Kind)


class RowTable(Sequence[Row]):
    """Rows of a table in some order, by columns of one number a row.

    `number` (n,) int64 is their place in the table; `kind` int8 is a place in Kind, `prompt` uint64 see
    :func:`prompt_words`, `claim` uint64 :func:`uft.data.rows.claim_word`;
    rows with the same `feedback` int16 have the same feedback, those with -1 are unlike all others.
    """

    def __init__(self, source: str, table: TableFile, columns: dict[str, np.ndarray] | None = None) -> None:
        if columns is None:
            columns = {name: table.column(name) for name in ("kind", "prompt", "claim", "feedback")}
            columns["number"] = np.arange(table.starts[-1])
        self.source, self.table, self.columns = source, table, columns
        self.examples: dict[int, Row] = {}  # a row of each feedback that was asked for

    def __len__(self) -> int:
        return len(self.columns["number"])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return self.select(index)
        number = int(self.columns["number"][index])
        return decode_row(self._content(number), self.source, number)

    def __iter__(self) -> Iterator[Row]:
        return (decode_row(self._content(number), self.source, number) for number in self._numbers())

    def encoded(self) -> Iterator[bytes]:
        """The canonical content of all rows in their order."""
        return map(self._content, self._numbers())

    def _numbers(self) -> Iterator[int]:
        for start in range(0, len(self), PART):
            self.table.release()
            yield from self.columns["number"][start : start + PART].tolist()

    def _content(self, number: int) -> bytes:
        batch, place = self.table.find(number)
        content: bytes = self.table.batches[batch].column(0)[place].as_py()
        return content

    def select(self, places: slice | np.ndarray) -> RowTable:
        return RowTable(self.source, self.table, {name: column[places] for name, column in self.columns.items()})


def pick(rows: Sequence[Row], places: Sequence[int] | np.ndarray) -> Sequence[Row]:
    """The rows at `places`, in that order."""
    if not isinstance(rows, RowTable):
        return tuple(rows[place] for place in places)
    chosen = np.asarray(places, np.int64)
    return rows if np.array_equal(chosen, np.arange(len(rows))) else rows.select(chosen)


def kinds(rows: Sequence[Row]) -> dict[Kind, int]:
    """How many rows there are of each kind, in the order in which the kinds come."""
    if not isinstance(rows, RowTable):
        return dict(Counter(row.kind for row in rows))
    found, first, counts = np.unique(rows.columns["kind"], return_index=True, return_counts=True)
    return {_KINDS[found[n]]: int(counts[n]) for n in np.argsort(first)}


def prompt_words(rows: Sequence[Row]) -> array[int]:
    """Per row the first 64 bits of its prompt's hash, unsigned.

    Among a million prompts two share theirs by chance in one of forty million data sets.
    """
    return array("Q", rows.columns["prompt"].tobytes() if isinstance(rows, RowTable) else map(_prompt_word, rows))


def _prompt_word(row: Row) -> int:
    return int(prompt_hash(row.prompt)[:16], 16)


def claims(sources: Sequence[Sequence[Row]]) -> tuple[int, int]:
    """(how many rows repeat another one, in how many cases some rows contradict others) over all sources."""
    words = [
        s.columns["claim"] if isinstance(s, RowTable) else np.array([*map(claim_word, s)], np.uint64) for s in sources
    ]
    found = np.unique(np.concatenate([np.empty(0, np.uint64), *words]))
    return sum(map(len, words)) - len(found), len(found) - len(np.unique(found >> np.uint64(1)))


def grouped(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """(a row, how many rows with its very feedback it stands for), in the order of the first of each.

    The views of objectives depend on the feedback alone, so one row answers for its group. The counts sum up to the
    rows; equal ones may come apart.
    """
    if not isinstance(rows, RowTable):
        yield from ((row, 1) for row in rows)
        return
    feedback = rows.columns["feedback"]
    apart = np.where(feedback < 0, -1 - np.arange(len(rows)), feedback)
    _, first, counts = np.unique(apart, return_index=True, return_counts=True)
    for number in np.argsort(first):
        yield rows[int(first[number])], int(counts[number])


def like(rows: Sequence[Row], place: int) -> Row:
    """The row at `place`, or one with the same feedback that was read before: cheaper where feedback alone matters."""
    if not isinstance(rows, RowTable) or (number := int(rows.columns["feedback"][place])) < 0:
        return rows[place]
    if number not in rows.examples:
        rows.examples[number] = rows[place]
    return rows.examples[number]


def hold_out(rows: Sequence[Row], amount: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training rows, held-out rows): whole prompts, those whose hashes are least, until `amount` rows are held out.

    `amount` is a share below 1 or a count. The choice of prompts does not depend on order, seed or source, so sources
    that share prompts hold out nearly the same ones. Order within both sides is that of `rows`.
    """
    wanted = max(1, round(amount * len(rows))) if 0 < amount < 1 else int(amount)
    count = min(wanted, len(rows))
    if count <= 0:
        return rows, pick(rows, ())
    words = np.array(prompt_words(rows))
    edge = np.sort(words)[count - 1]  # the word of one prompt, nearly always: a word is not the whole hash
    held = words < edge
    at_edge = {int(n): prompt_hash(rows[int(n)].prompt) for n in np.flatnonzero(words == edge)}
    last = sorted(at_edge.values())[count - int(held.sum()) - 1]
    held[[n for n, full_hash in at_edge.items() if full_hash <= last]] = True
    return pick(rows, np.flatnonzero(~held)), pick(rows, np.flatnonzero(held))


# --- Arrow files: one folder per table, written beside and published by rename, with a checksum and notes.


SPILL = 8 << 20
"""Bytes that a table may have in memory where the disk takes no more."""
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


def open_table(folder: Path, schema: pa.Schema) -> tuple[TableFile, dict[str, Any]]:
    """A published table of this schema, memory-mapped, and its notes.

    Raises FileNotFoundError where there is none, :class:`Corrupt` where it is not what was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if _checksum(folder / _TABLE) != about["checksum"]:
            raise Corrupt(f"{_TABLE} is not what was written")
        table = TableFile.mapped(folder / _TABLE)
        for batch in table.batches:
            if batch.schema != schema:
                raise Corrupt(f"{_TABLE} has other columns")
            batch.validate(full=True)  # its offsets point into it
            table.release()
        return table, dict(about["notes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{type(error).__name__}: {error}") from error


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 16):
            value = zlib.crc32(block, value)
            beat()
    return value


class TableWriter:
    """Writes a table batch by batch to disk beside `folder`; in memory if that is None or the disk refuses.

    As a context it removes what was not published. Where nothing can be written beside `folder`, the table goes to
    the system's temporary folder, and is not published.
    """

    def __init__(self, folder: Path | None, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self.refused: OSError | None = None  # the error of a disk that took no more; all batches are then in memory
        self.bytes = 0  # of all batches
        self._batches: list[pa.RecordBatch] = []  # in memory
        self._written = 0  # batches on disk
        self._beside: tempfile.TemporaryDirectory[str] | None = None  # the folder that is written to
        self._elsewhere: OSError | None = None  # why that is not beside `folder`
        self._handle: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._discard()

    def write(self, batch: pa.RecordBatch) -> None:
        self.bytes += batch.nbytes
        if self.folder is not None and self.refused is None:
            try:
                handle = self._file(self.folder)
                handle.write(memoryview(batch.serialize()))
                handle.flush()
                self._written += 1
                return
            except OSError as error:
                self.refused = error
                self._recall()
        self._batches.append(batch)

    def publish(self, notes: dict[str, Any]) -> TableFile:
        """Put the table at `folder`, whole or not at all, and map it into memory. Raises OSError.

        Of two processes that write the same key one wins; both wrote the same.
        """
        assert self.folder is not None
        if self.refused is None:
            self._file(self.folder).flush()  # of a table without a batch
        if (error := self.refused or self._elsewhere) is not None:
            raise error
        assert self._beside is not None
        beside = Path(self._beside.name)
        about = {"checksum": _checksum(beside / _TABLE), "notes": notes}
        (beside / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        try:
            beside.rename(self.folder)
        except OSError:
            if not self.folder.is_dir():
                raise
        return TableFile.mapped(self.folder / _TABLE)

    def unpublished(self, in_memory: bool = False) -> TableFile:
        """The table for this process alone: in a file that loses its name, unless it is to be in memory."""
        if in_memory or self._beside is None:
            self._recall()
            return TableFile(tuple(self._batches))
        return TableFile.mapped(Path(self._beside.name) / _TABLE)

    def _file(self, folder: Path) -> BinaryIO:
        if self._beside is None:
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                clear_left(folder.parent, ".*")
                self._beside = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
            except OSError as error:
                self._elsewhere, self._beside = error, tempfile.TemporaryDirectory()
        if self._handle is None:
            self._handle = open(Path(self._beside.name) / _TABLE, "wb")  # noqa: SIM115
            self._handle.write(memoryview(self.schema.serialize()))
        return self._handle

    def _recall(self) -> None:
        """Read batches on disk back into memory, and remove the file."""
        import pyarrow as pa

        if self._written:
            assert self._beside is not None
            with open(Path(self._beside.name) / _TABLE, "rb") as handle:
                reader = pa.ipc.open_stream(handle)
                self._batches = [reader.read_next_batch() for _ in range(self._written)]
            self._written = 0
        self._discard()

    def _discard(self) -> None:
        with suppress(OSError):  # of a full disk, which was told of when it was written to
            if self._handle is not None:
                self._handle.close()
        with suppress(OSError):
            if self._beside is not None:
                self._beside.cleanup()
        self._handle = self._beside = None


# --- Collecting the records of a source as its rows: in memory, and in a table once they are many.
#
# Scored completions of one prompt become one row, at the place of the first of them, since pairwise objectives compare
# the best with the worst completion of a prompt. Every other record is a row.


LARGE_ROWS = 5_000  # rows that a source may have in memory
LARGE_TEXT = 5_000_000  # characters of all of them
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 22  # of one record batch, whichever comes first
FEEDBACKS = 1000  # of a table that are numbered; a row with any further one counts as unlike all others


def row_schema() -> pa.Schema:
    """The columns of a table of rows."""
    import pyarrow as pa

    types = {
        "row": pa.large_binary(),
        "kind": pa.int8(),
        "prompt": pa.uint64(),
        "claim": pa.uint64(),
        "feedback": pa.int16(),
    }
    return pa.schema(list(types.items()))


class RowWriter(TableWriter):
    """Writes rows to a table, one after the other. Raises UftError where the disk refuses them and they are many."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, row_schema())
        self.place = folder.parent
        self.rows = self._waiting_bytes = 0
        self._waiting: list[tuple[bytes, int, int, int, int]] = []  # in the order of the columns
        self._known: dict[object, int] = {}  # feedback -> its number

    def add(self, row: Row) -> None:
        encoded = encode_row(row)
        feedback = tuple(
            (c.preferred, c.label, c.score, c.sampled_by, c.log_prob, *sorted(c.annotations.items()))
            for c in row.completions
        )
        if feedback not in self._known and len(self._known) < FEEDBACKS:
            self._known[feedback] = len(self._known)
        words = _prompt_word(row), claim_word(row)
        self._waiting.append((encoded, _KINDS.index(row.kind), *words, self._known.get(feedback, -1)))
        self.rows += 1
        self._waiting_bytes += len(encoded)
        if len(self._waiting) >= BATCH_ROWS or self._waiting_bytes > BATCH_BYTES:
            self._write_batch()

    def to_table(self, notes: dict[str, Any] | None) -> TableFile:
        """The rows written; with `notes` they are also published, where the disk takes them."""
        self._write_batch()
        if notes is not None:
            with suppress(OSError):  # a cache that cannot be written is no reason to stop
                return self.publish(notes)
        return self.unpublished()

    def _write_batch(self) -> None:
        import pyarrow as pa

        if self._waiting:
            columns = zip(zip(*self._waiting, strict=True), self.schema.types, strict=True)
            self.write(pa.record_batch([pa.array(c, t) for c, t in columns], schema=self.schema))
        self._waiting, self._waiting_bytes = [], 0
        if self.refused is not None and self.bytes > SPILL:
            with writing(self.place):
                raise self.refused


class RowCollector:
    """Collects the rows of the source `name`, at most `limit` of them.

    A table of many rows is written in `folder` (a cached one under `key`). Raises UftError where the disk refuses it.
    """

    def __init__(self, name: str, limit: int | None, folder: Path, key: str | None = None) -> None:
        self.name, self.limit, self.folder, self.cached = name, limit, folder / (key or "rows"), key is not None
        self._few: list[Row] = []  # records in memory, until they are too many
        self._text = self._alone = self._count = 0  # characters in memory; records that are a row each; all records
        self._writer: RowWriter | None = None
        self._scored, self._prompts = array("q"), bytearray()  # records with a score; 16 bytes of each one's prompt

    def add(self, record: Row) -> None:
        """The next record, as a row by itself."""
        if record.completions and record.completions[0].score is not None:
            said = [[turn.role, turn.content, turn.extra] for turn in record.prompt]
            prompt = json.dumps([said, record.answer, record.task, *([record.facts] if record.facts else [])])
            self._scored.append(self._count)
            self._prompts += hashlib.blake2b(prompt.encode("utf-8"), digest_size=16).digest()
        elif self.limit is not None and self._alone >= self.limit:
            return
        else:
            self._alone += 1
        self._count += 1
        if self._writer is not None:
            self._writer.add(record)
            return
        self._few.append(record)
        turns = (turn for one in record.completions for turn in one.turns)
        self._text += sum(len(turn.content) for turn in (*record.prompt, *turns))
        if len(self._few) > LARGE_ROWS or self._text > LARGE_TEXT:
            self._writer = RowWriter(self.folder)
            for one in self._few:
                self._writer.add(one)
            self._few.clear()

    def rows(self, notes: dict[str, Any]) -> Sequence[Row]:
        """All of them, once everything was added; `notes` are published with a cached table."""
        if self._writer is None:
            rows = self._joined(self._few) if self._scored else iter(self._few)
            return tuple(replace(row, source=self.name, index=n) for n, row in enumerate(rows))[: self.limit]
        published = notes if self.cached else None
        with self._writer as writer:
            if not self._scored:
                return RowTable(self.name, writer.to_table(published))[: self.limit]
            records = RowTable(self.name, writer.to_table(None))
        with RowWriter(self.folder) as writer:
            for row in self._joined(records):
                writer.add(row)
            return RowTable(self.name, writer.to_table(published))

    def _joined(self, records: Sequence[Row]) -> Iterator[Row]:
        """One row for the scored records of one prompt, in the order of the first of each; at most `limit`."""
        leaders, scored = np.arange(self._count), np.array(self._scored)  # of every record the first of its row
        _, first, place = np.unique(np.frombuffer(self._prompts, "V16"), return_index=True, return_inverse=True)
        leaders[scored] = scored[first[place]]
        order = np.argsort(leaders, kind="stable")
        starts = np.flatnonzero(np.diff(leaders[order], prepend=-1))[: self.limit]
        ends = np.flatnonzero(np.diff(leaders[order], append=-1))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=False):
            first_record, *others = (records[number] for number in order[start : end + 1].tolist())
            completions = (*first_record.completions, *(c for one in others for c in one.completions))
            yield replace(first_record, completions=completions)


# --- The import of pyarrow.


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("hidden from pyarrow", name=name)


@cache
def keep_pandas_out() -> None:
    """Make pyarrow look for pandas now, in vain, where nothing has imported it.

    Its first array imports pandas where that is installed, which costs every start a quarter of a second and 50 MB. No
    table of rows is ever a data frame.
    """
    import pyarrow as pa

    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
