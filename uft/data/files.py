"""Files of rows: JSON Lines, JSON, CSV and Parquet, each record with its place, so that a bad one can be found.

JSON Lines and CSV need the standard library alone; pyarrow is imported when a file asks for it.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uft.alive import sign

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
            sign()
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
        lines = "; lines end with a line feed, not with a carriage return" if b"\r" in raw else ""
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
