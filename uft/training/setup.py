"""From a frozen configuration to a trainer that is ready for its next step, with every check that comes before it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config, Data, Model, ReferenceModel
from uft.config.stages import Stage, made, rows_of
from uft.config.typed import adds
from uft.data.batch import micro_batches
from uft.data.chat import Renderer
from uft.data.loader import RowSampler
from uft.data.mixture import Mixture, epoch_rows, mixture_weights, portion
from uft.data.report import data_report
from uft.data.rows import Kind, Row, Selection, View, content_digest
from uft.data.sources import LoadedSource, load_sources
from uft.data.table import grouped, kinds, pick, prompt_words
from uft.data.tokens import TokenizedSource, tokenize_all
from uft.distributed import ranks, set_sharding
from uft.errors import BAD_REQUEST, FAILED, Problem, UftError
from uft.evaluation.evaluate import HeldOut, check_step_zero
from uft.heartbeat import activity
from uft.model.layout import compile_blocks, settle_layout
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, pad_id
from uft.model.memory import Shape, Spread, estimate, shape_of
from uft.model.policy import Policy
from uft.model.reference import Reference, make_reference
from uft.objectives import make
from uft.objectives.base import Clock, Objective
from uft.objectives.views import kind_table
from uft.runs import Run, cache_root, read_json
from uft.sampling.annotate import ANNOTATORS
from uft.training import checkpoint
from uft.training.device import settle_threads, sharding_of, tokens_per_pass
from uft.training.liveness import Stop
from uft.training.optim import make_optimiser
from uft.training.trainer import Progress, Trainer

STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a token's log-prob between policy and reference before the first step: rounding, no more."""

RANK_SEEDS = 1_000_003
"""Distance between the sampling seeds of two processes."""

REMOTE_CODE = "model.trust_remote_code is on: code that came with the model runs with all rights of this user"

Say = Callable[[str], None]


class Stopped(Exception):
    """Asked to stop before there was anything new worth a checkpoint."""


@dataclass(frozen=True)
class Prepared:
    """A trainer and what it was made from, for the start card, the evaluation and the export."""

    trainer: Trainer
    data: StageData
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None  # of the objective; None: it needs none
    eval_reference: Reference | None  # of the evaluation: every objective is compared with one


def prepare_stage(
    run: Run, config: Config, stage: Stage, model: Model, data: RunData, device: torch.device, stop: Stop, say: Say
) -> Prepared:
    """`prepare` a stage of a run that starts from `model`, with the references that the run gives it."""
    initial, own = config.model, replace(stage.config, model=model)
    if stage.reference == "initial" and model.path != initial.path:
        own = replace(own, reference=replace(own.reference, path=initial.path))
    reference = (initial if own.reference.path == initial.path else model, own.reference)
    eval_reference = None
    if stage.name and data.held_out:
        # named by its path, so that it is the same model in every stage, with and without an adapter
        eval_reference = (initial, replace(config.reference, path=config.reference.path or initial.path, mode="auto"))
    folder = Run(run.path / stage.folder)
    return prepare(folder, own, device, stop, say, data.stages[stage.name], reference, eval_reference)


def prepare(
    run: Run,
    config: Config,
    device: torch.device,
    stop: Stop,
    say: Say = lambda text: None,
    data: StageData | None = None,
    reference_model: tuple[Model, ReferenceModel] | None = None,
    eval_model: tuple[Model, ReferenceModel] | None = None,
) -> Prepared:
    """Data, model, objective, references and optimiser, as they are before the first step.

    `data`: None to read it here. `reference_model`: what the objective's reference is made from, by default the
    configuration's own model; `eval_model`: likewise for the evaluation, by default the objective's reference.
    Raises Stopped at a safe point after `stop` was set, and UftError about the request.
    """
    tokenizer = data.dataset.renderer.tokenizer if data else load_tokenizer(config.model)
    if data is None:
        data = StageData.of(config, read_train_data(config, tokenizer))
    dataset, objective, sampler, horizon = data.dataset, data.objective, data.sampler, data.horizon
    pause(stop)
    set_sharding(sharding_of(config.hardware))
    say("loading the model")
    policy = load_policy(config.model, device, config.seeds.init)
    settle_threads(config.hardware, policy)
    check_vocabulary(policy.module, tokenizer)
    check_positions(policy, dataset)
    longest = longest_row(dataset, config, objective)
    settle_layout(policy, config.train.packing, longest)
    if config.model.compile:
        say("compiling the model")
        compile_blocks(policy)
    pause(stop)
    objective.start(sampler.examples)
    reference_of = partial(
        make_reference, policy, device=device, tokenizer=tokenizer, cache=cache_dir(config), longest_row=longest
    )
    reference = None
    if objective.needs.reference:
        reference = reference_of(
            *(reference_model or (config.model, config.reference)),
            visits_per_row=horizon.total_rows / max(1, sampler.examples),
            distributions=objective.needs.distributions,
        )
        _cache_reference(reference, data, config, stop, say)
    if eval_model is None and reference is None and dataset.held_out:
        eval_model = (config.model, replace(config.reference, mode="auto"))
    # held-out rows are visited many times: a reference that is not in memory computes its column once
    eval_reference = reference_of(*eval_model, visits_per_row=math.inf) if eval_model else reference
    pause(stop)
    # last, so that the generator does not depend on what was found in caches; every process draws its own dropout
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
    return Prepared(trainer, data, tokenizer, reference, eval_reference)


def pause(stop: Stop) -> None:
    """A safe point of the preparation. Raises Stopped in all processes if any was asked to stop."""
    if stop.agreed():
        raise Stopped


def longest_row(dataset: TrainData, config: Config, objective: Objective) -> int:
    """Tokens of the longest sequence that the model will meet."""
    if objective.needs.mismatched:  # completions are scored under other rows' prompts
        return config.train.max_length
    return max((source.encoded.longest.max(initial=0) for source in (*dataset.train, *dataset.held_out)), default=0)


def _cache_reference(reference: Reference, data: StageData, config: Config, stop: Stop, say: Say) -> None:
    """Compute a cached reference for all completions that the run will meet, and give the column to the sampler."""
    if reference.column is None:
        return
    sampler, batch_size = data.sampler, config.train.batch_size
    every_step = data.objective.needs.mismatched  # which completions are scored depends on the rows of each step
    drawn = data.horizon.total_rows if every_step else min(data.horizon.total_rows, sampler.mixture.first_pass)
    encoded = [one for row in sampler.met(sampler.preview(drawn)) for one in row]
    if every_step:
        draws = list(sampler.preview(drawn))
        for start in range(0, len(draws), batch_size):
            items = sampler.items(draws[start : start + batch_size])
            encoded += [one for item in sampler.mismatched(items) for one in item.encoded]
    complete = reference.column.fill(
        encoded,
        batch_tokens=tokens_per_pass(config),
        should_stop=stop.between_passes,
        progress=lambda count, of: say(f"reference log-probs: {count} of {of} completions"),
    )
    if not complete:
        stop.agreed()
        raise Stopped
    sampler.reference = reference.column


@activity("a checkpoint was read", moving=True)
def resume(trainer: Trainer, say: Say = lambda text: None) -> int:
    """Continue from the newest undamaged checkpoint; its step, or -1 where there is none."""
    step = checkpoint.resume(trainer.run, trainer.load_checkpoint, say)
    if step >= 0:
        keep, best = trainer.config.train.keep_last, trainer.progress.best_step
        ranks().barrier()
        # the process may have died before it deleted the checkpoints that this one replaced
        ranks().on_rank0(lambda: checkpoint.prune(trainer.run, keep, best))
    return step


def saved_progress(run: Run) -> Progress:
    """The counters of the newest checkpoint; zeros where there is none."""
    checkpoint.recover(run)
    for _, folder in reversed(run.checkpoints()):
        with suppress(checkpoint.Damaged):
            return Progress(**checkpoint.read_state(folder)["progress"])
    return Progress()


# --- Checks before the first step.


def check_positions(policy: Policy, dataset: TrainData) -> None:
    """Raise UftError for sources with rows longer than the model's learned position embeddings."""
    positions = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
    problems = [
        Problem(
            f"data.sources.{source.source}",
            f"its longest row has {longest} tokens, the model has {positions} positions",
            advice=(f"train.max_length={positions} data.too_long=drop|truncate",),
        )
        for source in (*dataset.train, *dataset.held_out)
        if positions and (longest := int(source.encoded.longest.max(initial=0))) > positions
    ]
    if problems:
        raise UftError(*problems)


@torch.no_grad()
def check_start(trainer: Trainer, reference: Reference | None) -> dict[str, float]:
    """Check on the real run that the policy equals its reference before step 0, and losses have the values that follow.

    Returns the number of compared targets and their largest difference, {} where there is nothing to compare.
    Raises UftError (code 1) where they differ.
    """
    if reference is None or trainer.config.reference.path is not None or trainer.progress.step > 0:
        return {}
    items = trainer.sampler.items(trainer.sampler.preview(min(trainer.config.train.batch_size, 8)))
    if not items:
        return {}
    dtype = trainer.config.model.dtype
    batch = micro_batches(items[:2], 1, trainer.pad_id, trainer.policy.layout)[0].to(trainer.device)
    trainer.policy.eval()
    ours, theirs = trainer.policy(batch).log_probs, reference.forward(batch).log_probs
    problems = check_step_zero(ours, theirs, STEP_ZERO_TOLERANCE[dtype])
    if not problems:
        loss = trainer.objective(batch, trainer.policy, reference.forward, Clock(learning=False))
        loose = 1e-2 if dtype == "float32" else 1.0
        problems = [
            f"{name} is {float(loss[name].total):.6g} where policy = reference gives {float(total):.6g}"
            for name, total in trainer.objective.at_reference(batch).items()
            if abs(float(loss[name].total) - float(total)) > loose * max(1.0, float(loss[name].count))
        ]
    trainer.policy.train()
    if problems:
        raise UftError(Problem("step 0", problems[0], advice=tuple(problems[1:])), code=FAILED)
    return {"targets": ours.numel(), "largest_difference": float((ours - theirs).abs().max())}


def check_record(prepared: Prepared, step_zero: dict[str, float]) -> dict[str, Any]:
    """`check.json`: everything that was found out before the first step."""
    reference = prepared.reference
    return {
        "template": prepared.data.dataset.renderer.name,
        "model": prepared.trainer.policy.describe(),
        "cautions": cautions(prepared),
        "reference": {"mode": reference.mode, "why": reference.why} if reference else None,
        "policy_against_reference": step_zero,
        "memory_bytes": memory_record(prepared),
    }


def cautions(prepared: Prepared) -> list[str]:
    """Warnings about the run that its card and `check.json` repeat."""
    remote = [REMOTE_CODE] if prepared.trainer.config.model.trust_remote_code else []
    objective = prepared.data.objective
    return [*remote, *objective.cautions(), *counted_as_certain(prepared.data.sampler, objective)]


def memory_record(prepared: Prepared) -> dict[str, int]:
    """Bytes by part that each process of the run is expected to need."""
    reference = prepared.reference.mode if prepared.reference else None
    return planned_memory(prepared.trainer.config, shape_of(prepared.trainer.policy), reference)


def planned_memory(
    config: Config, shape: Shape, reference_mode: str | None, tokens: int | None = None
) -> dict[str, int]:
    """Bytes by part on each device; `tokens` of the largest micro-batch, by default the budget of one."""
    hardware = config.hardware
    return estimate(
        shape,
        optimiser=config.optim.name,
        momentum=config.optim.momentum > 0,
        micro_batch_tokens=tokens_per_pass(config) if tokens is None else tokens,
        reference_mode=reference_mode,
        spread=Spread(hardware.processes * hardware.nodes, hardware.sharding == "full", hardware.offload),
    )


# --- The data of one stage: from files to token ids, and how much of it is drawn in which order.


def cache_dir(config: Config) -> Path:
    """Root of the token and reference caches."""
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
    """Load (unless `loaded`), render and tokenise. Raises UftError with everything that is wrong with the data."""
    loaded = load_sources(config.data) if loaded is None else loaded
    renderer = Renderer(tokenizer, config.data.template)
    max_length, too_long, folder = config.train.max_length, config.data.too_long, cache_dir(config)
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
    tokenized = tokenize_all(rows, renderer, config.train.max_length, too_long, cache_dir(config))
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
    if refuse and not dropping:
        refuse_unusable(sampler, objective, config.data)
    else:
        sampler.views = complete_views(objective)
    if refuse and not sampler.takes_anything():
        drawn, name = sum(len(source.rows) for source in sampler.drawn), objective.name
        if dropping:
            problem = Problem("data.unusable=drop", f"objective={name} cannot use any of the {drawn:,} rows")
            raise UftError(problem, footer="See why:  data.unusable=error")
        problem = Problem("data", f"objective={name} learns from none of the {drawn:,} rows")
        raise UftError(problem, footer="See what it takes of each row:  uft data")
    return sampler


# --- Rows that an objective cannot use, for example since they lack annotations that it requires of completions.


def refuse_unusable(sampler: RowSampler, objective: Objective, data: Data) -> None:
    """Raise UftError with all unusable rows, the objective's line of the table of kinds, and the commands that help."""
    problems = [
        Problem(
            f"data.sources.{source}",
            f"objective={objective.name} cannot use {unusable.rows} {kind.value} row{'s' * (unusable.rows != 1)}",
            where=unusable.first,
        )
        for source, kinds in sampler.unusable().items()
        for kind, unusable in kinds.items()
    ]
    footer = []
    if problems:
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
            lacking.setdefault(name, []).extend(adds(source.source, data.sources[source.source]))
    for name, words in lacking.items():
        models = ["annotate.models=[MODEL,...]"] if ANNOTATORS[name].models else []
        footer.append(f"Write it:  {' '.join(['uft annotate', name, 'data=files', *words, *models])}")
    if problems:
        raise UftError(*problems, footer="\n".join([*footer, "Leave these rows out:  data.unusable=drop"]))


def complete_views(objective: Objective) -> Mapping[Kind, View]:
    """The objective's views, under which a row that lacks a required annotation is unusable."""

    def complete(kind: Kind, view: View) -> View:
        def selection(row: Row, visit: int) -> Selection | None:
            return None if lacks(objective, row) else view(row, visit)

        return selection if objective.annotations(kind) else view

    return {kind: complete(kind, view) for kind, view in objective.views.items()}


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


# --- The data of all stages, read before the first of them begins: every mistake in any stage's data is told then.


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
        """Of all stages whose rows are there."""
        return sum(self.steps.values())

    @property
    def trained_held_out(self) -> int:
        """Held-out rows whose prompt a stage trains on."""
        trained = np.unique(_prompts(source.rows for stage in self.stages.values() for source in stage.dataset.train))
        return int(np.isin(_prompts(held.rows for held in self.held_out), trained).sum())

    def read(self, stage: Stage) -> None:
        """Read the rows of a stage that trains. Raises UftError with everything that is wrong with them."""
        config, loaded = located(stage.config, self.run), None
        if config is not stage.config:
            held_out = _prompts(held.rows for held in self.held_out)
            loaded = load_sources(config.data)
            for number, source in enumerate(loaded):
                if made(stage.config.data.sources[source.name].path):
                    apart = np.isin(prompt_words(source.rows), held_out)
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
            there = {name: source for name, source in config.data.sources.items() if not made(source.path)}
            loaded = load_sources(replace(config.data, sources=there)) if there else []
            tokenized = tokenize_held_out(config, Renderer(self.tokenizer, config.data.template), loaded)
        checkers = {source.name: source.checker for source in loaded}
        known = {held.name: held for held in self.held_out}
        for source in tokenized:
            held = HeldOut(source.source, source.rows, source.encoded, checkers[source.source])
            if held.name not in known:
                self.held_out.append(held)
            elif content_digest(known[held.name].rows) != content_digest(held.rows):
                why = f"holds out other rows in stage {stage.name} than in a stage before it"
                raise UftError(Problem(f"data.sources.{held.name}", why, advice=("give one of the two another name",)))


def read_run_data(run: Run, config: Config, stages: Sequence[Stage], *, refuse: bool = True) -> RunData:
    """Read the rows of all stages that are there. Raises UftError with everything that is wrong with any of them."""
    data = RunData(run, load_tokenizer(config.model), refuse)
    errors: list[UftError] = []
    for stage in stages:
        try:
            if stage.do == "fit" and not has_made_rows(stage.config.data):
                data.read(stage)
            data.hold_out(stage)
        except UftError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = dict.fromkeys(problem for error in errors for problem in error.problems)
        code = FAILED if any(error.code == FAILED for error in errors) else BAD_REQUEST
        raise UftError(*problems, footer=errors[-1].footer, code=code)
    data.held_out.sort(key=lambda held: held.name)
    digests = {name: stage.dataset.digest for name, stage in data.stages.items()}
    data.digest = digests.get("") or hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    return data


def _prompts(sides: Iterable[Sequence[Row]]) -> np.ndarray:
    """(rows of all sides,) uint64, see prompt_words."""
    return np.concatenate([np.empty(0, np.uint64), *map(prompt_words, sides)])


def has_made_rows(data: Data) -> bool:
    """Whether a stage of the run makes some of the rows."""
    return any(made(source.path) for source in data.sources.values())


def located(config: Config, run: Run) -> Config:
    """`config` with the files that earlier stages made in place of their names."""
    if not has_made_rows(config.data):
        return config
    sources = {
        name: replace(source, path=str(rows_of(run.path, source.path, name)), holdout=0.0)
        if made(source.path)
        else source
        for name, source in config.data.sources.items()
    }
    return replace(config, data=replace(config.data, sources=sources))
