"""The start card: what runs, on what, and where it goes, with every derived number said once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from uft import __version__
from uft.config.schema import Config, Hardware
from uft.config.stages import Stage
from uft.data.batch import Layout
from uft.data.report import report_table
from uft.runs import Run, shown
from uft.tracking.console import count
from uft.training.device import tokens_per_pass
from uft.training.optim import warmup_steps
from uft.training.setup import PipelineData, Prepared, cautions, describe, memory_record

MIXTURE_COLUMNS = ("source", "kind", "rows", "held out", "asked", "of rows", "of tokens")
Card = list[tuple[str, str]]


def start_card(prepared: Prepared, run: Run, data: Mapping[str, Any], tracking: str) -> Card:
    """(label, value) lines; a value of several lines stands indented under its label."""
    return [
        *_identity(run),
        *_model_and_objective(prepared),
        ("data", _mixture(data)),
        ("digest", prepared.corpus.digest),
        ("template", prepared.corpus.renderer.name),
        *_horizon(prepared),
        *_machine(prepared),
        ("output", shown(run.path)),
        ("tracking", tracking or "metrics.jsonl only"),
    ]


def stages_card(run: Run, config: Config, stages: Sequence[Stage], ground: PipelineData, tracking: str) -> Card:
    """The start card of a run of stages; what each of them works with follows when it begins."""
    held, measured = ground.held_out, f"{sum(len(held.rows) for held in ground.held_out):,} rows held out"
    names = ", ".join(source.name for source in held)
    seen = f"; some stage trains on the prompts of {ground.seen:,}" if ground.seen else ""
    return [
        *_identity(run),
        ("model", f"{config.model.name}: {config.model.path}"),
        ("stages", "\n".join("  ".join(line) for line in describe(stages, ground))),
        ("digest", ground.digest),
        ("battery", f"{measured} ({names}), measured alike in all stages{seen}" if held else "no held-out rows"),
        ("disk", f"{count(shutil.disk_usage(run.path).free)}B free"),
        ("output", shown(run.path)),
        ("tracking", tracking or "metrics.jsonl only"),
    ]


def stage_card(prepared: Prepared, data: Mapping[str, Any]) -> Card:
    """What a stage of a run works with."""
    (_, model), *objective = _model_and_objective(prepared)
    path = prepared.trainer.config.model.path
    return [
        ("model", model.replace(path, shown(Path(path)), 1)),
        *objective,
        ("data", _mixture(data)),
        *(line for line in _horizon(prepared) if line[0] != "battery"),
        *(line for line in _machine(prepared) if line[0] != "disk"),
    ]


def _identity(run: Run) -> Card:
    info = run.info()
    commit = str(info.get("git_commit") or "")[:10]
    version = f"uft {__version__}" + (f", commit {commit}" if commit else "")
    return [("run", f"{run.name} ({info.get('id', '')})"), ("version", f"{version}, torch {torch.__version__}")]


def _model_and_objective(prepared: Prepared) -> Card:
    trainer, config = prepared.trainer, prepared.trainer.config
    objective = trainer.objective
    defaults = type(objective)()
    names = [f.name for f in fields(objective) if not f.metadata.get("internal") and f.name not in ("name", "method")]
    values = {name: getattr(objective, name) for name in names}
    changed = [f"{n}={getattr(v, 'name', v)}" for n, v in values.items() if v != getattr(defaults, n)]
    reference = prepared.reference
    return [
        ("model", "\n".join([f"{config.model.name}: {config.model.path}", *trainer.policy.describe()])),
        ("objective", f"{objective.name}  {' '.join(changed)}".rstrip()),
        ("lengths", objective.length_convention),
        *(("caution", caution) for caution in cautions(prepared)),
        ("reference", f"{reference.mode}: {reference.why}" if reference else "none needed to train"),
    ]


def _mixture(data: Mapping[str, Any]) -> str:
    """The report's table cut to what fits a card."""
    header, *rows = report_table(data)
    kept = [header.index(name) for name in MIXTURE_COLUMNS if name in header]
    table = [[line[i] for i in kept] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


def _horizon(prepared: Prepared) -> Card:
    trainer, cfg = prepared.trainer, prepared.trainer.config
    passes = prepared.plan.total_rows / prepared.plan.epoch_rows
    warmup = warmup_steps(cfg.optim.warmup, trainer.steps)
    padding = ", padding counted" if trainer.policy.layout is Layout.PADDED else ""
    held_out = sum(len(source.rows) for source in prepared.corpus.held_out)
    battery = f"{held_out:,} rows held out, {cfg.eval.rows} of each source are measured"
    if not held_out:
        battery = "no held-out rows: set data.holdout=0.05 to measure on some"
    return [
        ("horizon", f"{trainer.steps} steps of {cfg.train.batch_size} rows, {passes:.2f} passes"),
        ("batch", f"at most {tokens_per_pass(cfg):,} tokens per forward pass{padding}"),
        ("optimiser", f"{cfg.optim.name} lr {cfg.optim.lr:g}, {cfg.optim.schedule}, {warmup} steps of warm-up"),
        ("battery", battery),
    ]


def _machine(prepared: Prepared) -> Card:
    trainer = prepared.trainer
    device = trainer.device
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} thread{'s' * (threads != 1)}"
    parts = memory_record(prepared)
    needed = ", ".join(f"{part} {count(size)}B" for part, size in parts.items() if size)
    total, free = count(sum(parts.values())), count(free_memory(device))
    disk = shutil.disk_usage(trainer.run.path).free
    return [
        ("device", f"{device} ({name}){_processes(trainer.config.hardware)}"),
        ("memory", f"about {total}B of {free}B free ({needed})"),
        ("disk", f"{count(disk)}B free"),
    ]


def _processes(hardware: Hardware) -> str:
    count = hardware.processes * hardware.nodes
    held = "a share of the model" if hardware.sharding == "full" else "the whole model"
    return f", {count} processes, each with {held}" if count > 1 else ""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
