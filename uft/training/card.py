"""The card of a run, shown when it starts, the commands to go on with at its end, and the model card of an exported
folder, its README.md.

The model card has the form of the Hugging Face hub: what was trained by which objective and paper, on which rows, how
well it does, and how to load it. Places on this machine are left out, and secrets are hidden.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uft import __version__
from uft.config.messages import as_typed, config_dirs, groups
from uft.config.models import first_rate, size_of_model
from uft.config.schema import Config, Eval
from uft.config.stages import Stage
from uft.data.batch import Layout
from uft.data.report import data_omissions, mixture_table
from uft.errors import redact
from uft.runs import Run, lineage, read_json, shown, typed_path
from uft.tracking.console import HEADLINES, Card, count, number
from uft.tracking.metrics import read_metrics
from uft.training.dataset import RunData, TrainData
from uft.training.step import warmup_steps
from uft.training.trainer import tokens_per_pass

if TYPE_CHECKING:
    from uft.training.setup import Prepared

PAPER = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
READ = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
"""
LOAD = f"""{READ}\
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""
PLAIN = f"""{READ}\
print(tokenizer.decode(model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=64)[0]))
```"""
ADAPTER = """\
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)  # a LoRA adapter: the base model is loaded too
```"""


@dataclass(frozen=True)
class ModelCard:
    """The card of the weights that `run` had after `step` steps, trained under `config`."""

    run: Run
    config: Config
    step: int
    has_template: bool

    def text(self, adapter: bool = False) -> str:
        """The card of the whole model, or of the adapter alone."""
        config, name = self.config, self.config.objective["name"]
        path = config.model.path
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".") and not Path(path).exists()
        base = path if is_hub_id else None
        head = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
        head |= {"base_model": base} if base else {}
        front = [*(f"{key}: {value}" for key, value in head.items()), "tags:", *(f"- {t}" for t in ("uft", name))]
        kind = "LoRA adapter for" if adapter else "model fine-tuned from"
        parts = [
            "\n".join(["---", *front, "---"]),
            f"# {self.run.name}",
            f"A {kind} {base or config.model.name} with the objective `{name}` on the mixture `{config.data.name}`, "
            f"{self.step:,} steps of {config.train.batch_size} rows.",
            *self.objective(),
            *self.data(),
            *self.figures(),
            f"## Made with\n\n{self.origin()}",
            f"## Load\n\n{ADAPTER if adapter else LOAD if self.has_template else PLAIN}",
        ]
        return redact("\n\n".join(parts)) + "\n"

    def objective(self) -> list[str]:
        config = self.config
        keys = {key: value for key, value in config.objective.items() if key not in ("name", "method")}
        file = groups(config_dirs()).get("objective", {}).get(config.objective["name"])
        lines = ["## Objective"]
        if file:  # the sentences in front of it: the method, its paper as a link to arXiv, and its loss
            comment = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
            text = " ".join(line.strip("# ") for line in comment)
            lines.append(PAPER.sub(lambda found: f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})", text))
        optim, batch = config.optim, config.train.batch_size
        rate = f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule} schedule, batch of {batch}"
        adapter = f"; LoRA of rank {config.model.lora.rank}" if config.model.adapter == "lora" else ""
        settings = ", ".join(f"{key}={value}" for key, value in keys.items())
        lines.append((f"Settings: `{settings}`.\n" if settings else "") + f"Optimiser: {rate}{adapter}.")
        return lines

    def data(self) -> list[str]:
        records = [record for part in self.run.stages or [self.run] if (record := read_json(part.path / "data.json"))]
        if not records:
            return []
        digest = f"Digest of the rows and their order: `{self.run.info().get('data_digest', '')}`."
        return ["## Data", table(mixture_table(records[-1])), digest]

    def figures(self) -> list[str]:
        """The last evaluation up to this step, all held-out rows together."""
        lines = [line for line in read_metrics(self.run) if line["step"] <= self.step and "eval/nll" in line]
        if not lines:
            return []
        last = {name.removeprefix("eval/"): value for name, value in lines[-1].items() if name.startswith("eval/")}
        overall = {name: last[name] for name in (*HEADLINES, *last) if name in last and "/" not in name}
        rows = [["metric", "value"], *([name, number(value, 3)] for name, value in overall.items())]
        return ["## Figures", f"On held-out rows, after {lines[-1]['step']:,} steps.", table(rows)]

    def origin(self) -> str:
        info = self.run.info()
        code, versions = info.get("code") or {}, info.get("versions") or {}
        commit = f", commit {code['commit'][:10]}" if code.get("commit") else ""
        changed = " with changes that are not committed" if code.get("dirty") else ""
        there = [name for name in ("torch", "transformers", "peft") if name in versions]
        packages = ", ".join(f"{name} {versions[name]}" for name in there)
        started = f" Started from: {before}." if (before := lineage(info)) else ""
        return f"uft {versions.get('uft', '')}{commit}{changed}, {packages}, seed {self.config.seed}.{started}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is its head."""
    first, *others = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([first, "|" + "---|" * len(rows[0]), *others])


# --- the card of a run

NO_MOMENTS = "; the state of its optimiser does not come along"


def start_card(
    run: Run, config: Config, stages: Sequence[Stage], data: RunData, tracking: str, stage_lines: Card = ()
) -> Card:
    """(label, value) lines about the run; a value of several lines stands indented under its label.

    `stage_lines`: the card of the only stage; of several stages each has its own card when it begins.
    """
    info = run.info()
    commit = str((info.get("code") or {}).get("commit") or "")[:10]
    version = f"uft {__version__}" + (f", commit {commit}" if commit else "")
    if not stage_lines:
        names, trained = ", ".join(held.name for held in data.held_out), data.trained_held_out
        held_out = f"{sum(len(held.rows) for held in data.held_out):,} rows held out ({names}), the same in all stages"
        held_out += f"; some stage trains on the prompts of {trained:,}" if trained else ""
        stage_lines = [
            ("model", f"{config.model.name}: {config.model.path}"),
            ("stages", "\n".join(stage_line(stage, data) for stage in stages)),
            ("evaluation", held_out if names else "no held-out rows"),
        ]
    return [
        ("run", f"{run.name} ({info.get('id', '')})"),
        ("version", f"{version}, torch {torch.__version__}"),
        *stage_lines,
        ("disk", f"{count(shutil.disk_usage(run.path).free)}B free"),
        ("digest", data.digest),
        ("output", shown(run.path)),
        ("tracking", tracking or "metrics.jsonl only"),
    ]


def stage_line(stage: Stage, data: RunData) -> str:
    """`2 dpo  fit  objective=dpo data=pairs, 100 steps of 32 rows`"""
    config, steps = stage.config, data.steps.get(stage.name)
    if stage.do == "generate":
        how = f"data={config.data.name}, {len(config.generate.seeds)} for every prompt"
    elif stage.do == "annotate":
        how = f"data={config.data.name} column={config.annotate.column}"
    elif stage.do == "select":
        how = f"data={config.data.name} by={config.select.by} rows={config.select.rows:g}"
    else:
        how = f"objective={config.objective['name']} data={config.data.name}"
        rows = config.train.batch_size
        how += f", {steps} steps of {rows} rows" if steps else ", as many steps as its rows will give"
    return f"{stage.number} {stage.name}  {stage.do}  {how}"


def origin_of_rate(config: Config) -> str:
    """Where the learning rate is from, in the words of the card."""
    model, is_lora = config.model, config.model.adapter == "lora"
    if config.optim.lr != model.lr:
        return "optim.lr"
    if model.lr != first_rate(model.path, is_lora):
        return f"model.lr of {model.name}"
    size = size_of_model(model.path)
    which = f"{size / 1e6:,.3g}M parameters" if size else "a model of unknown size"
    return f"a first rate for {which}, {'an adapter' if is_lora else 'all weights'}; another: optim.lr=..."


def rollout_line(config: Config) -> str:
    """A line about the rollouts: completions, updates for each of them, and the score."""
    rollout = config.rollout
    updates = (rollout.prompts or config.train.batch_size) // config.train.batch_size
    weights = " + ".join(f"{weight:g} {name}" for name, weight in rollout.reward.items() if weight)
    line = f"{rollout.completions} completions of each prompt, at most {rollout.max_new_tokens} tokens at temperature "
    line += f"{rollout.temperature:g}, for {updates} update{'s' * (updates > 1)}"
    line += f"; score: {weights or 'the first figure'}"
    return line + (f"; hints: {rollout.hint.schedule}" if rollout.hint.schedule != "none" else "")


def measured_rows(dataset: TrainData, settings: Eval) -> str:
    """`64 of each source`, or `64 of a, 15 of b` where a source has fewer; `none`."""
    counts = {source.source: min(len(source.rows), settings.rows) for source in dataset.held_out}
    if not any(counts.values()):
        return "none"
    if len(set(counts.values())) == 1 and len(counts) > 1:
        return f"{next(iter(counts.values()))} of each source"
    return ", ".join(f"{count} of {name}" for name, count in counts.items())


def stage_card(prepared: Prepared) -> Card:
    """(label, value) lines about a stage: model, objective, data, horizon and machine."""
    trainer, config, data = prepared.trainer, prepared.trainer.config, prepared.data
    optim = config.optim
    objective, reference, device = trainer.objective, prepared.reference, trainer.device

    defaults = type(objective)()
    names = [f.name for f in fields(objective) if not f.metadata.get("internal") and f.name not in ("name", "method")]
    values = {name: getattr(objective, name) for name in names}
    changed = [f"{n}={getattr(v, 'name', v)}" for n, v in values.items() if v != getattr(defaults, n)]

    table = mixture_table(data.record)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    mixture = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]

    passes = data.horizon.total_rows / data.horizon.epoch_rows
    padding = ", padding counted" if trainer.policy.layout is Layout.PADDED else ""
    warmup = warmup_steps(optim.warmup, trainer.steps)
    rate = f"lr {optim.lr:g} ({origin_of_rate(config)})"
    held_out = sum(len(source.rows) for source in data.dataset.held_out)
    evaluation = f"{held_out:,} rows held out, measured are {measured_rows(data.dataset, config.eval)}"

    threads, hardware = torch.get_num_threads(), config.hardware
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s' * (threads != 1)}"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    processes = hardware.processes * hardware.nodes
    share = "a share of the model" if hardware.sharding == "full" else "the whole model"
    parts = prepared.memory
    needed = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    saved = (parts["gradients"] + parts["optimiser"]) * (processes if hardware.sharding == "full" else 1)
    compared, named = ("teacher", f"{config.teacher.path}, ") if objective.needs.teacher else ("reference", "")
    path = shown(Path(config.model.path)) if Path(config.model.path).is_absolute() else config.model.path
    return [
        ("model", "\n".join([f"{config.model.name}: {path}", *trainer.policy.describe()])),
        *([("weights", f"of {config.init_from}{NO_MOMENTS}")] if config.init_from else []),
        ("objective", f"{objective.name}  {' '.join(changed)}".rstrip()),
        ("lengths", objective.length_convention),
        *(("caution", caution) for caution in prepared.cautions),
        (compared, f"{named}{reference.mode}: {reference.why}" if reference else "none needed to train"),
        ("data", "\n".join(mixture)),
        *(("not read", line) for line in data_omissions(data.record["sources"])),
        ("template", data.dataset.renderer.name),
        ("horizon", f"{trainer.steps} steps of {config.train.batch_size} rows, {passes:.2f} passes"),
        *((("rollouts", rollout_line(config)),) if trainer.rollouts else ()),
        ("batch", f"at most {tokens_per_pass(config):,} tokens per forward pass{padding}"),
        ("optimiser", f"{optim.name} {rate}, {optim.schedule}, {warmup} steps of warm-up"),
        ("evaluation", evaluation if held_out else "no held-out rows: set data.holdout=0.05 to measure on some"),
        ("device", f"{device} ({name})" + (f", {processes} processes, each with {share}" if processes > 1 else "")),
        ("memory", f"about {count(sum(parts.values()))}B of {count(free)}B free ({needed})"),
        ("checkpoints", f"about {count(saved)}B each, the newest {config.train.keep_last} are kept (train.keep_last)"),
    ]


OWN_KEYS = ("objective", "run.", "sweep.")
"""Overrides that belong to this run alone: its objective, its folder and its sweep."""


def next_commands(run: Run, config: Config, status: str) -> list[str]:
    """Commands to go on with, each as it can be given here, with a word about it."""
    if status != "finished":
        return [f"uft resume {typed_path(run.path)}"]
    path, to = typed_path(run.path), shlex.quote(f"{run.name}-model")
    lines = [f"uft chat {path}      # a conversation with it", f"uft export {path} --to {to}      # for other programs"]
    lines += [f"uft eval {path}      # the tasks of eval.tasks"] if config.eval.tasks else []
    lines = lines if run.model_dir.is_dir() else []
    other = "ift" if config.objective["name"] == "sft" else "sft"
    words = [f"objective={other}", *(w for w in run.overrides() if not w.lstrip("+~").startswith(OWN_KEYS))]
    words = [f"train.steps={config.train.steps or 'null'}" if w.startswith("train.steps=") else w for w in words]
    files = any(word.lstrip("+").startswith(("experiment", "--")) for word in words)  # which may set anything
    swept = any(word.lstrip("+").startswith("sweep=") for word in words)  # the command would be the whole sweep
    if not config.stages and not swept and (not files or can_be_composed(words)):
        command = shlex.join(["uft", "train", *as_typed(words)])
        lines.insert(0, f"{command}      # the same rows under another objective")
    return lines


def can_be_composed(words: Iterable[str]) -> bool:
    """Whether these words, options among them, are a valid request: an experiment may set keys of its objective."""
    from uft.config.compose import examine
    from uft.config.files import Request

    options = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    overrides = tuple(word for word in words if not word.startswith("--"))
    name, folder = options.get("--config-name", "config"), options.get("--config-dir")
    return not examine(Request(overrides, name, folder, options.get("--config-path"))).problems
