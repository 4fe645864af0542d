"""Sample: one greedy answer of the model to a held-out prompt, and what a checker said of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    source: str  # name of the source in the mixture
    row: str  # id of the row
    prompt: str
    reply: str
    answer: str | None = None  # what a checker expects; None where the row has no such thing
    verdict: dict[str, float] = field(default_factory=dict)  # the checker's metrics, e.g. {"exact_match": 1.0}
