"""W&B's local logs of a run: what they hold, and their repair after a kill.

Each process of a run writes a segment, `wandb/*run-TIME-ID/run-ID.wandb`: seven bytes of header, then records in
LevelDB's log framing (blocks of 32 KiB; a record is one fragment, or several marked first, middle and last, each with
CRC, length and kind in seven bytes). The block being filled stays in memory. A process that is killed thus loses some
rows and leaves half a record, and `wandb sync` stops there without uploading the segments that follow. Cut at the last
whole record, a segment uploads like any other.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 32 * 1024
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def files(folders: Iterable[Path]) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.glob("run-*.wandb"))]


def repair(path: Path) -> bool:
    """Cut a segment at its last whole record; whether there was anything to cut."""
    data = path.read_bytes()
    ends = [end for end, _ in records(data)]
    whole = ends[-1] if ends else min(HEADER, len(data))
    if whole < len(data):
        os.truncate(path, whole)
    return whole < len(data)


def last_step(path: Path) -> int | None:
    """The last `step` among the history rows of a segment."""
    from wandb.proto import wandb_internal_pb2 as messages  # made at run time: no type checker sees what is in it

    for _, content in reversed(list(records(path.read_bytes()))):
        for item in messages.Record.FromString(content).history.item:  # type: ignore[attr-defined]
            if item.key == "step" or list(item.nested_key) == ["step"]:
                return int(json.loads(item.value_json))
    return None


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, content) of each whole record."""
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's last bytes, too few for a fragment, are padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + HEADER, position + HEADER + length
        if not FULL <= kind <= LAST or position > len(data):
            return
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            yield position, parts
