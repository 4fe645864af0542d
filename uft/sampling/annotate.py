"""Annotators: what writes a number beside every completion of given rows, by the name of its column.

A further column is one entry of :data:`ANNOTATORS`: a function from rows to numbers, and what to say about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from uft.config.schema import Model
from uft.data.annotations import SCORE, Numbers, with_numbers
from uft.data.rows import BASELINE, SOFT_LABEL, Completion, Row
from uft.errors import Problem, UftError
from uft.objectives.views import best_against_worst
from uft.sampling.likelihood import Bench, mean_log_probs

DIGITS = 6


@dataclass(frozen=True)
class Recipe:
    """What an annotator may work with."""

    bench: Bench
    models: Sequence[Model] = ()  # see likelihood.frozen
    temperature: float = 1.0  # of soft labels


@dataclass(frozen=True)
class Annotator:
    """How one column comes about."""

    measure: Callable[[Sequence[Row], Recipe], list[Numbers]]  # per row, one number per completion; None: there is none
    models: bool  # whether it asks models
    objective: str  # one that reads the column
    absent: str  # why no row at all would have a number


def annotate_rows(rows: Sequence[Row], column: str, recipe: Recipe) -> tuple[Row, ...]:
    """The rows with `column` on every completion that has such a number, in the place of one that was there.

    Raises UftError about what was asked, a model or a row, and `generate.Interrupted` when told to stop.
    """
    annotator = ANNOTATORS[column]
    if problems := _problems(column, annotator, recipe.models):
        raise UftError(*problems)
    numbers = annotator.measure(rows, recipe)
    return tuple(_with(row, column, values) for row, values in zip(rows, numbers, strict=True))


def baseline(rows: Sequence[Row], recipe: Recipe) -> list[Numbers]:
    """PoFT's column (arXiv 2412.12865): the mean over models of a completion's mean log-prob under each.

    A geometric mean of length-normalised likelihoods, each over the model's own tokens of the reply. A completion that
    says nothing, or of which one of the models says nothing, has none.
    """
    asked = [(row, c) for row in rows for c in row.completions if not _empty(c)]
    single = [Row(row.source, row.index, row.prompt, (c,)) for row, c in asked]
    per_model = [mean_log_probs(model, single, recipe.bench) for model in recipe.models]
    means = map(_mean, zip(*per_model, strict=True))
    return [[None if _empty(c) else next(means) for c in row.completions] for row in rows]


def soft_labels(rows: Sequence[Row], recipe: Recipe) -> list[Numbers]:
    """p = sigmoid((s_w - s_l) / temperature) on the better side and 1 - p on the other (arXiv 2409.06691).

    The sides are those of a pair whose ratings are known, or the best- and the worst-scored completion of a prompt.
    """
    return [_soft_label(row, recipe.temperature) for row in rows]


ANNOTATORS: dict[str, Annotator] = {
    BASELINE: Annotator(baseline, models=True, objective="poft", absent="no completion fits into every model"),
    SOFT_LABEL: Annotator(
        soft_labels,
        models=False,
        objective="gdpo_soft",
        absent="no row has two scores: of several completions of a prompt, or score_chosen and score_rejected",
    ),
}


def _problems(column: str, annotator: Annotator, models: Sequence[Model]) -> list[Problem]:
    paths = [model.path for model in models]
    asked = f"annotate.models=[{','.join(paths)}]"
    if annotator.models and not paths:
        return [Problem(asked, f"{column} is what models say: name at least one", advice=("annotate.models=[PATH]",))]
    if paths and not annotator.models:
        return [Problem(asked, f"{column} is made from scores; no model is asked")]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    return [Problem(asked, f"{path} is named twice") for path in twice]


def _mean(numbers: Sequence[float | None]) -> float | None:
    """Correctly rounded sums, so that the order of the models is of no matter."""
    said = [number for number in numbers if number is not None]
    return round(math.fsum(said) / len(said), DIGITS) if len(said) == len(numbers) else None


def _empty(completion: Completion) -> bool:
    return not any(turn.content.strip() for turn in completion.turns if turn.role == "assistant")


def _soft_label(row: Row, temperature: float) -> Numbers:
    values: list[float | None] = [None] * len(row.completions)
    given = (c.annotations.get(SCORE) if c.score is None else c.score for c in row.completions)
    scores = [score for score in given if score is not None]
    parts = best_against_worst(row, 0) if len(scores) == len(values) else None
    if parts:
        better, worse = (part.completion for part in parts)
        values[better] = _sigmoid((scores[better] - scores[worse]) / temperature)
        values[worse] = 1 - _sigmoid((scores[better] - scores[worse]) / temperature)
    return values


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(x / 2)


def _with(row: Row, column: str, values: Numbers) -> Row:
    completions = tuple(with_numbers(c, {column: v}) for c, v in zip(row.completions, values, strict=True))
    return replace(row, completions=completions)
