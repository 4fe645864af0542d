"""What frozen models say of completions: mean log-probs, each model under its own tokenizer and chat template.

One model is in memory at a time. What it said is kept in the cache, a few hundred completions to a file, known by the
model's weights and the completion's tokens: a job that was killed goes on where it was, and a further model, or further
rows, cost no more than themselves.
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

from uft.alive import doing
from uft.config.schema import Model
from uft.data.rows import Row
from uft.data.templates import Encoded, Renderer
from uft.data.tokens import POLICIES, tokenize
from uft.errors import FAILED, Problem, UftError
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
from uft.model.reference import Frozen
from uft.model.reference_cache import LogProbStore, sequence_key, weights_digest
from uft.model.sequences import batches_of, sequence_batch
from uft.sampling.generate import Interrupted

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


@doing("rows were annotated")
def _ask(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    missing: Mapping[bytes, Encoded],
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
            found |= {part[place]: _mean(piece, model.path) for place, piece in zip(group, pieces, strict=True)}
            done += len(group)
            if done == len(keys) or time.monotonic() - told >= PAUSE:
                bench.say(f"{model.path}: {done:,} of {len(keys):,} completions")
                told = time.monotonic()
        store.add(found)
    del policy, forward
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _mean(log_probs: torch.Tensor, path: str) -> np.ndarray:
    """(1,) float32. A log-prob that rounding left above 0 is 0."""
    mean = float(log_probs.double().mean())
    if not math.isfinite(mean):
        why = "gives a completion a log-prob that is no number; is model.dtype the one it was trained in?"
        raise UftError(Problem(f"model.path={path}", why), code=FAILED)
    return np.array([min(0.0, mean)], np.float32)


def _fitted(encoded: Sequence[Encoded], model: Model, too_long: str) -> list[Encoded | None]:
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
