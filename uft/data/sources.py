"""Sources: the named data sets of a mixture as rows, some of them kept for evaluation.

Everything that is wrong with any source, and every row that cannot be read, is told at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from uft.alive import doing, sign
from uft.config.schema import Data, Source
from uft.data import formats
from uft.data.files import BadRow, Table
from uft.data.formats import Format
from uft.data.gather import Gathered
from uft.data.identity import content_digest, prompt_hash
from uft.data.many import kinds, pick, prompt_words
from uft.data.messages import Unreadable
from uft.data.parsing import Fields
from uft.data.readers import Place, read
from uft.data.rows import Kind, Row
from uft.disk import cache_root
from uft.errors import Problem, UftError

SPELLED_OUT = 20  # bad rows told one by one; the rest are counted


@dataclass(frozen=True)
class LoadedSource:
    """A source, read and split. `digest` is the sha256 of the training rows' content.

    The rows of a large one lie on disk (:mod:`uft.data.store`): go through them rather than list them.
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


@doing("rows were read", moving=True)
def load_sources(data: Any) -> list[LoadedSource]:
    """All sources of `data` (a `schema.Data`, or a mapping with its keys), sorted by name.

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
    for one in loaded:
        if not one.rows and one.held_out and not one.apart:
            own = settings.sources[one.name].holdout
            amount = settings.holdout if own is None else own
            problems.append(Problem(f"data.sources.{one.name}.holdout={amount:g}", "leaves no row to train on"))
        elif not one.rows and not (told and one.dropped):
            problems.append(_nothing_left(one))
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
    good = Gathered(name, limit, cache_root(cache))
    bad: list[BadRow] = []
    for table in read(place):
        for item in _parsed(name, source, table):
            if isinstance(item, BadRow):
                bad.append(item)
            else:
                good.add(item)
    return good.rows(), bad


def _parsed(name: str, source: Source, table: Table) -> Iterator[Fields | BadRow]:
    if not table.records:
        yield from (found for found in table.find() if isinstance(found, BadRow))
        return
    form = _recognise(name, source, table)
    low_high = (source.score_range[0], source.score_range[1]) if source.score_range else None
    for found in table.find():
        sign()
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
    given = {"name": "data", **data}
    sources = {name: Source(**source) for name, source in given.pop("sources", {}).items()}
    return Data(**given, sources=sources)
