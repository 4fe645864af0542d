"""What an objective needs that must have been written beside completions, and the rows that lack it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from uft.config.frozen import adds
from uft.config.schema import Data, Source
from uft.data.many import alike, kinds
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
    for source in feed.drawn:
        without, first = Counter[str](), dict[str, str]()  # number -> rows that lack it, the id of one
        for row, count in alike(source.rows) if any(map(objective.annotations, kinds(source.rows))) else ():
            for name in lacks(objective, row):
                without[name] += count
                first.setdefault(name, row.id)
        for name, many in sorted(without.items()):
            why = f"objective={objective.name} needs {name}, which {many:,} of {len(source.rows):,} rows lack"
            problems.append(Problem(f"data.sources.{source.source}", why, where=first[name]))
            lacking.setdefault(name, []).append(source.source)
    return problems, [_command(name, {s: data.sources[s] for s in sources}) for name, sources in lacking.items()]


def counted_as_certain(feed: Feed, objective: Objective) -> list[str]:
    """A sentence per source and number that would refine the loss, and that rows do not carry."""
    sentences = []
    for source in feed.drawn:
        pairs = sum(count for kind, count in kinds(source.rows).items() if objective.refined_by(kind))
        without = Counter[str]()
        for row, count in alike(source.rows) if pairs else ():
            names = objective.refined_by(row.kind) - {name for c in row.completions for name in c.annotations}
            without.update(dict.fromkeys(names, count))
        sentences += [
            f"{many:,} of {pairs:,} pairs of {source.source} have no {name}: they count as certain"
            for name, many in sorted(without.items())
        ]
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
