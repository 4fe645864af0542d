"""Tokens: the rows of a source as ids with their supervised targets, checked, held to the longest length, and cached.

Nothing is cut in silence: what the length policy touched, and how many supervised tokens that cost, is in the report.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from uft.alive import doing, sign
from uft.data import cache
from uft.data.cache import EncodedRows, Packer
from uft.data.identity import content_digest
from uft.data.lengths import Fitted, LengthReport, Tally
from uft.data.many import pick
from uft.data.rows import Row
from uft.data.templates import Encoded, Renderer, finish
from uft.errors import Problem, UftError

log = logging.getLogger(__name__)

CODE_VERSION = 3  # raise it when this code makes other tokens of the same rows
CHUNK = 1024  # conversations tokenised at once, or a few more: a row is not divided
SHOWN = 5  # rows with a wrong mask that are told one by one


@dataclass(frozen=True)
class Tokenized:
    """A source's rows with their tokens: `encoded[i]` holds one :class:`Encoded` per completion of `rows[i]`."""

    source: str
    rows: Sequence[Row]
    encoded: EncodedRows
    report: LengthReport
    cache: str  # hit, miss, rebuilt (it was corrupt) or off


@doing("rows were tokenised")
def tokenize(
    name: str,
    rows: Sequence[Row],
    renderer: Renderer,
    max_length: int,
    too_long: str = "error",
    cache_dir: Path | None = None,
) -> Tokenized:
    """The rows of one source as tokens.

    `too_long`: error, drop (the row), truncate (the completion's end; a row left with nothing to learn is dropped).
    Raises :class:`UftError` for rows that are too long under error, or whose supervised tokens make no sense.
    """
    folder = cache_dir / "tokens" / _key(rows, renderer, max_length, too_long) if cache_dir is not None else None
    state = "off" if folder is None else "miss"
    if folder is not None:
        try:
            return _recalled(name, rows, *cache.load(folder))
        except FileNotFoundError:
            pass
        except cache.Corrupt as error:
            cache.discard(folder, error)
            state = "rebuilt"
    with Packer(folder) as packer:
        report = _encode(name, rows, renderer, max_length, too_long, packer)
        if folder is not None:
            try:
                return _kept(name, rows, cache.save(packer, folder, {"report": asdict(report)}), report, state)
            except OSError as error:
                log.warning("tokens are not kept for the next run: %s", error)
                state = "off"
        return _kept(name, rows, packer.packed(), report, state)


def _kept(name: str, rows: Sequence[Row], encoded: EncodedRows, report: LengthReport, state: str) -> Tokenized:
    return Tokenized(name, pick(rows, encoded.numbers), encoded, report, state)  # type: ignore[arg-type]


def tokenize_all(
    rows: Mapping[str, Sequence[Row]], renderer: Renderer, max_length: int, too_long: str, cache_dir: Path | None
) -> list[Tokenized]:
    """:func:`tokenize` for several sources, with the problems of all of them in one :class:`UftError`."""
    done: list[Tokenized] = []
    problems: list[Problem] = []
    for name, of_source in rows.items():
        try:
            done.append(tokenize(name, of_source, renderer, max_length, too_long, cache_dir))
        except UftError as error:
            problems += error.problems
    if problems:
        raise UftError(*problems)
    return done


def _key(rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str) -> str:
    parts = (content_digest(rows), renderer.digest, str(max_length), too_long, str(CODE_VERSION))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _recalled(name: str, rows: Sequence[Row], encoded: EncodedRows, notes: dict[str, Any]) -> Tokenized:
    report = dict(notes["report"])
    report["lengths"] = tuple((edge, count) for edge, count in report["lengths"])
    return _kept(name, rows, encoded, LengthReport(**report), "hit")


def _encode(
    name: str, rows: Sequence[Row], renderer: Renderer, max_length: int, too_long: str, packer: Packer
) -> LengthReport:
    """Tokenise, check, fit and pack, chunk by chunk: what is told of all rows is counted on the way."""
    faults, tally = _Faults(renderer), Tally(max_length)
    fit, number = POLICIES[too_long], 0
    for chunk in _chunks(rows):
        sign()
        encoded = _encoded(chunk, renderer)
        faults.look(chunk, encoded)
        fitted = [fit(row, max_length) for row in encoded]
        tally.count(encoded, fitted)
        packer.add((n, row) for n, row in enumerate(fitted, number) if row is not None)
        number += len(chunk)
    faults.refuse()
    if too_long == "error":
        tally.refuse_long(name)
    return tally.report()


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, as many at once as have about CHUNK conversations."""
    chunk: list[Row] = []
    conversations = 0
    for row in rows:
        chunk.append(row)
        conversations += len(row.completions)
        if conversations >= CHUNK:
            yield chunk
            chunk, conversations = [], 0
    if chunk:
        yield chunk


def _encoded(rows: Sequence[Row], renderer: Renderer) -> list[tuple[Encoded, ...]]:
    """All at once through the tokenizer, which is fastest so."""
    conversations = [(row.prompt, completion.turns) for row in rows for completion in row.completions]
    names = [row.id for row in rows for _ in row.completions]
    following = iter(renderer.encode_many(conversations, names))
    return [tuple(islice(following, len(row.completions))) for row in rows]


# --- checks


class _Faults:
    """Rows of which what would be learned makes no sense; the template, a likely cause, is named with them."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.shown: list[Problem] = []
        self.count = 0

    def look(self, rows: Sequence[Row], encoded: Sequence[Sequence[Encoded]]) -> None:
        stops, bos = self.renderer.stop_ids, self.renderer.tokenizer.bos_token_id
        for row, of_row in zip(rows, encoded, strict=True):
            why = next((why for one in of_row if (why := _mask_fault(one, stops, bos))), None)
            if why is None:
                continue
            self.count += 1
            if self.count <= SHOWN:
                self.shown.append(Problem(f"row {row.id}", f"{why} under {self.renderer.name}", where="data.template"))

    def refuse(self) -> None:
        """UftError if there were any."""
        if self.count > SHOWN:
            raise UftError(*self.shown, Problem(f"... and {self.count - SHOWN} more rows", "alike"))
        if self.count:
            raise UftError(*self.shown)


def _mask_fault(encoded: Encoded, stop_ids: Iterable[int], bos: int | None) -> str | None:
    if not encoded.supervised[1:].any():
        return "no token is supervised"
    if encoded.supervised.all():
        return "every token is supervised, the prompt's too"
    if int(encoded.ids[-1]) not in stop_ids:
        return "the stop token is not supervised, so the model would never learn to stop"
    if bos is not None and encoded.ids[0] == encoded.ids[1] == bos:
        return "the text begins with two beginning-of-text tokens"
    return None


# --- length


def shorten(encoded: Encoded, max_length: int) -> Encoded | None:
    """The first `max_length` tokens, ending at a supervised one; None if nothing supervised is left."""
    if encoded.length <= max_length:
        return encoded
    cut = finish(encoded.ids[:max_length], encoded.supervised[:max_length])
    return cut if cut.targets else None


def _whole(row: tuple[Encoded, ...], max_length: int) -> Fitted:
    return row


def _drop(row: tuple[Encoded, ...], max_length: int) -> Fitted:
    return row if all(one.length <= max_length for one in row) else None


def _truncate(row: tuple[Encoded, ...], max_length: int) -> Fitted:
    cut = [shorten(one, max_length) for one in row]
    whole = tuple(one for one in cut if one is not None)
    return whole if len(whole) == len(cut) else None


POLICIES: dict[str, Callable[[tuple[Encoded, ...], int], Fitted]] = {
    "error": _whole,
    "drop": _drop,
    "truncate": _truncate,
}
