"""Run folders as training leaves them, made in milliseconds: any number of runs and points, whole or broken.

The figures follow a formula with noise that depends on the seed alone (runs of one seed share it) and on the run.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from uft.config.frozen import flat, to_yaml
from uft.report.compare import Options, compare_loaded
from uft.report.runs import LoadedRun, Selection

SKILL = {"sft": 0.80, "uft": 0.86, "ift": 0.78, "dpo": 0.55}
STYLE = {"sft": 0.20, "uft": 0.88, "ift": 0.40, "dpo": 0.93}
SOURCES = ("instruct", "pairs")


def settings(objective: str = "sft", seed: int = 1, **changes: Any) -> dict[str, Any]:
    """A resolved configuration. `changes` are dotted keys with __ for the dots: `objective__beta=0.1`."""
    own = {} if objective == "sft" else {"beta": 0.1, "kind_weights": {}}
    source = {"kind": None, "share": None, "columns": {}, "split": "train", "checker": "playground", "limit": None}
    sources = {name: {"path": f"builtin:playground/{name}", **source} for name in SOURCES}
    config: dict[str, Any] = {
        "seed": seed,
        "seeds": {"init": seed, "data": seed, "sampling": seed},
        "objective": {"name": objective, "method": objective, "reduction": "token", **own},
        "data": {"name": "mix", "sources": sources, "ratio": None, "too_long": "error", "cache": None},
        "model": {"name": "playground", "path": "builtin:playground", "adapter": "none", "lr": 0.001},
        "reference": {"path": None, "mode": "auto"},
        "optim": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.999], "schedule": "cosine", "warmup": 0.1},
        "train": {"steps": 200, "epochs": 3.0, "batch_size": 32, "max_length": 1024, "log_every": 10},
        "eval": {"rows": 64, "samples": 4, "generate_rows": 64, "best": "eval/nll", "best_mode": "min"},
        "hardware": {"device": "auto", "threads": None},
        "tracking": {"mode": "offline", "project": "uft", "entity": None, "group": None, "tags": []},
        "run": {"name": None, "dir": None},
        "sweep": {"name": None},
    }
    for key, value in changes.items():
        node, parts = config, key.split("__")
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = value
    return config


def metrics_lines(config: Mapping[str, Any], name: str, points: int) -> Iterator[dict[str, Any]]:
    """The objects of metrics.jsonl: an evaluation at ten steps, a training line at each of `points` steps."""
    objective, seed, steps = config["objective"]["name"], config["seed"], config["train"]["steps"]
    beta, ratio = float(config["objective"].get("beta") or 0.1), float(config["data"]["ratio"] or 0.5)
    luck, own, noise = Random(f"seed{seed}").gauss(0, 0.03), Random(name).gauss(0, 0.01), Random(f"{name}/loss")

    def evaluation(progress: float) -> dict[str, float]:
        reach = SKILL.get(objective, 0.5) + 0.1 * (ratio - 0.5) - 0.02 * abs(math.log10(beta) + 1)
        skill, style = progress * reach + luck, progress * (STYLE.get(objective, 0.5) - 0.1 * (ratio - 0.5)) + luck
        found = {"nll": 2.5 - skill + own, "log_ratio": 2 * progress + 0.1 * own}
        found |= {"pair_accuracy": 0.5 + style / 2 - own, "reward_accuracy": 0.5 + style / 2 + own}
        found |= {"chosen_reward": -3 * progress, "rejected_reward": -9 * progress, "margin": 6 * progress}
        found |= {"exact_match": (skill + style) / 2 + own, "correct": skill + own, "completion_length": 8 + own}
        found |= {"instruct/exact_match": skill + own, "pairs/exact_match": style + own}
        return {f"eval/{metric}": value for metric, value in found.items()}

    yield {"step": 0, "rows": 0, "tokens": 0, **evaluation(0.0)}
    for point in range(1, points + 1):
        step, progress = max(1, round(steps * point / points)), point / points
        axes = {"step": step, "rows": 32 * step, "tokens": 600 * step}
        loss = 2 * math.exp(-3 * progress) + noise.gauss(0.5, 0.05)
        training = {"supervised_tokens": 300 * step, "seconds": 0.05 * step, "epoch": step / 100, "loss": loss}
        training |= {"nll": loss + 0.1, "lr": 0.001 * (1 - progress / 2), "grad_norm": abs(noise.gauss(0.5, 0.1))}
        yield {**axes, **training, "tokens_per_second": 12000.0, f"objective/{objective}": loss}
        if point % max(1, points // 10) == 0 or point == points:
            yield {**axes, **evaluation(progress)}


def make_run(
    folder: Path,
    objective: str = "sft",
    seed: int = 1,
    *,
    points: int = 20,
    status: str = "finished",
    error: str | None = None,
    final: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    overrides: Sequence[str] | None = None,
    **changes: Any,
) -> Path:
    """A run folder. `final` is laid over the last evaluation, `info` over run.json, `result` over result.json.

    `status`: finished, failed, stopped, or interrupted (no result.json).
    """
    folder.mkdir(parents=True)
    config = settings(objective, seed, **changes)
    config["run"]["name"] = folder.name
    written = list(metrics_lines(config, folder.name, points))
    if status != "finished":
        written = written[: max(2, len(written) // 2)]
    last: dict[str, Any] = {}
    for line in written:
        last |= line
    typed = [f"{key.replace('__', '.')}={value}" for key, value in changes.items() if not key.startswith("sweep")]
    run = {
        "id": sha256(str(folder).encode()).hexdigest()[:10],
        "name": folder.name,
        "versions": {"uft": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        "code": {"commit": "a" * 40, "dirty": None},
        "data_digest": f"rows-{seed}-{config['data']['ratio']}",
        "total_steps": config["train"]["steps"],
        "device": "cpu",
        "torch": "2.13.0+cpu",
    }
    answers = [  # before and after training, to two prompts of each source
        {"step": at, "source": source, "row": f"{source}:{row}", "prompt": f"repeat {row}", "answer": str(row)}
        | {"reply": f"{objective} {seed} says {row} at {at}", "verdict": {"exact_match": float(at > 0)}}
        for at, source, row in product((0, last["step"]), SOURCES, (0, 1))
    ]
    ending = {
        "status": status,
        "error": error or ("RuntimeError: it broke" if status == "failed" else None),
        "steps": last["step"],
        **{key: last.get(key, 0) for key in ("rows", "tokens", "supervised_tokens", "seconds")},
        "tokens_per_second": 12000.0,
        "peak_memory_bytes": 500_000_000,
        "final": {k: v for k, v in last.items() if k.startswith("eval/") or k in ("loss", "nll")} | dict(final or {}),
        "best": {"eval/nll": last["eval/nll"]},
    }
    words = overrides or [f"objective={objective}", f"seed={seed}", *typed]
    files = {
        "overrides.yaml": "".join(f"- {json.dumps(word)}\n" for word in words),
        "run.json": json.dumps({**run, **(info or {})}),
        "data.json": json.dumps({"run_digest": f"rows-{seed}", "digest": "content", "sources": {}}),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in written),
        "samples.jsonl": "".join(json.dumps(sample) + "\n" for sample in (answers if samples is None else samples)),
        "result.json": json.dumps({**ending, **(result or {})}),
        "config.yaml": to_yaml(config),
    }
    for name, text in files.items():
        if name != "result.json" or status != "interrupted":
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def make_sweep(
    root: Path,
    objectives: Sequence[str] = ("sft", "uft", "ift"),
    betas: Sequence[float] = (),
    ratios: Sequence[float] = (),
    seeds: Sequence[int] = (1, 2, 3),
    *,
    points: int = 20,
    change: Callable[[str, dict[str, Any]], None] | None = None,
    **more: Any,
) -> Path:
    """A sweep's folder with a run for every combination; `sft` has no beta. `change(name, arguments)` may edit one."""
    for objective, ratio, seed in product(objectives, ratios or (None,), seeds):
        for beta in betas if objective != "sft" and betas else (None,):
            parts = {"": objective, "beta": beta, "ratio": ratio, "seed": seed}
            name = "-".join(f"{label}{value}" for label, value in parts.items() if value is not None)
            keys = {"objective__beta": beta, "data__ratio": ratio, "sweep__name": root.name}
            arguments = {key: value for key, value in keys.items() if value is not None} | {"points": points, **more}
            arguments |= {"objective": objective, "seed": seed}
            if change:
                change(name, arguments)
            make_run(root / name, **arguments)
    return root


def tear(file: Path, keep: float = 0.5) -> None:
    """Cut a file within a line, as a kill in mid-write does."""
    data = file.read_bytes()
    cut = int(len(data) * keep)
    file.write_bytes(data[: cut - 3] if data[cut - 1 : cut] == b"\n" else data[:cut])


@contextmanager
def held(run: Path) -> Iterator[None]:
    """A process that trains this run, as far as others can see."""
    with open(run / ".lock", "a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def loaded(objective: str = "sft", seed: int = 1, *, final: Mapping[str, Any] | None = None, **more: Any) -> LoadedRun:
    """A run as `load` returns it, without a folder. `more`: fields of LoadedRun, and keys of the configuration."""
    fields = {name: more.pop(name) for name in list(more) if name in LoadedRun.__dataclass_fields__}
    config = {key: value for key, value in flat(settings(objective, seed, **more)) if value != {}}
    words = (f"objective={objective}", f"seed={seed}", *(f"{key.replace('__', '.')}={more[key]}" for key in more))
    given = {"path": Path("run"), "name": "run", "status": "finished", "config": config, "overrides": words}
    return LoadedRun(**{**given, "result": {"status": "finished", "final": dict(final or {})}, **fields})


def compared(runs: Sequence[LoadedRun], title: str = "title", **options: Any) -> dict[str, Any]:
    """The comparison of runs without a folder."""
    return compare_loaded(runs, Selection(tuple(run.path for run in runs), title, Path("nowhere")), Options(**options))
