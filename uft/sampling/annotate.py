"""Annotators: what writes a number beside every completion of given rows, by the name of its column.

A further column is one entry of :data:`ANNOTATORS`: a function from rows to numbers, and what to say about it.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Model
from uft.data.batch import batches_of, sequence_batch
from uft.data.chat import Renderer, Tokens
from uft.data.formats import SCORE, Numbers, with_numbers
from uft.data.rows import BASELINE, SOFT_LABEL, Completion, Row
from uft.data.tokens import POLICIES, tokenize
from uft.errors import FAILED, Problem, UftError
from uft.heartbeat import activity
from uft.model.load import (
    check_vocabulary,
    choose_attention,
    load_base,
    load_policy,
    load_tokenizer,
    pad_id,
    positions,
    whereabouts,
)
from uft.model.reference import Frozen, LogProbStore, sequence_key, weights_digest
from uft.objectives.views import best_against_worst
from uft.sampling.generate import Interrupted

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


# --- What frozen models say of completions: mean log-probs, each model under its own tokenizer and chat template.
#
# One model is in memory at a time. What it said is kept in the cache, a few hundred completions to a file, known by
# the
# model's weights and the completion's tokens: a job that was killed goes on where it was, and a further model, or
# further
# rows, cost no more than themselves.


PER_FILE = 256
"""Completions kept at once, which is also what a job that is stopped or killed loses, at most."""

PAUSE = 5.0
"""Seconds between lines of progress, at least."""

KEY = "annotate.models"


@dataclass(frozen=True)
class Bench:
    """What models are asked with."""

    device: torch.device
    cache: Path  # root of the caches on disk
    batch_tokens: int = 8192  # per forward pass, padding counted
    too_long: str = "error"  # a completion beyond the model's positions: error, drop (nothing is said), truncate
    should_stop: Callable[[], bool] = lambda: False
    say: Callable[[str], None] = lambda line: None


def frozen(model: Model, path: str) -> Model:
    """Another model, loaded in the precision and with the kernels of `model`; nothing of it is trained."""
    return replace(model, path=path, revision=None, adapter="none", master_weights=False, gradient_checkpointing=False)


def mean_log_probs(model: Model, rows: Sequence[Row], bench: Bench) -> list[float | None]:
    """Per row, which has one completion: the mean log-prob of its supervised tokens, each end of turn among them.

    None where the completion was longer than the model's positions and `too_long` drops it. Raises UftError about the
    model or a row that its template refuses, Interrupted between two batches once asked to stop.
    """
    with _said_of(model.path):
        tokenizer = load_tokenizer(model)
        tokens = tokenize("rows", rows, Renderer(tokenizer), max_length=sys.maxsize).encoded
        fitted = _fitted([encoded for (encoded,) in tokens], model, bench.too_long)
        store = LogProbStore.of(bench.cache / "annotations", _identity(model, bench.device))
        keys = [None if encoded is None else sequence_key(encoded.ids, encoded.supervised) for encoded in fitted]
        asked = {key: encoded for key, encoded in zip(keys, fitted, strict=True) if key and encoded}
        missing = {key: encoded for key, encoded in asked.items() if key not in store.values}
        if known := len(asked) - len(missing):
            bench.say(f"{model.path}: {known:,} of {len(asked):,} completions are known from before")
        if missing:
            _ask(model, tokenizer, missing, store, bench)
    return [None if key is None else float(store.values[key][0]) for key in keys]


@activity("rows were annotated")
def _ask(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    missing: Mapping[bytes, Tokens],
    store: LogProbStore,
    bench: Bench,
) -> None:
    """Load the model, ask it for what is missing, keep the answers file by file, and let go of it."""
    bench.say(f"{model.path}: loading the model")
    policy = load_policy(model, bench.device, init_seed=0)
    check_vocabulary(policy.module, tokenizer, f"{KEY}={model.path}")
    forward = Frozen(policy)
    # like lengths together, and files in that order: after an interruption the batches are those that would have been
    keys = sorted(missing, key=lambda key: missing[key].length)
    done, told = 0, time.monotonic()
    for start in range(0, len(keys), PER_FILE):
        part = keys[start : start + PER_FILE]
        found: dict[bytes, np.ndarray] = {}
        for group in batches_of([missing[key].length for key in part], bench.batch_tokens):
            if bench.should_stop():
                raise Interrupted
            asked = [missing[part[place]] for place in group]
            batch = sequence_batch([(one.ids, one.supervised) for one in asked], pad_id(tokenizer)).to(bench.device)
            pieces = forward(batch).log_probs.float().cpu().split(batch.lengths.tolist())
            found |= {
                part[place]: _mean_log_prob(piece, model.path) for place, piece in zip(group, pieces, strict=True)
            }
            done += len(group)
            if done == len(keys) or time.monotonic() - told >= PAUSE:
                bench.say(f"{model.path}: {done:,} of {len(keys):,} completions")
                told = time.monotonic()
        store.add(found)
    del policy, forward
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _mean_log_prob(log_probs: torch.Tensor, path: str) -> np.ndarray:
    """(1,) float32. A log-prob that rounding left above 0 is 0."""
    mean = float(log_probs.double().mean())
    if not math.isfinite(mean):
        why = "gives a completion a log-prob that is no number; is model.dtype the one it was trained in?"
        raise UftError(Problem(f"model.path={path}", why), code=FAILED)
    return np.array([min(0.0, mean)], np.float32)


def _fitted(encoded: Sequence[Tokens], model: Model, too_long: str) -> list[Tokens | None]:
    """The completions as the model can take them. Raises UftError where some are too long and nobody allowed less."""
    room = positions(model) or sys.maxsize
    longest = max((one.length for one in encoded), default=0)
    if too_long == "error" and longest > room:
        many = sum(one.length > room for one in encoded)
        why = f"has {room} positions; {many} completions with their prompts are longer, up to {longest} tokens"
        advice = "cut them, or leave them without the number:  data.too_long=truncate|drop"
        raise UftError(Problem(f"model.path={model.path}", why, advice=(advice,)))
    kept = (POLICIES[too_long]((one,), room) for one in encoded)
    return [None if row is None else row[0] for row in kept]


def _identity(model: Model, device: torch.device) -> dict[str, str]:
    """What decides the answers besides the tokens asked about."""
    return {
        "weights": weights_digest(whereabouts(model), lambda: load_base(model, device)),
        "dtype": model.dtype,
        "attention": choose_attention(model, device) or "auto",
        "device": device.type,
        "value": "mean log-prob",
    }


@contextmanager
def _said_of(path: str) -> Iterator[None]:
    """Problems with a model are problems with the key that named it; those with a row say under which model."""
    ours, theirs = f"{KEY}={path}", f"model.path={path}"
    try:
        yield
    except UftError as error:
        problems = [
            replace(p, what=ours) if p.what in (ours, theirs) else replace(p, where=ours) for p in error.problems
        ]
        raise UftError(*problems, footer=error.footer, code=error.code) from error
