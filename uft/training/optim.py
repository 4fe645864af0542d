"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from uft.config.schema import Optim
from uft.distributed import ranks

Groups = list[dict[str, Any]]


def make_optimiser(parameters: Mapping[str, torch.nn.Parameter], cfg: Optim) -> torch.optim.Optimizer:
    """Weight decay acts on matrices only: gains and biases are scales, and those are not to shrink."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    others = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return OPTIMISERS[cfg.name]([group for group in groups if group["params"]], cfg)


def _adamw(groups: Groups, cfg: Optim) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, fused=cfg.fused)


def _rmsprop(groups: Groups, cfg: Optim) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=cfg.lr, alpha=cfg.alpha, eps=cfg.eps, momentum=cfg.momentum)


def _sgd(groups: Groups, cfg: Optim) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, fused=cfg.fused)


OPTIMISERS: dict[str, Callable[[Groups, Optim], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
}


def defers_finite_check(sync: bool | None, device: torch.device, optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step's finite check is awaited only while the device works on the next step (`train.sync_every_step`).

    It takes an optimiser that can skip an update on the device, and a model that is not sharded: a sharded one waits
    for other ranks in every step anyway.
    """
    able = bool(optimiser.defaults.get("fused")) and not ranks().sharded
    return able and (device.type == "cuda" if sync is None else not sync)


def skip_update(optimiser: torch.optim.Optimizer, unless: torch.Tensor) -> None:
    """Make a fused optimiser's next step change nothing where `unless` () bool, on its device, is false.

    This is the interface of torch's gradient scaler.
    """
    optimiser.found_inf = unless.logical_not().float()  # type: ignore[attr-defined]


def warmup_steps(warmup: float, steps: int) -> int:
    """`optim.warmup`: a share of the horizon below 1, a number of steps from 1 on."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, steps: int, cfg: Optim) -> float:
    """Rate of the 0-based `step`: linear warm-up that begins above 0, then the schedule down to 0.

    A pure function of the step: a resumed run needs no scheduler state.
    """
    warmup = warmup_steps(cfg.warmup, steps)
    if step < warmup:
        return cfg.lr_scale * cfg.lr * (step + 1) / warmup
    return cfg.lr_scale * cfg.lr * SCHEDULES[cfg.schedule]((step - warmup) / max(1, steps - warmup))
