"""Repair of W&B's local logs after a kill.

Each process of a run writes a segment, `wandb/*run-TIME-ID/run-ID.wandb`: seven bytes of header, then records in
LevelDB's log framing (blocks of 32 KiB; a record is one fragment, or several marked first, middle and last, each with
CRC, length and kind in seven bytes). A process that is killed leaves half a record, and `wandb sync` stops there
without uploading the segments that follow. Cut at the last whole record, a segment uploads like any other.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

BLOCK = 32 * 1024
HEADER = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def repair_all(folder: Path) -> list[Path]:
    """Cut every torn segment below `folder`, a run's `wandb/`; the segments that were."""
    return [path for path in sorted(folder.glob("*run-*/run-*.wandb")) if repair(path)]


def repair(path: Path) -> bool:
    """Cut a segment at its last whole record; whether there was anything to cut."""
    whole, size = whole_until(path.read_bytes()), path.stat().st_size
    if whole < size:
        os.truncate(path, whole)
    return whole < size


def whole_until(data: bytes) -> int:
    """The offset where the last whole record ends."""
    position = end = min(HEADER, len(data))
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's last bytes, too few for a fragment, are padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER + length
        if not FULL <= kind <= LAST or position > len(data):
            break
        if kind in (FULL, LAST):
            end = position
    return end
