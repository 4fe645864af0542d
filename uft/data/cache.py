"""Tokenised rows on disk: flat arrays that are memory-mapped, one folder per key, published by rename.

The key is made of everything the tokens depend on, so nothing is ever stale. A folder that does not agree with its own
checksums is thrown away and made again, and that is said.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from uft.data.templates import Encoded

log = logging.getLogger(__name__)


class Corrupt(Exception):
    """A cache folder that is not what was written."""


@dataclass(frozen=True)
class EncodedRows(Sequence[tuple[Encoded, ...]]):
    """Every row's completions as tokens, over flat arrays that may be memory maps.

    `ids` int32 and `supervised` bool are (T,); completion c holds tokens `bounds[c]` to `bounds[c + 1]` and row r
    completions `rows[r]` to `rows[r + 1]`; `prompts[c]` is the completion's prompt length.
    """

    ids: np.ndarray
    supervised: np.ndarray
    bounds: np.ndarray  # (C + 1,) int64
    prompts: np.ndarray  # (C,) int64
    rows: np.ndarray  # (R + 1,) int64

    def __len__(self) -> int:
        return len(self.rows) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[Encoded, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Encoded, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Encoded, ...] | list[tuple[Encoded, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return tuple(self._completion(c) for c in range(self.rows[number], self.rows[number + 1]))

    def _completion(self, number: int) -> Encoded:
        part = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        return Encoded(self.ids[part], self.supervised[part], int(self.prompts[number]))

    @classmethod
    def pack(cls, rows: Iterable[Sequence[Encoded]]) -> EncodedRows:
        """Rows of completions laid end to end."""
        listed = [tuple(row) for row in rows]
        flat = [encoded for row in listed for encoded in row]
        return cls(
            ids=np.concatenate([np.empty(0, np.int32), *(e.ids for e in flat)]),
            supervised=np.concatenate([np.empty(0, bool), *(e.supervised for e in flat)]),
            bounds=np.cumsum([0, *(e.length for e in flat)], dtype=np.int64),
            prompts=np.asarray([e.prompt_length for e in flat], np.int64),
            rows=np.cumsum([0, *(len(row) for row in listed)], dtype=np.int64),
        )


ARRAYS = ("ids", "supervised", "bounds", "prompts", "rows")


def load(folder: Path) -> tuple[EncodedRows, dict[str, Any]]:
    """The arrays, memory-mapped, and what was noted with them.

    Raises FileNotFoundError when there is no such folder, :class:`Corrupt` when it is not what was written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays = {}
        for name in ARRAYS:
            file = folder / f"{name}.npy"
            if _checksum(file) != about["checksums"][name]:
                raise Corrupt(f"{file.name} is not what was written")
            arrays[name] = _mapped(file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{type(error).__name__}: {error}") from error
    return EncodedRows(**arrays), about["notes"]


def save(folder: Path, rows: EncodedRows, notes: dict[str, Any]) -> None:
    """Write beside, then rename. Of two processes that write the same key one wins; both wrote the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name in ARRAYS:
            np.save(beside / f"{name}.npy", getattr(rows, name))
        checksums = {name: _checksum(beside / f"{name}.npy") for name in ARRAYS}
        (beside / "about.json").write_text(json.dumps({"checksums": checksums, "notes": notes}), encoding="utf-8")
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
