"""What an objective needs that must have been written beside completions, and the rows that lack it."""

from __future__ import annotations

from collections.abc import Mapping

from uft.config.schema import Data, Source
from uft.config.typed import adds
from uft.data.rows import Kind, Row
from uft.data.views import Parts, View
from uft.errors import Problem
from uft.objectives.base import Objective
from uft.sampling.annotate import ANNOTATORS
from uft.training.feed import Feed


def complete_views(objective: Objective) -> Mapping[Kind, View]:
    """The objective's views, for which a row that lacks a number the objective needs is one it cannot use."""
    return {kind: _complete(objective, kind, view) for kind, view in objective.views.items()}


def lacks(objective: Objective, row: Row) -> frozenset[str]:
    """The numbers that are missing on some completion the objective takes of this row, at whichever visit."""
    needed, view = objective.annotations(row.kind), objective.views.get(row.kind)
    if not needed or view is None:
        return frozenset()
    visits = (view(row, visit) or () for visit in range(len(row.completions)))
    taken = (row.completions[part.completion] for parts in visits for part in parts)
    return frozenset(name for completion in taken for name in needed - completion.annotations.keys())


def missing_annotations(feed: Feed, objective: Objective, data: Data) -> tuple[list[Problem], list[str]]:
    """(a problem per source and number that its rows lack, the commands that write them)."""
    problems: list[Problem] = []
    lacking: dict[str, list[str]] = {}  # number -> sources
    for source, weight in zip(feed.sources, feed.mixture.weights, strict=True):
        found = [(row, lacks(objective, row)) for row in source.rows] if weight else []
        for name in sorted(frozenset[str]().union(*(names for _, names in found))):
            without = [row for row, names in found if name in names]
            why = f"objective={objective.name} needs {name}, which {len(without):,} of {len(found):,} rows lack"
            problems.append(Problem(f"data.sources.{source.source}", why, where=without[0].id))
            lacking.setdefault(name, []).append(source.source)
    return problems, [_command(name, {s: data.sources[s] for s in sources}) for name, sources in lacking.items()]


def counted_as_certain(feed: Feed, objective: Objective) -> list[str]:
    """A sentence per source and number that would refine the loss, and that rows do not carry."""
    sentences = []
    for source, weight in zip(feed.sources, feed.mixture.weights, strict=True):
        rows = [row for row in source.rows if objective.refined_by(row.kind)] if weight else []
        for name in sorted({name for row in rows for name in objective.refined_by(row.kind)}):
            without = sum(all(name not in c.annotations for c in row.completions) for row in rows)
            if without:
                sentences.append(
                    f"{without:,} of {len(rows):,} pairs of {source.source} have no {name}: they count as certain"
                )
    return sentences


def _complete(objective: Objective, kind: Kind, view: View) -> View:
    if not objective.annotations(kind):
        return view

    def whole(row: Row, visit: int) -> Parts | None:
        return None if lacks(objective, row) else view(row, visit)

    return whole


def _command(column: str, sources: Mapping[str, Source]) -> str:
    words = ["uft annotate", column, "data=files", *(word for name, s in sources.items() for word in adds(name, s))]
    return " ".join([*words, *(["annotate.models=[MODEL,...]"] if ANNOTATORS[column].models else [])])
