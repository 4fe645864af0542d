"""Readers of files: JSON Lines, JSON, CSV and Parquet, also compressed, each record with its number, so that a bad one
can be found. JSON Lines and CSV need the standard library alone; pyarrow is imported when a file asks for it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from uft.data.messages import JSON, Unreadable, repeated
from uft.errors import first_line

Found = tuple[int, dict[str, Any] | str]  # a line or item's number with its record, or with why it cannot be read
Reader = Callable[[Path], Iterator[Found]]
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


def reader_of(path: Path) -> Reader | None:
    """The reader of a file by its name: rows.jsonl, rows.jsonl.gz."""
    return READERS.get(suffix_of(path))


def suffix_of(path: Path) -> str:
    """The last part of a file's name in lower case, without that of its compression."""
    name = path.name.lower()
    packed = next((end for end in COMPRESSED if name.endswith(end)), "")
    return Path(name.removesuffix(packed)).suffix


def opened(path: Path) -> BinaryIO:
    """The content of a file as bytes, unpacked."""
    if (packed := COMPRESSED.get(path.suffix.lower())) is None:
        return open(path, "rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression=packed))


def with_names(record: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    known = {column: record[column] for column in names if record.get(column) is not None}
    return record | {column: names[column][number] if number >= 0 else None for column, number in known.items()}


def _jsonl(path: Path) -> Iterator[Found]:
    """One JSON object per line. Read as bytes, so that one bad byte costs one row; a BOM, blank lines and CRLF pass."""
    with opened(path) as handle:
        for number, line in enumerate(handle, start=1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                yield 1, "the file is UTF-16; save it as UTF-8"
                return
            raw = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if raw:
                value, _, fault = _parsed(raw)
                if b"\r" in raw and "JSON" in fault:
                    fault += "; lines end with a line feed, not with a carriage return"
                yield number, fault or _record(value)


def _json(path: Path) -> Iterator[Found]:
    """A JSON array of objects, which is read whole, or one object per line."""
    with opened(path) as handle:
        first = handle.read(3).removeprefix(_BOM).lstrip()
        while not first and (block := handle.read(4096)):
            first = block.lstrip()
    if not first.startswith(b"["):
        yield from _jsonl(path)
        return
    with opened(path) as handle:
        items, line, fault = _parsed(handle.read().removeprefix(_BOM).strip())
    yield from [(line, fault)] if fault else enumerate(map(_record, items), start=1)


_BOM = b"\xef\xbb\xbf"


def _record(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else "not a JSON object"


def _parsed(raw: bytes) -> tuple[Any, int, str]:
    """The value of a JSON text; else the line of its fault, and the fault."""
    try:
        return JSON.decode(raw.decode("utf-8")), 1, ""
    except Unreadable as error:
        return None, 1, str(error)
    except UnicodeDecodeError as error:
        fault = f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}"
        return None, raw.count(b"\n", 0, error.start) + 1, fault
    except json.JSONDecodeError as error:
        return None, error.lineno, f"broken JSON: {error.msg} at column {error.colno}"
    except ValueError:  # of Python's int
        return None, 1, "broken JSON: a number of more than 4,300 digits"
    except RecursionError:
        return None, 1, "broken JSON: nested too deeply"


def _csv(path: Path) -> Iterator[Found]:
    """Text cells under a header. Bytes that are not UTF-8 stay visible as surrogates, which the row's check names."""
    csv.field_size_limit(2**31 - 1)
    with opened(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as handle:
        rows = csv.reader(handle, delimiter="\t" if suffix_of(path) == ".tsv" else ",", strict=True)
        try:
            header: list[str] = next(rows, [])
            if header and "\x00" in header[0] and header[0][:1] in ("\udcff", "\udcfe"):
                yield 1, "the file is UTF-16; save it as UTF-8"
                return
            if twice := repeated(header):
                yield 1, f"names a column twice: {twice[:200]}"
                return
            for number, cells in _csv_rows(rows):
                if isinstance(cells, str):
                    yield number, cells
                elif cells == header:
                    yield number, "is the header once more"
                elif len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                elif cells:
                    yield number, f"has {len(cells)} cells under {len(header)} columns"
        except csv.Error as error:
            yield rows.line_num, f"broken CSV: {error}"


_CSV_FAULTS = {
    "expected after": "text follows the quotation mark that closes a cell; a mark within a cell is written twice",
    "unexpected end": "the quotation mark that opens a cell is never closed",
}
"""What csv's words mean to those who wrote the file."""


def _csv_rows(rows: Any) -> Iterator[tuple[int, list[str] | str]]:
    """The first line of every row of a csv.reader, with its cells or why it has none."""
    while True:
        number = rows.line_num + 1
        try:
            yield number, next(rows)
        except csv.Error as error:
            fault = next((said for words, said in _CSV_FAULTS.items() if words in str(error)), error)
            yield number, f"broken CSV: {fault}"
        except StopIteration:
            return


def _parquet(path: Path) -> Iterator[Found]:
    import pyarrow.parquet

    def rows_of(batch: Any) -> list[Any]:
        try:
            return list(batch.to_pylist())
        except Exception as error:  # a row has no value in Python (a text that is not UTF-8): find it
            if batch.num_rows == 1:
                return [f"cannot be read: {first_line(error)}"]
            return [row for place in range(batch.num_rows) for row in rows_of(batch.slice(place, 1))]

    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the usual one keeps what a large file once needed
    with pyarrow.parquet.ParquetFile(opened(path)) as file:  # read_table would make columns of the names of folders
        if twice := repeated(file.schema_arrow.names):
            yield 1, f"names a column twice: {twice[:200]}"
            return
        names = {}  # of classes, as `datasets` writes them
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
            labels = {column: one for column, one in features.items() if isinstance(one, dict) and one.get("names")}
            names = {column: one["names"] for column, one in labels.items()}
        rows = (row for batch in file.iter_batches(1024) for row in rows_of(batch))
        yield from enumerate((row if isinstance(row, str) else with_names(row, names) for row in rows), start=1)


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}
