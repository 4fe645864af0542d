"""Mixture: the order in which rows are drawn from several sources.

Sources are interleaved by Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): after
any n rows, source i has been drawn within one row of n * share_i, whatever the number of sources. The interleave knows
no seed. Each source has an order of its own, made from its name, the data seed and the pass over it: its k-th row is
the same in every mixture, so that changing a share or adding a source never reorders another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uft.data.rows import Kind, Row
from uft.data.table import kinds
from uft.errors import Problem, UftError, raise_problems

_SLACK = 1e-9  # shares are floats: a tie must stay a tie
LONGEST_EPOCH = 2**53  # rows of an epoch; beyond it counts are no longer exact
DEMONSTRATION_KINDS = (Kind.DEMONSTRATION, Kind.NEGATIVES)
"""Kinds on the demonstrations' side of `ratio`: negatives beside one must not change how often it is drawn."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """One draw: `source` and `index` are positions in the mixture's sources and in that source's rows."""

    source: int
    index: int
    visit: int  # how often this row was drawn before


class Mixture:
    """An endless, seeded, resumable stream of row indices.

    `sizes` are the rows of each source, `weights` their shares (they sum to one; a share of zero is never drawn).
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(names) == len(sizes) == len(weights)
        assert math.isclose(sum(weights), 1.0, abs_tol=1e-6)
        assert all(size > 0 for size, weight in zip(sizes, weights, strict=True) if weight > 0)
        self.names, self.sizes, self.weights, self.seed = list(names), list(sizes), list(weights), seed
        self.counts = [0] * len(self.names)  # rows drawn from each source
        self._orders: list[tuple[int, np.ndarray] | None] = [None] * len(self.names)  # (pass, permutation)
        self._live = [number for number, weight in enumerate(weights) if weight > 0]
        self._gap = 1 / (2 * len(self._live) - 2) if len(self._live) > 1 else 0.0

    def take(self, count: int) -> list[RowIndex]:
        """The next `count` draws."""
        return list(self.draws(count))

    def draws(self, count: int) -> Iterator[RowIndex]:
        """The same one by one, for many of them."""
        for _ in range(count):
            source = self._due_source()
            visit, place = divmod(self.counts[source], self.sizes[source])
            self.counts[source] += 1
            yield RowIndex(source, int(self._order(source, visit)[place]), visit)

    def fork(self) -> Mixture:
        """A copy at the same position; its draws do not move this one."""
        other = Mixture(self.names, self.sizes, self.weights, self.seed)
        other.counts, other._orders = list(self.counts), list(self._orders)
        return other

    @property
    def first_pass(self) -> int:
        """Draws from the beginning after which every row of every source that is drawn has been drawn."""
        return math.ceil(max(((self.sizes[number] + 1) / self.weights[number] for number in self._live), default=0))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as JSON values."""
        return {"seed": self.seed, "counts": dict(zip(self.names, self.counts, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["seed"] == self.seed, "the state of a mixture with another data seed"
        assert set(state["counts"]) == set(self.names), "the state of a mixture of other sources"
        self.counts = [int(state["counts"][name]) for name in self.names]

    def _due_source(self) -> int:
        """Tijdeman: of the sources that may be drawn without running ahead, the one that must be drawn soonest."""
        turn = sum(self.counts) + 1
        best, soonest = self._live[0], math.inf
        for number in self._live:
            weight = self.weights[number]
            behind = turn * weight - self.counts[number]
            due = (1 - self._gap - behind) / weight
            if behind >= self._gap - _SLACK and due < soonest - _SLACK:
                best, soonest = number, due
        return best

    def _order(self, source: int, visit: int) -> np.ndarray:
        """The permutation of a source's rows in its pass number `visit`.

        Raw words of PCG64 are stable over NumPy versions, unlike `Generator.permutation`; sorting them shuffles.
        """
        known = self._orders[source]
        if known is None or known[0] != visit:
            key = hashlib.sha256(f"{self.names[source]}\n{self.seed}\n{visit}".encode()).digest()
            words = np.random.PCG64(int.from_bytes(key, "big")).random_raw(self.sizes[source])
            known = self._orders[source] = (visit, np.argsort(words, kind="stable"))
        return known[1]


@dataclass(frozen=True)
class Portion:
    """One source's part in the shares: its rows, the share asked for it, and whether it is of demonstrations."""

    name: str
    rows: int
    share: float | None
    demonstration: bool


def portion(name: str, rows: Sequence[Row], share: float | None) -> Portion:
    """A source with rows of several kinds counts as demonstrations when more than half of its rows are."""
    demonstrations = sum(count for kind, count in kinds(rows).items() if kind in DEMONSTRATION_KINDS)
    return Portion(name, len(rows), share, 2 * demonstrations > len(rows))


def mixture_weights(portions: Sequence[Portion], ratio: float | None = None) -> list[float]:
    """Shares that sum to one: those asked for, else by rows; `ratio` is then given to the demonstrations together.

    Raises :class:`UftError` when some sources have a share and others none, when nothing has any, when a source that
    is to be drawn has no rows, or when there is nothing on one side of `ratio`.
    """
    raise_problems(_share_problems(portions))
    raw = [float(p.rows if p.share is None else p.share) for p in portions]
    total = sum(raw)
    if ratio is None:
        return [value / total for value in raw]
    demonstrations = sum(value for value, p in zip(raw, portions, strict=True) if p.demonstration)
    sides = {True: demonstrations, False: total - demonstrations}
    wanted = {True: ratio, False: 1 - ratio}
    names = {True: "demonstrations", False: "rows with feedback (pairs, labels, scores), or prompts alone"}
    lacking = [names[side] for side in (True, False) if wanted[side] > 0 and sides[side] == 0]
    if lacking:
        found = ", ".join(f"{p.name}: {'demonstrations' if p.demonstration else 'feedback'}" for p in portions)
        raise UftError(Problem(f"data.ratio={ratio:g}", f"there are no {lacking[0]} in this mixture", advice=(found,)))
    return [
        value / sides[p.demonstration] * wanted[p.demonstration] if sides[p.demonstration] else 0.0
        for value, p in zip(raw, portions, strict=True)
    ]


def epoch_rows(sizes: Sequence[int], weights: Sequence[float], exhaustion: str = "repeat") -> int:
    """Rows in one epoch of a mixture.

    repeat: as many as there are, small sources repeating; first: until the first source would have to repeat;
    all: until every source was shown once. Sources with a share of zero do not count.
    """
    live = [(size, weight) for size, weight in zip(sizes, weights, strict=True) if weight > 0]
    passes = [size / weight for size, weight in live]  # rows of the mixture in one pass over each source
    if exhaustion == "all" and max(passes) > LONGEST_EPOCH:
        why = f"a source has so small a share that an epoch would be of {max(passes):.0e} rows"
        raise UftError(Problem("data.exhaustion=all", why))
    return {
        "repeat": lambda: sum(size for size, _ in live),
        "first": lambda: max(1, math.floor(min(passes) + 1e-6)),
        "all": lambda: math.ceil(max(passes) - 1e-6),
    }[exhaustion]()


def _share_problems(portions: Sequence[Portion]) -> list[Problem]:
    without = [p.name for p in portions if p.share is None]
    if without and len(without) < len(portions):
        return [
            Problem(
                f"data.sources.{name}.share",
                "has no share while other sources have one",
                advice=("give every source a share, or none: then each counts by its rows",),
            )
            for name in without
        ]
    total = sum(p.rows if p.share is None else p.share for p in portions)
    if not math.isfinite(total):
        return [Problem("data.sources", "the shares of its sources add up to no number")]
    if not total:
        return [Problem("data.sources", "every source has a share of zero" if portions else "there are no rows")]
    return [
        Problem(f"data.sources.{p.name}", "has no rows left to draw")
        for p in portions
        if not p.rows and (p.share is None or p.share > 0)
    ]
