"""Corpus: what a run reads, from files to token ids, and the plan of how much of it is drawn."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config, Data
from uft.data.mixture import Mixture, epoch_rows, mixture_weights, portion
from uft.data.rows import Row
from uft.data.sources import LoadedSource, load_sources
from uft.data.templates import Renderer
from uft.data.tokens import Tokenized, tokenize_all
from uft.disk import cache_root
from uft.errors import Problem, UftError
from uft.objectives.base import Objective
from uft.objectives.kinds import kind_table
from uft.training.feed import Feed
from uft.training.needs import complete_views, missing_annotations


def cache_dir(config: Config) -> Path:
    """Where token and reference caches live."""
    return cache_root(config.data.cache)


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


def read_corpus(config: Config, tokenizer: PreTrainedTokenizerBase, loaded: list[LoadedSource] | None = None) -> Corpus:
    """Load (unless that was done), render and tokenise. Raises UftError with everything that is wrong with the data."""
    loaded = load_sources(config.data) if loaded is None else loaded
    renderer = Renderer(tokenizer, config.data.template)
    max_length, too_long, folder = config.train.max_length, config.data.too_long, cache_dir(config)
    # a source with a share of zero is measured, never drawn: its training rows need not even fit
    drawn: dict[str, Sequence[Row]] = {s.name: s.rows if config.data.sources[s.name].share != 0 else () for s in loaded}
    train = tokenize_all(drawn, renderer, max_length, too_long, folder)
    held_out = encode_held_out(config, renderer, {s.name: s.held_out for s in loaded})
    empty = [s.source for s in train if not s.rows and drawn[s.source]]
    if empty:
        raise UftError(*(Problem(f"data.sources.{name}", "no row is left to train on") for name in empty))
    portions = [portion(s.source, s.rows, config.data.sources[s.source].share) for s in train]
    weights = mixture_weights(portions, config.data.ratio)
    order = [[s.digest for s in loaded], weights, config.seeds.data, config.train.batch_size]
    rendered = [renderer.digest, max_length, too_long]
    digest = hashlib.sha256(json.dumps([order, rendered]).encode()).hexdigest()[:16]
    return Corpus(loaded, renderer, train, held_out, weights, digest)


def encode_held_out(config: Config, renderer: Renderer, rows: Mapping[str, Sequence[Row]]) -> list[Tokenized]:
    """The held-out rows of every source that has some.

    They are measured, not trained on: cutting one that is too long loses nothing that should be learned.
    """
    too_long = "truncate" if config.data.too_long == "error" else config.data.too_long
    some = {name: held for name, held in rows.items() if held}
    encoded = tokenize_all(some, renderer, config.train.max_length, too_long, cache_dir(config))
    return [source for source in encoded if source.rows]


@dataclass(frozen=True)
class Plan:
    """How many rows and steps the run takes."""

    epoch_rows: int
    total_rows: int
    steps: int


def plan(config: Config, corpus: Corpus) -> Plan:
    """The horizon: train.steps whole batches, or train.epochs passes whose last batch may be short."""
    one_epoch = epoch_rows(corpus.sizes, corpus.weights, config.data.exhaustion)
    batch, steps = config.train.batch_size, config.train.steps
    rows = steps * batch if steps is not None else max(1, round(config.train.epochs * one_epoch))
    if config.data.exhaustion == "first":  # nothing is shown twice: the run ends where a source would run dry
        rows = min(rows, one_epoch)
    return Plan(one_epoch, rows, math.ceil(rows / batch))


def make_feed(config: Config, corpus: Corpus, objective: Objective, *, refuse: bool = True) -> Feed:
    """The stream of rows under an objective's views.

    Rows it cannot use stop the request unless data.unusable=drop, or `refuse` is False: somebody only looks.
    """
    names = [source.source for source in corpus.train]
    mixture = Mixture(names, corpus.sizes, corpus.weights, config.seeds.data)
    feed = Feed(corpus.train, mixture, objective.views, config.train.max_length)
    if refuse and config.data.unusable == "error":
        _refuse_unusable(feed, objective, config.data)
    else:
        feed.views = complete_views(objective)
    if refuse:
        _refuse_nothing(feed, objective, config.data)
    return feed


def _refuse_nothing(feed: Feed, objective: Objective, data: Data) -> None:
    """A run that drops every row, or takes nothing of what is left, would train on none and call itself finished."""
    if feed.takes_anything():
        return
    drawn = sum(len(source.rows) for source in feed.drawn)
    name, dropping = objective.name, data.unusable == "drop"
    raise UftError(
        Problem("data.unusable=drop", f"objective={name} cannot use any of the {drawn:,} rows")
        if dropping
        else Problem("data", f"objective={name} learns from none of the {drawn:,} rows"),
        footer="See why:  data.unusable=error" if dropping else "See what it takes of each row:  uft data",
    )


def _refuse_unusable(feed: Feed, objective: Objective, data: Data) -> None:
    """Tell which rows, with the objective's own line of the table of what it does with each kind."""
    problems = [
        Problem(
            f"data.sources.{source}",
            f"objective={objective.name} cannot use {unusable.rows} {kind.value} row{'s' * (unusable.rows != 1)}",
            where=unusable.first,
        )
        for source, kinds in feed.unusable().items()
        for kind, unusable in kinds.items()
    ]
    lacking, commands = missing_annotations(feed, objective, data)
    if not problems and not lacking:
        return
    footer = []
    if problems:
        kinds, uses = kind_table({objective.name: objective})
        footer += [f"What {uses[0]} takes of each kind of row:"]
        footer += [f"  {kind:<14} {use}" for kind, use in zip(kinds[1:], uses[1:], strict=True)]
        if objective.needs.columns:
            footer.append(f"It needs {', '.join(sorted(objective.needs.columns))}; uft generate writes them.")
        footer.append("")
    footer += [*(f"Write it:  {command}" for command in commands), "Leave these rows out:  data.unusable=drop"]
    raise UftError(*problems, *lacking, footer="\n".join(footer))
