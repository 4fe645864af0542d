"""Sources: the named data sets of a mixture as rows, some of them held out for evaluation.

Every fault of any source, and every row that cannot be read, is told at once. From top to bottom: loading sources,
parsing with a cache, places (files, folders, the hub, the playground), and readers of files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import uft
from uft.data import formats
from uft.data.formats import Format
from uft.data.messages import Unreadable, facts_of
from uft.data.readers import READERS, Found, reader_of, suffix_of, with_names
from uft.data.rows import Kind, Row, content_digest, oddities, slice_bounds
from uft.data.table import Corrupt, RowCollector, RowTable, hold_out, kinds, open_table, row_schema
from uft.data.unread import FEEDBACK, FileFormat, Said, Unread, unread_feedback, unread_meaning
from uft.errors import BAD_REQUEST, Problem, UftError, did_you_mean, first_line, tame
from uft.heartbeat import activity, beat, report_progress
from uft.runs import cache_root, file_digest

if TYPE_CHECKING:
    from uft.config.schema import Data, Source

log = logging.getLogger(__name__)

SPELLED_OUT = 20  # bad rows told one by one; the rest are counted
CODE_VERSION = 10  # raise it when this code makes other rows of the same files, or lays them out otherwise
CACHED_BYTES = 1 << 17  # smaller files are parsed sooner than looked up
KEPT_BYTES = 4 << 20  # records of larger files are not all in memory


class BadRow(NamedTuple):
    """A row that cannot be used: `where` is `file:line` (the item's number in files without lines)."""

    where: str
    why: str
    advice: Sequence[str] = ()


@dataclass
class Omissions:
    """The parts of a place that its rows do not hold, and their oddities. They are told before a run begins."""

    refused: list[Problem] = field(default_factory=list)  # places and files that cannot be read as they are
    bad: list[BadRow] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # column -> rows in which it says something
    files: list[str] = field(default_factory=list)  # of a folder: those that were left out
    oddities: Counter[str] = field(default_factory=Counter)  # see `uft.data.rows.oddities`

    def record(self) -> dict[str, Any]:
        """The columns and files as they stand in `data.json`."""
        unread = {tame(column): count for column, count in self.unread.most_common()}
        return {"unread": unread, "left_out": [tame(name) for name in self.files]}

    def add(self, other: Omissions, same_folder: bool) -> None:
        """Those of another place too; of one folder read twice, files that were left out both times."""
        self.refused += other.refused
        self.bad += other.bad
        self.unread += other.unread
        self.oddities += other.oddities
        self.files = [f for f in self.files if f in other.files] if same_folder else self.files + other.files


@dataclass(frozen=True)
class LoadedSource:
    """A source, read and split. `digest` is the sha256 of the training rows' content.

    The rows of a large one lie on disk (:mod:`uft.data.table`): iterate over them rather than list them.
    """

    name: str
    path: str
    rows: Sequence[Row]
    held_out: Sequence[Row]
    digest: str
    omitted: Omissions = field(default_factory=Omissions)
    checker: str | None = None
    apart: bool = False  # held-out rows lie in a place of their own, and are numbered there

    @property
    def kinds(self) -> dict[Kind, int]:
        """How many training rows there are of each kind of feedback."""
        return kinds(self.rows)


@activity("rows were read", moving=True)
def load_sources(settings: Data) -> list[LoadedSource]:
    """All sources of a mixture, sorted by name.

    Raises :class:`UftError` with every source that cannot be loaded and, unless `bad_rows` is drop, every bad row.
    """
    if not settings.sources:
        raise UftError(
            Problem("data.sources", "this mixture has no sources"),
            footer="Add one:  uft train data=files +data.sources.mine.path=x.jsonl",
        )
    loaded = [_load(name, source, settings) for name, source in sorted(settings.sources.items())]
    problems = [problem for one in loaded for problem in one.omitted.refused]
    bad = list({row[:2]: row for one in loaded for row in one.omitted.bad}.values())  # of a file read twice, once
    strict = settings.bad_rows == "error"
    if strict:
        problems += [Problem(row.where, row.why, advice=tuple(row.advice)) for row in bad[:SPELLED_OUT]]
        if len(bad) > SPELLED_OUT:
            problems.append(Problem(f"... and {len(bad) - SPELLED_OUT} more", "rows that cannot be read"))
    for one in loaded:
        name, unusable = one.name, one.omitted.bad
        if one.omitted.refused:
            continue
        if not one.rows and one.held_out and not one.apart:
            own = settings.sources[name].holdout
            amount = settings.holdout if own is None else own
            key, why = f"data.sources.{name}.holdout={amount:g}", "leaves no row to train on"
            line = f"evaluate on no row of it:  data.sources.{name}.holdout=0"
            problems.append(Problem(key, why, advice=(line,)))
        elif not one.rows and not (strict and unusable):
            why = f"no row could be used: {unusable[0].why}" if unusable else "there are no rows in it"
            advice = tuple(unusable[0].advice) if unusable else ()
            problems.append(Problem(f"data.sources.{name}.path={one.path}", why, advice=advice))
    if problems:
        good = bad and strict and any(one.rows or one.held_out for one in loaded)  # else it would leave none
        raise UftError(*problems, footer="Train on the good rows alone:  data.bad_rows=drop" if good else "")
    return loaded


def _load(name: str, source: Source, data: Data) -> LoadedSource:
    """One source; without rows where it is refused, with all reasons and all its bad rows."""
    problems = formats.check_mapping(source.columns, name, source.facts)
    scores = source.score_range
    if scores is not None and not (len(scores) == 2 and scores[0] < scores[1]):
        why = "is not two numbers, the lowest and the highest score"
        problems.append(Problem(f"data.sources.{name}.score_range={list(scores)}", why))
    amount = data.holdout if source.holdout is None else source.holdout
    place = Place(source.path, source.split, source.subset, source.revision, f"data.sources.{name}.path")
    apart = None  # where evaluation rows of their own lie: as configured, or the test split that builtin data has
    if source.eval_path is not None:
        key = f"data.sources.{name}.eval_path"
        apart = replace(place, path=source.eval_path, split=source.eval_split or source.split, key=key)
    elif source.eval_split is not None:
        apart = replace(place, split=source.eval_split)
    elif source.path.startswith(_BUILTIN) and source.holdout is None:
        apart = replace(place, split="test")
    is_valid = not problems  # else only rows that are bad whatever their columns mean can be told
    rows, omitted = _parse(name, source, place, None if source.part else source.limit, data.cache, is_valid)
    held_out: Sequence[Row] = ()
    if apart is not None:
        held_out, more = _parse(name, source, apart, None, data.cache, is_valid)
        omitted.add(more, same_folder=apart.path == place.path)
    omitted.refused = list(dict.fromkeys([*problems, *omitted.refused]))
    if omitted.refused:
        return LoadedSource(name, source.path, (), (), "", omitted)
    if apart is None:
        rows, held_out = hold_out(rows, amount)
    if source.part:  # of what is not held out, so that all parts hold out the same rows
        span = slice_bounds(source.part, len(rows))
        if span is None or span[0] == span[1]:
            why = f"is no slice r/n of its {len(rows):,} training rows"
            omitted.refused.append(Problem(f"data.sources.{name}.part={source.part}", why))
            return LoadedSource(name, source.path, (), (), "", omitted)
        if span[2]:
            omitted.unread["rows after the last part"] = span[2]
        rows = rows[span[0] : span[1]][: source.limit]
    digest = content_digest(rows)
    return LoadedSource(name, source.path, rows, held_out, digest, omitted, source.checker, apart is not None)


# --- Parsing: the records of a place as rows. The rows of large files are cached, so that every further process maps
# the first one's table instead of parsing again.


def _parse(
    name: str, source: Source, place: Place, limit: int | None, cache: str | None, is_valid: bool
) -> tuple[Sequence[Row], Omissions]:
    """The rows of a place, and what it has beside them; `is_valid`: whether the settings say how to read them."""
    folder = cache_root(cache) / "rows"
    try:
        tables, left_out = open_place(place)
    except UftError as error:
        return (), Omissions(list(error.problems))
    files = [table.file for table in tables if table.file is not None]
    key = None
    if is_valid and files and sum(file.stat().st_size for file in files) >= CACHED_BYTES:
        digests = [[str(file), file_digest(file)] for file in files]  # of their content
        scores = source.score_range and list(source.score_range)
        settings = [dict(source.columns), source.kind, scores, limit, source.facts]
        parts = json.dumps([uft.__version__, CODE_VERSION, settings, digests], sort_keys=True)
        key = hashlib.sha256(parts.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        try:
            table, notes = open_table(folder / key, row_schema())
            bad = [BadRow(*row) for row in notes["bad"]]
            omitted = Omissions([], bad, Counter(notes["unread"]), left_out, Counter(notes["odd"]))
            return RowTable(name, table)[:limit], omitted
        except FileNotFoundError:
            pass
        except Corrupt as error:
            log.warning("row cache %s is corrupt (%s): reading the rows again", folder / key, error)
            shutil.rmtree(folder / key, ignore_errors=True)
    good, omitted = RowCollector(name, limit, folder, key), Omissions(files=left_out)
    for records in tables:
        told = len(omitted.refused)
        try:
            _parse_table(name, source, records, good, omitted, is_valid)
        except UftError as error:  # about the file: the rows after that are not known
            if error.code != BAD_REQUEST:  # about the disk that rows are kept on
                raise
            omitted.refused += error.problems
        for number, problem in enumerate(omitted.refused[told:] if len(tables) > 1 else (), told):
            typed = any("data.sources." in line for line in problem.advice)
            every = ("these lines are for all files of the folder: one of another layout needs a place of its own",)
            more = every if typed else ()
            omitted.refused[number] = replace(problem, where=records.name, advice=(*problem.advice, *more))
    if omitted.refused:
        return (), omitted
    return good.rows({"bad": omitted.bad, "unread": omitted.unread, "odd": omitted.oddities}), omitted


def _parse_table(
    name: str, source: Source, records: RecordTable, good: RowCollector, omitted: Omissions, is_valid: bool
) -> None:
    """Add the rows of one file to `good`; all else, and why the file is refused, to `omitted`. Raises UftError where
    the file cannot be read to its end."""
    scan, form, facts = records.scan, None, source.facts
    said = scan.said.renamed(source.columns, source.kind)
    if scan.count and is_valid:
        try:
            form = _recognise(name, source, scan, said)
        except UftError as error:
            omitted.refused += error.problems
    score_range = (source.score_range[0], source.score_range[1]) if is_valid and source.score_range else None
    left = Unread(texts=said.texts, words=said.words)
    for number, record in records:
        report_progress(number, scan.count, f"rows of {name}")
        where = f"{records.name}:{number}"
        if isinstance(record, str):  # why the reader could make no record of it
            omitted.bad.append(BadRow(where, record, []))
            continue
        if form is None:
            continue
        fields = formats.rename(record, source.columns, source.kind)
        fields = formats.from_text(fields) if records.textual else fields
        try:
            row = form.read(fields, score_range)
        except Unreadable as error:
            advice = [line.replace("{source}", f"data.sources.{name}") for line in error.advice]
            if other := formats.of_another_kind(form, fields):
                advice.append(f"it has the columns of {other}: a file holds one kind of rows, so give those their own")
            omitted.bad.append(BadRow(where, str(error), advice))
            continue
        good.add(replace(row, facts=facts_of(fields, facts)) if facts else row)
        left.add_row(form, {n: value for n, value in fields.items() if n not in facts}, row, source.kind is not None)
        omitted.oddities.update(oddities(row, fields.get("sampling")))
    omitted.unread += left.rows
    if form is not None:
        file = FileFormat(form, name, source.columns, scan.columns)
        feedback = (*unread_feedback(file, said), *unread_feedback(file, left))  # of columns, then also within them
        problems = (None if source.kind else next(iter(feedback), None), unread_meaning(file, left))
        omitted.refused += [one for one in problems if one is not None]


def _recognise(name: str, source: Source, table: Scan, said: Said) -> Format:
    """The format, by the columns that at least half of the records have: one stray or missing key is a row's fault.

    Raises UftError where there is none. `said`: the table's under our names; columns for a checker are taken out of it.
    """
    why, listed = "no such column in the data", f"columns: {_listing(table.columns)}"
    missing = {  # an empty name: the field is left unread
        f"{ours}={theirs}": (*did_you_mean(theirs, sorted(table.columns)), listed)
        for ours, theirs in source.columns.items()
        if theirs and theirs not in table.columns
    }
    if missing:
        raise UftError(*(Problem(f"data.sources.{name}.columns.{what}", why, advice=a) for what, a in missing.items()))
    if source.facts and not any(map(said.rows.get, source.facts)):
        why = f"reads {', '.join(source.facts)}, and the data has no such column"
        key = f"data.sources.{name}"
        advice = (
            f"map one:  {key}.columns.{source.facts[0]}=THEIR_COLUMN",
            f"judge nothing:  {key}.checker=null",
            listed,
        )
        raise UftError(Problem(f"{key}.checker={source.checker}", why, advice=advice))
    for column in source.facts:
        said.rows.pop(column, None)
    common = {c: c for c, count in table.columns.items() if 2 * count >= table.count}
    usual = formats.rename(common, source.columns, source.kind)
    columns = {column for column in usual if said.rows.get(column) or column not in FEEDBACK}
    mapped = [ours for ours, theirs in source.columns.items() if theirs and ours not in source.facts]
    return formats.recognise(columns, source.kind, mapped, name)


# --- Places: files, folders, the hub and the playground. `datasets` is imported when a path asks for it.


@dataclass
class Scan:
    """The first reading of a table."""

    columns: Counter[str] = field(default_factory=Counter)  # column -> records that have it
    said: Said = field(default_factory=Said)  # by column
    count: int = 0  # records that could be read
    kept: list[Found] = field(default_factory=list)  # all of them, of a small file


@dataclass(frozen=True)
class RecordTable:
    """The records of one file or split; they share one format.

    They are read once to count their columns. Those of a small file are kept, others read again, so that memory holds
    the rows made of them and not both.
    """

    name: str  # of the file or data set
    find: Callable[[], Iterable[Found]]
    file: Path | None = None
    textual: bool = False  # every value is a text cell (CSV)
    small: bool = False  # so that its records can be kept

    def __iter__(self) -> Iterator[Found]:
        return iter(self.scan.kept if self.small else self.find())

    @cached_property
    def scan(self) -> Scan:
        scan = Scan()
        for number, record in self.find():
            beat()
            if isinstance(record, dict):
                scan.columns.update(record.keys())
                for column, value in record.items():
                    scan.said.add(column, value, self.textual)
                scan.count += 1
            if self.small:
                scan.kept.append((number, record))
        return scan


@dataclass(frozen=True)
class Place:
    """Where to read: a source's `path` and the settings beside it. `key` is the setting that errors point at."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    key: str = "data.sources.NAME.path"

    def problem(self, why: str, *advice: str) -> UftError:
        return UftError(Problem(f"{self.key}={self.path}", why, advice=advice))


_BUILTIN = "builtin:"
_SPLIT_WORDS = {
    "train": "train training",
    "test": "test testing eval evaluation heldout held-out held_out holdout",
    "validation": "validation valid val dev",
}
_SPLITS = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
_SPLIT_NAME = re.compile(
    rf"(?:^|[-_. ])({'|'.join(sorted(_SPLITS, key=len, reverse=True))})(?:set)?(?=[-_. \d]|$)", re.IGNORECASE
)
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


_HOW = ("kind", "columns", "score_range", "holdout", "eval_path", "eval_split", "checker", "part")
"""Settings of a source that its rows may not suit; the program's own come with none of them but their checker."""


def can_be_judged(source: Mapping[str, Any]) -> bool:
    """Whether a source has rows of this machine that may be bad: none of the program's own are, read as shipped."""
    path = source["path"]
    if path.startswith(_BUILTIN):
        return any(source[key] for key in _HOW if source[key] != "playground") or source["split"] != "train"
    return os.path.lexists(os.path.expanduser(path)) or looks_local(path)


def looks_local(path: str) -> bool:
    """Whether a path that does not exist is meant as a file: by its suffix, or since it cannot be a hub id."""
    return suffix_of(Path(path)) in (*READERS, ".txt", ".zip", ".arrow") or not _HUB_ID.fullmatch(path)


def open_place(place: Place) -> tuple[list[RecordTable], list[str]]:
    """The tables of a place in a stable order, and the names of a folder's files that are in none of them.

    Raises :class:`UftError` when it cannot be opened.
    """
    if place.path.startswith(_BUILTIN):
        return [_builtin(place)], []
    path = Path(os.path.expanduser(place.path))
    if os.path.isfile(path):  # Path's own methods raise for names that are too long, or hold a NUL
        return [_file(path, place)], []
    if os.path.isdir(path):
        return _folder(path, place)
    if os.path.islink(path):
        raise place.problem("this link leads nowhere, or in a circle")
    if os.path.exists(path):
        raise place.problem("is neither a file nor a folder")
    if not looks_local(place.path):
        return [_hub(place.path, place)], []
    advice = [f"the folder {path.parent} does not exist either"]
    if os.path.isdir(path.parent):
        beside = sorted(os.listdir(path.parent)) if os.access(path.parent, os.R_OK) else []
        advice = list(did_you_mean(path.name, beside, shown=lambda name: path.parent / name))
    raise place.problem("no such file or folder", *advice)


def _file(path: Path, place: Place) -> RecordTable:
    reader = reader_of(path)
    if reader is None:
        raise place.problem(f"cannot read files of type {path.suffix or '(none)'}", f"types: {' '.join(READERS)}")
    before = path.stat()

    def find() -> Iterator[Found]:
        try:
            yield from reader(path)
        except Exception as error:  # a broken Parquet file, no permission: the reader's own words say it best
            raise place.problem(f"cannot be read: {first_line(error)}") from error
        after = path.stat()
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
            raise place.problem("changed while it was read", "wait until the program that writes it is done")

    suffix = suffix_of(path)
    small = before.st_size <= KEPT_BYTES and path.suffix == suffix
    return RecordTable(str(path), find, path, textual=suffix in (".csv", ".tsv"), small=small)


def _folder(path: Path, place: Place) -> tuple[list[RecordTable], list[str]]:
    """A folder written by `datasets`, a hub repository's layout, or plain files in the order of their names."""
    if not os.access(path, os.R_OK | os.X_OK):
        raise place.problem("cannot be read: no permission")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return [_saved_dataset(path, place)], []
    beside = sorted(path.iterdir())
    files = [p for p in beside if p.is_file() and reader_of(p) and not p.name.startswith(".")]
    if beside and all(p.name.startswith(".") for p in beside):
        raise place.problem(f"holds hidden files alone, which are not read: {_listing({p.name for p in beside})}")
    if not files or _is_repository(path):
        return [_hub(str(path), place)], []
    # names may tell splits apart (train-00.jsonl, rows_test.jsonl); else all files are of any split
    stems = {file: re.sub("(?<=[a-z])(?=[A-Z])", "_", file.stem) for file in files}
    found = {file: match for file in files if (match := _SPLIT_NAME.search(stems[file]))}
    named, wanted = {file: _SPLITS[m[1].lower()] for file, m in found.items()}, _SPLITS.get(place.split, place.split)
    unnamed = [file for file in files if file not in named]
    apart = len({*named.values()}) > 1 or any(not match.start() for match in found.values())
    if wanted == "train" and unnamed and wanted not in named.values():
        files = unnamed
    elif apart or (named and wanted != "train" and (unnamed or wanted in named.values())):
        files = [file for file in files if named.get(file) == wanted]
    if not files:
        splits = f"splits: {_listing(set(named.values()))}"
        raise place.problem(f"no file of split {place.split} in this folder", splits)
    same: dict[str, list[str]] = {}
    for file in files:
        name = file.name.lower()
        same.setdefault(name[: name.rindex(suffix_of(file))], []).append(file.name)
    if twice := [names for names in same.values() if names[1:]]:
        why = "; ".join(f"{' and '.join(names)} may be the same rows in two files" for names in twice)
        one, both = path / twice[0][0], ",".join(str(path / name) for name in twice[0])
        raise place.problem(why, f"read one:  {place.key}={one}", f"read both:  data=[{both}]")
    unread = (p for p in beside if p not in files and (reader_of(p) or not p.name.startswith(".")))
    empty = (p for p in files if not p.stat().st_size)
    return [_file(file, place) for file in files], sorted(p.name for p in (*unread, *empty))


def _is_repository(path: Path) -> bool:
    """Whether a folder is laid out as a data set of the hub: its README names the files, or they lie in folders."""
    card = path / "README.md"
    if not card.is_file():
        return False
    named = re.match(rb"---\s*\n(?:(?!---).*\n)*?configs:", card.read_bytes())
    folders = (folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    return bool(named) or any(p.is_file() and reader_of(p) for folder in folders for p in folder.iterdir())


def _saved_dataset(path: Path, place: Place) -> RecordTable:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise place.problem(f"this datasets folder cannot be read: {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if place.split not in loaded:
            raise place.problem(f"no split {place.split} in this datasets folder", f"splits: {_listing(loaded)}")
        loaded = loaded[place.split]
    return RecordTable(str(path), partial(_named, loaded, loaded.features))


def hub_answers() -> bool:
    """One look before the hub's client starts its half minute of retries; without an answer, its cache alone is read.

    Behind a proxy nothing can be said, and the client tries.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return False
    if any(os.environ.get(one) for one in ("HTTPS_PROXY", "https_proxy")):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
        return True
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # the worker inherits it
        for module in ("huggingface_hub.constants", "datasets.config"):  # which read it as they are imported
            if module in sys.modules:
                vars(sys.modules[module])["HF_HUB_OFFLINE"] = True
        return False


def _hub(name: str, place: Place) -> RecordTable:
    local = Path(name).is_dir()
    if not local:
        hub_answers()
    import datasets

    progress = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, place.subset, split=place.split, revision=place.revision)
    except Exception as error:  # of the hub, the network or a builder; a user cannot act on a traceback
        why = "datasets cannot read this folder" if local else "not found here, and not from the hub"
        advice = () if local else ("without a network, give a file, a folder or builtin:NAME",)
        while error.__cause__ and local:  # "an error occurred", in which file and why
            error = error.__cause__  # type: ignore[assignment]
        raise place.problem(f"{why}: {first_line(error)}", *advice) from error
    finally:
        if progress:
            datasets.enable_progress_bars()
    return RecordTable(name, partial(_named, loaded, loaded.features))


def _named(records: Iterable[dict[str, Any]], features: Mapping[str, Any]) -> Iterator[Found]:
    """Records of `datasets`, with the names of classes (`ClassLabel`) in the place of their numbers."""
    names = {column: one.names for column, one in features.items() if getattr(one, "names", None)}
    return enumerate((with_names(record, names) for record in records), start=1)


def _builtin(place: Place) -> RecordTable:
    family, _, name = place.path.removeprefix(_BUILTIN).partition("/")
    if family != "playground" or not name:
        raise place.problem("no such builtin data", "builtin data is named  builtin:playground/NAME")
    from uft.playground import world

    if name not in world.SOURCES:
        names = _listing(f"{_BUILTIN}{family}/{one}" for one in world.SOURCES)
        raise place.problem("no such builtin data", f"choices: {names}")
    if place.split not in ("train", "test"):
        raise place.problem(f"builtin data has no split {place.split}", "splits: test, train")
    records = world.records(name, "test" if place.split == "test" else "train")
    return RecordTable(place.path, partial(enumerate, records, 1))


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"
