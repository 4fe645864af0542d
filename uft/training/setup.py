"""From a frozen configuration to a trainer that is ready for its next step, with every check that comes before it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from uft.config.messages import written
from uft.config.schema import Config, Hardware, Model, Optim, ReferenceModel, flat, value_at
from uft.config.stages import Stage
from uft.data.batch import micro_batches
from uft.data.loader import Collator
from uft.data.report import data_cautions
from uft.distributed import Sharding, ranks, set_sharding
from uft.environment import launched, local_rank
from uft.errors import FAILED, Problem, UftError, raise_problems
from uft.evaluation.evaluate import check_step_zero
from uft.heartbeat import activity
from uft.model import checkpoint
from uft.model.layout import compile_blocks, compiles, settle_layout
from uft.model.load import check_vocabulary, load_policy, load_tokenizer, pad_id
from uft.model.memory import estimate, hidden_matrices, keep_freed_memory, shape_of
from uft.model.policy import Frozen, Policy, idle_adapters, own_dropout, preserved_rng
from uft.model.reference import Reference, make_reference
from uft.objectives.base import Needs, Objective, StepContext
from uft.runs import Run, cache_root
from uft.training.dataset import RunData, StageData, TrainData, counted_as_certain, longest_rollout, read_train_data
from uft.training.liveness import Stop
from uft.training.step import OPTIMISERS, SCHEDULES, make_optimiser
from uft.training.trainer import Progress, Trainer, available_devices, tokens_per_pass

STEP_ZERO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a token's log-prob between policy and reference before the first step: rounding, no more."""

SINGLE_THREADED = 3_000_000  # parameters below which a second CPU thread made no run faster
RANK_SEEDS = 1_000_003  # distance between the sampling seeds of two processes

ONE_ROW = "a step has one row: its baseline is measured under the prompts of a step's other rows, and is always 0"
REMOTE_CODE = "model.trust_remote_code is on: code that came with the model runs with all rights of this user"
UNREPEATABLE = "a resumed run samples other completions than one that was never stopped"
IN_BFLOAT16 = "(optim.lr) in bfloat16, and will hardly move: model.master_weights=true"

WITHOUT_PART: dict[str, tuple[str, tuple[Any, ...]]] = {
    "model.lora": ("model.adapter", ("none",)),
    "model.recompute_every": ("model.gradient_checkpointing", (False,)),
    "optim.decay": ("optim.schedule", tuple(SCHEDULES.keys() - {"wsd"})),
    "reference.sync_mix": ("reference.sync_every", (None,)),
    "rollout": ("rollout.completions", (0,)),
    "train.save_dtype": ("train.save_model", (False,)),
    "train.check_model": ("train.save_model", (False,)),
    **{
        f"optim.{key}": ("optim.name", tuple(name for name, (_, keys) in OPTIMISERS.items() if key not in keys))
        for key in ("betas", "eps", "fused", "momentum", "alpha")
    },
}
"""A key, or a group of keys: the key beside whose values it does nothing."""

UNMOVED = 0.5  # share of weights that a step of the learning rate's size does not move, from which that is told

STAYS: dict[str, Any] = {"mode": "auto", "sync_every": None}
"""Settings of the evaluation's reference, which is the same throughout a run."""

Say = Callable[[str], None]


@dataclass
class Work:
    """A job, or a stage of a run: its settings, the device, the signals that end it, and who hears of it."""

    config: Config
    device: torch.device = torch.device("cpu")
    stop: Stop = field(default_factory=Stop)
    say: Say = lambda line: None
    stopped: str = "stopped"  # what is said where a signal ended it


class Stopped(Exception):
    """Asked to stop before there was anything new worth a checkpoint."""


@dataclass(frozen=True)
class Prepared:
    """A trainer and what it was made from, for the start card, the evaluation and the export."""

    trainer: Trainer
    data: StageData
    reference: Reference | None  # of the objective; None: it needs none
    eval_reference: Reference | None  # of the evaluation: every objective is compared with one

    @cached_property
    def cautions(self) -> list[str]:
        """Warnings about the run that its card and `check.json` repeat."""
        trainer, objective, config = self.trainer, self.data.objective, self.trainer.config
        idle, share = unused_adapters(trainer), unmoved_share(trainer.parameters, config.optim)
        unused, optim = f"has no part in objective={objective.name}", config.optim
        holding = [REMOTE_CODE] if config.model.trust_remote_code else []
        if idle:
            names = ", ".join(idle[:3])
            holding.append(f"{len(idle)} adapters never act, since the model does not call their layers: {names}")
        if share > UNMOVED and optim.name != "sgd":
            what = f"{share:.0%} of the trained weights are too large"
            holding.append(f"{what} for steps of {optim.lr:g} {IN_BFLOAT16}")
        if config.teacher.path and not objective.needs.teacher:
            holding.append(f"teacher.path={config.teacher.path} {unused}")
        if config.reference.sync_every and not trainer.synced_reference:
            holding.append(f"reference.sync_every {unused}")
        if trainer.rollouts and config.rollout.engine != "own":
            holding.append(f"rollout.engine={config.rollout.engine}: {UNREPEATABLE}")
        if objective.needs.mismatched and config.train.batch_size == 1:
            holding.append(ONE_ROW)
        settings, plain = asdict(config), asdict(Config())
        for group, (switch, values) in WITHOUT_PART.items():
            state = value_at(settings, tuple(switch.split(".")))
            for key, value in flat({group: value_at(settings, tuple(group.split(".")))}):
                if state in values and key != switch and value != value_at(plain, tuple(key.split("."))):
                    holding.append(f"{key}={written(value)} does nothing: {switch}={written(state)}")
        certain = counted_as_certain(self.data.sampler, objective)
        return [*holding, *objective.cautions(), *certain, *data_cautions(self.data.record)]

    @cached_property
    def memory(self) -> dict[str, int]:
        """Bytes by part that each process of the run is expected to need."""
        config = self.trainer.config  # the completions of a prompt are never divided
        own = config.rollout.completions * longest_rollout(self.data.dataset, config)
        return self.planned(max(tokens_per_pass(config), own))

    def planned(self, tokens: int) -> dict[str, int]:
        """As `memory`, for a largest micro-batch of `tokens`."""
        mode, forward = (self.reference.mode, self.reference.forward) if self.reference else (None, None)
        other = shape_of(forward.policy) if isinstance(forward, Frozen) else None
        return estimate(self.trainer.config, shape_of(self.trainer.policy), tokens, mode, other)


def prepare_stage(work: Work, stage: Stage, model: Model, data: RunData) -> Prepared:
    """`prepare` a stage of a run that starts from `model`, with the references that the run gives it."""
    config, initial, own = work.config, work.config.model, replace(stage.config, model=model)
    if stage.reference == "initial" and model.path != initial.path:
        own = replace(own, reference=replace(own.reference, path=initial.path))
    reference = (initial if own.reference.path == initial.path else model, own.reference)
    part, folder = data.stages[stage.name], Run(data.run.path / stage.folder)
    eval_reference = None
    if stage.name and data.held_out:
        # named by its path, so that it is the same model in every stage, with and without an adapter
        eval_reference = (initial, replace(config.reference, path=config.reference.path or initial.path, **STAYS))
    reference_model = None if part.objective.needs.teacher else reference
    return prepare(folder, replace(work, config=own), part, reference_model, eval_reference)


def prepare(
    run: Run,
    work: Work,
    data: StageData | None = None,
    reference_model: tuple[Model, ReferenceModel] | None = None,
    eval_model: tuple[Model, ReferenceModel] | None = None,
) -> Prepared:
    """Data, model, objective, references and optimiser, as they are before the first step.

    `data`: None to read it here. `reference_model`: what the objective's reference is made from, by default the
    configuration's own model; `eval_model`: likewise for the evaluation, by default the objective's reference.
    Raises Stopped at a safe point after `stop` was set, and UftError about the request.
    """
    config, device, stop = work.config, work.device, work.stop
    tokenizer = data.dataset.renderer.tokenizer if data else load_tokenizer(config.model)
    if data is None:
        data = StageData.of(config, read_train_data(config, tokenizer))
    dataset, objective, sampler, horizon = data.dataset, data.objective, data.sampler, data.horizon
    pause(stop)
    needs, hardware = objective.needs, config.hardware
    set_sharding(Sharding(hardware.reshard, hardware.offload) if hardware.sharding == "full" else None)
    work.say("loading the model")
    policy = loaded_policy(config, device, tokenizer)
    check_use(policy, config, objective)
    check_positions(policy, data, config)
    longest = longest_row(dataset, config, objective)
    settle_layout(policy, config.train.packing, longest)
    if not ranks().sharded:
        policy.cast_once()
    if compiles(config.model.compile, device):
        work.say("compiling the model")
        compile_blocks(policy, asked=config.model.compile is not None)
    pause(stop)
    objective.start(sampler.row_count)
    reference_of = partial(
        make_reference,
        policy,
        device=device,
        tokenizer=tokenizer,
        cache=cache_root(config.data.cache),
        longest_row=longest,
    )
    reference = None
    if needs.reference:
        compared, key = reference_settings(config, needs)
        reference = reference_of(
            *(reference_model or (config.model, compared)),
            visits_per_row=horizon.total_rows / max(1, sampler.row_count),
            distributions=needs.distributions,
            rollouts=config.rollout.completions > 0,
            key=key,
        )
        _cache_reference(reference, data, work)
    another = needs.teacher or config.reference.sync_every is not None  # than the initial policy
    if eval_model is None and dataset.held_out and (reference is None or another):
        eval_model = (config.model, replace(config.reference, **STAYS))
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
        rollouts=data.rollouts(policy, config, stop) if config.rollout.completions else None,
        optimiser=make_optimiser(policy.trainable(), config.optim, hidden_matrices(policy), config.model.lora.lr_ratio),
        collator=Collator(tokens_per_pass(config), pad_id(tokenizer), policy.layout, pinned=device.type == "cuda"),
        steps=horizon.steps,
        total_rows=horizon.total_rows,
        epoch_rows=horizon.epoch_rows,
        stop=stop,
    )
    return Prepared(trainer, data, reference, eval_reference)


def reference_settings(config: Config, needs: Needs) -> tuple[ReferenceModel, str]:
    """Settings of the model that an objective compares with, reference or teacher, and the key that names it."""
    if needs.teacher:
        return ReferenceModel(path=config.teacher.path), "teacher.path"
    return config.reference, "reference.path"


def pause(stop: Stop) -> None:
    """A safe point of the preparation. Raises Stopped in all processes if any was asked to stop."""
    if stop.agreed():
        raise Stopped


def longest_row(dataset: TrainData, config: Config, objective: Objective) -> int:
    """Tokens of the longest sequence that the model will meet."""
    sources = (*dataset.train, *dataset.held_out)
    longest = max((int(source.encoded.longest.max(initial=0)) for source in sources), default=0)
    longest = max(longest, longest_rollout(dataset, config))
    return max(longest, longest_mismatched(dataset, config.train.max_length)) if objective.needs.mismatched else longest


def longest_mismatched(dataset: TrainData, max_length: int) -> int:
    """Tokens of the longest reply under the longest prompt of another row, cut as such sequences are."""
    sides = [source.encoded.longest_sides for source in dataset.train]
    return min(max_length, max(prompt for prompt, _ in sides) + max(reply for _, reply in sides))


def _cache_reference(reference: Reference, data: StageData, work: Work) -> None:
    """Compute a cached reference for all completions that the run will meet, and give the column to the sampler."""
    if reference.column is None:
        return
    sampler, batch_size = data.sampler, work.config.train.batch_size
    every_step = data.objective.needs.mismatched  # which completions are scored depends on the rows of each step
    drawn = data.horizon.total_rows if every_step else min(data.horizon.total_rows, sampler.mixture.first_pass)
    encoded = [one for row in sampler.distinct_tokens(sampler.preview(drawn)) for one in row]
    if every_step:
        draws = list(sampler.preview(drawn))
        for start in range(0, len(draws), batch_size):
            examples = sampler.examples_of(draws[start : start + batch_size])
            encoded += [one for item in sampler.mismatched(examples) for one in item.encoded]
    complete = reference.column.fill(
        encoded,
        batch_tokens=tokens_per_pass(work.config),
        should_stop=work.stop.between_passes,
        progress=lambda count, of: work.say(f"reference log-probs: {count} of {of} completions"),
    )
    if not complete:
        work.stop.agreed()
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


# --- The device of a process, its threads and kernels, and the model on it.


def choose_device(hardware: Hardware) -> torch.device:
    """The device asked for, or the best there is; also sets threads, precision and determinism of the process."""
    there = available_devices()
    name = there[0] if hardware.device == "auto" else hardware.device
    if name not in there:
        usable = ", ".join(there)
        raise UftError(Problem(f"hardware.device={name}", "this machine has none", advice=(f"there is: {usable}",)))
    if name == "cpu" and hardware.keep_memory:
        keep_freed_memory()
    # torch and oneDNN each keep what was made for the last 1,024 shapes of products in bfloat16, and packs come in many
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = hardware.tf32
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if name == "cuda" and launched() > 1:
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device(name)


def loaded_policy(config: Config, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The policy of a configuration; UftError where its vocabulary is too small for the tokenizer. Sets one CPU thread
    for a small model unless asked otherwise: more threads would wait for each other."""
    policy = load_policy(config.model, device, config.seeds.init)
    if config.hardware.threads is None and device.type == "cpu" and policy.size < SINGLE_THREADED:
        torch.set_num_threads(1)
    check_vocabulary(policy.module, tokenizer)
    return policy


# --- Checks before the first step.


def check_use(policy: Policy, config: Config, objective: Objective) -> None:
    """Raise UftError where the model is not right for its objective, or not for its export."""
    needs = objective.needs
    if config.model.dropout and needs.reference and not needs.teacher and own_dropout(policy.base.config):
        why = f"objective={objective.name} compares the policy with its reference, which dropout would make unequal"
        raise UftError(Problem("model.dropout=true", why, advice=("model.dropout=false",)))
    if config.train.neftune_alpha:
        policy.require_embeddings("train.neftune_alpha")
    if needs.embeddings:
        policy.require_embeddings(f"objective={objective.name}")
    if policy.first_position and config.train.save_model and config.train.check_model:
        why = f"transformers numbers positions from {policy.first_position} in a forward pass, but from 0 when it "
        why += "generates: the exported model would answer otherwise than it was trained"
        advice = ("keep checkpoints alone:  train.save_model=false", "export it all the same:  train.check_model=false")
        raise UftError(Problem(f"model.path={config.model.path}", why, advice=advice))


def check_positions(policy: Policy, data: StageData, config: Config) -> None:
    """Raise UftError for what may be longer than the model's learned position embeddings: rows, own completions behind
    their prompts, and for an objective that scores them completions under other rows' prompts."""
    dataset, positions = data.dataset, policy.positions
    problems = [
        Problem(
            f"data.sources.{source.source}",
            f"its longest row has {longest} tokens, the model has {positions} positions",
            advice=(f"train.max_length={positions} data.too_long=drop|truncate",),
        )
        for source in (*dataset.train, *dataset.held_out)
        if positions and (longest := int(source.encoded.longest.max(initial=0))) > positions
    ]
    if positions and (rollout := longest_rollout(dataset, config)) > positions:
        key, room = "rollout.max_new_tokens", positions - rollout + config.rollout.max_new_tokens
        why = f"a prompt with its completion has up to {rollout} tokens, the model has {positions} positions"
        advice = (f"{key}={room}",) if room > 0 else ()
        problems.append(Problem(f"{key}={config.rollout.max_new_tokens}", why, advice=advice))
    if positions and not problems and data.objective.needs.mismatched:
        joined = longest_mismatched(dataset, data.sampler.max_length)
        if joined > positions:
            why = f"replies under other rows' prompts have up to {joined} tokens, the model has {positions} positions"
            advice = (f"train.max_length={positions}   (such sequences are cut there)",)
            problems.append(Problem(f"objective={data.objective.name}", why, advice=advice))
    raise_problems(problems)


def unused_adapters(trainer: Trainer) -> list[str]:
    """Names of adapted layers that a forward pass on a row of the data does not go through."""
    policy = trainer.policy
    if not policy.has_adapter or policy.compiled:  # hooks on its layers would compile all of it again
        return []
    examples = trainer.sampler.examples_of(trainer.sampler.preview(8))[:1]
    batches = micro_batches(examples, 1, trainer.collator.pad_id, policy.layout)
    with preserved_rng(trainer.device):
        return [name for batch in batches for name in idle_adapters(policy, batch.to(trainer.device))]


@torch.no_grad()
def unmoved_share(parameters: Mapping[str, torch.nn.Parameter], optim: Optim) -> float:
    """Share of the trained weights that are bfloat16 and stay what they are when the peak learning rate is added."""
    stored = [p.to_local() if isinstance(p, DTensor) else p for p in parameters.values()]
    narrow = [weight for weight in stored if weight.dtype == torch.bfloat16]
    unmoved = sum(int(((w.float() + optim.lr_scale * optim.lr).bfloat16() == w).sum()) for w in narrow)
    return unmoved / max(1, sum(weight.numel() for weight in stored))


@torch.no_grad()
def check_start(trainer: Trainer, reference: Reference | None) -> dict[str, float]:
    """Check on the real run that the policy equals its reference before step 0, and losses have the values that follow.

    Returns the number of compared targets and their largest difference, {} where there is nothing to compare.
    Raises UftError (code 1) where they differ.
    """
    another = trainer.config.reference.path is not None or trainer.objective.needs.teacher
    if reference is None or another or trainer.progress.step > 0:
        return {}
    examples = trainer.sampler.examples_of(trainer.sampler.preview(min(trainer.config.train.batch_size, 8)))
    if not examples:
        return {}
    dtype = trainer.policy.dtype
    batch = micro_batches(examples[:2], 1, trainer.collator.pad_id, trainer.policy.layout)[0].to(trainer.device)
    with preserved_rng(trainer.device):  # as in training, where dropout acts
        trainer.policy.train()
        ours, theirs = trainer.policy(batch).log_probs, reference.forward(batch).log_probs
        problems = check_step_zero(ours, theirs, STEP_ZERO_TOLERANCE[dtype])
        if not problems:
            loss = trainer.objective(batch, trainer.policy, reference.forward, StepContext(learning=False))
            loose = 1e-2 if dtype == "float32" else 1.0
            problems = [
                f"{name} is {float(loss[name].total):.6g} where policy = reference gives {float(total):.6g}"
                for name, total in trainer.objective.at_reference(batch).items()
                # SPPO's loss is 500,000 a pair: rounding is a share of it
                if abs(float(loss[name].total) - float(total)) > loose * max(1.0, float(loss[name].count), float(total))
            ]
    if problems:
        raise UftError(Problem("step 0", problems[0], advice=tuple(problems[1:])), code=FAILED)
    return {"targets": ours.numel(), "largest_difference": float((ours - theirs).abs().max())}


def check_record(prepared: Prepared, step_zero: dict[str, float]) -> dict[str, Any]:
    """`check.json`: everything that was found out before the first step."""
    policy, used = prepared.trainer.policy, prepared.reference
    return {
        "template": prepared.data.dataset.renderer.name,
        "model": policy.describe(),
        "parameters": {"all": policy.size, "trained": sum(p.numel() for p in policy.trainable().values())},
        "cautions": prepared.cautions,
        "reference": {"mode": used.mode, "why": used.why} if used else None,
        "policy_against_reference": step_zero,
        "memory_bytes": prepared.memory,
    }
