"""W&B's local logs of a run: what they hold, and their repair after a kill.

Each process of a run writes a segment, `wandb/*run-TIME-ID/run-ID.wandb`: seven bytes of header, then records in
LevelDB's log framing (blocks of 32 KiB; a record is one fragment, or several marked first, middle and last, each with
the CRC of kind and content, length and kind in seven bytes). The block being filled stays in memory. A process that is
killed thus loses some rows and leaves half a record, and `wandb sync` stops there without uploading the segments that
follow. Cut at the last whole record, a segment uploads like any other.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
HEADER = 7
MAGIC = b":W&B"
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("run-*.wandb"))]


def inside(run: Path, names: Iterable[str]) -> list[Path]:
    """The folders of these names below `run`. Files in them are repaired, so one that a record names outside is not
    gone to."""
    folders = (run / name for name in names)
    return [folder for folder in folders if folder.resolve().is_relative_to(run.resolve())]


def readable(path: Path) -> bool:
    """Whether W&B would take the file for a log, or one that had hardly begun."""
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    return MAGIC.startswith(start)


def repair(path: Path, keep: Path | None = None) -> int:
    """Cut a segment at its last whole record; how many bytes were cut. The file as it was is kept as `keep`."""
    data = path.read_bytes()
    ends = [end for end, _ in records(data)]
    whole = ends[-1] if ends else min(HEADER, len(data))
    if whole < len(data):
        if keep is not None and not keep.exists():
            shutil.copy2(path, keep)
        os.truncate(path, whole)
    return len(data) - whole


def last_step(path: Path) -> int | None:
    """The last `step` among the history rows of a segment."""
    for record in reversed(list(parsed(path))):
        for item in record.history.item:
            if item.key == "step" or list(item.nested_key) == ["step"]:
                return int(json.loads(item.value_json))
    return None


def kinds(path: Path) -> set[str]:
    """What kinds of records a segment has: run, history, exit, ..."""
    return {record.WhichOneof("record_type") for record in parsed(path)}


def parsed(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2 as messages  # made at run time: no type checker sees what is in it

    for _, content in records(path.read_bytes()):
        yield messages.Record.FromString(content)  # type: ignore[attr-defined]


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, content) of each record, up to the first that is torn or damaged."""
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's last bytes, too few for a fragment, are padding
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + HEADER, position + HEADER + length
        if not FULL <= kind <= LAST or position > len(data) or zlib.crc32(data[start - 1 : position]) != crc:
            return
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            yield position, parts
