"""The data of a run's stages: from files to token ids, the rows that an objective can use, and how much is drawn.

The data of all stages is read before the first of them begins, so that every mistake in any of it is told then.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from uft.config.frozen import source_overrides
from uft.config.messages import as_typed
from uft.config.schema import Config, Data, Source
from uft.config.stages import Stage, is_made, rows_of
from uft.data.chat import Renderer
from uft.data.loader import RowSampler
from uft.data.mixture import Mixture, epoch_rows, mixture_weights, portion
from uft.data.report import data_report
from uft.data.rows import FLAT, Kind, Row, Selection, View, content_digest
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import grouped, keep_pandas_out, kinds, pick, prompt_words
from uft.data.tokens import TokenizedSource, tokenize_all
from uft.errors import Problem, UftError, raise_problems, run_all, typed
from uft.evaluation.evaluate import HeldOut
from uft.model.load import load_tokenizer
from uft.model.policy import Policy
from uft.objectives import make
from uft.objectives.base import Objective
from uft.objectives.dft import SAMPLING
from uft.objectives.views import kind_table
from uft.rewards import Spec, spec_of
from uft.runs import Run, cache_root, read_json
from uft.sampling.engines import EngineContext, make_engine
from uft.sampling.rollouts import RolloutSampler, expected_views, refuse_unscored
from uft.training.liveness import Stop
from uft.training.trainer import tokens_per_pass


@dataclass(frozen=True)
class TrainData:
    """Every source of the mixture, read and tokenised; training rows and held-out rows apart."""

    loaded: list[LoadedSource]
    renderer: Renderer
    train: list[TokenizedSource]
    held_out: list[TokenizedSource]
    weights: list[float]
    digest: str  # of everything that decides which tokens are trained on in which order

    @property
    def sizes(self) -> list[int]:
        return [len(source.rows) for source in self.train]


def make_renderer(tokenizer: PreTrainedTokenizerBase, data: Data) -> Renderer:
    """The renderer of a mixture's settings, the same for training, evaluation and generation."""
    how = (data.template_args, data.train_on, data.special_text, data.rendering)
    return Renderer(tokenizer, data.template, data.lost_text, data.date, *how)


def read_train_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, loaded: list[LoadedSource] | None = None
) -> TrainData:
    """Load (unless `loaded`), render and tokenise. Raises UftError with everything that is wrong with the data."""
    keep_pandas_out()
    loaded = load_sources(config.data) if loaded is None else loaded
    renderer = make_renderer(tokenizer, config.data)
    max_length, too_long, folder = config.train.max_length, config.data.too_long, cache_root(config.data.cache)
    # a source with a share of zero is measured, never drawn: its training rows need not even fit
    drawn: dict[str, Sequence[Row]] = {s.name: s.rows if config.data.sources[s.name].share != 0 else () for s in loaded}
    train = tokenize_all(drawn, renderer, max_length, too_long, folder)
    empty = [s.source for s in train if not s.rows and drawn[s.source]]
    if empty:
        raise UftError(*(Problem(f"data.sources.{name}", "no row is left to train on") for name in empty))
    portions = [portion(s.source, s.rows, config.data.sources[s.source].share) for s in train]
    weights = mixture_weights(portions, config.data.ratio)
    order = [[s.digest for s in loaded], weights, config.seeds.data, config.train.batch_size]
    rendered = [renderer.digest, max_length, too_long]
    digest = hashlib.sha256(json.dumps([order, rendered]).encode()).hexdigest()[:16]
    return TrainData(loaded, renderer, train, tokenize_held_out(config, renderer, loaded), weights, digest)


def tokenize_held_out(config: Config, renderer: Renderer, loaded: Sequence[LoadedSource]) -> list[TokenizedSource]:
    """The held-out rows of every source that has some. Too long ones are cut: nothing is learned from them."""
    too_long = "truncate" if config.data.too_long == "error" else config.data.too_long
    rows = {source.name: source.held_out for source in loaded if source.held_out}
    tokenized = tokenize_all(rows, renderer, config.train.max_length, too_long, cache_root(config.data.cache))
    return [source for source in tokenized if source.rows]


@dataclass(frozen=True)
class Horizon:
    """Rows and steps of a whole run or stage."""

    epoch_rows: int
    total_rows: int
    steps: int


def make_horizon(config: Config, dataset: TrainData) -> Horizon:
    """train.steps whole batches, or train.epochs passes whose last batch may be short."""
    one_epoch = epoch_rows(dataset.sizes, dataset.weights, config.data.exhaustion)
    batch, steps = config.train.batch_size, config.train.steps
    rows = steps * batch if steps is not None else max(1, round(config.train.epochs * one_epoch))
    if config.data.exhaustion == "first":  # nothing is drawn twice: training ends where a source would run dry
        rows = min(rows, one_epoch)
    return Horizon(one_epoch, rows, math.ceil(rows / batch))


@dataclass
class StageData:
    """A data set and the rows that a stage draws from it under its objective."""

    dataset: TrainData
    objective: Objective
    sampler: RowSampler
    horizon: Horizon

    @classmethod
    def of(cls, config: Config, dataset: TrainData, *, refuse: bool = True) -> StageData:
        """Raises UftError about rows that the objective cannot use, unless not to `refuse` them."""
        objective = make(config.objective)
        sampler = make_sampler(config, dataset, objective, refuse=refuse)
        return cls(dataset, objective, sampler, make_horizon(config, dataset))

    def rollouts(self, policy: Policy, config: Config, stop: Stop) -> RolloutSampler:
        """The sampler that takes completions of the rows of each step from the policy as it is then."""
        longest, seed = longest_rollout(self.dataset, config), config.seeds.sampling
        context = EngineContext(policy, self.dataset.renderer, config.rollout, seed, longest, stop.between_passes)
        return RolloutSampler(
            self.sampler,
            make_engine(context),
            views=self.objective.views,
            sampled=sampled_sources(config, self.dataset),
            batch_size=config.train.batch_size,
            total_rows=self.horizon.total_rows,
            tokens_per_pass=tokens_per_pass(config),
            keeps_old=self.objective.needs.rollouts > 0,
        )

    @cached_property
    def record(self) -> dict[str, Any]:
        """`data.json`: what was asked of the data, and what all steps draw of it under the objective's own views."""
        drawn, dataset = self.sampler.mixture, self.dataset
        mixture = Mixture(drawn.names, drawn.sizes, drawn.weights, drawn.seed)  # from its first row on
        unusable = {name: sum(rows for rows, _ in kinds.values()) for name, kinds in self.sampler.unusable().items()}
        rows = self.horizon.total_rows
        report = data_report(dataset.loaded, dataset.train, mixture, rows, self.sampler.views, unusable)
        return {"run_digest": dataset.digest, "epoch_rows": self.horizon.epoch_rows, **report}

    def refuse_other_data(self, run: Run) -> None:
        """UftError where `data.json` of a begun run was of other rows: the checkpoint's cursors point into those."""
        record = read_json(run.path / "data.json")
        if record.get("run_digest", self.dataset.digest) == self.dataset.digest:
            return
        began = {name: entry["digest"] for name, entry in record.get("sources", {}).items()}
        changed = [source for source in self.dataset.loaded if began.get(source.name) != source.digest]
        problems = [Problem(f"data.sources.{s.name}", "its rows changed since the run began", s.path) for s in changed]
        if not problems:
            problems = [Problem("data", "rows become other tokens than when the run began (template or tokenizer)")]
        raise UftError(*problems, footer="Put back what was there, or start another run.")


def make_sampler(config: Config, dataset: TrainData, objective: Objective, *, refuse: bool = True) -> RowSampler:
    """The stream of rows under an objective's views.

    Raises UftError about rows that the objective cannot use, unless data.unusable=drop or not to `refuse` them, and
    where no row is left that it learns from.
    """
    names = [source.source for source in dataset.train]
    mixture = Mixture(names, dataset.sizes, dataset.weights, config.seeds.data)
    sampler = RowSampler(dataset.train, mixture, objective.views, config.train.max_length)
    dropping = config.data.unusable == "drop"
    checks: list[Callable[[], None]] = [partial(refuse_unknown_words, dataset, config.model.path)]
    if config.rollout.completions:
        sampled, limits = sampled_sources(config, dataset), (config.train.max_length, dataset.renderer, objective.name)
        sampler.views = expected_views(objective.views, config.rollout, sampled)
        checks.append(partial(refuse_unscored, sampler.drawn, objective.views, config.rollout, sampled, *limits))
    if SAMPLING in objective.needs.columns:
        checks.append(partial(refuse_flat, dataset.loaded, objective))
    if not dropping:
        checks.append(partial(refuse_unusable, sampler, objective, config.data, dataset.loaded))
    if refuse:
        run_all(checks)
    if dropping or not refuse:
        sampler.views = complete_views(objective, sampler.views)
    if refuse and not sampler.takes_anything():
        drawn, name = sum(len(source.rows) for source in sampler.drawn), objective.name
        if dropping:
            problem = Problem("data.unusable=drop", f"objective={name} cannot use any of the {drawn:,} rows")
            raise UftError(problem, footer="See why:  data.unusable=error")
        problem = Problem("data", f"objective={name} learns from none of the {drawn:,} rows")
        raise UftError(problem, footer="See what it takes of each row:  uft data")
    return sampler


LOOKED_AT, MOST_UNKNOWN = 200, 0.2


def refuse_unknown_words(dataset: TrainData, model: str) -> None:
    """UftError where more than a fifth of a source's text is the unknown token: nothing can be learned from it.

    Counted in its first rows. Some tokenizers call a token unknown that has another meaning too: those know all text.
    """
    tokenizer = dataset.renderer.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    problems = []
    for source in dataset.train:
        rows = (source.encoded[number] for number in range(min(len(source.encoded), LOOKED_AT)))
        ids = [tokens.ids for row in rows for tokens in row]
        share = float((np.concatenate(ids) == unknown).mean()) if ids else 0.0
        if share > MOST_UNKNOWN:
            why = f"{share:.0%} of its tokens are {tokenizer.unk_token}: model.path={model} does not know these words"
            advice = ("take a model that does:  model=smollm2_135m   or  model.path=FOLDER or ORG/NAME",)
            problems.append(Problem(f"data.sources.{source.source}", why, advice=advice))
    raise_problems(problems, footer="See the rows as the model reads them:  uft data ...")


# --- Rows that an objective cannot use, for example since they lack annotations that it requires of completions.


def refuse_unusable(sampler: RowSampler, objective: Objective, data: Data, loaded: Sequence[LoadedSource]) -> None:
    """Raise UftError with all unusable rows, the objective's line of the table of kinds, and the commands that help."""
    by_kind = {(source, kind): one for source, kinds in sampler.unusable().items() for kind, one in kinds.items()}
    unread = {source.name: [column for column, _ in source.omitted.unread.most_common()] for source in loaded}
    problems, footer = list[Problem](), list[str]()
    for (name, kind), unusable in by_kind.items():
        why = f"objective={objective.name} cannot use {unusable.rows} {kind.value} row{'s' * (unusable.rows != 1)}"
        advice = tuple[str, ...]()
        if kind is Kind.PROMPT:
            reason, advice = without_reply(name, data.sources[name], kind in sampler.views, unread[name])
            why = f"{why}: {reason}"
        problems.append(Problem(f"data.sources.{name}", why, unusable.first, advice))
    if any(kind is not Kind.PROMPT for _, kind in by_kind):
        names, uses = kind_table({objective.name: objective})
        footer += [f"What {uses[0]} takes of each kind of row:"]
        footer += [f"  {kind:<14} {use}" for kind, use in zip(names[1:], uses[1:], strict=True)]
        if objective.needs.columns:
            footer.append(f"It needs {', '.join(sorted(objective.needs.columns))}; uft generate writes them.")
        footer.append("")
    lacking: dict[str, list[str]] = {}  # annotation -> the sources that lack it, as they are typed
    for source in sampler.drawn:
        without, first = Counter[str](), dict[str, str]()  # annotation -> rows that lack it, the id of one
        for row, count in grouped(source.rows) if any(map(objective.annotations, kinds(source.rows))) else ():
            for name in lacks(objective, row):
                without[name] += count
                first.setdefault(name, row.id)
        for name, many in sorted(without.items()):
            why = f"objective={objective.name} needs {name}, which {many:,} of {len(source.rows):,} rows lack"
            problems.append(Problem(f"data.sources.{source.source}", why, where=first[name]))
            lacking.setdefault(name, []).extend(source_overrides(source.source, data.sources[source.source]))
    if lacking:
        from uft.sampling.annotate import ANNOTATORS  # here: a request that lacks nothing starts without it
    for name, words in lacking.items():
        models = ["annotate.models=[MODEL,...]"] if ANNOTATORS[name].models else []
        footer.append(f"Write it:  {' '.join(['uft annotate', name, *as_typed(['data=files', *words]), *models])}")
    some = sampler.takes_anything() or all(kind is Kind.PROMPT for _, kind in by_kind)
    none = "No other row is left. What takes every kind of row:  objective=uft"
    out = "Leave these rows out:  data.unusable=drop" if some else none
    raise_problems(problems, footer="\n".join([*footer, out]))


PAIRED = (
    "good|better|win(?:ner|ning)?|pos(?:itive)?|right|prefer(?:red)?",
    "bad|wors[et]|los(?:er?|ing)|neg(?:ative)?|wrong",
)
"""How people call the columns of a better and of a worse reply."""


def without_reply(name: str, source: Source, samples: bool, unread: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Why prompts alone teach an objective nothing, and what to type; `samples`: whether the policy samples replies,
    `unread`: the columns that are not read, the fullest first."""
    key = f"data.sources.{name}"
    if samples and source.rollout:
        return "it sets own completions beside a demonstration, and they have none", ("objective=grpo",)
    if samples:
        return "they have no reply, and are not sampled", (f"{key}.rollout=true",)
    columns = [column for column in unread if "." not in column]
    words = (re.compile(rf"(?<![a-z])(?:{pattern})s?(?![a-z])", re.IGNORECASE) for pattern in PAIRED)
    better, worse = (next(filter(one.search, columns), "") for one in words)
    if better and worse and better != worse:
        pair = f"{typed(f'{key}.columns.chosen', better)} {typed(f'{key}.columns.rejected', worse)}"
        named = [f"a pair under other names:  {pair}"]
    else:
        named = [f"a reply under another name:  {typed(f'{key}.columns.completion', column)}" for column in columns]
    rows = " ".join(as_typed(["data=files", *source_overrides(name, source)]))
    return "they have no reply to learn from", (
        *named[:3],
        "learn from the policy's own replies:  objective=grpo rollout.completions=8 reward=NAME",
        f"have a model answer them first:  uft generate model=NAME {rows}",
    )


def refuse_flat(loaded: Sequence[LoadedSource], objective: Objective) -> None:
    """Raise UftError about negatives whose log-probs are not those of the distribution that sampled them."""
    why = f"objective={objective.name} needs log-probs as sampled; {{:,}} rows have those at temperature 1, uncut"
    advice = ("an earlier version wrote them: sample again with uft generate", "or objective.denominator=plain")
    flat = {source.name: source.omitted.oddities[FLAT] for source in loaded}
    problems = [Problem(f"data.sources.{name}", why.format(n), advice=advice) for name, n in flat.items() if n]
    raise_problems(problems)


def complete_views(objective: Objective, views: Mapping[Kind, View]) -> Mapping[Kind, View]:
    """Views under which a row that lacks an annotation that the objective requires is unusable."""

    def complete(kind: Kind, view: View) -> View:
        def selection(row: Row, visit: int) -> Selection | None:
            return None if lacks(objective, row) else view(row, visit)

        return selection if objective.annotations(kind) else view

    return {kind: complete(kind, view) for kind, view in views.items()}


def sampled_sources(config: Config, dataset: TrainData) -> dict[str, Spec | None]:
    """The sources of whose prompts the policy samples completions while it trains, with their checkers."""
    chosen = [source for source in dataset.loaded if config.data.sources[source.name].rollout]
    return {source.name: spec_of(config.reward, source.checker) for source in chosen}


def longest_rollout(dataset: TrainData, config: Config) -> int:
    """Tokens of the longest prompt that is sampled, with its longest hint, and of the longest completion; 0: nothing is
    sampled."""
    sampled = sampled_sources(config, dataset) if config.rollout.completions else {}
    encoded = [source.encoded for source in dataset.train if source.source in sampled]
    if config.rollout.hint.schedule == "none":
        longest = max((rows.longest_sides[0] for rows in encoded), default=0)
    else:
        longest = max((int(rows.longest.max(initial=0)) for rows in encoded), default=0)
    return longest + config.rollout.max_new_tokens if longest else 0


def lacks(objective: Objective, row: Row) -> frozenset[str]:
    """The annotations that are missing on any completion that the objective selects of this row, at any visit."""
    needed, view = objective.annotations(row.kind), objective.views.get(row.kind)
    if not needed or view is None:
        return frozenset()
    visits = (view(row, visit) or () for visit in range(len(row.completions)))
    selected = (row.completions[part.completion] for parts in visits for part in parts)
    return frozenset(name for completion in selected for name in needed - completion.annotations.keys())


def counted_as_certain(sampler: RowSampler, objective: Objective) -> list[str]:
    """A sentence per source and optional annotation of pairs that would refine the loss and is missing."""
    sentences = []
    for source in sampler.drawn:
        pairs = sum(count for kind, count in kinds(source.rows).items() if objective.refined_by(kind))
        without = Counter[str]()
        for row, count in grouped(source.rows) if pairs else ():
            names = objective.refined_by(row.kind) - {name for c in row.completions for name in c.annotations}
            without.update(dict.fromkeys(names, count))
        sentences += [
            f"{many:,} of {pairs:,} pairs of {source.source} have no {name}: they count as certain"
            for name, many in sorted(without.items())
        ]
    return sentences


# --- The data of all stages.


@dataclass
class RunData:
    """The data of all stages of a run, and the rows on which all of them are evaluated.

    The held-out rows are those of the sources of all stages, each source once. Rows that an earlier stage makes are
    read when their stage begins (`read`); none of them is held out, and those whose prompt is held out are left out.
    """

    run: Run
    tokenizer: PreTrainedTokenizerBase
    refuse: bool = True  # rows that an objective cannot use
    held_out: list[HeldOut] = field(default_factory=list)
    stages: dict[str, StageData] = field(default_factory=dict)  # by the stage's name, once its rows are there
    steps: dict[str, int] = field(default_factory=dict)
    digest: str = ""  # of the data that was there from the start

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages whose rows are there."""
        return sum(self.steps.values())

    @property
    def trained_held_out(self) -> int:
        """Held-out rows whose prompt a stage trains on."""
        trained = np.unique(_prompts(source.rows for stage in self.stages.values() for source in stage.dataset.train))
        return int(np.isin(_prompts(held.rows for held in self.held_out), trained).sum())

    def read(self, stage: Stage) -> None:
        """Read the rows of a stage that are there. Raises UftError with everything that is wrong with them."""
        if stage.do == "fit" and not has_made_rows(stage.config.data):
            self.read_training(stage)
        self.hold_out(stage)

    def read_training(self, stage: Stage) -> None:
        """Read the rows of a stage that trains. Raises UftError with everything that is wrong with them."""
        config, loaded = resolve_made_paths(stage.config, self.run), None
        if config is not stage.config:
            held_out = _prompts(held.rows for held in self.held_out)
            loaded = load_sources(config.data)
            for number, source in enumerate(loaded):
                if is_made(stage.config.data.sources[source.name].path):
                    apart = np.isin(prompt_words(source.rows), held_out)
                    if apart.all():
                        why = f"no row is left to train on: the prompts of all {len(apart):,} are held out"
                        raise UftError(Problem(f"data.sources.{source.name} of stage {stage.name}", why))
                    rows = pick(source.rows, np.flatnonzero(~apart).tolist())
                    loaded[number] = replace(source, rows=rows, digest=content_digest(rows))
        dataset = read_train_data(config, self.tokenizer, loaded)
        self.stages[stage.name] = StageData.of(config, dataset, refuse=self.refuse)
        self.steps[stage.name] = self.stages[stage.name].horizon.steps

    def hold_out(self, stage: Stage) -> None:
        """Add the held-out rows of a stage's sources. Raises UftError where one name means different rows."""
        if stage.name in self.stages:
            loaded, tokenized = self.stages[stage.name].dataset.loaded, self.stages[stage.name].dataset.held_out
        else:
            config = stage.config
            there = {name: source for name, source in config.data.sources.items() if not is_made(source.path)}
            loaded = load_sources(replace(config.data, sources=there)) if there else []
            tokenized = tokenize_held_out(config, make_renderer(self.tokenizer, config.data), loaded)
        checkers = {source.name: source.checker for source in loaded}
        known = {held.name: held for held in self.held_out}
        for source in tokenized:
            checker = spec_of(stage.config.reward, checkers[source.source])
            held = HeldOut(source.source, source.rows, source.encoded, checker)
            if held.name not in known:
                self.held_out.append(held)
            elif content_digest(known[held.name].rows) != content_digest(held.rows):
                why = f"holds out other rows in stage {stage.name} than in a stage before it"
                raise UftError(Problem(f"data.sources.{held.name}", why, advice=("give one of the two another name",)))


def read_run_data(run: Run, config: Config, stages: Sequence[Stage], *, refuse: bool = True) -> RunData:
    """Read the rows of all stages that are there. Raises UftError with everything that is wrong with any of them."""
    keep_pandas_out()
    data = RunData(run, load_tokenizer(config.model), refuse)
    run_all(partial(data.read, stage) for stage in stages)
    data.held_out.sort(key=lambda held: held.name)
    digests = {name: stage.dataset.digest for name, stage in data.stages.items()}
    data.digest = digests.get("") or hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    return data


def _prompts(sides: Iterable[Sequence[Row]]) -> np.ndarray:
    """(rows of all sides,) uint64, see prompt_words."""
    return np.concatenate([np.empty(0, np.uint64), *map(prompt_words, sides)])


def has_made_rows(data: Data) -> bool:
    """Whether a stage of the run makes some of the rows."""
    return any(is_made(source.path) for source in data.sources.values())


def resolve_made_paths(config: Config, run: Run) -> Config:
    """`config` with the files that earlier stages made in place of their names."""
    sources = dict(config.data.sources)
    for name, source in sources.items():
        if is_made(source.path):
            sources[name] = replace(source, path=str(rows_of(run.path, source.path, name)), holdout=0.0)
    return replace(config, data=replace(config.data, sources=sources)) if has_made_rows(config.data) else config
