"""Checkpoints: written beside, flushed, then renamed. What has the final name is whole; nothing is ever pickled.

A checkpoint is a folder `step-000400/` with one safetensors file (trained weights, optimiser moments, objective state,
random generators, meters) and one JSON file (counters, cursors of the data). The old one is deleted only when the new
one has its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from uft.runs import Run

Tensor = torch.Tensor
TENSORS, STATE = "tensors.safetensors", "state.json"
REPLACED, DISCARDED = "replaced", "discarded"
"""How a hidden folder ends: one that waits for its replacement to get its name, and one that is being deleted."""


def nested(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`, without it."""
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Moments by parameter name (`names`: id(parameter) -> name), so that no order of parameters is relied upon."""
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimiser.state.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimiser(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    fused = bool(optimiser.defaults.get("fused"))
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        # torch keeps the step counter on the CPU unless the kernel is fused
        place = tensor if key == "step" and not fused else tensor.to(parameter.device)
        optimiser.state[parameter][key] = place.clone()


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Publish `step-XXXXXX`; returns its folder. Saving a step that is there already replaces it."""
    run.checkpoints_dir.mkdir(exist_ok=True)
    final = run.checkpoints_dir / f"step-{step:06d}"
    beside = run.checkpoints_dir / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    # clone: safetensors refuses tensors that share memory (tied weights), and the copy is on the CPU anyway
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, beside / TENSORS)
    (beside / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in (beside / TENSORS, beside / STATE, beside):
        _flush(path)
    replaced = _hidden(final, REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(beside, final)
    _flush(run.checkpoints_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / TENSORS), read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The counters and cursors of a checkpoint, without its tensors."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def _hidden(folder: Path, why: str) -> Path:
    return folder.with_name(f".{folder.name}.{why}")


def _discard(folder: Path) -> None:
    """Take the name away first: half a checkpoint must never bear one."""
    hidden = _hidden(folder, DISCARDED)
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(run: Run) -> None:
    """Give a checkpoint its name back if the process was killed between taking it away and naming its replacement.

    It is whole: what was replaced is deleted only after the replacement has the name.
    """
    for hidden in run.checkpoints_dir.glob(f".step-*.{REPLACED}"):
        final = hidden.with_name(hidden.name[1:].removesuffix(f".{REPLACED}"))
        if not final.exists():
            os.replace(hidden, final)


def prune(run: Run, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` and the best, and what a killed process left half done."""
    complete = run.checkpoints()
    for step, folder in complete[:-keep_last]:
        if step != best_step:
            _discard(folder)
    for leftover in run.checkpoints_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
