"""Annotation: `uft annotate` writes a number beside every completion of given rows, by the name of its column.

A further column is one entry of :data:`ANNOTATORS`: a function from rows to numbers, and its messages.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from uft.config.schema import Model
from uft.data.chat import Renderer, Tokens
from uft.data.formats import Numbers, with_numbers
from uft.data.rows import BASELINE, SCORE, SOFT_LABEL, Completion, Row
from uft.data.tokens import POLICIES, tokenize
from uft.errors import FAILED, Problem, UftError
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, model_config, pad_id
from uft.model.policy import Frozen, common_length, position_limit
from uft.model.reference import LogProbStore, ReferenceColumn, model_identity, sequence_key
from uft.objectives.views import best_against_worst
from uft.sampling.generate import Interrupted

DIGITS = 6
PER_FILE = 256
"""Completions stored at once, which is also the most that a stopped or killed job loses."""

PAUSE = 5.0
"""Seconds between lines of progress, at least."""

KEY = "annotate.models"


@dataclass(frozen=True)
class Recipe:
    """Settings of an annotation, and how models are run."""

    device: torch.device
    cache: Path  # root of the caches on disk
    models: Sequence[Model] = ()  # see :func:`frozen_settings`
    temperature: float = 1.0  # of soft labels
    batch_tokens: int = 8192  # per forward pass, padding counted
    too_long: str = "error"  # a completion beyond the model's positions: error, drop (no number), truncate
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Annotator:
    """How one column is computed."""

    measure: Callable[[Sequence[Row], Recipe], list[Numbers]]  # per row, one number per completion; None: there is none
    models: bool  # whether it runs models
    objective: str  # one that reads the column
    absent: str  # why no row at all would have a number


def annotate_rows(rows: Sequence[Row], column: str, recipe: Recipe) -> tuple[Row, ...]:
    """The rows with `column` on every completion that has such a number, replacing an earlier one.

    Raises UftError about the request, a model or a row, and `generate.Interrupted` when told to stop.
    """
    annotator, paths = ANNOTATORS[column], [model.path for model in recipe.models]
    key = f"{KEY}=[{','.join(paths)}]"
    if annotator.models and not paths:
        why = f"{column} is what models say: name at least one"
        raise UftError(Problem(key, why, advice=("annotate.models=[PATH]",)))
    if paths and not annotator.models:
        raise UftError(Problem(key, f"{column} is made from scores; no model is asked"))
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise UftError(*(Problem(key, f"{path} is named twice") for path in twice))
    annotated = []
    for row, values in zip(rows, annotator.measure(rows, recipe), strict=True):
        completions = tuple(with_numbers(c, {column: v}) for c, v in zip(row.completions, values, strict=True))
        annotated.append(replace(row, completions=completions))
    return tuple(annotated)


def baseline(rows: Sequence[Row], recipe: Recipe) -> list[Numbers]:
    """PoFT's column (arXiv 2412.12865): the mean over models of a completion's mean log-prob under each.

    A geometric mean of length-normalised likelihoods, each over the model's own tokens of the reply. An empty
    completion, or one without a number from some model, has none.
    """
    single = [Row(row.source, row.index, row.prompt, (c,)) for row in rows for c in row.completions if not _empty(c)]
    per_model = [mean_log_probs(model, single, recipe) for model in recipe.models]
    means = map(_mean, zip(*per_model, strict=True))
    return [[None if _empty(c) else next(means) for c in row.completions] for row in rows]


def _mean(numbers: Sequence[float | None]) -> float | None:
    """Correctly rounded sums, so that the order of the models does not matter."""
    known = [number for number in numbers if number is not None]
    return round(math.fsum(known) / len(known), DIGITS) if len(known) == len(numbers) else None


def _empty(completion: Completion) -> bool:
    return not any(turn.content.strip() for turn in completion.turns if turn.role == "assistant")


def soft_labels(rows: Sequence[Row], recipe: Recipe) -> list[Numbers]:
    """p = sigmoid((s_w - s_l) / temperature) on the better side and 1 - p on the other (arXiv 2409.06691).

    The sides are those of a pair whose ratings are known, or the best- and the worst-scored completion of a prompt.
    """
    labels: list[Numbers] = []
    for row in rows:
        values: list[float | None] = [None] * len(row.completions)
        given = (c.annotations.get(SCORE) if c.score is None else c.score for c in row.completions)
        scores = [score for score in given if score is not None]
        if len(scores) == len(values) and (sides := best_against_worst(row, 0)):
            better, worse = (side.completion for side in sides)
            p = 0.5 + 0.5 * math.tanh((scores[better] - scores[worse]) / recipe.temperature / 2)
            values[better], values[worse] = p, 1 - p
        labels.append(values)
    return labels


ANNOTATORS: dict[str, Annotator] = {
    BASELINE: Annotator(baseline, models=True, objective="poft", absent="no completion fits into every model"),
    SOFT_LABEL: Annotator(
        soft_labels,
        models=False,
        objective="gdpo_soft",
        absent="no row has two scores: of several completions of a prompt, or score_chosen and score_rejected",
    ),
}


# --- Mean log-probs of completions under frozen models, each with its own tokenizer and chat template
#
# One model is in memory at a time. Its numbers are cached like those of a reference, a few hundred to a file: a job
# that was killed continues, and a further model, or further rows, cost no more than themselves.


def frozen_settings(model: Model, path: str) -> Model:
    """Another model, loaded in the precision and with the kernels of `model`; nothing of it is trained."""
    whole = replace(model, path=path, revision=None, adapter="none", quantize="none")
    return replace(whole, master_weights=False, gradient_checkpointing=False)


def mean_log_probs(model: Model, rows: Sequence[Row], recipe: Recipe) -> list[float | None]:
    """Per row, which has one completion: the mean log-prob of its supervised tokens, each end of turn among them.

    None where the completion was longer than the model's positions and `too_long` drops it. Raises UftError about the
    model or a row that its template refuses, Interrupted between two batches once asked to stop.
    """
    device, say, done, reported = recipe.device, recipe.say, 0, time.monotonic()

    def load() -> Frozen:
        say(f"{model.path}: loading the model")
        policy = load_policy(model, device, init_seed=0)
        check_vocabulary(policy.module, tokenizer, f"{KEY}={model.path}")
        return Frozen(policy)

    def mean_of(log_probs: torch.Tensor) -> np.ndarray:
        nonlocal done, reported
        mean = float(log_probs.double().mean())
        if not math.isfinite(mean):
            why = "gives a completion a log-prob that is no number; is model.dtype the one it was trained in?"
            raise UftError(Problem(f"model.path={model.path}", why), code=FAILED)
        done += 1
        if done == len(missing) or time.monotonic() - reported >= PAUSE:
            say(f"{model.path}: {done:,} of {len(missing):,} completions")
            reported = time.monotonic()
        return np.array([min(0.0, mean)], np.float32)  # rounding may leave a log-prob above 0

    with _problems_of(model.path):
        tokenizer = load_tokenizer(model)
        tokens = tokenize("rows", rows, Renderer(tokenizer, lost_text="keep"), max_length=sys.maxsize).encoded
        fitted = _fitted([encoded for (encoded,) in tokens], model, recipe.too_long)
        identity = model_identity(model, device) | {"value": "mean log-prob"}
        column = ReferenceColumn(
            LogProbStore.of(recipe.cache / "annotations", identity),
            load,
            pad_id(tokenizer),
            device,
            value=mean_of,
            per_file=PER_FILE,
            phase="rows were annotated",
        )
        fitting = [encoded for encoded in fitted if encoded is not None]
        missing, all_keys = column.missing(fitting), {sequence_key(one.ids, one.supervised) for one in fitting}
        if known := len(all_keys) - len(missing):
            say(f"{model.path}: {known:,} of {len(all_keys):,} completions are known from before")
        alone = max((one.length for one in fitting), default=0) > (common_length(model_config(model)) or sys.maxsize)
        batch_tokens = 1 if alone else recipe.batch_tokens  # of embeddings that depend on the longest row of a batch
        if not column.fill(fitting, batch_tokens=batch_tokens, should_stop=recipe.should_stop):
            raise Interrupted
    if missing:  # the model was loaded, and is free again
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [None if encoded is None else float(column(encoded)[0]) for encoded in fitted]


def _fitted(encoded: Sequence[Tokens], model: Model, too_long: str) -> list[Tokens | None]:
    """The completions cut to the model's positions. Raises UftError where some are too long and `too_long` is error."""
    room = position_limit(model_config(model)) or sys.maxsize
    longest = max((one.length for one in encoded), default=0)
    if too_long == "error" and longest > room:
        many = sum(one.length > room for one in encoded)
        why = f"has {room} positions; {many} completions with their prompts are longer, up to {longest} tokens"
        advice = "cut them, or leave them without the number:  data.too_long=truncate|drop"
        raise UftError(Problem(f"model.path={model.path}", why, advice=(advice,)))
    kept = (POLICIES[too_long]((one,), room) for one in encoded)
    return [None if row is None else row[0] for row in kept]


@contextmanager
def _problems_of(path: str) -> Iterator[None]:
    """Problems with a model are problems with the key that named it; those with a row say under which model."""
    ours, theirs = f"{KEY}={path}", f"model.path={path}"
    try:
        yield
    except UftError as error:
        problems = [
            replace(p, what=ours) if p.what in (ours, theirs) else replace(p, where=ours) for p in error.problems
        ]
        raise UftError(*problems, footer=error.footer, code=error.code) from error
