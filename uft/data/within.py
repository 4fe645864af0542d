"""Where pieces of a text lie in it: in characters, and in the tokens that a tokenizer made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding

Span = tuple[int, int]  # characters [start, end)
Skeleton = tuple[list[str], list[int]]  # texts around the contents (one more than those), and whose content is between
NEAR = 3  # characters


def fill(skeleton: Skeleton | None, contents: Sequence[str], text: str) -> dict[int, Span] | None:
    """Where each content lies if the skeleton filled with `contents` is exactly `text`; else None."""
    assert skeleton is not None
    around, whose = skeleton
    parts, places, length = [around[0]], {}, len(around[0])
    for number, after in zip(whose, around[1:], strict=True):
        places[number] = (length, length + len(contents[number]))
        parts += [contents[number], after]
        length = places[number][1] + len(after)
    return places if "".join(parts) == text else None


def tokens(encoding: Encoding, span: Span) -> Span:
    """[first, last) of the tokens that hold a character of `span`.

    A few look-ups do for most; where they do not settle it, all offsets are looked through. A token that stands for
    trimmed white space, and so for no character, lies at the end of what it stands for.
    """
    start, end = span
    first, last = _near(encoding, start), _near(encoding, end)
    if (
        first is not None
        and last is not None
        and (first == 0 or characters(encoding, first - 1)[1] <= start)
        and (last == 0 or characters(encoding, last - 1)[0] < end)
        and start < characters(encoding, first)[1]
        and end <= characters(encoding, last)[0]
    ):
        return first, last
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))


def _near(encoding: Encoding, place: int) -> int | None:
    """A token at that character or, over white space that is in none, soon after it."""
    for character in range(place, place + NEAR):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return None


def characters(encoding: Encoding, token: int) -> Span:
    span = encoding.token_to_chars(token)
    assert span is not None, "only tokens that a tokenizer adds on its own stand for nothing, and none were asked for"
    return span


def runs(mask: np.ndarray) -> list[Span]:
    """[start, end) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
