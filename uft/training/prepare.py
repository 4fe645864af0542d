"""From a frozen configuration to a trainer ready for its next step. Everything that can be wrong is said here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from uft.config.schema import Config, Hardware
from uft.data.batches import micro_batches
from uft.data.templates import Encoded
from uft.errors import Problem, UftError
from uft.evaluation.stepzero import check_step_zero
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, pad_id
from uft.model.reference import Reference, make_reference
from uft.objectives import make
from uft.objectives.base import Objective
from uft.runs import Run
from uft.training.corpus import Corpus, Plan, cache_dir, make_feed, plan, read_corpus
from uft.training.feed import Feed
from uft.training.optim import make_optimiser
from uft.training.signals import Stop
from uft.training.trainer import Trainer

STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a token's log-prob between policy and reference before the first step: rounding, no more."""


@dataclass(frozen=True)
class Prepared:
    """A trainer and what it was made from, for the start card, the battery and the export."""

    trainer: Trainer
    corpus: Corpus
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None


class Stopped(Exception):
    """Asked to stop before there was anything worth a checkpoint."""


def choose_device(hardware: Hardware) -> torch.device:
    """The device asked for, or the best there is. Sets threads and kernels on the way."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = hardware.device
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        usable = ", ".join(device for device, there in available.items() if there)
        raise UftError(Problem(f"hardware.device={name}", "this machine has none", advice=(f"there is: {usable}",)))
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = hardware.tf32
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return torch.device(name)


def longest_sequence(tokenizer: PreTrainedTokenizerBase, config: object) -> int | None:
    """Positions the model has, if it says so."""
    return getattr(config, "max_position_embeddings", None)


def prepare(run: Run, config: Config, device: torch.device, stop: Stop) -> Prepared:
    """Data, model, objective, reference and optimiser of a run, before its first step or resumed at its newest one."""
    torch.manual_seed(config.seeds.sampling)
    objective = make(config.objective)
    tokenizer = load_tokenizer(config.model)
    corpus = read_corpus(config, tokenizer)
    horizon = plan(config, corpus)
    feed = make_feed(config, corpus, objective.views)
    policy = load_policy(config.model, device, config.seeds.init)
    check_vocabulary(policy.module, tokenizer)
    objective.start(feed.examples)
    reference = _reference(config, policy, tokenizer, device, feed, horizon) if _wanted(config, objective) else None
    if reference and reference.column:
        _fill(reference, corpus, feed, horizon, stop)
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
    return Prepared(trainer, corpus, horizon, tokenizer, reference)
