"""Problems with a configuration in words: where a file lies, what was probably meant, how a value is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from uft.errors import Problem, UftError

COMMAND_LINE = "command line"
HIDDEN_GROUPS = ("hydra", "schema")
LONGEST_HEADLINE = 104  # characters
MOST_LISTED = 14  # names in an error

# where files lie


@cache
def conf_dir() -> Path:
    """The folder of the shipped YAML files: inside the package when installed, beside it in a checkout.

    Found by path, not as a package resource: an editable install has no `uft.conf` to import.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UftError(
        Problem("conf/", "the configuration files are missing from this installation", str(package)),
        footer="Install again:  pip install --force-reinstall uft-lm",
    )


def user_dir() -> Path | None:
    """The user's own configuration folder: $UFT_CONF, else ./conf-user. Its files win over the shipped ones."""
    named = os.environ.get("UFT_CONF")
    folder = Path(named).expanduser() if named else Path("conf-user")
    return folder.resolve() if folder.is_dir() else None


@cache
def installed_dirs() -> list[Path]:
    """The conf folders of installed packages that bring rewards or objectives. Nothing of them is imported."""
    points = [point for group in ("uft.rewards", "uft.objectives") for point in entry_points(group=group)]
    specs = map(find_spec, dict.fromkeys(point.module.partition(".")[0] for point in points))
    return [Path(place) / "conf" for spec in specs if spec for place in spec.submodule_search_locations or ()]


def config_dirs(extra: str | None = None) -> list[Path]:
    """Every folder with configuration files, the first one that has a file wins. `extra` is Hydra's --config-dir."""
    dirs = [user_dir(), conf_dir(), *installed_dirs(), Path(extra).resolve() if extra else None]
    return [folder for folder in dirs if folder is not None and folder.is_dir()]


def groups(dirs: list[Path]) -> dict[str, dict[str, Path]]:
    """Group -> option -> file, over all `dirs`, sorted by name."""
    grouped: dict[str, dict[str, Path]] = {}
    for folder in dirs:
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and group.split("/")[0] not in HIDDEN_GROUPS:
                grouped.setdefault(group, {}).setdefault(file.stem, file)
    return {group: dict(sorted(options.items())) for group, options in sorted(grouped.items())}


def headline(file: Path) -> str:
    """The first sentence of a file's opening comment: what this option is. `# @package` lines do not count."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    comment = takewhile(lambda line: line.startswith("#") and not line.startswith("#   "), lines)  # then come commands
    text = " ".join(line.strip("# ") for line in comment if "@package" not in line)
    return shorten(f"{text} ".partition(". ")[0], LONGEST_HEADLINE, placeholder=" ...", break_on_hyphens=False)


def conf_name(path: Path) -> str:
    """A file as people know it: `conf/data/mix.yaml` for the shipped ones, else relative to here if it is below."""
    path = path.resolve()
    for base, prefix in ((conf_dir(), "conf"), (Path.cwd(), ".")):
        if path.is_relative_to(base):
            return (Path(prefix) / path.relative_to(base)).as_posix()
    return str(path)


# files of rows on the command line

PLAIN_PATH = re.compile(r"[\w./:@-]+", re.ASCII)
FREE_KEY = re.compile(r"(data\.(sources\.\w+\.columns|template_args)|eval\.(task|shot)_files|rollout\.reward)\.\w+=")
"""Keys that are checked against rows, the template, tasks and checkers later, and so need no + to be new."""


def names_rows(word: str, config_dir: str | None = None) -> bool:
    """Whether a word is a file of rows, or chooses one (or a folder, or a hub id with its slash) as data=PATH."""
    key, equals, path = word.partition("=") if "=" in word else ("data", "", word)
    if key != "data" or word.startswith(("~", "-")):
        return False
    if equals and path in groups(config_dirs(config_dir)).get("data", {}):
        return False
    from uft.data.readers import reader_of

    there = os.path.exists(path) or "/" in path if equals else os.path.isfile(path)
    return there or reader_of(Path(path)) is not None


def source_name(path: str) -> str:
    """The source that data=PATH makes: the name of its file, as a key."""
    name = re.sub(r"\W", "_", Path(path).name.partition(".")[0], flags=re.ASCII)
    return name if re.match(r"[A-Za-z_]", name) else f"_{name}"


def as_typed(words: Sequence[str]) -> list[str]:
    """Overrides as short as a person types them: data=PATH for a source that is named after its file, and no + before
    keys that need none."""
    bare = [word[2:] if word.startswith("++") and FREE_KEY.match(word[2:]) else word for word in words]
    bare = [word for word in bare if word != "model=custom" or not any(x.startswith("model.path=") for x in bare)]
    files = dict[str, str]()
    for word in bare if "data=files" in bare else ():
        name, _, path = word.removeprefix("+data.sources.").partition(".path=")
        if word.startswith("+data.sources.") and PLAIN_PATH.fullmatch(path) and name == source_name(path):
            files |= {word: f"data={path}"} if names_rows(f"data={path}") else {}
    return [files.get(word, word) for word in bare if not (files and word == "data=files")]


# what was meant

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "rft": (
        "rft is the name of two methods: reward-learning fine-tuning (2405.17888; objective=irft is its implicit form)",
        "and reinforcement fine-tuning: objective=grpo and its kin, with demonstrations objective=uft_rl (2505.16984)",
    ),
    "rdpo": (
        "three methods are called so: objective=rdpo_length (length-regularised, 2403.19159),",
        "objective=robust_dpo (flipped labels, 2403.00409) and objective=ld_dpo (length-desensitised, 2409.06411)",
    ),
    "ppo": ("PPO trains a value model, which is not there; without one:  objective=grpo, rloo or reinforce",),
    "gdpo": ("objective=gdpo_soft is geometric-averaged DPO (2409.06691); another GDPO normalises groups of rewards",),
    "unified": (
        "two methods are called UFT: objective=uft is 2410.21438,",
        "objective=uft_rl is unified supervised and reinforcement fine-tuning (2505.16984)",
    ),
}
"""Names of objectives that mean several things, or something else elsewhere: explained, not guessed."""

MOVED = "playground_"
"""Experiments that were called so are rows of conf/sweep/playground.yaml."""

TRL_KEYS = {
    "activation_offloading": "model.activation_offload",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "assistant_only_loss": "data.train_on: replies alone are learned; all, the last or marked ones",
    "attn_implementation": "model.attention",
    "batch": "train.batch_size",
    "bf16": "model.dtype: bfloat16, with float32 master weights",
    "bs": "train.batch_size",
    "chat_template_path": "data.template",
    "checkpoint": "init_from: RUN@best or RUN@STEP; a stopped run goes on with  uft resume RUN",
    "clip": "train.max_grad_norm",
    "completion_only_loss": "data.train_on: replies alone are learned; all, the last or marked ones",
    "data.file": "data: a file, a folder or a hub id, as data=PATH",
    "data.mix": "data.ratio",
    "data.path": "data: a file, a folder or a hub id, as data=PATH",
    "data.split": "data.holdout: a share of the rows",
    "data_seed": "seeds.data",
    "dataset_name": "data: a file, a folder or a hub id, as data=PATH",
    "deepspeed": "hardware.sharding: full is FSDP2",
    "early_stopping_patience": "train.early_stop: evaluations without a better eval.best",
    "eval.interval": "train.eval_every",
    "eval.steps": "train.eval_every",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "every": "train.eval_every",
    "fp16": "model.dtype: bfloat16 or float32; there is no float16",
    "fsdp": "hardware.sharding: full is FSDP2",
    "gpus": "hardware.processes: one for each, or a file such as hardware=gpu8",
    "grad_clip": "train.max_grad_norm",
    "gradient_accumulation_steps": "train.micro_batch_tokens: a step is train.batch_size rows, accumulated as they fit",
    "init": "init_from",
    "learning_rate": "optim.lr",
    "load_best_model_at_end": "eval.best: the best checkpoint is kept, as RUN@best",
    "load_in_4bit": "model.quantize: nf4",
    "log": "train.log_every",
    "logging_steps": "train.log_every",
    "lora": "model.adapter: lora, with model.lora.*",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_modules_to_save": "model.lora.modules_to_save",
    "lora_r": "model.lora.rank",
    "lora_target_modules": "model.lora.targets",
    "loraplus_lr_ratio": "model.lora.lr_ratio",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_completion_length": "rollout.max_new_tokens",
    "max_len": "train.max_length",
    "max_prompt_length": "train.max_length: of prompt and completion together; longer rows: data.too_long",
    "max_seq_length": "train.max_length",
    "max_steps": "train.steps",
    "max_tokens": "generate.max_new_tokens: of an answer; of rows train.max_length",
    "metric_for_best_model": "eval.best",
    "model_name_or_path": "model.path",
    "name": "run.name",
    "neftune_noise_alpha": "train.neftune_alpha",
    "num_epochs": "train.epochs",
    "num_generations": "rollout.completions",
    "num_train_epochs": "train.epochs",
    "optimizer": "optim.name",
    "out": "run.dir",
    "output": "run.dir",
    "output_dir": "run.dir",
    "peft_config": "model.adapter: lora, with model.lora.*",
    "per_device_eval_batch_size": "train.micro_batch_tokens: tokens of a forward pass, in evaluation too",
    "per_device_train_batch_size": "train.batch_size: rows per optimiser step, over all devices",
    "precision": "model.dtype",
    "precompute_ref_log_probs": "reference.mode: cached",
    "r": "model.lora.rank",
    "ref_model": "reference.path",
    "ref_model_mixup_alpha": "reference.sync_mix",
    "ref_model_sync_steps": "reference.sync_every",
    "report_to": "tracking.mode: disabled for none",
    "resume": "init_from: other weights to start with; a stopped run goes on with  uft resume RUN",
    "resume_from_checkpoint": "init_from: other weights to start with; a stopped run goes on with  uft resume RUN",
    "run_name": "run.name",
    "save_every": "train.checkpoint_every",
    "save_steps": "train.checkpoint_every",
    "save_strategy": "train.checkpoint_every",
    "save_total_limit": "train.keep_last",
    "select.keep": "select.rows",
    "shuffle": "seeds.data: rows are drawn in an order of this seed",
    "steps_per_generation": "rollout.prompts: as a multiple of train.batch_size",
    "temperature": "generate.temperature: of answers; of own samples in training rollout.temperature",
    "test_size": "data.holdout: a share of the rows",
    "torch_compile": "model.compile",
    "train.seed": "seed",
    "train_file": "data: a file, a folder or a hub id, as data=PATH",
    "use_dora": "model.lora.dora",
    "use_lora": "model.adapter: lora",
    "use_peft": "model.adapter: lora",
    "use_rslora": "model.lora.rslora",
    "val": "data.holdout: a share of the rows",
    "wandb": "tracking: none, offline or wandb",
    "warmup_ratio": "optim.warmup: below 1 a share of the steps",
    "warmup_steps": "optim.warmup: from 1 on a count of steps",
    "wd": "optim.weight_decay",
}
"""Keys of Transformers and TRL, and other words that people type: our key of the same meaning, with a hint after a
colon where it needs one. A name with a dot is that key alone."""

OFF = {"off", "false", "no", "disabled"}
SAID = {("hardware", "cuda"): "gpu", ("debug", "true"): "fast", ("optim", "adam"): "adamw"}
"""Choices by the words that people have for them, beside OFF, which is none."""

EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}
"""Options that are no file of ours, and the extra that brings each."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` probably means: of its letters, by spelling, or the only one that begins so."""
    known = {option.lower(): option for option in options}
    close = [key for key in known if sorted(key) == sorted(word.lower())]  # dop is dpo before it is dpop
    close = close or get_close_matches(word.lower(), known, 1, 0.6)
    starts = [key for key in known if word and key.startswith(word.lower())]
    found = close or (starts if len(starts) == 1 else [])
    return known[found[0]] if found else None


def hint(meant: str | None, label: str, options: Collection[str]) -> str:
    """`did you mean  data=mix ?   choices: ...`; the two halves stand in columns when there are several problems."""
    listed = f"{label}: {listing(options)}" if options else ""
    return f"{f'did you mean  {meant} ?':<30}   {listed}".rstrip() if meant else listed


def listing(options: Collection[str]) -> str:
    return ", ".join(list(options)[:MOST_LISTED]) + (", ..." if len(options) > MOST_LISTED else "")


def no_such_option(group: str, option: str, options: list[str], key: str) -> tuple[tuple[str, ...], str | None]:
    """(advice, what was probably meant) for an option without a file; `key` is what it was given to."""
    plugin = not_installed(f"{group}/{option}")
    explained = OTHER_NAMES.get(option.lower().removesuffix("_ft"), ()) if group == "objective" else ()
    explained = explained or ((plugin,) if plugin else ())
    if group == "experiment" and option.startswith(MOVED):
        arm = option.removeprefix(MOVED)
        explained = (f"the arms of the playground's study are rows of a sweep:  sweep=playground arm={arm}",)
    if group == "model" and ("/" in option or Path(option).is_dir()):
        explained = (f"a model of the hub, or a folder:  model.path={option}",)
    usual = "none" if option.lower() in OFF and "none" in options else SAID.get((group, option.lower()))
    near = usual or (None if explained else nearest(option, options))
    if group == "model" and not near and not explained:
        explained = (f"a model of the hub, or a folder:  model.path={option}",)
    if group == "data" and not near:
        explained = ("rows of yours:  data=FILE, data=FOLDER or data=ORG/NAME",)
    meant = f"{key}={near}" if near else None
    return tuple(line for line in (*explained, hint(meant, "choices", options)) if line), meant


def not_installed(option: str) -> str | None:
    """The command that installs `option`, such as hydra/launcher/ray; None: no extra of ours brings it."""
    extra = EXTRAS.get(option)
    return f"pip install 'uft-lm[{extra}]'" if extra else None


def belongs_to(key: str) -> tuple[str, ...]:
    """The objectives that do have a key, in words."""
    from yaml import safe_load

    files = groups(config_dirs()).get("objective", {})
    names = [name for name, file in files.items() if key in (safe_load(file.read_text(encoding="utf-8")) or {})]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (f"{key} is a key of:  {', '.join(names[:6])}{more}",) if names else ()


# values and types

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers, like [0,1]",
    list[float]: "a list of numbers, like [0.9,0.95]",
    list[str]: "a list, like [a,b]",
}


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return f"[{','.join(written(item) for item in value)}]"
    return json.dumps(value, default=str)


def expected(kind: Any) -> str:
    """A type in words: `a whole number or null`."""
    group = "a list, like [NAME] or [{key: value}]" if item_of(kind) else "a group of keys"
    word = WORDS.get(bare(kind), group)
    return f"{word} or null" if get_origin(kind) in (UnionType, Union) else word


def choices(kind: Any) -> list[str]:
    """The choices that a type leaves, as they are typed; none of a type that is no choice."""
    own = bare(kind)
    null = ["null"] if own != kind else []
    return [*null, *map(written, get_args(own))] if get_origin(own) is Literal else []


def bare(kind: Any) -> Any:
    """A type without null, and without what is noted beside it."""
    if get_origin(kind) in (UnionType, Union):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def item_of(kind: Any) -> Any:
    """The type of a list's items; None of a type that is no list."""
    return get_args(bare(kind))[0] if get_origin(bare(kind)) is list else None


def right_type(kind: Any, value: Any) -> tuple[str, ...]:
    """Advice for a value of the wrong type."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ()
    return (f"write {int(number)}",) if "whole number" in expected(kind) and number.is_integer() else ()
