"""A frozen lake: a 4 x 4 map that is not slippery, its routes to the gift, and what is optimal at every cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SIDE, CELLS, ACTIONS = 4, 16, 4  # actions: left, down, right, up
MAPS = (  # the first eight of a seeded shuffle of maps with exactly two simple routes, of different length
    *("SFFG/FHFH/FFFH/FHHF", "SHFF/FFFF/FHFH/GFFH", "SFFF/FHFF/FGHH/FFHF", "SFFG/HHFF/HFFH/FHHH"),
    *("SFFG/FHFF/HHHF/FFHH", "SFFH/FHFF/HHGF/FHFH", "SFFF/FHHF/FFGF/FHHF", "SFFG/FFHF/FHHH/HFFF"),
)


def move(cell: int, action: int) -> int:
    """The cell that an action leads to; walls stop it."""
    row, column = divmod(cell, SIDE)
    row, column = row + (action == 1) - (action == 3), column + (action == 2) - (action == 0)
    return row * SIDE + column if 0 <= row < SIDE and 0 <= column < SIDE else cell


BACK = (2, 3, 0, 1)  # the action that undoes one


@dataclass(frozen=True)
class Lake:
    """A map, rows of S (start), F (ice), H (hole), G (gift) with slashes between them."""

    text: str

    @cached_property
    def ice(self) -> frozenset[int]:
        return frozenset(cell for cell, kind in enumerate(self.text.replace("/", "")) if kind in "SF")

    @cached_property
    def gift(self) -> int:
        return self.text.replace("/", "").index("G")

    @cached_property
    def routes(self) -> list[list[int]]:
        """The actions of every simple route from the start to the gift, the shortest first."""

        def beyond(cell: int, seen: frozenset[int]) -> Iterator[list[int]]:
            if cell == self.gift:
                yield []
                return
            for action in range(ACTIONS):
                to = move(cell, action)
                if to not in seen and (to in self.ice or to == self.gift):
                    yield from ([action, *rest] for rest in beyond(to, seen | {to}))

        return sorted(beyond(0, frozenset({0})), key=len)

    @cached_property
    def distance(self) -> dict[int, int]:
        """Steps to the gift from every cell of ice that has a way, by value iteration."""
        value = {self.gift: 0}
        for _ in range(CELLS):
            for cell in self.ice:
                steps = [value[to] + 1 for action in range(ACTIONS) if (to := move(cell, action)) in value]
                value |= {cell: min([*steps, value.get(cell, CELLS)])} if steps else {}
        return {cell: steps for cell, steps in value.items() if cell != self.gift}

    @cached_property
    def optimal(self) -> np.ndarray:
        """(CELLS, ACTIONS) float64: even over the actions that come nearer; rows of other cells are 0."""
        table, left = np.zeros((CELLS, ACTIONS)), {self.gift: 0, **self.distance}
        for cell, steps in self.distance.items():
            good = [action for action in range(ACTIONS) if left.get(move(cell, action), CELLS) < steps]
            table[cell, good] = 1 / len(good)
        return table

    def visited(self, actions: Sequence[int]) -> list[int]:
        """The cells in which the actions are taken, from the start."""
        cells = [0]
        for action in actions[:-1]:
            cells.append(move(cells[-1], action))
        return cells

    def negative(self, kind: str) -> list[int]:
        """Actions of a trajectory that is worse than the shorter route."""
        short, long = self.routes
        if kind == "route":
            return long
        aside = [  # (actions before, an action that leaves the route, where it leads)
            (short[:at], action, to)
            for at, cell in enumerate(self.visited(short))
            for action in range(ACTIONS)
            if action != short[at] and (to := move(cell, action)) != cell and to != self.gift
        ]
        if kind == "hole":  # the last place beside one
            falls = [[*before, action] for before, action, to in aside if to not in self.ice]
            return max(falls, key=len)  # the first of the longest
        before, action = next((before, action) for before, action, to in aside if to in self.ice)
        return [*before, action, BACK[action], *short[len(before) :]]
