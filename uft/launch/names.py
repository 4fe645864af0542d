"""Names of runs and sweeps, and the folders they stand for. Never an = or a comma: Hydra could not read them back."""

from __future__ import annotations

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from uft.config.frozen import free

OUTPUTS = Path("outputs")
LONGEST = 120  # characters; file systems allow 255


def slug(text: str) -> str:
    """`text` as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+]+", "-", text).strip("-.") or "none"


def short_hash(text: str, digits: int = 6) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def today(now: datetime | None = None) -> str:
    return (now or datetime.now()).strftime("%Y-%m-%d")


def run_name(cfg: Mapping[str, Any], now: datetime | None = None) -> str:
    """`run.name`, else objective and data (or stages), model, seed and time of day."""
    if cfg["run"]["name"]:
        return str(cfg["run"]["name"])
    what = ("-then-".join(cfg["stages"]),) if cfg.get("stages") else (cfg["objective"]["name"], cfg["data"]["name"])
    parts = (*what, cfg["model"]["name"], f"seed{cfg['seed']}")
    return slug("-".join([*map(str, parts), (now or datetime.now()).strftime("%H%M%S")]))


def single_run_dir(cfg: Mapping[str, Any], now: datetime | None = None) -> Path:
    """Where a run of its own goes: `run.dir`, else outputs/DATE/NAME. A second one of that name gets a number.

    A name that somebody chose is taken at its word: the folder it means is continued, not avoided.
    """
    if cfg["run"]["dir"]:
        return Path(cfg["run"]["dir"])
    folder = OUTPUTS / today(now) / run_name(cfg, now)
    if cfg["run"]["name"] or not folder.exists():
        return folder
    return next(p for n in range(2, 10_000) if not (p := folder.with_name(f"{folder.name}-{n}")).exists())


def axis_labels(axes: Sequence[str]) -> dict[str, str]:
    """What a swept key is called in a job's name: nothing for a group, the last part of a key, two where one is not
    enough (`optim.lr` and `model.lr`)."""
    dotted = [axis.lstrip("+~") for axis in axes]
    last = Counter(key.rpartition(".")[2] for key in dotted)
    return {axis: label(key, last) for axis, key in zip(axes, dotted, strict=True)}


def label(key: str, last: Counter[str]) -> str:
    if "." not in key:
        return key if key == "seed" else ""
    leaf = key.rpartition(".")[2]
    return leaf if last[leaf] == 1 else ".".join(key.split(".")[-2:])


def job_name(overrides: Sequence[str], axes: Sequence[str]) -> str:
    """A job by the axes that vary: `ift-beta0.1-ratio0.5-seed1`.

    A value that cannot be written in a folder's name as it is gets a hash, which depends on that value alone: a job
    keeps its name when the grid grows.
    """
    labels = axis_labels(axes)
    settings = dict(override.partition("=")[::2] for override in overrides)
    values = ((axis, settings[axis]) for axis in axes if axis in settings)
    parts = [f"{labels[axis]}{slug(value)}{doubt(value)}" for axis, value in values]
    name = "-".join(parts) or "run"
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{short_hash(name)}"


def doubt(value: str) -> str:
    return "" if slug(value) == value or slug(value) == value.lstrip("-") != value else f"-{short_hash(value, 4)}"


def sweep_name(axes: Sequence[str], fixed: Sequence[str]) -> str:
    """A sweep by its file (`sweep=NAME`), else by its swept keys, and a hash of what is the same in all jobs but for
    keys that change no result."""
    typed = {line: line.partition("=")[0].lstrip("+~") for line in fixed}
    that_matter = sorted(line for line, key in typed.items() if not (free(key) or free(f"{key}.")))
    file = next((line.partition("=")[2] for line in fixed if line.startswith("sweep=")), "")
    keys = slug(file) if file else "-".join(slug(axis.lstrip("+~").rpartition(".")[2]) for axis in axes) or "sweep"
    return f"{keys[:LONGEST]}-{short_hash(repr((sorted(axes), that_matter)))}"


def sweep_dir(name: str, now: datetime | None = None) -> Path:
    """outputs/DATE/NAME: today's, or the newest one of that name, so that a sweep can be completed on another day."""
    earlier = sorted(OUTPUTS.glob(f"*/{glob.escape(name)}")) if OUTPUTS.is_dir() else []
    return earlier[-1] if earlier else OUTPUTS / today(now) / name
