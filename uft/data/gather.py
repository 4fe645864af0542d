"""Gathering: what records say, made the rows of a source; on disk once it is much.

Scored completions of one prompt become one row, where the first of them stood, since pairwise objectives compare the
best with the worst completion of a prompt. Everything else is a row as it is.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft.data.identity import Says
from uft.data.parsing import Fields
from uft.data.rows import Row

if TYPE_CHECKING:
    import numpy as np

    from uft.data.store import StoredRows, Writer

LARGE_ROWS = 20_000  # rows that a source may have in memory: about 30 MB
LARGE_TEXT = 20_000_000  # characters of all of them


class Gathered:
    """The rows of the source `name`, at most `limit` of them; `folder` is where they are stored if they are many.

    Its methods raise UftError where the disk refuses them.
    """

    def __init__(self, name: str, limit: int | None, folder: Path) -> None:
        self.name, self.limit, self.folder = name, limit, folder
        self._held: list[Fields] = []  # in memory, until they are too many
        self._text = self._alone = 0  # characters held; rows so far that nothing can be added to
        self._writer: Writer | None = None
        self._scored, self._prompts = array("q"), bytearray()  # records with a score; 16 bytes of each one's prompt

    def add(self, fields: Fields) -> None:
        """The next record."""
        if fields.completions[0].score is None:
            if self.limit is not None and self._alone >= self.limit:
                return
            self._alone += 1
        if self._writer is not None:
            self._write(self._writer, fields)
            return
        self._held.append(fields)
        self._text += _characters(fields)
        if len(self._held) > LARGE_ROWS or self._text > LARGE_TEXT:
            self._store()

    def rows(self) -> Sequence[Row]:
        """All of them, once everything was added."""
        if self._writer is None:
            grouped = enumerate(_grouped(self._held)[: self.limit])
            return tuple(Row(self.name, n, one.prompt, one.completions, one.answer, one.task) for n, one in grouped)
        import numpy as np

        stored = self._writer.done()
        leaders = _leaders(len(stored), np.asarray(self._scored), np.frombuffer(bytes(self._prompts), np.uint64))
        if (leaders == np.arange(len(stored))).all():
            return stored[: self.limit]
        return self._together(stored, leaders)

    def _store(self) -> None:
        """Go on on disk."""
        from uft.data.store import Writer  # with numpy, which small sources do without

        self._writer = Writer(self.name, self.folder)
        for one in self._held:
            self._write(self._writer, one)
        self._held.clear()

    def _write(self, writer: Writer, fields: Fields) -> None:
        if fields.completions[0].score is not None:
            self._scored.append(len(writer))
            self._prompts += _prompt_key(fields)
        writer.add(fields)

    def _together(self, stored: StoredRows, leaders: np.ndarray) -> StoredRows:
        """Records of one leader as one row, in the order of the leaders."""
        import numpy as np

        from uft.data.store import Writer

        writer = Writer(self.name, self.folder)
        order = np.argsort(leaders, kind="stable")
        starts = np.flatnonzero(np.diff(leaders[order], prepend=-1))[: self.limit]
        ends = np.append(np.flatnonzero(np.diff(leaders[order])) + 1, len(order))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=False):
            first, *others = (stored[int(number)] for number in order[start:end])
            writer.add(_joined(first, others))
        return writer.done()


def _grouped(found: Sequence[Fields]) -> list[Fields]:
    """The same of records in memory."""
    grouped: list[Fields] = []
    places: dict[Any, int] = {}
    for fields in found:
        if fields.completions[0].score is None:
            grouped.append(fields)
            continue
        place = places.setdefault(fields.prompt, len(grouped))
        if place == len(grouped):
            grouped.append(fields)
        else:
            first = grouped[place]
            grouped[place] = replace(first, completions=first.completions + fields.completions)
    return grouped


def _joined(first: Row, others: Sequence[Row]) -> Row:
    more = (completion for one in others for completion in one.completions)
    return replace(first, completions=(*first.completions, *more)) if others else first


def _leaders(count: int, scored: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """(count,) int64: for every record the first with its prompt, if it is scored, else itself.

    `scored` (S,) are the numbers of the scored records in rising order, `prompts` (2 S,) uint64 the keys of theirs.
    """
    import numpy as np

    leaders = np.arange(count)
    low, high = prompts[::2], prompts[1::2]
    order = np.lexsort((low, high))  # stable: of one prompt the first record stands first
    new = np.ones(len(order), bool)
    new[1:] = (low[order][1:] != low[order][:-1]) | (high[order][1:] != high[order][:-1])
    starts = np.flatnonzero(new)
    leaders[scored[order]] = np.repeat(scored[order][starts], np.diff(np.append(starts, len(order))))
    return leaders


def _prompt_key(fields: Says) -> bytes:
    """16 bytes that two different prompts do not share."""
    turns = json.dumps([[turn.role, turn.content] for turn in fields.prompt])
    return hashlib.blake2b(turns.encode("utf-8"), digest_size=16).digest()


def _characters(fields: Says) -> int:
    turns = (turn for one in fields.completions for turn in one.turns)
    return sum(len(turn.content) for turn in (*fields.prompt, *turns))
