"""From a frozen configuration to a trainer ready for its next step. Everything that can be wrong is said here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from uft.alive import doing
from uft.config.schema import Config, Model, ReferenceModel
from uft.data.batch import Batch
from uft.data.batches import micro_batches
from uft.data.tokens import Tokenized
from uft.errors import FAILED, Problem, UftError
from uft.evaluation.stepzero import check_step_zero
from uft.model.compiled import compile_blocks
from uft.model.forward import Policy
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, pad_id
from uft.model.packed import settle_layout
from uft.model.reference import Reference, make_reference
from uft.objectives import make
from uft.objectives.base import Clock, Objective
from uft.parallel.ranks import keep_step, ranks
from uft.runs import Run, read_json
from uft.training import checkpoints
from uft.training.corpus import Corpus, Plan, cache_dir, make_feed, plan, read_corpus
from uft.training.device import settle_threads, sharding_of, tokens_per_pass
from uft.training.feed import Feed
from uft.training.optim import make_optimiser
from uft.training.signals import Stop
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
    corpus: Corpus
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None  # what the objective compares with; None: it needs none
    yardstick: Reference | None  # what the battery compares with: every objective is measured against one


@dataclass(frozen=True)
class Given:
    """What a stage of a run has from the run, which a run of one piece reads and makes for itself."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    reference: tuple[Model, ReferenceModel]  # what the objective compares with
    yardstick: tuple[Model, ReferenceModel] | None  # what the battery of every stage compares with


class Stopped(Exception):
    """Asked to stop before there was anything new worth a checkpoint."""


def prepare(
    run: Run, config: Config, device: torch.device, stop: Stop, say: Say = _silent, given: Given | None = None
) -> Prepared:
    """Data, model, objective, reference and optimiser of a run, as they are before its first step."""
    objective = make(config.objective)
    tokenizer = given.tokenizer if given else load_tokenizer(config.model)
    corpus = given.corpus if given else read_corpus(config, tokenizer)
    horizon = plan(config, corpus)
    feed = make_feed(config, corpus, objective)
    _pause(stop)
    keep_step(sharding_of(config.hardware))
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
    objective.start(feed.examples)
    cache = cache_dir(config)
    against = partial(make_reference, policy, device=device, tokenizer=tokenizer, cache=cache, longest_row=longest)
    visits = horizon.total_rows / max(1, feed.examples)
    reference = None
    if objective.needs.reference:
        whole = objective.needs.distributions
        compared = given.reference if given else (config.model, config.reference)
        reference = against(*compared, visits_per_row=visits, distributions=whole)
        _fill(reference, feed, horizon, config, objective, stop, say)
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
        feed=feed,
        optimiser=make_optimiser(policy.trainable(), config.optim),
        pad_id=pad_id(tokenizer),
        steps=horizon.steps,
        total_rows=horizon.total_rows,
        epoch_rows=horizon.epoch_rows,
        stop=stop,
    )
    return Prepared(trainer, corpus, horizon, tokenizer, reference, yardstick)


def longest_row(corpus: Corpus, config: Config, objective: Objective) -> int:
    """Tokens of the longest sequence the model will meet."""
    if objective.needs.mismatched:  # prompts and completions meet that were not together before
        return config.train.max_length
    return max(map(longest_of, [*corpus.train, *corpus.held_out]), default=0)


def longest_of(source: Tokenized) -> int:
    return int(source.encoded.longest.max(initial=0))


@doing("a checkpoint was read", moving=True)
def resume(trainer: Trainer, say: Say = _silent) -> int:
    """Continue from the newest whole checkpoint; its step, or -1 where there is none: the run begins."""
    step = checkpoints.resume(trainer.run, trainer.load_checkpoint, say)
    if step >= 0:
        keep, best = trainer.config.train.keep_last, trainer.progress.best_step
        ranks().wait()
        # the process may have died before it deleted what this checkpoint replaced
        ranks().from_first(lambda: checkpoints.prune(trainer.run, keep, best))
    return step


def standing(run: Run) -> tuple[Progress, int]:
    """Counters and horizon of the newest checkpoint; zeros where there is none."""
    checkpoints.recover(run)
    for _, folder in reversed(run.checkpoints()):
        with suppress(checkpoints.Damaged):
            state = checkpoints.read_state(folder)
            return Progress(**state["progress"]), int(state["steps"])
    return Progress(), 0


def refuse_other_data(run: Run, corpus: Corpus) -> None:
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
    reference: Reference, feed: Feed, horizon: Plan, config: Config, objective: Objective, stop: Stop, say: Say
) -> None:
    """Compute the cached reference of all completions the run will meet, and hand the column to the feed."""
    if reference.column is None:
        return
    every_step = objective.needs.mismatched  # whose completions depend on who is in a step with whom
    drawn = horizon.total_rows if every_step else min(horizon.total_rows, feed.mixture.first_pass)
    encoded = [one for row in feed.met(feed.preview(drawn)) for one in row]
    if every_step:
        draws = list(feed.preview(drawn))
        steps = (
            draws[start : start + config.train.batch_size] for start in range(0, len(draws), config.train.batch_size)
        )
        encoded += [one for step in steps for item in feed.mismatched(feed.items(step)) for one in item.encoded]
    done = reference.column.fill(
        encoded,
        batch_tokens=tokens_per_pass(config),
        should_stop=stop.between_passes,
        progress=lambda count, of: say(f"reference log-probs: {count} of {of} completions"),
    )
    if not done:
        stop.agreed()
        raise Stopped
    feed.reference = reference.column


def check_positions(policy: Policy, corpus: Corpus) -> None:
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
    items = trainer.feed.items(trainer.feed.preview(min(trainer.config.train.batch_size, 8)))
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
    clock = Clock(learning=False)
    loss = trainer.objective(batch, trainer.policy, reference.forward, clock)
    expected = trainer.objective.at_reference(batch)
    loose = 1e-2 if trainer.config.model.dtype == "float32" else 1.0
    return [
        f"{name} is {float(loss[name].total):.6g} where policy = reference gives {float(total):.6g}"
        for name, total in expected.items()
        if abs(float(loss[name].total) - float(total)) > loose * max(1.0, float(loss[name].count))
    ]
