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

from uft.data.chat import Renderer, advice_about
from uft.data.rows import Row, Tokens, content_digest, finish, learned_turns
from uft.data.table import Corrupt, TableFile, TableWriter, open_table, pick
from uft.errors import Problem, UftError, raise_problems
from uft.heartbeat import activity, report_progress

log = logging.getLogger(__name__)

CODE_VERSION = 9  # raise it when this code makes other tokens of the same rows, or lays them out otherwise
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
    notes: tuple[tuple[str, int, str], ...] = ()  # (difference that the template makes, how often, where first)


@dataclass(frozen=True)
class TokenizedSource:
    """A source's rows with their tokens: `encoded[i]` holds one :class:`Tokens` per completion of `rows[i]`, or that of
    its prompt alone."""

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
    Raises :class:`UftError` for rows that are too long under error, whose supervised tokens make no sense, or whose
    supervised text the template changes. Other differences that it makes are logged with their counts.
    """
    folder, state = None, "off"
    report: LengthReport | None = None
    if cache_dir is not None:
        policies = f"{too_long} {renderer.lost_text}"
        parts = (content_digest(rows), renderer.digest, str(max_length), policies, str(CODE_VERSION))
        folder, state = cache_dir / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], "miss"
        try:
            with activity("tokens were read", moving=True):
                table, notes = open_table(folder, SCHEMA)
            pairs = {key: tuple(map(tuple, notes["report"][key])) for key in ("lengths", "notes")}
            report, state = LengthReport(**{**notes["report"], **pairs}), "hit"
        except FileNotFoundError:
            pass
        except Corrupt as error:
            log.warning("token cache %s is corrupt (%s): tokenising again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            state = "rebuilt"
    if report is None:
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
            table = published or writer.unpublished(in_memory=True)
    for what, count, first in report.notes:
        times = "once, in" if count == 1 else f"{count:,} times, first in"
        log.warning("data.sources.%s: %s %s: %s row %s", name, renderer.name, what, times, first)
    encoded = EncodedRows(table)
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
    raise_problems(problems)
    return done


def _encode(
    name: str, rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str, writer: TableWriter
) -> LengthReport:
    """Tokenise, check, fit and write, chunk by chunk, and count for the report on the way."""
    counts, lengths, notes = Counter(_policy_counts((), ())), Counter[int](), dict[str, tuple[int, str]]()
    problems: list[Problem] = []
    number = longest = long = faults = 0
    marked = renderer.train_on != "marked"
    for chunk in _chunks(rows):
        report_progress(number, len(rows), f"rows of {name}")
        encoded = _encode_chunk(chunk, renderer)
        marked = marked or not all(row.completions for row in chunk)
        marked = marked or any(turn.learned for row in chunk for one in row.completions for turn in one.turns)
        fitted = [POLICIES[too_long](row, max_length) for row in encoded]
        for row, tokens in zip(chunk, encoded, strict=True):
            if fault := _fault(row, tokens, renderer):
                faults += 1
                problems += [fault] if faults <= FAULTS_SHOWN else []
            for note in (note for one in tokens for note in one.notes):
                count, first = notes.get(note.what, (0, f"{row.id}, turn {note.turn + 1}"))
                notes[note.what] = count + 1, first
        sizes = [one.length for row in encoded for one in row]
        lengths.update(np.searchsorted(EDGES, sizes).tolist())
        longest = max(longest, *sizes)
        long += sum(max(one.length for one in row) > max_length for row in encoded)
        counts.update(_policy_counts(encoded, fitted))
        if batch := record_batch((n, row) for n, row in enumerate(fitted, number) if row is not None):
            writer.write(batch)
        number += len(chunk)
    if faults > FAULTS_SHOWN:
        problems.append(Problem(f"... and {faults - FAULTS_SHOWN} more rows", "alike"))
    if number and not marked:
        why = f"no assistant turn of data.sources.{name} is marked to be learned"
        advice = ("give turns a weight of 1, or learn all of them:  data.train_on=all",)
        problems = [Problem("data.train_on=marked", why, advice=advice)]
    raise_problems(problems)
    if long and too_long == "error":
        why = f"{long} of {number} rows are longer than train.max_length={max_length}; the longest has {longest} tokens"
        ways = (
            "leave them out or cut them:  data.too_long=drop|truncate",
            f"or make room:  train.max_length={longest}",
        )
        raise UftError(Problem(f"data.sources.{name}", why, advice=ways))
    edges = (*EDGES, max(longest, EDGES[-1] + 1))
    return LengthReport(
        **counts,
        longest=longest,
        lengths=tuple((edges[place], count) for place, count in sorted(lengths.items())),
        notes=tuple((what, count, first) for what, (count, first) in notes.items()),
    )


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, as many at once as have about CHUNK conversations."""
    chunk: list[Row] = []
    conversations = 0
    for row in rows:
        chunk.append(row)
        conversations += len(row.completions) or 1
        if conversations >= CHUNK:
            yield chunk
            chunk, conversations = [], 0
    if chunk:
        yield chunk


def _encode_chunk(rows: Sequence[Row], renderer: Renderer) -> list[tuple[Tokens, ...]]:
    """All at once through the tokenizer, which is fastest so."""
    conversations = [(row.prompt, completion.turns) for row in rows for completion in row.completions]
    names = [row.id for row in rows for _ in row.completions]
    following = iter(renderer.encode_many(conversations, names) if names else ())
    alone = [row for row in rows if not row.completions]
    prompts = iter(renderer.encode_prompts([row.prompt for row in alone], [row.id for row in alone]) if alone else ())
    return [tuple(islice(following, len(row.completions))) or (next(prompts),) for row in rows]


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
            (ids.values.to_numpy(), batch.column("supervised").values.to_numpy().view(bool), ids.offsets.to_numpy())
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
    def _lengths(self) -> np.ndarray:
        """(completions,) int64: tokens of each with its prompt."""
        return np.concatenate([np.empty(0, np.int64), *(np.diff(offsets) for _, _, offsets in self._parts)])

    @cached_property
    def longest(self) -> np.ndarray:
        """(R,) int64: tokens of each row's longest completion."""
        return np.maximum.reduceat(self._lengths, self._first[:-1]) if len(self) else self._lengths

    @property
    def longest_sides(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest reply, which may be of different rows."""
        return int(self._prompts.max(initial=0)), int((self._lengths - self._prompts).max(initial=0))


def _fault(row: Row, tokens: Sequence[Tokens], renderer: Renderer) -> Problem | None:
    """The reason to refuse a row: a mask that makes no sense, or supervised text that the template changes."""
    if renderer.train_on != "marked" and not all(learned_turns(c.turns, 0, renderer.train_on) for c in row.completions):
        unlearned = "every assistant turn of a completion is marked as not to be learned"
        return Problem(f"row {row.id}", unlearned, advice=("give one a weight of 1, or leave the row out",))
    bos = renderer.tokenizer.bos_token_id
    for one in tokens if row.completions else ():
        why = ""  # the template is a likely cause
        if not one.supervised[1:].any():
            why = "no token is supervised"
        elif one.supervised.all():
            why = "every token is supervised, the prompt's too"
        elif int(one.ids[-1]) not in renderer.stop_ids:
            why = "the stop token is not supervised, so the model would never learn to stop"
        elif bos is not None and one.ids[0] == one.ids[1] == bos:
            why = "the text begins with two beginning-of-text tokens"
        if why:
            return Problem(f"row {row.id}", f"{why} under {renderer.name}", where="data.template")
    lost = next((note for one in tokens for note in one.notes if note.lost), None)
    if lost is None or renderer.lost_text == "keep":
        return None
    why = f"{renderer.name} {lost.what}: turn {lost.turn + 1} would not be learned as the row has it"
    advice = (*advice_about(renderer), "use another data.template, or learn what it writes:  data.lost_text=keep")
    return Problem(f"row {row.id}", why, "data.template", advice)


# --- The length policy.


Fitted = tuple[Tokens, ...] | None  # a row within the length, or None: dropped
EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)


def _truncate(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    """Each completion's first `max_length` tokens, ending at a supervised one; None where one has none left. A prompt
    alone is never cut."""
    cut = tuple(
        one if one.length <= max_length else finish(one.ids[:max_length], one.supervised[:max_length]) for one in row
    )
    return cut if all(new is old or new.targets for new, old in zip(cut, row, strict=True)) else None


POLICIES: dict[str, Callable[[tuple[Tokens, ...], int], Fitted]] = {
    "error": lambda row, max_length: row,
    "drop": lambda row, max_length: row if all(one.length <= max_length for one in row) else None,
    "truncate": _truncate,
}


def _policy_counts(before: Sequence[tuple[Tokens, ...]], after: Sequence[Fitted]) -> dict[str, int]:
    """The counts of a report, of rows before and after the length policy."""
    kept = [row for row in after if row is not None]
    sums = [sum(int(one.supervised.sum()) for row in rows for one in row) for rows in (kept, before)]
    pairs = zip(before, after, strict=True)
    return {
        "rows": len(kept),
        "completions": sum(bool(one.supervised.any()) for row in kept for one in row),
        "tokens": sum(map(_token_count, kept)),
        "supervised": sums[0],
        "touched": sum(new is not None and _token_count(new) < _token_count(old) for old, new in pairs),
        "dropped": len(before) - len(kept),
        "supervised_lost": sums[1] - sums[0],
    }


def _token_count(row: Sequence[Tokens]) -> int:
    return sum(one.length for one in row)
