"""Tokens: the rows of a source as ids with their supervised targets, checked, held to the longest length, and cached.

Nothing is cut in silence: what the length policy touched, and how many supervised tokens that cost, is in the report.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from uft.data.chat import Renderer, Tokens, finish
from uft.data.rows import Row, content_digest
from uft.data.table import pick
from uft.errors import Problem, UftError
from uft.heartbeat import activity, beat
from uft.runs import clear_left

log = logging.getLogger(__name__)

CODE_VERSION = 3  # raise it when this code makes other tokens of the same rows
CHUNK = 1024  # conversations tokenised at once, or a few more: a row is not divided
SHOWN = 5  # rows with a wrong mask that are told one by one


@dataclass(frozen=True)
class TokenizedSource:
    """A source's rows with their tokens: `encoded[i]` holds one :class:`Encoded` per completion of `rows[i]`."""

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
    folder = cache_dir / "tokens" / _key(rows, renderer, max_length, too_long) if cache_dir is not None else None
    state = "off" if folder is None else "miss"
    if folder is not None:
        try:
            return _recalled(name, rows, *load(folder))
        except FileNotFoundError:
            pass
        except Corrupt as error:
            discard(folder, error)
            state = "rebuilt"
    with Packer(folder) as packer:
        report = _encode(name, rows, renderer, max_length, too_long, packer)
        if folder is not None:
            try:
                return _kept(name, rows, save(packer, folder, {"report": asdict(report)}), report, state)
            except OSError as error:
                log.warning("tokens are not kept for the next run: %s", error)
                state = "off"
        return _kept(name, rows, packer.packed(), report, state)


def _kept(name: str, rows: Sequence[Row], encoded: EncodedRows, report: LengthReport, state: str) -> TokenizedSource:
    return TokenizedSource(name, pick(rows, encoded.numbers), encoded, report, state)  # type: ignore[arg-type]


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


def _key(rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str) -> str:
    parts = (content_digest(rows), renderer.digest, str(max_length), too_long, str(CODE_VERSION))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _recalled(name: str, rows: Sequence[Row], encoded: EncodedRows, notes: dict[str, Any]) -> TokenizedSource:
    report = dict(notes["report"])
    report["lengths"] = tuple((edge, count) for edge, count in report["lengths"])
    return _kept(name, rows, encoded, LengthReport(**report), "hit")


def _encode(
    name: str, rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str, packer: Packer
) -> LengthReport:
    """Tokenise, check, fit and pack, chunk by chunk: what is told of all rows is counted on the way."""
    faults, tally = _Faults(renderer), Tally(max_length)
    fit, number = POLICIES[too_long], 0
    for chunk in _chunks(rows):
        beat()
        encoded = _encoded(chunk, renderer)
        faults.look(chunk, encoded)
        fitted = [fit(row, max_length) for row in encoded]
        tally.count(encoded, fitted)
        packer.add((n, row) for n, row in enumerate(fitted, number) if row is not None)
        number += len(chunk)
    faults.refuse()
    if too_long == "error":
        tally.refuse_long(name)
    return tally.report()


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


def _encoded(rows: Sequence[Row], renderer: Renderer) -> list[tuple[Tokens, ...]]:
    """All at once through the tokenizer, which is fastest so."""
    conversations = [(row.prompt, completion.turns) for row in rows for completion in row.completions]
    names = [row.id for row in rows for _ in row.completions]
    following = iter(renderer.encode_many(conversations, names))
    return [tuple(islice(following, len(row.completions))) for row in rows]


# --- checks


class _Faults:
    """Rows of which what would be learned makes no sense; the template, a likely cause, is named with them."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.shown: list[Problem] = []
        self.count = 0

    def look(self, rows: Sequence[Row], encoded: Sequence[Sequence[Tokens]]) -> None:
        stops, bos = self.renderer.stop_ids, self.renderer.tokenizer.bos_token_id
        for row, of_row in zip(rows, encoded, strict=True):
            why = next((why for one in of_row if (why := _mask_fault(one, stops, bos))), None)
            if why is None:
                continue
            self.count += 1
            if self.count <= SHOWN:
                self.shown.append(Problem(f"row {row.id}", f"{why} under {self.renderer.name}", where="data.template"))

    def refuse(self) -> None:
        """UftError if there were any."""
        if self.count > SHOWN:
            raise UftError(*self.shown, Problem(f"... and {self.count - SHOWN} more rows", "alike"))
        if self.count:
            raise UftError(*self.shown)


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


# --- length


def shorten(encoded: Tokens, max_length: int) -> Tokens | None:
    """The first `max_length` tokens, ending at a supervised one; None if nothing supervised is left."""
    if encoded.length <= max_length:
        return encoded
    cut = finish(encoded.ids[:max_length], encoded.supervised[:max_length])
    return cut if cut.targets else None


def _whole(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    return row


def _drop(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    return row if all(one.length <= max_length for one in row) else None


def _truncate(row: tuple[Tokens, ...], max_length: int) -> Fitted:
    cut = [shorten(one, max_length) for one in row]
    whole = tuple(one for one in cut if one is not None)
    return whole if len(whole) == len(cut) else None


POLICIES: dict[str, Callable[[tuple[Tokens, ...], int], Fitted]] = {
    "error": _whole,
    "drop": _drop,
    "truncate": _truncate,
}


# --- Tokenised rows on disk: flat arrays that are memory-mapped, one folder per key, published by rename.
#
# The key is made of everything the tokens depend on, so nothing is ever stale. A folder that does not agree with its
# own
# checksums is thrown away and made again, and that is said. Tokens of many rows go to the disk as they are made.


class Corrupt(Exception):
    """A cache folder that is not what was written."""


@dataclass(frozen=True)
class EncodedRows(Sequence[tuple[Tokens, ...]]):
    """Every row's completions as tokens, over flat arrays that may be memory maps.

    `ids` int32 and `supervised` bool are (T,); completion c holds tokens `bounds[c]` to `bounds[c + 1]` and row r
    completions `rows[r]` to `rows[r + 1]`; `prompts[c]` is the completion's prompt length and `targets[c]` how many
    tokens of it a model can be asked for. `numbers[r]` is the row's place among those that were tokenised.
    """

    ids: np.ndarray
    supervised: np.ndarray
    bounds: np.ndarray  # (C + 1,) int64
    prompts: np.ndarray  # (C,) int32
    targets: np.ndarray  # (C,) int32
    rows: np.ndarray  # (R + 1,) int64
    numbers: np.ndarray  # (R,) int64

    def __len__(self) -> int:
        return len(self.rows) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[Tokens, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tokens, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tokens, ...] | list[tuple[Tokens, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return tuple(self._completion(c) for c in range(self.rows[number], self.rows[number + 1]))

    def targets_of(self, index: int) -> np.ndarray:
        """(completions of row `index`,) int32: the targets of each."""
        return self.targets[self.rows[index] : self.rows[index + 1]]

    def _completion(self, number: int) -> Tokens:
        part = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        return Tokens(self.ids[part], self.supervised[part], int(self.prompts[number]))

    @cached_property
    def longest(self) -> np.ndarray:
        """(R,) int64: tokens of each row's longest completion."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.maximum.reduceat(np.diff(self.bounds), self.rows[:-1])


ARRAYS = {
    "ids": np.int32,
    "supervised": bool,
    "bounds": np.int64,
    "prompts": np.int32,
    "targets": np.int32,
    "rows": np.int64,
    "numbers": np.int64,
}
HEAD = 128  # bytes before the values of a file
SPILL = 32 << 20
"""Bytes of packed rows from which on they are written to the cache as they come."""


class Packer:
    """Lays rows of completions end to end, as they come: in memory, and in files once they are many.

    `folder` is where :func:`save` will put them, None where nothing is kept. As a context it removes what is not saved.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.refused: OSError | None = None  # what the disk said when it took no more; then all rows are in memory
        self._beside: Path | None = None
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}  # not in the files
        self._counts = dict.fromkeys(ARRAYS, 0)  # values so far
        self._append(bounds=np.zeros(1, np.int64), rows=np.zeros(1, np.int64))

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *about: object) -> None:
        if self._beside is not None:
            shutil.rmtree(self._beside, ignore_errors=True)

    def add(self, rows: Iterable[tuple[int, Sequence[Tokens]]]) -> None:
        """The next rows, each with its number."""
        listed = [(number, tuple(row)) for number, row in rows]
        flat = [encoded for _, row in listed for encoded in row]
        self._append(
            bounds=self._counts["ids"] + np.cumsum([e.length for e in flat], dtype=np.int64),
            rows=self._counts["prompts"] + np.cumsum([len(row) for _, row in listed], dtype=np.int64),
            ids=np.concatenate([np.empty(0, np.int32), *(e.ids for e in flat)]),
            supervised=np.concatenate([np.empty(0, bool), *(e.supervised for e in flat)]),
            prompts=np.asarray([e.prompt_length for e in flat], np.int32),
            targets=np.asarray([e.targets for e in flat], np.int32),
            numbers=np.asarray([number for number, _ in listed], np.int64),
        )
        if self.folder is not None and self.refused is None and self._heavy():
            try:
                self._spill(self.folder)
            except OSError as error:
                self.refused = error
                self._recall()

    @property
    def spilled(self) -> bool:
        """Whether there is more than memory should hold."""
        return self._beside is not None

    def packed(self) -> EncodedRows:
        """Everything, in memory."""
        self._recall()
        return EncodedRows(**{name: self._joined(name) for name in ARRAYS})

    def settle(self, folder: Path) -> Path:
        """The folder beside `folder` in which every array is a whole file now. Raises OSError."""
        if self.refused is not None:
            raise self.refused
        beside = self._spill(folder)
        for name, count in self._counts.items():
            with open(_file(beside, name), "r+b") as file:
                _head(file, name, count)
        return beside

    def _append(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._waiting[name].append(array)
            self._counts[name] += len(array)

    def _heavy(self) -> bool:
        """Whether so much waits that it should go to the disk; once there are files, everything should."""
        return self.spilled or sum(a.nbytes for arrays in self._waiting.values() for a in arrays) > SPILL

    def _spill(self, folder: Path) -> Path:
        """Append what waits to the files. Raises OSError; what is not whole in them waits on."""
        if self._beside is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            clear_left(folder.parent, ".*")
            self._beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        for name, arrays in self._waiting.items():
            with open(_file(self._beside, name), "ab") as file:
                if not file.tell():
                    _head(file, name, 0)
                while arrays:
                    file.write(arrays[0].data)
                    file.flush()
                    arrays.pop(0)
        return self._beside

    def _recall(self) -> None:
        """Back into memory what is in files, and the files away."""
        if self._beside is None:
            return
        for name, arrays in self._waiting.items():
            there = self._counts[name] - sum(map(len, arrays))
            if there:
                arrays.insert(0, np.fromfile(_file(self._beside, name), ARRAYS[name], there, offset=HEAD))
        shutil.rmtree(self._beside, ignore_errors=True)
        self._beside = None

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([np.empty(0, ARRAYS[name]), *self._waiting[name]])


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _head(file: BinaryIO, name: str, count: int) -> None:
    """What an array's file begins with; as long for every `count`, so that it can be written again."""
    about = {"descr": np.dtype(ARRAYS[name]).str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == HEAD, "numpy pads a header so that its array may grow"


@activity("tokens were read", moving=True)
def load(folder: Path) -> tuple[EncodedRows, dict[str, Any]]:
    """The arrays, memory-mapped, and what was noted with them.

    Raises FileNotFoundError when there is no such folder, :class:`Corrupt` when it is not what was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        for name in ARRAYS:
            if _checksum(_file(folder, name)) != about["checksums"][name]:
                raise Corrupt(f"{name}.npy is not what was written")
        return mapped(folder), about["notes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{type(error).__name__}: {error}") from error


@activity("tokens were written", moving=True)
def save(packer: Packer, folder: Path, notes: dict[str, Any]) -> EncodedRows:
    """The rows, in `folder` now; those of many are memory-mapped. Raises OSError; then the packer has them still.

    Written beside, then renamed. Of two processes that write the same key one wins; both wrote the same.
    """
    small = None if packer.spilled else packer.packed()
    beside = packer.settle(folder)
    checksums = {name: _checksum(_file(beside, name)) for name in ARRAYS}
    (beside / "about.json").write_text(json.dumps({"checksums": checksums, "notes": notes}), encoding="utf-8")
    try:
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    return mapped(folder) if small is None else small


def mapped(folder: Path) -> EncodedRows:
    return EncodedRows(**{name: _mapped(_file(folder, name)) for name in ARRAYS})


def discard(folder: Path, why: object) -> None:
    """Throw a corrupt folder away, and say so."""
    log.warning("token cache %s is corrupt (%s): tokenising again", folder, why)
    shutil.rmtree(folder, ignore_errors=True)


def _mapped(file: Path) -> np.ndarray:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return array if array.size else np.array(array)


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


# --- Lengths of the rows of a source, counted chunk by chunk: what its report says, and which rows are too long.


EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)

Fitted = tuple[Tokens, ...] | None  # a row within the length, or None: dropped


@dataclass(frozen=True)
class LengthReport:
    """What the rows of a source came to, and what the length policy cost. Lengths are prompt + completion in tokens."""

    rows: int  # kept
    completions: int
    tokens: int
    supervised: int
    touched: int = 0  # rows with a completion that was cut
    dropped: int = 0
    supervised_lost: int = 0  # in cut and dropped rows
    longest: int = 0  # of all completions, before anything was cut
    lengths: tuple[tuple[int, int], ...] = ()  # (up to this length, completions), before anything was cut


class Tally:
    """Counts of all rows, for the report and for what is told of those that are too long."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.before, self.after = Counter[str](), Counter[str]()  # rows, completions, tokens, supervised
        self.long = self.touched = self.longest = 0
        self.lengths = np.zeros(len(EDGES) + 1, np.int64)  # completions up to each edge, and beyond the last

    def count(self, before: Sequence[tuple[Tokens, ...]], after: Sequence[Fitted]) -> None:
        """A chunk, as it was and as the length policy left it."""
        lengths = np.asarray([one.length for row in before for one in row], np.int64)
        self.lengths += np.bincount(np.searchsorted(EDGES, lengths), minlength=len(self.lengths))
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.long += sum(max(one.length for one in row) > self.max_length for row in before)
        self.touched += sum(
            new is not None and _tokens(new) < _tokens(old) for old, new in zip(before, after, strict=True)
        )
        self.before += _sizes(before)
        self.after += _sizes([row for row in after if row is not None])

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


def _sizes(rows: Sequence[Sequence[Tokens]]) -> Counter[str]:
    return Counter(
        rows=len(rows),
        completions=sum(map(len, rows)),
        tokens=sum(map(_tokens, rows)),
        supervised=sum(int(one.supervised.sum()) for row in rows for one in row),
    )


def _tokens(row: Sequence[Tokens]) -> int:
    return sum(one.length for one in row)
