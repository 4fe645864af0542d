"""Rounds: `rounds: N` repeats the stages of a request, round after round, each a stage of its own.

A request is expanded when it is composed and nowhere else: a frozen configuration holds the list that came out. What
is written, and what it is in round r of N:

| written | in round r |
|---|---|
| a stage NAME | NAME-r; NAME where N is 1 |
| `stage:NAME` | `stage:NAME-r` |
| `stage:NAME@before` | `stage:NAME-(r-1)`; the first round is without it |
| `stage:NAME@all` | the rows of NAME-1 to NAME-r: a source for each, which share the share |
| `part: round` | `r/N`: a slice of the source's rows that no other round has |
| `by_round: {KEY: [first, second]}` | KEY with the r-th of these values; the last one goes on |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from uft.config.checks import Draft, Setting
from uft.config.schema import value_at
from uft.config.stages import MADE_BY, made, maker
from uft.errors import Problem

BEFORE, ALL, ROUND = "before", "all", "round"
SOURCES = ("data", "sources")
MODELS, PAST = ("annotate", "models"), ("select", "past")


@dataclass(frozen=True)
class Round:
    """One round of a run, or the whole of a run without rounds."""

    number: int = 1  # 1-based
    count: int | None = None  # `rounds`; None: a run without
    stages: tuple[str, ...] = ()  # as they are written, in their order

    def name(self, stage: str, number: int | None = None) -> str:
        """The stage of this round, or of round `number`, that is written `stage`."""
        return stage if self.count in (None, 1) else f"{stage}-{number or self.number}"

    def value(self, setting: Setting) -> tuple[Setting, Problem | None]:
        """The setting of this round that a list under `by_round` means, or what is wrong with it."""
        values, where = setting.value, setting.where
        if self.count is None:
            return setting, Problem(setting.text, "has a meaning in a run of rounds alone", where, ("rounds=3",))
        if not isinstance(values, list) or not values:
            why = "must be a list: a value for every round, of which the last one goes on"
            return setting, Problem(setting.text, why, where)
        return replace(setting, value=values[min(self.number, len(values)) - 1]), None

    def meant(self, path: str) -> list[tuple[str, str]]:
        """(ending of a name, path) of what `path` means in this round; the path itself where it is no stage's."""
        name, _, which = maker(path).partition("@")
        if not made(path) or name not in self.stages or self.count is None or which not in ("", BEFORE, ALL):
            return [("", path)]
        if which == ALL:
            numbers = range(1, self.number + 1)
            return [(f"-{n}" if self.count > 1 else "", MADE_BY + self.name(name, n)) for n in numbers]
        number = self.number - (which == BEFORE)
        return [("", MADE_BY + self.name(name, number))] if number else []

    def settle(self, draft: Draft) -> None:
        """Put what this round means in the place of what is written for all of them."""
        for source, node in list((draft.get(SOURCES) or {}).items()):
            if not isinstance(node, dict):
                continue
            if node.get("part") == ROUND and self.count is not None:
                node["part"] = f"{self.number}/{self.count}"
            meant = self.meant(str(node.get("path") or ""))
            if [ending for ending, _ in meant] == [""]:
                node["path"] = meant[0][1] if node.get("path") else node.get("path")
            else:
                self._replace(draft, source, meant)
        for place in (MODELS, PAST):
            group: dict[str, Any] = value_at(draft.values, place[:1])
            value = group.get(place[1])
            if isinstance(value, list):
                group[place[1]] = [path for one in value for _, path in self.meant(str(one))]
            elif isinstance(value, str):
                group[place[1]] = next((path for _, path in reversed(self.meant(value))), None)

    @staticmethod
    def _replace(draft: Draft, source: str, meant: Sequence[tuple[str, str]]) -> None:
        """Put a source for each of `meant` in the place of one; none in the place of rows that are not there yet."""
        sources = draft.get(SOURCES)
        node, place = sources.pop(source), (*SOURCES, source)
        own = [setting for setting in draft.settings if setting.path[:3] == place]
        for ending, path in meant:
            name, share = f"{source}{ending}", node.get("share")
            sources[name] = {**node, "path": path}
            if isinstance(share, (int, float)):
                sources[name]["share"] = share / len(meant)
            draft.settings += [replace(setting, path=(*SOURCES, name, *setting.path[3:])) for setting in own]


def rounds_of(written: Sequence[object]) -> int | None:
    """The rounds of a request from what is written for them, the last counting; a value that is none is told by the
    schema and counts as one round."""
    value = written[-1] if written else None
    return value if value is None or (type(value) is int and value > 0) else 1
