"""Tokens: the rows of a source as ids with their supervised targets, checked, held to the longest length, and cached.

Nothing is cut in silence: the rows that the length policy touched, and the supervised tokens that it cost, are in the
report.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from uft.data.chat import Renderer, Tokens, finish
from uft.data.rows import Row, content_digest
from uft.data.table import Corrupt, TableFile, TableWriter, open_table, pick
from uft.errors import Problem, UftError
from uft.heartbeat import activity, beat

log = logging.getLogger(__name__)

CODE_VERSION = 4  # raise it when this code makes other tokens of the same rows, or lays them out otherwise
CHUNK = 1024  # conversations tokenised at once, or a few more: a row is not divided
FAULTS_SHOWN = 5  # rows with a wrong mask that are told one by one


@dataclass(frozen=True)
class LengthReport:
    """Counts of a source's rows, and the cost of the length policy. Lengths are prompt + completion in tokens."""

    rows: int  # kept
    completions: int
    tokens: int
    supervised: int
    touched: int = 0  # rows with a completion that was cut
    dropped: int = 0
    supervised_lost: int = 0  # in cut and dropped rows
    longest: int = 0  # of all completions, before anything was cut
    lengths: tuple[tuple[int, int], ...] = ()  # (up to this length, completions), before anything was cut


@dataclass(frozen=True)
class TokenizedSource:
    """A source's rows with their tokens: `encoded[i]` holds one :class:`Tokens` per completion of `rows[i]`."""

    source: str
    rows: Sequence[Row]
    encoded: EncodedRows
    report: LengthReport
    cache: str  # hit, miss, rebuilt (it was corrupt) or off


@activity("rows were tokenised")
def tokenize(
    name: str,
    rows: Sequence[Row],
    renderer: Renderer,
    max_length: int,
    too_long: str = "error",
    cache_dir: Path | None = None,
) -> TokenizedSource:
    """The rows of one source as tokens.

    `too_long`: error, drop (the row), truncate (the completion's end; a row left with nothing to learn is dropped).
    Raises :class:`UftError` for rows that are too long under error, or whose supervised tokens make no sense.
    """
    folder, state = None, "off"
    if cache_dir is not None:
        parts = (content_digest(rows), renderer.digest, str(max_length), too_long, str(CODE_VERSION))
        folder, state = cache_dir / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], "miss"
        try:
            with activity("tokens were read", moving=True):
                table, notes = open_table(folder)
            report = LengthReport(**{**notes["report"], "lengths": tuple(map(tuple, notes["report"]["lengths"]))})
            encoded = EncodedRows(table)
            return TokenizedSource(name, pick(rows, encoded.numbers), encoded, report, "hit")
        except FileNotFoundError:
            pass
        except Corrupt as error:
            log.warning("token cache %s is corrupt (%s): tokenising again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            state = "rebuilt"
    with TableWriter(folder, SCHEMA) as writer:
        report = _encode(name, rows, renderer, max_length, too_long, writer)
        published: TableFile | None = None
        if folder is not None:
            try:
                with activity("tokens were written", moving=True):
                    published = writer.publish({"report": asdict(report)})
            except OSError as error:
                log.warning("tokens are not kept for the next run: %s", error)
                state = "off"
        encoded = EncodedRows(published or writer.unpublished(in_memory=True))
    return TokenizedSource(name, pick(rows, encoded.numbers), encoded, report, state)


def tokenize_all(
    rows: Mapping[str, Sequence[Row]], renderer: Renderer, max_length: int, too_long: str, cache_dir: Path | None
) -> list[TokenizedSource]:
    """:func:`tokenize` for several sources, with the problems of all of them in one :class:`UftError`."""
    done: list[TokenizedSource] = []
    problems: list[Problem] = []
    for name, of_source in rows.items():
        try:
            done.append(tokenize(name, of_source, renderer, max_length, too_long, cache_dir))
        except UftError as error:
            problems += error.problems
    if problems:
        raise UftError(*problems)
    return done


def _encode(
    name: str, rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str, writer: TableWriter
) -> LengthReport:
    """Tokenise, check, fit and write, chunk by chunk, and count for the report on the way."""
    faults, counts = MaskFaults(renderer), LengthCounts(max_length)
    fit, number = POLICIES[too_long], 0
    for chunk in _chunks(rows):
        beat()
        encoded = _encode_chunk(chunk, renderer)
        faults.look(chunk, encoded)
        fitted = [fit(row, max_length) for row in encoded]
        counts.add(encoded, fitted)
        if batch := record_batch((n, row) for n, row in enumerate(fitted, number) if row is not None):
            writer.write(batch)
        number += len(chunk)
    faults.refuse()
    if too_long == "error":
        counts.refuse_long(name)
    return counts.report()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, as many at once as have about CHUNK conversations."""
    chunk: list[Row] = []
    conversations = 0
    for row in rows:
        chunk.append(row)
        conversations += len(row.completions)
        if conversations >= CHUNK:
            yield chunk
            chunk, conversations = [], 0
    if chunk:
        yield chunk


def _encode_chunk(rows: Sequence[Row], renderer: Renderer) -> list[tuple[Tokens, ...]]:
    """All at once through the tokenizer, which is fastest so."""
    conversations = [(row.prompt, completion.turns) for row in rows for completion in row.completions]
    names = [row.id for row in rows for _ in row.completions]
    following = iter(renderer.encode_many(conversations, names))
    return [tuple(islice(following, len(row.completions))) for row in rows]


# --- Tokens as an Arrow table, one row per completion.


SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # the row's place among those that were tokenised
        ("ids", pa.large_list(pa.int32())),
        ("supervised", pa.large_list(pa.uint8())),
        ("prompt", pa.int32()),  # tokens before the first supervised one
        ("targets", pa.int32()),
    ]
)


def record_batch(rows: Iterable[tuple[int, tuple[Tokens, ...]]]) -> pa.RecordBatch | None:
    flat = [(number, one) for number, row in rows for one in row]
    if not flat:
        return None
    offsets = np.cumsum([0, *(one.length for _, one in flat)])
    ids = np.concatenate([one.ids for _, one in flat]).astype(np.int32, copy=False)
    supervised = np.concatenate([one.supervised for _, one in flat]).astype(np.uint8)
    return pa.record_batch(
        [
            pa.array([number for number, _ in flat], pa.int64()),
            pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
            pa.LargeListArray.from_arrays(offsets, pa.array(supervised)),
            pa.array([one.prompt_length for _, one in flat], pa.int32()),
            pa.array([one.targets for _, one in flat], pa.int32()),
        ],
        schema=SCHEMA,
    )


class EncodedRows(Sequence[tuple[Tokens, ...]]):
    """Every row's completions as tokens: views into a table that may be memory-mapped."""

    def __init__(self, table: TableFile) -> None:
        self.table = table
        self._prompts, self._targets = table.column("prompt"), table.column("targets")  # (completions,)
        of_row = table.column("row")
        starts = np.flatnonzero(np.diff(of_row, prepend=-1))
        self.numbers: np.ndarray = of_row[starts]  # (R,) int64: each row's place among those that were tokenised
        self._first = np.append(starts, len(of_row))  # (R + 1,): row r has completions [_first[r], _first[r + 1])
        self._parts = [
            (
                ids.values.to_numpy(),
                batch.column("supervised").values.to_numpy().view(bool),
                ids.offsets.to_numpy(),
            )
            for batch in table.batches
            for ids in [batch.column("ids")]
        ]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[Tokens, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tokens, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tokens, ...] | list[tuple[Tokens, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        row = []
        for completion in range(int(self._first[number]), int(self._first[number + 1])):
            batch, place = self.table.find(completion)
            ids, supervised, offsets = self._parts[batch]
            span = slice(int(offsets[place]), int(offsets[place + 1]))
            row.append(Tokens(ids[span], supervised[span], int(self._prompts[completion])))
        return tuple(row)

    def targets_of(self, index: int) -> np.ndarray:
        """(completions of row `index`,) int32: the targets of each."""
        return self._targets[self._first[index] : self._first[index + 1]]

    @cached_property
    def longest(self) -> np.ndarray:
        """(R,) int64: tokens of each row's longest completion."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.maximum.reduceat(
            np.concatenate([np.diff(offsets) for _, _, offsets in self._parts]), self._first[:-1]
        )


# --- Checks of the masks.


class MaskFaults:
    """Rows whose supervised tokens make no sense; the template, a likely cause, is named with them."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.problems: list[Problem] = []
        self.count = 0

    def look(self, rows: Sequence[Row], encoded: Sequence[Sequence[Tokens]]) -> None:
        stops, bos = self.renderer.stop_ids, self.renderer.tokenizer.bos_token_id
        for row, of_row in zip(rows, encoded, strict=True):
            why = next((why for one in of_row if (why := _mask_fault(one, stops, bos))), None)
            if why is None:
                continue
            self.count += 1
            if self.count <= FAULTS_SHOWN:
                why = f"{why} under {self.renderer.name}"
                self.problems.append(Problem(f"row {row.id}", why, where="data.template"))

    def refuse(self) -> None:
        """UftError if there were any."""
        if self.count > FAULTS_SHOWN:
            self.problems.append(Problem(f"... and {self.count - FAULTS_SHOWN} more rows", "alike"))
        if self.problems:
            raise UftError(*self.problems)


def _mask_fault(encoded: Tokens, stop_ids: Iterable[int], bos: int | None) -> str | None:
    if not encoded.supervised[1:].any():
        return "no token is supervised"
    if encoded.supervised.all():
        return "every token is supervised, the prompt's too"
    if int(encoded.ids[-1]) not in stop_ids:
        return "the stop token is not supervised, so the model would never learn to stop"
    if bos is not None and encoded.ids[0] == encoded.ids[1] == bos:
        return "the text begins with two beginning-of-text tokens"
    return None


# --- The length policy, and counts of lengths chunk by chunk.


Fitted = tuple[Tokens, ...] | None  # a row within the length, or None: dropped
EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)


def _drop(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    return row if all(one.length <= max_length for one in row) else None


def _truncate(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    """Each completion's first `max_length` tokens, ending at a supervised one; None where one has none left."""
    cut = tuple(
        one if one.length <= max_length else finish(one.ids[:max_length], one.supervised[:max_length]) for one in row
    )
    return cut if all(new is old or new.targets for new, old in zip(cut, row, strict=True)) else None


POLICIES: dict[str, Callable[[tuple[Tokens, ...], int], Fitted]] = {
    "error": lambda row, max_length: row,
    "drop": _drop,
    "truncate": _truncate,
}


class LengthCounts:
    """Counts of all rows, for the report and for the error about those that are too long."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.before, self.after = Counter[str](), Counter[str]()  # rows, completions, tokens, supervised
        self.long = self.touched = self.longest = 0
        self.lengths = np.zeros(len(EDGES) + 1, np.int64)  # completions up to each edge, and beyond the last

    def add(self, before: Sequence[tuple[Tokens, ...]], after: Sequence[Fitted]) -> None:
        """A chunk, before and after the length policy."""
        lengths = np.asarray([one.length for row in before for one in row], np.int64)
        self.lengths += np.bincount(np.searchsorted(EDGES, lengths), minlength=len(self.lengths))
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.long += sum(max(one.length for one in row) > self.max_length for row in before)
        self.touched += sum(
            new is not None and _token_count(new) < _token_count(old) for old, new in zip(before, after, strict=True)
        )
        for counts, rows in ((self.before, before), (self.after, [row for row in after if row is not None])):
            counts["rows"] += len(rows)
            counts["completions"] += sum(map(len, rows))
            counts["tokens"] += sum(map(_token_count, rows))
            counts["supervised"] += sum(int(one.supervised.sum()) for row in rows for one in row)

    def refuse_long(self, name: str) -> None:
        """UftError if there were rows that are too long."""
        if not self.long:
            return
        these = f"{self.long} of {self.before['rows']} rows are longer than train.max_length={self.max_length}"
        raise UftError(
            Problem(
                f"data.sources.{name}",
                f"{these}; the longest has {self.longest} tokens",
                advice=(
                    "leave them out or cut them:  data.too_long=drop|truncate",
                    f"or make room:  train.max_length={self.longest}",
                ),
            )
        )

    def report(self) -> LengthReport:
        edges = (*EDGES, max(self.longest, EDGES[-1] + 1))
        return LengthReport(
            rows=self.after["rows"],
            completions=self.after["completions"],
            tokens=self.after["tokens"],
            supervised=self.after["supervised"],
            touched=self.touched,
            dropped=self.before["rows"] - self.after["rows"],
            supervised_lost=self.before["supervised"] - self.after["supervised"],
            longest=self.longest,
            lengths=tuple((edge, int(count)) for edge, count in zip(edges, self.lengths, strict=True) if count),
        )


def _token_count(row: Sequence[Tokens]) -> int:
    return sum(one.length for one in row)
