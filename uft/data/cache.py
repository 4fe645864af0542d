"""Tokenised rows on disk: flat arrays that are memory-mapped, one folder per key, published by rename.

The key is made of everything the tokens depend on, so nothing is ever stale. A folder that does not agree with its own
checksums is thrown away and made again, and that is said. Tokens of many rows go to the disk as they are made.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from uft.alive import doing
from uft.data.templates import Encoded
from uft.disk import clear_left

log = logging.getLogger(__name__)


class Corrupt(Exception):
    """A cache folder that is not what was written."""


@dataclass(frozen=True)
class EncodedRows(Sequence[tuple[Encoded, ...]]):
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
    def __getitem__(self, index: int) -> tuple[Encoded, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Encoded, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Encoded, ...] | list[tuple[Encoded, ...]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return tuple(self._completion(c) for c in range(self.rows[number], self.rows[number + 1]))

    def targets_of(self, index: int) -> np.ndarray:
        """(completions of row `index`,) int32: the targets of each."""
        return self.targets[self.rows[index] : self.rows[index + 1]]

    def _completion(self, number: int) -> Encoded:
        part = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        return Encoded(self.ids[part], self.supervised[part], int(self.prompts[number]))

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

    def add(self, rows: Iterable[tuple[int, Sequence[Encoded]]]) -> None:
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


@doing("tokens were read", moving=True)
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


@doing("tokens were written", moving=True)
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
