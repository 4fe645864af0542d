"""The start card: what runs, on what data and machine, and where it goes, with every derived number stated once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from uft import __version__
from uft.config.schema import Config
from uft.config.stages import Stage
from uft.data.batch import Layout
from uft.data.report import report_table
from uft.runs import Run, shown
from uft.tracking.console import Card, count
from uft.training.dataset import RunData
from uft.training.device import tokens_per_pass
from uft.training.optim import warmup_steps
from uft.training.setup import Prepared, cautions, memory_record

MIXTURE_COLUMNS = ("source", "kind", "rows", "held out", "asked", "of rows", "of tokens")


def start_card(
    run: Run, config: Config, stages: Sequence[Stage], data: RunData, tracking: str, stage_lines: Card = ()
) -> Card:
    """(label, value) lines about the run; a value of several lines stands indented under its label.

    `stage_lines`: the card of the only stage; of several stages each has its own card when it begins.
    """
    info = run.info()
    commit = str(info.get("git_commit") or "")[:10]
    version = f"uft {__version__}" + (f", commit {commit}" if commit else "")
    held_out = f"{sum(len(held.rows) for held in data.held_out):,} rows held out"
    names = ", ".join(held.name for held in data.held_out)
    trained = f"; some stage trains on the prompts of {data.trained_held_out:,}" if data.trained_held_out else ""
    overview = [
        ("model", f"{config.model.name}: {config.model.path}"),
        ("stages", "\n".join(stage_line(stage, data) for stage in stages)),
        ("evaluation", f"{held_out} ({names}), the same in all stages{trained}" if names else "no held-out rows"),
    ]
    return [
        ("run", f"{run.name} ({info.get('id', '')})"),
        ("version", f"{version}, torch {torch.__version__}"),
        *(stage_lines or overview),
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
    else:
        how = f"objective={config.objective['name']} data={config.data.name}"
        rows = config.train.batch_size
        how += f", {steps} steps of {rows} rows" if steps else ", as many steps as its rows will give"
    return f"{stage.number} {stage.name}  {stage.do}  {how}"


def stage_card(prepared: Prepared) -> Card:
    """What a stage trains and on what: model, objective, data, horizon and machine."""
    trainer, config, data = prepared.trainer, prepared.trainer.config, prepared.data
    optim = config.optim
    objective, reference, device = trainer.objective, prepared.reference, trainer.device

    defaults = type(objective)()
    names = [f.name for f in fields(objective) if not f.metadata.get("internal") and f.name not in ("name", "method")]
    values = {name: getattr(objective, name) for name in names}
    changed = [f"{n}={getattr(v, 'name', v)}" for n, v in values.items() if v != getattr(defaults, n)]

    header, *rows = report_table(data.record)
    kept = [header.index(name) for name in MIXTURE_COLUMNS if name in header]
    table = [[line[i] for i in kept] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    mixture = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]

    passes = data.horizon.total_rows / data.horizon.epoch_rows
    padding = ", padding counted" if trainer.policy.layout is Layout.PADDED else ""
    warmup = warmup_steps(optim.warmup, trainer.steps)
    held_out = sum(len(source.rows) for source in data.dataset.held_out)
    evaluation = f"{held_out:,} rows held out, {config.eval.rows} of each source are measured"

    threads, hardware = torch.get_num_threads(), config.hardware
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s' * (threads != 1)}"
    processes = hardware.processes * hardware.nodes
    share = "a share of the model" if hardware.sharding == "full" else "the whole model"
    parts = memory_record(prepared)
    needed = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    path = shown(Path(config.model.path)) if Path(config.model.path).is_absolute() else config.model.path
    return [
        ("model", "\n".join([f"{config.model.name}: {path}", *trainer.policy.describe()])),
        ("objective", f"{objective.name}  {' '.join(changed)}".rstrip()),
        ("lengths", objective.length_convention),
        *(("caution", caution) for caution in cautions(prepared)),
        ("reference", f"{reference.mode}: {reference.why}" if reference else "none needed to train"),
        ("data", "\n".join(mixture)),
        ("template", data.dataset.renderer.name),
        ("horizon", f"{trainer.steps} steps of {config.train.batch_size} rows, {passes:.2f} passes"),
        ("batch", f"at most {tokens_per_pass(config):,} tokens per forward pass{padding}"),
        ("optimiser", f"{optim.name} lr {optim.lr:g}, {optim.schedule}, {warmup} steps of warm-up"),
        ("evaluation", evaluation if held_out else "no held-out rows: set data.holdout=0.05 to measure on some"),
        ("device", f"{device} ({name})" + (f", {processes} processes, each with {share}" if processes > 1 else "")),
        ("memory", f"about {count(sum(parts.values()))}B of {count(free_memory(device))}B free ({needed})"),
    ]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
