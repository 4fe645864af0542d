"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from uft.config.schema import Optim
from uft.distributed import ranks

Parameters = Mapping[str, torch.nn.Parameter]


def _groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only: gains and biases are scales, and shrinking a scale is not what decay is for."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: Iterable[dict[str, Any]], cfg: Optim) -> torch.optim.Optimizer:
    betas = (cfg.betas[0], cfg.betas[1])
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=cfg.fused)


def _rmsprop(groups: Iterable[dict[str, Any]], cfg: Optim) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=cfg.lr, alpha=cfg.alpha, eps=cfg.eps, momentum=cfg.momentum)


def _sgd(groups: Iterable[dict[str, Any]], cfg: Optim) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=cfg.fused)


OPTIMISERS: dict[str, Callable[[Iterable[dict[str, Any]], Optim], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
}


def make_optimiser(parameters: Parameters, cfg: Optim) -> torch.optim.Optimizer:
    return OPTIMISERS[cfg.name](_groups(parameters, cfg.weight_decay), cfg)


def asks_late(sync: bool | None, device: torch.device, optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step's numbers are looked at only while the device works on the next one (`train.sync_every_step`).

    It takes an optimiser that can pass over an update by itself, and a model that every process has whole: one in
    pieces waits for others in every step anyway.
    """
    able = bool(optimiser.defaults.get("fused")) and not ranks().sharded
    return able and (device.type == "cuda" if sync is None else not sync)


def passes_over(optimiser: torch.optim.Optimizer, unless: torch.Tensor) -> None:
    """A fused optimiser's next step changes nothing, unless `unless` () bool, which stays on its device, is true.

    torch's own gradient scaler tells it in the same way.
    """
    optimiser.found_inf = unless.logical_not().float()  # type: ignore[attr-defined]


def warmup_steps(warmup: float, steps: int) -> int:
    """A share of the horizon below 1, a count from 1 on."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, steps: int, cfg: Optim) -> float:
    """Rate of the 0-based `step`: linear warm-up whose first step is not wasted on 0, then the schedule down to 0.

    A pure function of the step, so that a resumed run needs no scheduler state and cannot get another shape.
    """
    warmup = warmup_steps(cfg.warmup, steps)
    if step < warmup:
        return cfg.lr_scale * cfg.lr * (step + 1) / warmup
    return cfg.lr_scale * cfg.lr * SCHEDULES[cfg.schedule]((step - warmup) / max(1, steps - warmup))
