"""Sources: the named data sets of a mixture as rows, some of them kept for evaluation.

Everything that is wrong with any source, and every row that cannot be read, is told at once.
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from uft.config.schema import Data, Source
from uft.data import formats
from uft.data.formats import Format, ParsedRecord, Unreadable
from uft.data.rows import Kind, Row, content_digest, prompt_hash
from uft.data.table import RowCollector, kinds, pick, prompt_words
from uft.errors import Problem, UftError
from uft.heartbeat import activity, beat
from uft.runs import cache_root

SPELLED_OUT = 20  # bad rows told one by one; the rest are counted


@dataclass(frozen=True)
class LoadedSource:
    """A source, read and split. `digest` is the sha256 of the training rows' content.

    The rows of a large one lie on disk (:mod:`uft.data.table`): go through them rather than list them.
    """

    name: str
    path: str
    rows: Sequence[Row]
    held_out: Sequence[Row]
    digest: str
    dropped: tuple[BadRow, ...] = ()
    checker: str | None = None
    apart: bool = False  # held-out rows lie in a place of their own, and are numbered there

    @property
    def kinds(self) -> dict[Kind, int]:
        """How many training rows there are of each kind of feedback."""
        return kinds(self.rows)


@activity("rows were read", moving=True)
def load_sources(data: Any) -> list[LoadedSource]:
    """All sources of `data` (a `schema.Data`, a config node or a mapping with its keys), sorted by name.

    Raises :class:`UftError` with every source that cannot be loaded and, unless `bad_rows` is drop, every bad row.
    """
    settings = _as_data(data)
    if not settings.sources:
        raise UftError(
            Problem("data.sources", "this mixture has no sources"),
            footer="Add one:  uft train data=files +data.sources.mine.path=x.jsonl",
        )
    loaded: list[LoadedSource] = []
    problems: list[Problem] = []
    bad: list[BadRow] = []
    for name, source in sorted(settings.sources.items()):
        try:
            found = _load(name, source, settings)
        except UftError as error:
            problems += error.problems
            continue
        loaded.append(found)
        bad += found.dropped
    told = settings.bad_rows == "error"
    if told:
        problems += _bad_row_problems(bad)
    problems += [_nothing_left(source) for source in loaded if not source.rows and not (told and source.dropped)]
    if problems:
        footer = "Train on the good rows alone:  data.bad_rows=drop" if bad and told else ""
        raise UftError(*problems, footer=footer)
    return loaded


def hold_out(rows: Sequence[Row], amount: float) -> tuple[Sequence[Row], Sequence[Row]]:
    """(training rows, held-out rows): whole prompts, those whose hashes are least, until `amount` rows are kept.

    `amount` is a share below 1 or a count. Which prompts are kept does not depend on order, seed or source, so sources
    that share prompts keep nearly the same ones. Order within both sides is that of `rows`.
    """
    wanted = max(1, round(amount * len(rows))) if 0 < amount < 1 else int(amount)
    kept = _least(rows, min(wanted, len(rows))) if wanted > 0 and rows else bytes(len(rows))
    train, held = (array("q", (n for n, one in enumerate(kept) if one == side)) for side in (0, 1))
    return pick(rows, train), pick(rows, held)


def _least(rows: Sequence[Row], count: int) -> bytearray:
    """1 for the `count` >= 1 rows whose prompt hashes are least, and for all with the prompt of the last of them."""
    words = prompt_words(rows)
    edge = sorted(words)[count - 1]
    kept = bytearray(word < edge for word in words)
    there = [n for n, word in enumerate(words) if word == edge]  # one prompt's, nearly always: a word is not all
    hashes = [prompt_hash(rows[n].prompt) for n in there]
    last = sorted(hashes)[count - sum(kept) - 1]
    for n, whole in zip(there, hashes, strict=True):
        kept[n] = whole <= last
    return kept


def _load(name: str, source: Source, data: Data) -> LoadedSource:
    if problems := [*formats.check_mapping(source.columns, name), *_range_problems(name, source.score_range)]:
        raise UftError(*problems)
    place = Place(source.path, source.split, source.subset, source.revision, f"data.sources.{name}.path")
    rows, bad = _rows(name, source, place, source.limit, data.cache)
    apart = _evaluation_place(source, place)
    if apart is not None:
        held_out, more = _rows(name, source, apart, None, data.cache)
        bad += more
    else:
        amount = data.holdout if source.holdout is None else source.holdout
        rows, held_out = hold_out(rows, amount)
        if held_out and not rows:
            raise UftError(Problem(f"data.sources.{name}.holdout={amount:g}", "leaves no row to train on"))
    return LoadedSource(
        name, source.path, rows, held_out, content_digest(rows), tuple(bad), source.checker, apart is not None
    )


def _range_problems(name: str, score_range: Sequence[float] | None) -> list[Problem]:
    if score_range is None or (len(score_range) == 2 and score_range[0] < score_range[1]):
        return []
    why = "is not two numbers, the lowest and the highest score"
    return [Problem(f"data.sources.{name}.score_range={list(score_range)}", why)]


def _evaluation_place(source: Source, place: Place) -> Place | None:
    """Where evaluation rows of their own lie: as configured, or the test split that builtin data has."""
    if source.eval_path is not None:
        key = place.key.removesuffix("path") + "eval_path"
        return replace(place, path=source.eval_path, split=source.eval_split or source.split, key=key)
    if source.eval_split is not None:
        return replace(place, split=source.eval_split)
    if source.path.startswith("builtin:") and source.holdout is None:
        return replace(place, split="test")
    return None


def _rows(
    name: str, source: Source, place: Place, limit: int | None, cache: str | None
) -> tuple[Sequence[Row], list[BadRow]]:
    """The rows of a place and what could not be read there."""
    good = RowCollector(name, limit, cache_root(cache))
    bad: list[BadRow] = []
    for table in read(place):
        for item in _parsed(name, source, table):
            if isinstance(item, BadRow):
                bad.append(item)
            else:
                good.add(item)
    return good.rows(), bad


def _parsed(name: str, source: Source, table: Table) -> Iterator[ParsedRecord | BadRow]:
    if not table.records:
        yield from (found for found in table.find() if isinstance(found, BadRow))
        return
    form = _recognise(name, source, table)
    low_high = (source.score_range[0], source.score_range[1]) if source.score_range else None
    for found in table.find():
        beat()
        if isinstance(found, BadRow):
            yield found
            continue
        fields = formats.rename(found.fields, source.columns)
        try:
            yield form.read(formats.from_text(fields) if table.textual else fields, low_high)
        except Unreadable as error:
            yield BadRow(found.where, str(error))


def _recognise(name: str, source: Source, table: Table) -> Format:
    """The format by the columns that at least half of the records have: one stray or missing key is a row's fault."""
    counts = table.columns
    problems = [
        Problem(
            f"data.sources.{name}.columns.{ours}={theirs}",
            "no such column in the data",
            advice=(*formats.nearest("{}", theirs, counts), f"columns: {', '.join(sorted(counts))}"),
        )
        for ours, theirs in source.columns.items()
        if theirs not in counts
    ]
    if problems:
        raise UftError(*problems)
    usual: dict[str, Any] = {key: None for key, count in counts.items() if 2 * count >= table.records}
    columns = formats.rename(usual, source.columns)
    return formats.recognise(columns, source.kind, source.columns, name)


def _bad_row_problems(bad: Sequence[BadRow]) -> list[Problem]:
    problems = [Problem(row.where, row.why) for row in bad[:SPELLED_OUT]]
    if len(bad) > SPELLED_OUT:
        problems.append(Problem(f"... and {len(bad) - SPELLED_OUT} more", "rows that cannot be read"))
    return problems


def _nothing_left(source: LoadedSource) -> Problem:
    why = f"no row could be used: {source.dropped[0].why}" if source.dropped else "there are no rows in it"
    return Problem(f"data.sources.{source.name}.path={source.path}", why)


def _as_data(data: Any) -> Data:
    """`data` under the schema, so that defaults stand in one place whatever the caller holds."""
    if isinstance(data, Data):
        return data
    from omegaconf import OmegaConf

    given = data if isinstance(data, Mapping) else OmegaConf.to_container(data, resolve=True)
    merged = OmegaConf.merge(OmegaConf.structured(Data(name="data")), given)
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


# --- Records out of files, folders, the hub and the playground, each with its place, so that a bad one can be found.
#
# `uft.data.sources` reads single files; datasets is imported when a path asks for it.


@dataclass(frozen=True)
class Place:
    """Where to read: a source's `path` and what goes with it. `key` is the setting that errors point at."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    key: str = "data.sources.NAME.path"

    def problem(self, why: str, *advice: str) -> UftError:
        return UftError(Problem(f"{self.key}={self.path}", why, advice=advice))


_BUILTIN = "builtin:"
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?=[-_.\d]|$)", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def read(place: Place) -> list[Table]:
    """All records of a place, in a stable order. Raises :class:`UftError` when it cannot be opened."""
    if place.path.startswith(_BUILTIN):
        return [_builtin(place)]
    path = Path(os.path.expanduser(place.path))
    if os.path.isfile(path):  # Path's own methods raise for names that are too long, or hold a NUL
        return [_file(path, place)]
    if os.path.isdir(path):
        return _folder(path, place)
    if os.path.islink(path):
        raise place.problem("this link leads nowhere, or in a circle")
    if os.path.exists(path):
        raise place.problem("is neither a file nor a folder")
    if _looks_local(place.path):
        raise place.problem("no such file or folder", *_neighbours(path))
    return [_hub(place.path, place)]


def _looks_local(path: str) -> bool:
    suffix = Path(path).suffix.lower()
    return suffix in (*READERS, ".gz", ".txt", ".zip", ".arrow") or not _HUB_ID.fullmatch(path)


def _neighbours(path: Path) -> tuple[str, ...]:
    """The nearest name beside a missing file, or the nearest thing that exists."""
    parent = path.parent
    if not os.path.isdir(parent):
        return (f"the folder {parent} does not exist either",)
    beside = sorted(os.listdir(parent)) if os.access(parent, os.R_OK) else []
    close = get_close_matches(path.name, beside, n=1)
    return (f"did you mean  {parent / close[0]} ?",) if close else ()


# --- files and folders


def _file(path: Path, place: Place) -> Table:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise place.problem(f"cannot read files of type {path.suffix or '(none)'}", f"types: {' '.join(READERS)}")
    before: list[tuple[int, int, int]] = []

    def find() -> Iterator[Found]:
        try:
            before.append(_state(path))
            yield from reader(path)
            after = _state(path)
        except Exception as error:  # a broken Parquet file, no permission: the reader's own words say it best
            raise place.problem(f"cannot be read: {first_line(error)}") from error
        if before[0] != after:
            raise place.problem("changed while it was read", "wait until whoever writes it is done")

    return Table.of(find, textual=reader is read_csv)


def _state(path: Path) -> tuple[int, int, int]:
    """What tells that somebody writes a file: its identity, size and time."""
    known = path.stat()
    return known.st_ino, known.st_size, known.st_mtime_ns


def _folder(path: Path, place: Place) -> list[Table]:
    """A folder written by `datasets`, a hub repository's layout, or plain files in the order of their names."""
    if not os.access(path, os.R_OK | os.X_OK):
        raise place.problem("cannot be read: no permission")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_saved(path, place)]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    if (path / "README.md").is_file() or not files:
        return [_hub(str(path), place)]
    return [_file(file, place) for file in _of_split(files, place)]


def _of_split(files: list[Path], place: Place) -> list[Path]:
    """The files named after the asked split, where names say so (train-00.jsonl, test.jsonl); else all of them."""
    named = {file: _SPLITS[match[1].lower()] for file in files if (match := _SPLIT_NAME.match(file.stem))}
    wanted = _SPLITS.get(place.split, place.split)
    if not named:
        return files
    chosen = [file for file in files if named.get(file) == wanted]
    if not chosen:
        raise place.problem(f"no file of split {place.split} in this folder", f"splits: {_list(set(named.values()))}")
    return chosen


def _saved(path: Path, place: Place) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise place.problem(f"this datasets folder cannot be read: {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if place.split not in loaded:
            raise place.problem(f"no split {place.split} in this datasets folder", f"splits: {_list(loaded)}")
        loaded = loaded[place.split]
    return _dataset(loaded, str(path))


def _look_for_the_hub() -> None:
    """One look before the hub's client starts its half minute of retries; where nothing answers, its cache alone."""
    if any(os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")):
        return
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the worker inherits it


def _hub(name: str, place: Place) -> Table:
    if not Path(name).is_dir():
        _look_for_the_hub()
    import datasets

    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, place.subset, split=place.split, revision=place.revision)
    except Exception as error:  # whatever the hub, the network or a builder says; a user cannot act on a traceback
        local = Path(name).is_dir()
        raise place.problem(
            f"{'datasets cannot read this folder' if local else 'not found here, and not from the hub'}:"
            f" {first_line(error)}",
            *(() if local else ("without a network, give a file, a folder or builtin:NAME",)),
        ) from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
    return _dataset(loaded, name)


def _dataset(dataset: Any, name: str) -> Table:
    return Table.of(lambda: _numbered(dataset, name))


def _numbered(records: Iterable[Any], name: str) -> Iterator[Found]:
    return (Record(f"{name}:{number}", record) for number, record in enumerate(records, start=1))


def _builtin(place: Place) -> Table:
    family, _, name = place.path.removeprefix(_BUILTIN).partition("/")
    if family != "playground" or not name:
        raise place.problem("no such builtin data", "builtin data is named  builtin:playground/NAME")
    from uft.playground import world

    if name not in world.SOURCES:
        raise place.problem(
            "no such builtin data", f"choices: {_list(f'{_BUILTIN}{family}/{n}' for n in world.SOURCES)}"
        )
    if place.split not in ("train", "test"):
        raise place.problem(f"builtin data has no split {place.split}", "splits: test, train")
    records = world.records(name, "test" if place.split == "test" else "train")
    return Table.of(lambda: _numbered(records, place.path))


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "(none)"


# --- Files of rows: JSON Lines, JSON, CSV and Parquet, each record with its place, so that a bad one can be found.
#
# JSON Lines and CSV need the standard library alone; pyarrow is imported when a file asks for it.


_BATCH = 1024  # rows of a Parquet file in memory as Python values at once


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `where` is `file:line` (the item's number in files without lines)."""

    where: str
    why: str


@dataclass(frozen=True)
class Record:
    """One record as it was found."""

    where: str
    fields: Mapping[str, Any]


Found = Record | BadRow


@dataclass(frozen=True)
class Table:
    """The records of one file or split; they share one format.

    They were looked through once, to learn their columns, and are not kept: `find` reads them again, so that memory
    holds what is made of them and not both.
    """

    find: Callable[[], Iterator[Found]]
    columns: Mapping[str, int]  # in how many records each stands
    records: int
    textual: bool = False  # every value is a text cell (CSV)

    @classmethod
    def of(cls, find: Callable[[], Iterator[Found]], textual: bool = False) -> Table:
        columns: Counter[str] = Counter()
        records = 0
        for found in find():
            beat()
            if isinstance(found, Record):
                columns.update(found.fields.keys())
                records += 1
        return cls(find, columns, records, textual)

    @property
    def found(self) -> tuple[Found, ...]:
        return tuple(self.find())


def _jsonl(path: Path) -> Iterator[Found]:
    """One JSON object per line. Read as bytes, so that one bad byte costs one row; a BOM, blank lines and CRLF pass."""
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield BadRow(f"{path}:1", "the file is UTF-16; save it as UTF-8")
                return
            raw = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if raw:
                yield _json_object(raw, f"{path}:{number}")


def _json_object(raw: bytes, where: str) -> Found:
    try:
        return _record(json.loads(raw.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        return BadRow(where, f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        lines = "; lines end with a line sampler, not with a carriage return" if b"\r" in raw else ""
        return BadRow(where, f"broken JSON: {error.msg} at column {error.colno}{lines}")
    except ValueError:  # of Python's int
        return BadRow(where, "broken JSON: a number of more than 4,300 digits")
    except RecursionError:
        return BadRow(where, "broken JSON: nested too deeply")


def _record(value: Any, where: str) -> Found:
    return Record(where, value) if isinstance(value, dict) else BadRow(where, "not a JSON object")


def _json(path: Path) -> Iterator[Found]:
    """A JSON array of objects, which is read whole, or one object per line."""
    if not _begins_array(path):
        yield from _jsonl(path)
        return
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    try:
        items = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        yield BadRow(f"{path}:{line}", f"not UTF-8: byte 0x{raw[error.start]:02x}")
    except json.JSONDecodeError as error:
        yield BadRow(f"{path}:{error.lineno}", f"broken JSON: {error.msg}")
    except ValueError:
        yield BadRow(f"{path}:1", "broken JSON: a number of more than 4,300 digits")
    except RecursionError:
        yield BadRow(f"{path}:1", "broken JSON: nested too deeply")
    else:
        del raw
        yield from (_record(item, f"{path}:{number}") for number, item in enumerate(items, start=1))


def _begins_array(path: Path) -> bool:
    with open(path, "rb") as handle:
        first = handle.read(3).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not first and (block := handle.read(4096)):
            first = block.lstrip()
    return first.startswith(b"[")


def read_csv(path: Path) -> Iterator[Found]:
    """Text cells under a header. Bytes that are not UTF-8 stay visible as surrogates, which the row's check names."""
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        yield from _cells(path, csv.reader(handle, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))


def _cells(path: Path, rows: Any) -> Iterator[Found]:
    try:
        header: list[str] = next(rows, [])
        twice = sorted(name for name, count in Counter(header).items() if count > 1)
        if twice:
            yield BadRow(f"{path}:1", f"names a column twice: {', '.join(map(repr, twice[:3]))}")
            return
        start = rows.line_num + 1
        for cells in rows:
            where, start = f"{path}:{start}", rows.line_num + 1
            if len(cells) == len(header):
                yield Record(where, dict(zip(header, cells, strict=True)))
            elif cells:
                yield BadRow(where, f"has {len(cells)} cells under {len(header)} columns")
    except csv.Error as error:
        yield BadRow(f"{path}:{rows.line_num}", f"broken CSV: {error}")


def _parquet(path: Path) -> Iterator[Found]:
    import pyarrow.parquet

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the usual one keeps what a large file once needed
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:  # read_table would make columns of what folders are called
        for batch in file.iter_batches(batch_size=_BATCH):
            for record in _records(batch):
                number += 1
                yield (
                    Record(f"{path}:{number}", record)
                    if isinstance(record, dict)
                    else BadRow(f"{path}:{number}", record)
                )


def _records(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; of one that has no value in Python (a text that is not UTF-8), why."""
    try:
        yield from batch.to_pylist()
        return
    except Exception:  # one of them: find it
        rows = [batch.slice(number, 1) for number in range(batch.num_rows)]
    for row in rows:
        try:
            yield row.to_pylist()[0]
        except Exception as error:
            yield f"cannot be read: {first_line(error)}"


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": read_csv,
    ".tsv": read_csv,
}


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
