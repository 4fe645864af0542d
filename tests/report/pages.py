"""Comparisons that the page must cope with, of made-up runs: gone wrong, large, small, empty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from synthetic import compared, loaded

from uft.report.runs import LoadedRun

HEADLINE = ("eval/new/exact_match", "eval/style/pair_accuracy", "eval/nll")
SKILL = {"sft": 0.82, "uft": 0.71, "ift": 0.78, "dpo": 0.21}
STYLE = {"sft": 0.42, "uft": 0.90, "ift": 0.55, "dpo": 0.93}
STEPS = 800
NOISE = [Random(number).uniform(0.96, 1.04) for number in range(997)]


def run(objective: str, ratio: float, seed: int, beta: float = 0.1, points: int = 40) -> LoadedRun:
    """A finished run of `points` training lines and ten evaluations, with answers before and after it."""
    name = f"{objective}-ratio{ratio}-seed{seed}"
    luck = Random(f"{name}{beta}")
    skill = SKILL[objective] + 0.15 * (ratio - 0.5) - 0.05 * abs(math.log10(beta) + 1) + luck.gauss(0, 0.012)
    style = STYLE[objective] - 0.2 * (ratio - 0.5) + luck.gauss(0, 0.012)
    evaluation = dict(zip(HEADLINE, (skill, style, 2.4 - skill + luck.gauss(0, 0.01)), strict=True))
    training = {"loss": 0.7 - skill / 3, "nll": 0.9, "grad_norm": 1.0, "lr": 1e-6, f"objective/{objective}": 0.7}
    lines = []
    for point in range(1, points + 1):
        step = STEPS * point // points
        metrics = {**training, **(evaluation if point % max(1, points // 10) == 0 else {})}
        left = math.exp(-4 * point / points)
        start = luck.randrange(len(NOISE))
        noisy = {key: end + (2.5 - end) * left * NOISE[start - n] for n, (key, end) in enumerate(metrics.items())}
        lines.append({"step": step, "tokens": 8192 * step, "seconds": (0.11 + 0.002 * seed) * step, **noisy})
    answers = []
    for n, step in product(range(10), (0, STEPS)):
        good, right = step > 0 and luck.random() < 0.7, 2 * n + 7
        prompt = {"source": "instruct", "row": f"row-{n:04}", "prompt": f"Add {n} and {n + 7}.", "answer": right}
        reply = f"{name} says {right if good else n}"
        answers.append({"step": step, **prompt, "reply": reply, "verdict": {"exact_match": float(good)}})
    final = {**evaluation, "eval/chosen_reward": -3 * style, "loss": training["loss"]}
    spent = {"steps": STEPS, "seconds": 95.0, "tokens": 6_553_600, "tokens_per_second": 64e3, "peak_memory_bytes": 61e9}
    return loaded(
        objective,
        seed,
        path=Path(f"outputs/2026-11-21/beta-sweep/{name}"),
        name=name,
        info={"data_digest": "9f2c41d0", "device": "cpu", "torch": "2.13.0", "versions": {"uft": "0.1.0"}},
        result={"status": "finished", "final": final, "best": final, **spent},
        lines=tuple(lines),
        samples=tuple(answers),
        data__ratio=ratio,
        **({} if objective == "sft" else {"objective__beta": beta}),
    )


def page_of(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    return compared(runs, "beta-sweep", metrics=HEADLINE if any(run.figures for run in runs) else ())


def ended(run: LoadedRun, status: str, error: str | None = None) -> LoadedRun:
    """The run as it would be if it had not finished."""
    if status == "unreadable":
        return LoadedRun(run.path, run.name, status, error)
    result = {"status": status, "steps": 310, "seconds": 40.0} if status in ("failed", "stopped") else {}
    return replace(run, status=status, error=error, result=result)


def mixed() -> dict[str, Any]:
    """Nine groups of three seeds in which things went wrong, and data digests that differ."""
    runs = [run(*cell) for cell in product(("ift", "sft", "uft"), (0.25, 0.5, 0.75), (1, 2, 3))]
    runs[3] = replace(runs[3], info={**runs[3].info, "data_digest": "00aa11bb"})
    runs[4] = ended(runs[4], "failed", "the gradient is not a number at step 310: rows instruct/17, instruct/90")
    runs[8], runs[13] = ended(runs[8], "stopped"), ended(runs[13], "running")
    trace = "killed; the newest checkpoint is step 300\nTraceback (most recent call last):\n  ...\nKilled"
    runs[20] = ended(runs[20], "interrupted", trace)
    runs[26] = ended(runs[26], "unreadable", "metrics.jsonl: cut in the middle of line 41")
    return page_of(runs)


@cache
def wide() -> dict[str, Any]:
    """200 runs of 500 points: two numbers and an objective vary."""
    ratios, betas = (0.1, 0.3, 0.5, 0.7, 0.9), (0.01, 0.03, 0.1, 0.3, 1.0)
    return page_of([run(*cell, points=500) for cell in product(("dpo", "uft"), ratios, range(1, 5), betas)])


def one_run() -> dict[str, Any]:
    return page_of([run("uft", 0.5, 1)])


def one_group() -> dict[str, Any]:
    return page_of([run("uft", 0.5, seed) for seed in (1, 2, 3)])


def no_curves() -> dict[str, Any]:
    return page_of([replace(run(objective, 0.5, 1), lines=(), samples=()) for objective in ("sft", "uft")])


def all_failed() -> dict[str, Any]:
    error = "CUDA out of memory. Tried to allocate 2.00 GiB."
    cells = product(("sft", "uft"), (0.5,), (1, 2))
    return page_of([replace(ended(run(*cell), "failed", error), samples=()) for cell in cells])


def nothing() -> dict[str, Any]:
    return page_of([])
