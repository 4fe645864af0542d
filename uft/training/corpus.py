"""Corpus: what a run reads, from files to token ids, and the plan of how much of it is drawn."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config
from uft.data.mixture import Mixture, epoch_rows, mixture_weights
from uft.data.rows import Kind
from uft.data.sources import LoadedSource, load_sources
from uft.data.templates import Renderer
from uft.data.tokens import Tokenized, tokenize
from uft.data.views import View
from uft.errors import Problem, UftError
from uft.training.feed import Feed


def cache_dir(config: Config) -> Path:
    """Where token and reference caches live."""
    return Path(config.data.cache or os.environ.get("UFT_CACHE") or Path.home() / ".cache" / "uft").expanduser()


@dataclass(frozen=True)
class Corpus:
    """Every source of the mixture, read and tokenised; training rows and held-out rows apart."""

    loaded: list[LoadedSource]
    renderer: Renderer
    train: list[Tokenized]
    held_out: list[Tokenized]
    weights: list[float]
    digest: str  # of everything that decides which tokens are trained on in which order

    @property
    def sizes(self) -> list[int]:
        return [len(source.rows) for source in self.train]


def read_corpus(config: Config, tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> Corpus:
    """Load, render and tokenise. `longest`: what the model can hold, when that is less than train.max_length."""
    loaded = load_sources(config.data)
    renderer = Renderer(tokenizer, config.data.template)
    max_length = min(config.train.max_length, longest or config.train.max_length)
    folder = cache_dir(config)
    too_long = config.data.too_long
    train = [tokenize(s.name, s.rows, renderer, max_length, too_long, folder) for s in loaded]
    # held-out rows are measured, not trained on: cutting or dropping one that is too long loses nothing
    held_policy = "truncate" if too_long == "error" else too_long
    held_out = [tokenize(s.name, s.held_out, renderer, max_length, held_policy, folder) for s in loaded if s.held_out]
    empty = [s.source for s in train if not s.rows]
    if empty:
        raise UftError(*(Problem(f"data.sources.{name}", "no row is left to train on") for name in empty))
    weights = mixture_weights(config.data, train)
    order = [[s.digest for s in loaded], weights, config.seeds.data, config.train.batch_size]
    rendered = [renderer.digest, max_length, too_long]
    digest = hashlib.sha256(json.dumps([order, rendered]).encode()).hexdigest()[:16]
    return Corpus(loaded, renderer, train, held_out, weights, digest)


@dataclass(frozen=True)
class Plan:
    """How many rows and steps the run takes."""

    epoch_rows: int
    total_rows: int
    steps: int


def plan(config: Config, corpus: Corpus) -> Plan:
    """The horizon: train.steps whole batches, or train.epochs passes whose last batch may be short."""
    one_epoch = epoch_rows(corpus.sizes, corpus.weights, config.data.exhaustion)
    batch = config.train.batch_size
    if config.train.epochs is not None:
        rows = max(1, round(config.train.epochs * one_epoch))
        return Plan(one_epoch, rows, math.ceil(rows / batch))
    rows = (config.train.steps or 1) * batch
    if config.data.exhaustion == "first":  # nothing is shown twice: the run ends where a source would run dry
        rows = min(rows, one_epoch)
    return Plan(one_epoch, rows, math.ceil(rows / batch))


def make_feed(config: Config, corpus: Corpus, views: Mapping[Kind, View]) -> Feed:
    """The stream of rows under an objective's views; rows it cannot use stop the run unless data.unusable=drop."""
    names = [source.source for source in corpus.train]
    feed = Feed(corpus.train, Mixture(names, corpus.sizes, corpus.weights, config.seeds.data), views)
    if config.data.unusable == "error":
        _refuse_unusable(feed, str(config.objective["name"]), views)
    return feed


def _refuse_unusable(feed: Feed, objective: str, views: Mapping[Kind, View]) -> None:
    problems = [
        Problem(
            f"data.sources.{source}",
            f"objective={objective} cannot use {len(rows)} {kind.value} row{'s' * (len(rows) != 1)}",
            where=rows[0],
            advice=(f"it uses: {', '.join(k.value for k in views)}",),
        )
        for source, kinds in feed.unusable().items()
        for kind, rows in kinds.items()
    ]
    if problems:
        advice = "Leave them out:  data.unusable=drop"
        if objective == "dpo":
            advice += "   or train on demonstrations as well:  objective.sft_weight=1"
        raise UftError(*problems, footer=f"{advice}\nWhat each objective does with each kind of row:  uft data")
