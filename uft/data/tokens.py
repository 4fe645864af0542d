"""Tokens: the rows of a source as ids with their supervised targets, checked, held to the longest length, and cached.

Nothing is cut in silence: what the length policy touched, and how many supervised tokens that cost, is in the report.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from uft.data import cache
from uft.data.cache import EncodedRows
from uft.data.identity import content_digest
from uft.data.rows import Row
from uft.data.templates import Encoded, Renderer, finish
from uft.errors import Problem, UftError

log = logging.getLogger(__name__)

CODE_VERSION = 2  # raise it when this code makes other tokens of the same rows
CHUNK = 1024  # conversations tokenised at once
SHOWN = 5  # rows with a wrong mask that are told one by one
EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)

Fitted = tuple[Encoded, ...] | None  # a row within the length, or None: dropped


@dataclass(frozen=True)
class LengthReport:
    """What the rows of a source came to, and what the length policy cost. Lengths are prompt + completion in tokens."""

    rows: int  # kept
    completions: int
    tokens: int
    supervised: int
    touched: int = 0  # rows with a completion that was cut
    dropped: int = 0
    supervised_lost: int = 0  # in cut and dropped rows
    longest: int = 0  # of all completions, before anything was cut
    lengths: tuple[tuple[int, int], ...] = ()  # (up to this length, completions), before anything was cut


@dataclass(frozen=True)
class Tokenized:
    """A source's rows with their tokens: `encoded[i]` holds one :class:`Encoded` per completion of `rows[i]`."""

    source: str
    rows: tuple[Row, ...]
    encoded: Sequence[tuple[Encoded, ...]]
    report: LengthReport
    cache: str  # hit, miss, rebuilt (it was corrupt) or off


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
    encoded = _encode(rows, renderer)
    _check(rows, encoded, renderer)
    fitted = [POLICIES[too_long](row, max_length) for row in encoded]
    if too_long == "error":
        _refuse_long(name, encoded, max_length)
    packed = EncodedRows.pack(row for row in fitted if row is not None)
    kept = [number for number, row in enumerate(fitted) if row is not None]
    report = _report(encoded, fitted, packed)
    if folder is not None:
        try:
            cache.save(folder, packed, {"kept": kept, "report": asdict(report)})
        except OSError as error:
            log.warning("tokens are not kept for the next run: %s", error)
            state = "off"
    return Tokenized(name, tuple(rows[number] for number in kept), packed, report, state)


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
    return Tokenized(name, tuple(rows[n] for n in notes["kept"]), encoded, LengthReport(**report), "hit")


def _encode(rows: Sequence[Row], renderer: Renderer) -> list[tuple[Encoded, ...]]:
    """Rows in chunks through the tokenizer, which is fastest on many texts at once."""
    flat = (((row.prompt, completion.turns), row.id) for row in rows for completion in row.completions)
    encoded: list[Encoded] = []
    while chunk := list(islice(flat, CHUNK)):
        encoded += renderer.encode_many([conversation for conversation, _ in chunk], [name for _, name in chunk])
    following = iter(encoded)
    return [tuple(islice(following, len(row.completions))) for row in rows]


# --- checks


def _check(rows: Sequence[Row], encoded: Sequence[Sequence[Encoded]], renderer: Renderer) -> None:
    """Stop when what would be learned makes no sense; the template is the likely cause, so it is named with the row."""
    bos = renderer.tokenizer.bos_token_id
    wrong = [
        (row, why)
        for row, of_row in zip(rows, encoded, strict=True)
        if (why := next((w for one in of_row if (w := _mask_fault(one, renderer.stop_ids, bos))), None))
    ]
    if not wrong:
        return
    problems = [
        Problem(f"row {row.id}", f"{why} under {renderer.name}", where="data.template") for row, why in wrong[:SHOWN]
    ]
    if len(wrong) > SHOWN:
        problems.append(Problem(f"... and {len(wrong) - SHOWN} more rows", "alike"))
    raise UftError(*problems)


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


def _refuse_long(name: str, encoded: Sequence[tuple[Encoded, ...]], max_length: int) -> None:
    lengths = [max(one.length for one in row) for row in encoded]
    long = sum(length > max_length for length in lengths)
    if not long:
        return
    longest = max(lengths)
    these = f"{long} of {len(lengths)} rows are longer than train.max_length={max_length}"
    raise UftError(
        Problem(
            f"data.sources.{name}",
            f"{these}; the longest has {longest} tokens",
            advice=(
                "leave them out or cut them:  data.too_long=drop|truncate",
                f"or make room:  train.max_length={longest}",
            ),
        )
    )


def _report(before: Sequence[tuple[Encoded, ...]], after: Sequence[Fitted], packed: EncodedRows) -> LengthReport:
    lengths = np.asarray([one.length for row in before for one in row], np.int64)
    edges = [*EDGES, max(int(lengths.max(initial=0)), EDGES[-1] + 1)]
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    supervised = sum(int(one.supervised.sum()) for row in before for one in row)
    kept = int(packed.supervised.sum())
    return LengthReport(
        rows=len(packed),
        completions=len(packed.prompts),
        tokens=len(packed.ids),
        supervised=kept,
        touched=sum(new is not None and _tokens(new) < _tokens(old) for old, new in zip(before, after, strict=True)),
        dropped=sum(new is None for new in after),
        supervised_lost=supervised - kept,
        longest=int(lengths.max(initial=0)),
        lengths=tuple((edge, int(count)) for edge, count in zip(edges, counts, strict=True) if count),
    )


def _tokens(row: Sequence[Encoded]) -> int:
    return sum(one.length for one in row)
