"""From a frozen configuration to a trainer ready for its next step. Everything that can be wrong is said here."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config, Data, Model, ReferenceModel, Source
from uft.config.stages import Stage, made, rows_of
from uft.config.typed import adds
from uft.data.batch import Batch, micro_batches
from uft.data.chat import Renderer
from uft.data.loader import RowSampler
from uft.data.mixture import Mixture, epoch_rows, mixture_weights, portion
from uft.data.report import data_report
from uft.data.rows import Kind, Row, Selection, View, content_digest
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import grouped, kinds, pick, prompt_words
from uft.data.tokens import TokenizedSource, tokenize_all
from uft.distributed import ranks, set_sharding
from uft.errors import FAILED, Problem, UftError
from uft.evaluation.evaluate import HeldOut, check_step_zero
from uft.heartbeat import activity
from uft.model.layout import compile_blocks, settle_layout
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, pad_id
from uft.model.memory import Shape, Spread, estimate, shape_of
from uft.model.policy import Policy
from uft.model.reference import Reference, make_reference
from uft.objectives import make
from uft.objectives.base import Objective, StepContext
from uft.objectives.views import kind_table
from uft.runs import Run, cache_root, read_json, write_json
from uft.sampling.annotate import ANNOTATORS
from uft.training import checkpoint
from uft.training.device import settle_threads, sharding_of, tokens_per_pass
from uft.training.liveness import Stop
from uft.training.optim import make_optimiser
from uft.training.trainer import Progress, Trainer

STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a token's log-prob between policy and reference before the first step: rounding, no more."""

RANK_SEEDS = 1_000_003
"""Between the seeds of two processes."""

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Nobody is watching."""


@dataclass(frozen=True)
class Prepared:
    """A trainer and what it was made from, for the start card, the battery and the export."""

    trainer: Trainer
    corpus: TrainData
    plan: Horizon
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None  # what the objective compares with; None: it needs none
    yardstick: Reference | None  # what the battery compares with: every objective is measured against one


@dataclass(frozen=True)
class SharedInputs:
    """What a stage of a run has from the run, which a run of one piece reads and makes for itself."""

    tokenizer: PreTrainedTokenizerBase
    corpus: TrainData
    reference: tuple[Model, ReferenceModel]  # what the objective compares with
    yardstick: tuple[Model, ReferenceModel] | None  # what the battery of every stage compares with


class Stopped(Exception):
    """Asked to stop before there was anything new worth a checkpoint."""


def prepare(
    run: Run, config: Config, device: torch.device, stop: Stop, say: Say = _silent, given: SharedInputs | None = None
) -> Prepared:
    """Data, model, objective, reference and optimiser of a run, as they are before its first step."""
    objective = make(config.objective)
    tokenizer = given.tokenizer if given else load_tokenizer(config.model)
    corpus = given.corpus if given else read_train_data(config, tokenizer)
    horizon = make_horizon(config, corpus)
    sampler = make_sampler(config, corpus, objective)
    _pause(stop)
    set_sharding(sharding_of(config.hardware))
    say("loading the model")
    policy = load_policy(config.model, device, config.seeds.init)
    settle_threads(config.hardware, policy)
    check_vocabulary(policy.module, tokenizer)
    check_positions(policy, corpus)
    longest = longest_row(corpus, config, objective)
    settle_layout(policy, config.train.packing, longest)
    if config.model.compile:
        say("compiling the model")
        compile_blocks(policy)
    _pause(stop)
    objective.start(sampler.examples)
    cache = cache_dir(config)
    against = partial(make_reference, policy, device=device, tokenizer=tokenizer, cache=cache, longest_row=longest)
    visits = horizon.total_rows / max(1, sampler.examples)
    reference = None
    if objective.needs.reference:
        whole = objective.needs.distributions
        compared = given.reference if given else (config.model, config.reference)
        reference = against(*compared, visits_per_row=visits, distributions=whole)
        _fill(reference, sampler, horizon, config, objective, stop, say)
    # the battery visits its rows many times, so without a reference in memory its column is computed once
    measured = given.yardstick if given else None
    if given is None and reference is None and corpus.held_out:
        measured = (config.model, replace(config.reference, mode="auto"))
    yardstick = against(*measured, visits_per_row=float("inf")) if measured else reference
    _pause(stop)
    # last: what was found in a cache and what was made must not show; every process draws its own dropout
    torch.manual_seed(config.seeds.sampling + RANK_SEEDS * ranks().rank)
    trainer = Trainer(
        run=run,
        config=config,
        device=device,
        objective=objective,
        policy=policy,
        reference=reference.forward if reference else None,
        sampler=sampler,
        optimiser=make_optimiser(policy.trainable(), config.optim),
        pad_id=pad_id(tokenizer),
        steps=horizon.steps,
        total_rows=horizon.total_rows,
        epoch_rows=horizon.epoch_rows,
        stop=stop,
    )
    return Prepared(trainer, corpus, horizon, tokenizer, reference, yardstick)


def longest_row(corpus: TrainData, config: Config, objective: Objective) -> int:
    """Tokens of the longest sequence the model will meet."""
    if objective.needs.mismatched:  # prompts and completions meet that were not together before
        return config.train.max_length
    return max(map(longest_of, [*corpus.train, *corpus.held_out]), default=0)


def longest_of(source: TokenizedSource) -> int:
    return int(source.encoded.longest.max(initial=0))


@activity("a checkpoint was read", moving=True)
def resume(trainer: Trainer, say: Say = _silent) -> int:
    """Continue from the newest whole checkpoint; its step, or -1 where there is none: the run begins."""
    step = checkpoint.resume(trainer.run, trainer.load_checkpoint, say)
    if step >= 0:
        keep, best = trainer.config.train.keep_last, trainer.progress.best_step
        ranks().barrier()
        # the process may have died before it deleted what this checkpoint replaced
        ranks().on_rank0(lambda: checkpoint.prune(trainer.run, keep, best))
    return step


def standing(run: Run) -> tuple[Progress, int]:
    """Counters and horizon of the newest checkpoint; zeros where there is none."""
    checkpoint.recover(run)
    for _, folder in reversed(run.checkpoints()):
        with suppress(checkpoint.Damaged):
            state = checkpoint.read_state(folder)
            return Progress(**state["progress"]), int(state["steps"])
    return Progress(), 0


def refuse_other_data(run: Run, corpus: TrainData) -> None:
    """UftError where the files say something else than when the run began: its cursors would point at other rows."""
    record = read_json(run.path / "data.json")
    if record.get("run_digest", corpus.digest) == corpus.digest:
        return
    began = {name: entry["digest"] for name, entry in record.get("sources", {}).items()}
    changed = [source for source in corpus.loaded if began.get(source.name) != source.digest]
    problems = [Problem(f"data.sources.{s.name}", "its rows changed since the run began", s.path) for s in changed]
    if not problems:
        problems = [Problem("data", "rows become other tokens than when the run began (template or tokenizer)")]
    raise UftError(*problems, footer="Put back what was there, or start another run.")


def _pause(stop: Stop) -> None:
    """A safe point of the preparation."""
    if stop.agreed():
        raise Stopped


def _fill(
    reference: Reference,
    sampler: RowSampler,
    horizon: Horizon,
    config: Config,
    objective: Objective,
    stop: Stop,
    say: Say,
) -> None:
    """Compute the cached reference of all completions the run will meet, and hand the column to the sampler."""
    if reference.column is None:
        return
    every_step = objective.needs.mismatched  # whose completions depend on who is in a step with whom
    drawn = horizon.total_rows if every_step else min(horizon.total_rows, sampler.mixture.first_pass)
    encoded = [one for row in sampler.met(sampler.preview(drawn)) for one in row]
    if every_step:
        draws = list(sampler.preview(drawn))
        steps = (
            draws[start : start + config.train.batch_size] for start in range(0, len(draws), config.train.batch_size)
        )
        encoded += [one for step in steps for item in sampler.mismatched(sampler.items(step)) for one in item.encoded]
    done = reference.column.fill(
        encoded,
        batch_tokens=tokens_per_pass(config),
        should_stop=stop.between_passes,
        progress=lambda count, of: say(f"reference log-probs: {count} of {of} completions"),
    )
    if not done:
        stop.agreed()
        raise Stopped
    sampler.reference = reference.column


def check_positions(policy: Policy, corpus: TrainData) -> None:
    """Learned position embeddings end somewhere; a longer row must be said before step 0, not by an index error."""
    positions = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
    problems = [
        Problem(
            f"data.sources.{source.source}",
            f"its longest row has {longest} tokens, the model has {positions} positions",
            advice=(f"train.max_length={positions} data.too_long=drop|truncate",),
        )
        for source in [*corpus.train, *corpus.held_out]
        if positions and (longest := longest_of(source)) > positions
    ]
    if problems:
        raise UftError(*problems)


@torch.no_grad()
def check_start(trainer: Trainer, reference: Reference | None) -> dict[str, float]:
    """Rule 5 on the real run: before step 0 the policy is the reference, and losses have the values that follow.

    Returns what was measured, {} where there is nothing to compare; raises UftError where it is not as it must be.
    """
    if reference is None or trainer.config.reference.path is not None or trainer.progress.step > 0:
        return {}
    items = trainer.sampler.items(trainer.sampler.preview(min(trainer.config.train.batch_size, 8)))
    if not items:
        return {}
    batch = micro_batches(items[:2], 1, trainer.pad_id, trainer.policy.layout)[0].to(trainer.device)
    trainer.policy.eval()
    ours, theirs = trainer.policy(batch).log_probs, reference.forward(batch).log_probs
    problems = check_step_zero(ours, theirs, STEP_ZERO_TOLERANCE[trainer.config.model.dtype])
    if not problems:
        problems = _wrong_terms(trainer, reference, batch)
    trainer.policy.train()
    if problems:
        raise UftError(Problem("step 0", problems[0], advice=tuple(problems[1:])), code=FAILED)
    return {"targets": ours.numel(), "largest_difference": float((ours - theirs).abs().max())}


def _wrong_terms(trainer: Trainer, reference: Reference, batch: Batch) -> list[str]:
    """Terms of the loss that are not what they must be while policy and reference are equal."""
    context = StepContext(learning=False)
    loss = trainer.objective(batch, trainer.policy, reference.forward, context)
    expected = trainer.objective.at_reference(batch)
    loose = 1e-2 if trainer.config.model.dtype == "float32" else 1.0
    return [
        f"{name} is {float(loss[name].total):.6g} where policy = reference gives {float(total):.6g}"
        for name, total in expected.items()
        if abs(float(loss[name].total) - float(total)) > loose * max(1.0, float(loss[name].count))
    ]


# --- Corpus: what a run reads, from files to token ids, and the plan of how much of it is drawn.


def cache_dir(config: Config) -> Path:
    """Where token and reference caches live."""
    return cache_root(config.data.cache)


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


def read_train_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, loaded: list[LoadedSource] | None = None
) -> TrainData:
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
    return TrainData(loaded, renderer, train, held_out, weights, digest)


def encode_held_out(config: Config, renderer: Renderer, rows: Mapping[str, Sequence[Row]]) -> list[TokenizedSource]:
    """The held-out rows of every source that has some.

    They are measured, not trained on: cutting one that is too long loses nothing that should be learned.
    """
    too_long = "truncate" if config.data.too_long == "error" else config.data.too_long
    some = {name: held for name, held in rows.items() if held}
    encoded = tokenize_all(some, renderer, config.train.max_length, too_long, cache_dir(config))
    return [source for source in encoded if source.rows]


@dataclass(frozen=True)
class Horizon:
    """How many rows and steps the run takes."""

    epoch_rows: int
    total_rows: int
    steps: int


def make_horizon(config: Config, corpus: TrainData) -> Horizon:
    """The horizon: train.steps whole batches, or train.epochs passes whose last batch may be short."""
    one_epoch = epoch_rows(corpus.sizes, corpus.weights, config.data.exhaustion)
    batch, steps = config.train.batch_size, config.train.steps
    rows = steps * batch if steps is not None else max(1, round(config.train.epochs * one_epoch))
    if config.data.exhaustion == "first":  # nothing is shown twice: the run ends where a source would run dry
        rows = min(rows, one_epoch)
    return Horizon(one_epoch, rows, math.ceil(rows / batch))


def make_sampler(config: Config, corpus: TrainData, objective: Objective, *, refuse: bool = True) -> RowSampler:
    """The stream of rows under an objective's views.

    Rows it cannot use stop the request unless data.unusable=drop, or `refuse` is False: somebody only looks.
    """
    names = [source.source for source in corpus.train]
    mixture = Mixture(names, corpus.sizes, corpus.weights, config.seeds.data)
    sampler = RowSampler(corpus.train, mixture, objective.views, config.train.max_length)
    if refuse and config.data.unusable == "error":
        _refuse_unusable(sampler, objective, config.data)
    else:
        sampler.views = complete_views(objective)
    if refuse:
        _refuse_nothing(sampler, objective, config.data)
    return sampler


def _refuse_nothing(sampler: RowSampler, objective: Objective, data: Data) -> None:
    """A run that drops every row, or takes nothing of what is left, would train on none and call itself finished."""
    if sampler.takes_anything():
        return
    drawn = sum(len(source.rows) for source in sampler.drawn)
    name, dropping = objective.name, data.unusable == "drop"
    raise UftError(
        Problem("data.unusable=drop", f"objective={name} cannot use any of the {drawn:,} rows")
        if dropping
        else Problem("data", f"objective={name} learns from none of the {drawn:,} rows"),
        footer="See why:  data.unusable=error" if dropping else "See what it takes of each row:  uft data",
    )


def _refuse_unusable(sampler: RowSampler, objective: Objective, data: Data) -> None:
    """Tell which rows, with the objective's own line of the table of what it does with each kind."""
    problems = [
        Problem(
            f"data.sources.{source}",
            f"objective={objective.name} cannot use {unusable.rows} {kind.value} row{'s' * (unusable.rows != 1)}",
            where=unusable.first,
        )
        for source, kinds in sampler.unusable().items()
        for kind, unusable in kinds.items()
    ]
    lacking, commands = missing_annotations(sampler, objective, data)
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


# --- What a run writes down about its data and its checks.


def data_record(corpus: TrainData, sampler: RowSampler, plan: Horizon) -> dict[str, Any]:
    """`data.json`: what was asked of the data and what the whole run draws of it, under the objective's own views."""
    mixture = Mixture(sampler.mixture.names, sampler.mixture.sizes, sampler.mixture.weights, sampler.mixture.seed)
    unusable = {name: sum(found.rows for found in kinds.values()) for name, kinds in sampler.unusable().items()}
    report = data_report(corpus.loaded, corpus.train, mixture, plan.total_rows, sampler.views, unusable)
    return {"run_digest": corpus.digest, "epoch_rows": plan.epoch_rows, **report}


def memory_record(prepared: Prepared) -> dict[str, int]:
    """Bytes by part that each process of the run is expected to need."""
    reference = prepared.reference.mode if prepared.reference else None
    return planned(prepared.trainer.config, shape_of(prepared.trainer.policy), reference)


def planned(config: Config, shape: Shape, reference_mode: str | None, tokens: int | None = None) -> dict[str, int]:
    """Bytes by part on each device, at the budget of a micro-batch unless it is known to be smaller (`tokens`)."""
    hardware = config.hardware
    return estimate(
        shape,
        optimiser=config.optim.name,
        momentum=config.optim.momentum > 0,
        micro_batch_tokens=tokens_per_pass(config) if tokens is None else tokens,
        reference_mode=reference_mode,
        spread=Spread(hardware.processes * hardware.nodes, hardware.sharding == "full", hardware.offload),
    )


REMOTE_CODE = "model.trust_remote_code is on: code that came with the model runs with all rights of this user"


def cautions(prepared: Prepared) -> list[str]:
    """What a reader of this run should know."""
    remote = [REMOTE_CODE] if prepared.trainer.config.model.trust_remote_code else []
    objective = prepared.trainer.objective
    return [*remote, *objective.cautions(), *counted_as_certain(prepared.trainer.sampler, objective)]


def check_record(prepared: Prepared, step_zero: dict[str, float]) -> dict[str, Any]:
    """`check.json`: what was measured before the first step."""
    reference = prepared.reference
    return {
        "template": prepared.corpus.renderer.name,
        "model": prepared.trainer.policy.describe(),
        "cautions": cautions(prepared),
        "reference": {"mode": reference.mode, "why": reference.why} if reference else None,
        "policy_against_reference": step_zero,
        "memory_bytes": memory_record(prepared),
    }


# --- What an objective needs that must have been written beside completions, and the rows that lack it.


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


def missing_annotations(sampler: RowSampler, objective: Objective, data: Data) -> tuple[list[Problem], list[str]]:
    """(a problem per source and number that its rows lack, the commands that write them)."""
    problems: list[Problem] = []
    lacking: dict[str, list[str]] = {}  # number -> sources
    for source in sampler.drawn:
        without, first = Counter[str](), dict[str, str]()  # number -> rows that lack it, the id of one
        for row, count in grouped(source.rows) if any(map(objective.annotations, kinds(source.rows))) else ():
            for name in lacks(objective, row):
                without[name] += count
                first.setdefault(name, row.id)
        for name, many in sorted(without.items()):
            why = f"objective={objective.name} needs {name}, which {many:,} of {len(source.rows):,} rows lack"
            problems.append(Problem(f"data.sources.{source.source}", why, where=first[name]))
            lacking.setdefault(name, []).append(source.source)
    return problems, [_command(name, {s: data.sources[s] for s in sources}) for name, sources in lacking.items()]


def counted_as_certain(sampler: RowSampler, objective: Objective) -> list[str]:
    """A sentence per source and number that would refine the loss, and that rows do not carry."""
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


def _complete(objective: Objective, kind: Kind, view: View) -> View:
    if not objective.annotations(kind):
        return view

    def whole(row: Row, visit: int) -> Selection | None:
        return None if lacks(objective, row) else view(row, visit)

    return whole


def _command(column: str, sources: Mapping[str, Source]) -> str:
    words = ["uft annotate", column, "data=files", *(word for name, s in sources.items() for word in adds(name, s))]
    return " ".join([*words, *(["annotate.models=[MODEL,...]"] if ANNOTATORS[column].models else [])])


# --- What a run of stages reads before the first of them begins: every mistake in any stage's data is told then.
#
# All stages are measured alike: the battery's rows are what the sources of all stages hold out, each source once.
# Rows
# that an earlier stage makes are read when their stage begins; they are never measured on, and those whose prompt is
# held out are left out of them.


@dataclass
class PipelineData:
    """The data of all stages. A corpus is there from the start, or once the rows it is made of are."""

    run: Run
    tokenizer: PreTrainedTokenizerBase
    held_out: list[HeldOut] = field(default_factory=list)
    corpora: dict[str, TrainData] = field(default_factory=dict)
    plans: dict[str, Horizon] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # data.json of every stage that trains

    @property
    def steps(self) -> int:
        """Of all stages whose rows are there."""
        return sum(horizon.steps for horizon in self.plans.values())

    @property
    def digest(self) -> str:
        """Of the data of all stages that was there from the start."""
        told = {name: record["run_digest"] for name, record in self.records.items()}
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def read(self, stage: Stage) -> None:
        """The rows of a stage that trains. Raises UftError with everything that is wrong with them."""
        config = located(stage.config, self.run)
        loaded = load_sources(config.data)
        if config.data is not stage.config.data:
            loaded = [self._without_held_out(s) if made(stage.config.data.sources[s.name].path) else s for s in loaded]
        corpus = read_train_data(config, self.tokenizer, loaded)
        horizon = make_horizon(config, corpus)
        sampler = make_sampler(config, corpus, make(config.objective))
        self.corpora[stage.name], self.plans[stage.name] = corpus, horizon
        self.records[stage.name] = data_record(corpus, sampler, horizon)

    def keep(self, stage: Stage) -> None:
        """Write what a stage's data came to. Raises UftError where it came to something else before."""
        folder = Run(self.run.path / stage.folder)
        folder.path.mkdir(parents=True, exist_ok=True)
        refuse_other_data(folder, self.corpora[stage.name])
        write_json(folder.path / "data.json", self.records[stage.name])

    @property
    def seen(self) -> int:
        """Held-out rows whose prompt some stage trains on."""
        trained = np.unique(_words(source.rows for corpus in self.corpora.values() for source in corpus.train))
        return int(np.isin(_words(held.rows for held in self.held_out), trained).sum())

    def _without_held_out(self, source: LoadedSource) -> LoadedSource:
        apart = np.isin(prompt_words(source.rows), _words(held.rows for held in self.held_out))
        rows = pick(source.rows, np.flatnonzero(~apart).tolist())
        return replace(source, rows=rows, digest=content_digest(rows))


def _words(sides: Iterable[Sequence[Row]]) -> np.ndarray:
    """(rows of all sides,) uint64, see prompt_words."""
    return np.concatenate([np.empty(0, np.uint64), *map(prompt_words, sides)])


def read_pipeline_data(run: Run, config: Config, stages: Sequence[Stage]) -> PipelineData:
    """Read what is there of the data of all stages. Raises UftError with everything that is wrong with any of it."""
    ground = PipelineData(run, load_tokenizer(config.model))
    problems: dict[Problem, None] = {}
    footer = ""
    for stage in stages:
        try:
            if stage.do == "fit" and not waits(stage.config.data):
                ground.read(stage)
            _hold_out(ground, stage)
        except UftError as error:
            problems |= dict.fromkeys(error.problems)
            footer = error.footer
    if problems:
        raise UftError(*problems, footer=footer)
    ground.held_out.sort(key=lambda held: held.name)
    return ground


def waits(data: Data) -> bool:
    """Whether some of the rows are made by a stage."""
    return any(made(source.path) for source in data.sources.values())


def located(config: Config, run: Run) -> Config:
    """`config` with the files that earlier stages made in the place of their names."""
    if not waits(config.data):
        return config
    sources = {
        name: replace(source, path=str(rows_of(run.path, source.path, name)), holdout=0.0)
        if made(source.path)
        else source
        for name, source in config.data.sources.items()
    }
    return replace(config, data=replace(config.data, sources=sources))


def _hold_out(ground: PipelineData, stage: Stage) -> None:
    """Add what the sources of a stage hold out. One name means the same rows in all stages."""
    config = stage.config
    corpus = ground.corpora.get(stage.name)
    if corpus is None:
        there = {name: source for name, source in config.data.sources.items() if not made(source.path)}
        loaded = load_sources(replace(config.data, sources=there)) if there else []
        renderer = Renderer(ground.tokenizer, config.data.template)
        encoded = encode_held_out(config, renderer, {s.name: s.held_out for s in loaded})
    else:
        loaded, encoded = corpus.loaded, corpus.held_out
    checkers = {source.name: source.checker for source in loaded}
    known = {held.name: held for held in ground.held_out}
    for source in encoded:
        held = HeldOut(source.source, source.rows, source.encoded, checkers[source.source])
        if held.name not in known:
            ground.held_out.append(held)
        elif content_digest(known[held.name].rows) != content_digest(held.rows):
            why = f"holds out other rows in stage {stage.name} than in a stage before it"
            raise UftError(Problem(f"data.sources.{held.name}", why, advice=("give one of the two another name",)))


def stage_inputs(stage: Stage, run: Config, model: Model, ground: PipelineData) -> tuple[Config, SharedInputs]:
    """(configuration of a stage that starts from `model`, what its run hands it)."""
    initial, config = run.model, replace(stage.config, model=model)
    if stage.reference == "initial" and model.path != initial.path:
        config = replace(config, reference=replace(config.reference, path=initial.path))
    # by its path, so that it is the same in every stage, with and without an adapter
    yardstick = replace(run.reference, path=run.reference.path or initial.path, mode="auto")
    return config, SharedInputs(
        tokenizer=ground.tokenizer,
        corpus=ground.corpora[stage.name],
        reference=(initial if config.reference.path == initial.path else model, config.reference),
        yardstick=(initial, yardstick) if ground.held_out else None,
    )


def describe(stages: Sequence[Stage], ground: PipelineData) -> Iterator[tuple[str, str]]:
    """A line per stage, for cards."""
    for stage in stages:
        config, horizon = stage.config, ground.plans.get(stage.name)
        how = {
            "fit": f"objective={config.objective['name']} data={config.data.name}",
            "generate": f"data={config.data.name}, {len(config.generate.seeds)} for every prompt",
            "annotate": f"data={config.data.name} column={config.annotate.column}",
        }[stage.do]
        steps = f", {horizon.steps} steps of {config.train.batch_size} rows" if horizon else ""
        later = ", as many steps as its rows will give" if stage.do == "fit" and not horizon else ""
        yield f"{stage.number} {stage.name}", f"{stage.do}  {how}{steps}{later}"
