"""Records out of files, folders, the hub and the playground, each with its place, so that a bad one can be found.

`uft.data.files` reads single files; datasets is imported when a path asks for it.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from uft.data.files import READERS, Found, Record, Table, first_line, read_csv
from uft.errors import Problem, UftError


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


def is_local(path: str) -> bool:
    """Whether a source's path is read from this machine, not from the hub."""
    return path.startswith(_BUILTIN) or os.path.lexists(os.path.expanduser(path)) or _looks_local(path)


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
