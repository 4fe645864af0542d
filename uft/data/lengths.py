"""Lengths of the rows of a source, counted chunk by chunk: what its report says, and which rows are too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uft.data.templates import Encoded
from uft.errors import Problem, UftError

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


class Tally:
    """Counts of all rows, for the report and for what is told of those that are too long."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.before, self.after = Counter[str](), Counter[str]()  # rows, completions, tokens, supervised
        self.long = self.touched = self.longest = 0
        self.lengths = np.zeros(len(EDGES) + 1, np.int64)  # completions up to each edge, and beyond the last

    def count(self, before: Sequence[tuple[Encoded, ...]], after: Sequence[Fitted]) -> None:
        """A chunk, as it was and as the length policy left it."""
        lengths = np.asarray([one.length for row in before for one in row], np.int64)
        self.lengths += np.bincount(np.searchsorted(EDGES, lengths), minlength=len(self.lengths))
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.long += sum(max(one.length for one in row) > self.max_length for row in before)
        self.touched += sum(
            new is not None and _tokens(new) < _tokens(old) for old, new in zip(before, after, strict=True)
        )
        self.before += _sizes(before)
        self.after += _sizes([row for row in after if row is not None])

    def refuse_long(self, name: str) -> None:
        """UftError if there were rows that are too long."""
        if not self.long:
            return
        these = f"{self.long} of {self.before['rows']} rows are longer than train.max_length={self.max_length}"
        raise UftError(
            Problem(
                f"data.sources.{name}",
                f"{these}; the longest has {self.longest} tokens",
                advice=(
                    "leave them out or cut them:  data.too_long=drop|truncate",
                    f"or make room:  train.max_length={self.longest}",
                ),
            )
        )

    def report(self) -> LengthReport:
        edges = (*EDGES, max(self.longest, EDGES[-1] + 1))
        return LengthReport(
            rows=self.after["rows"],
            completions=self.after["completions"],
            tokens=self.after["tokens"],
            supervised=self.after["supervised"],
            touched=self.touched,
            dropped=self.before["rows"] - self.after["rows"],
            supervised_lost=self.before["supervised"] - self.after["supervised"],
            longest=self.longest,
            lengths=tuple((edge, int(count)) for edge, count in zip(edges, self.lengths, strict=True) if count),
        )


def _sizes(rows: Sequence[Sequence[Encoded]]) -> Counter[str]:
    return Counter(
        rows=len(rows),
        completions=sum(map(len, rows)),
        tokens=sum(map(_tokens, rows)),
        supervised=sum(int(one.supervised.sum()) for row in rows for one in row),
    )


def _tokens(row: Sequence[Encoded]) -> int:
    return sum(one.length for one in row)
