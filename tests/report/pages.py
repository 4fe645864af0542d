"""Comparisons as compare.json holds them, made up: of any size, with failures, and one that means harm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from random import Random
from typing import Any

from scipy.stats import t as student

HEADLINE = [
    {"metric": "eval/new/exact_match", "direction": "max"},
    {"metric": "eval/style/pair_accuracy", "direction": "max"},
    {"metric": "eval/nll", "direction": "min"},
]
CURVES = ["eval/new/exact_match", "eval/style/pair_accuracy", "eval/nll", "loss", "nll", "grad_norm", "lr"]
CAPTIONS = {
    "curves": "Lines are means over the finished seeds of a group, bands their standard deviation. Training losses of "
    "different objectives measure different things and must not be compared.",
    "scatter": "A point is a group's mean with its 95 % interval. New skill against kept style is the trade-off here.",
    "heatmap": "Mean over seeds in every cell.",
    "parallel": "A line is a run.",
    "runs": "Every run that was found, whatever became of it. Figures are those of the last evaluation.",
    "differences": "Settings and facts that are not the same in all runs.",
    "samples": "Greedy answers to the same held-out prompts, with what the checker said.",
    "summary": "The best of several groups was chosen on the same figures, which flatters it a little. p is adjusted "
    "for the number of comparisons (Holm).",
}
SKILL = {"sft": 0.82, "uft": 0.71, "ift": 0.78, "dpo": 0.21}
NOISE = [Random(number).gauss(0, 1) for number in range(997)]
STYLE = {"sft": 0.42, "uft": 0.90, "ift": 0.55, "dpo": 0.93}


def stat(values: Sequence[float]) -> dict[str, Any]:
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(values)
    half = float(student.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def metric(name: str, direction: str | None = None, **more: Any) -> dict[str, Any]:
    kind = "eval" if name.startswith("eval/") else "train"
    return {
        "name": name,
        "direction": direction,
        "kind": kind,
        "curve": True,
        "caption": None,
        "comparable": True,
        **more,
    }


def metrics() -> list[dict[str, Any]]:
    loss = "The loss is the objective's own: a lower one under another objective means nothing."
    return [
        *(metric(entry["metric"], entry["direction"]) for entry in HEADLINE),
        metric(
            "eval/chosen_reward",
            caption="It may fall while the margin rises: both replies become less likely.",
            curve=False,
        ),
        metric("loss", caption=loss, comparable=False),
        metric("nll", "min"),
        metric("grad_norm"),
        metric("lr"),
    ]


def finals(settings: Mapping[str, Any], luck: Random) -> dict[str, float]:
    objective = settings.get("objective", "uft")
    ratio, beta = settings.get("data.ratio", 0.5), settings.get("objective.beta", 0.1)
    skill = SKILL.get(objective, 0.5) + 0.15 * (ratio - 0.5) - 0.05 * abs(math.log10(beta) + 1) + luck.gauss(0, 0.012)
    style = STYLE.get(objective, 0.5) - 0.2 * (ratio - 0.5) + luck.gauss(0, 0.012)
    return {
        "eval/new/exact_match": skill,
        "eval/style/pair_accuracy": style,
        "eval/nll": 2.4 - skill + luck.gauss(0, 0.01),
        "eval/chosen_reward": -3 * style,
        "loss": 0.7 - skill / 3,
    }


def curve(name: str, final: float, points: int, luck: Random, who: str) -> dict[str, list[Any]]:
    every = 1 if name.startswith("eval/") and points <= 20 else max(1, 800 // points)
    steps = [every * (i + 1) for i in range(points)]
    start = {"loss": 2.5, "nll": 2.5, "eval/nll": 2.5, "grad_norm": 4.0, "lr": 1e-4}.get(name, 0.05)
    end = final if name not in ("grad_norm", "lr") else (1.0 if name == "grad_norm" else 1e-6)
    noise = abs(start - end) * (0.005 if name == "lr" else 0.04)
    first = luck.randrange(len(NOISE))
    values = [
        end + (start - end) * math.exp(-4 * (i + 1) / points) + noise * NOISE[(first + i) % len(NOISE)]
        for i in range(points)
    ]
    speed = 0.11 + 0.002 * (int(who[1:]) % 10)
    return {
        "step": steps,
        "tokens": [8192 * s for s in steps],
        "seconds": [round(speed * s, 2) for s in steps],
        "value": values,
    }


def run(
    number: int, group: int | None, name: str, settings: Mapping[str, Any], seed: int, luck: Random
) -> dict[str, Any]:
    final = finals(settings, luck)
    words = " ".join(f"{key}={value}" for key, value in settings.items())
    return {
        "id": f"r{number}",
        "name": f"{name}-seed{seed}",
        "path": f"outputs/2026-11-21/sweep/{name}-seed{seed}",
        "group": None if group is None else f"g{group}",
        "color": group or 0,
        "status": "finished",
        "error": None,
        "seed": seed,
        "config": dict(settings),
        "final": final,
        "best": {key: value * 1.01 for key, value in final.items()},
        "steps": 800,
        "total_steps": 800,
        "seconds": 95 + 10 * luck.random(),
        "tokens": 6_553_600,
        "supervised_tokens": 2_100_000,
        "tokens_per_second": 64_000 + 3000 * luck.random(),
        "peak_memory_bytes": 61_000_000_000,
        "command": f"uft train {words} seed={seed}",
        "facts": {"data digest": "9f2c41d0", "uft": "0.1.0", "commit": "b34432d", "torch": "2.13.0", "device": "cpu"},
    }


def fail(one: dict[str, Any], status: str, error: str | None) -> None:
    one.update(status=status, error=error, steps=310, seconds=40.0)
    if status == "unreadable":
        one.update(group=None, final={}, best={}, steps=None, total_steps=None, seconds=None, tokens=None, command=None)
        one.update(
            supervised_tokens=None, tokens_per_second=None, peak_memory_bytes=None, facts={}, config={}, seed=None
        )


def groups_of(
    runs: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[dict[str, Any]]:
    made = []
    for number, (settings, name) in enumerate(zip(cells, names, strict=True)):
        members = [one for one in runs if one["group"] == f"g{number}"]
        done = [one for one in members if one["status"] == "finished"]
        figures = {key: stat([one["final"][key] for one in done]) for key in (done[0]["final"] if done else {})}
        made.append(
            {"id": f"g{number}", "name": name, "config": dict(settings), "runs": [one["id"] for one in members]}
            | {"baseline": number == 0, "metrics": figures}
        )
    return made


def summary(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for entry in HEADLINE:
        name, direction = entry["metric"], entry["direction"]
        ranked = sorted((g for g in groups if name in g["metrics"]), key=lambda g: g["metrics"][name]["mean"])
        ranked = ranked[::-1] if direction == "max" else ranked
        if not ranked:
            continue
        best, rest = ranked[0], ranked[1:]
        mean = best["metrics"][name]["mean"]
        words = [f"{best['name']} is best on {name}: {mean:.3f} over {best['metrics'][name]['n']} seeds."]
        words += (
            [f"It is {abs(mean - rest[0]['metrics'][name]['mean']):.3f} ahead of {rest[0]['name']}."] if rest else []
        )
        comparisons = [
            {"a": best["id"], "b": other["id"], "difference": mean - other["metrics"][name]["mean"]}
            | {"low": -0.01, "high": 0.05, "p": 0.21, "p_adjusted": 0.42, "n": 3, "paired": True}
            | {"method": "paired t, by seed", "inside_noise": i == 0}
            for i, other in enumerate(rest)
        ]
        found.append(
            {"metric": name, "direction": direction, "words": words, "best": best["id"], "comparisons": comparisons}
            | {"runner_up": rest[0]["id"] if rest else None, "baseline": groups[0]["id"]}
        )
    return found


def samples(runs: Sequence[Mapping[str, Any]], prompts: int, luck: Random) -> list[dict[str, Any]]:
    made = []
    for i in range(prompts):
        first, second = luck.randrange(10, 90), luck.randrange(10, 90)
        right = str(first + second)
        answers = []
        for one in runs:
            for step in (0, 800):
                good = step > 0 and luck.random() < 0.7
                text = (
                    f"The sum is {right}."
                    if good
                    else f"I think it is {first + second + luck.randrange(1, 9)}, but I am not sure."
                )
                answers.append({"run": one["id"], "step": step, "text": text, "verdict": "right" if good else "wrong"})
        prompt = f"Add {first} and {second}. Answer in a short sentence."
        made.append(
            {"source": "instruct", "row": f"row-{i:04d}", "prompt": prompt, "reference": right, "answers": answers}
        )
    return made


def differences(runs: Sequence[Mapping[str, Any]], axes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for axis in axes:
        values = [
            {"value": value, "runs": [one["id"] for one in runs if one["config"].get(axis["key"]) == value]}
            for value in axis["values"]
        ]
        found.append({"key": axis["key"], "values": values})
    return found


def axes_of(swept: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    numeric = {key: all(isinstance(value, int | float) for value in values) for key, values in swept.items()}
    return [
        {"key": key, "values": list(values), "numeric": numeric[key]}
        for key, values in swept.items()
        if len(values) > 1
    ]


def comparison(
    swept: Mapping[str, Sequence[Any]] | None = None, seeds: int = 3, points: int = 40, prompts: int = 10
) -> dict[str, Any]:
    """A grid of settings by seeds. Without `swept`: three objectives and three ratios."""
    swept = {"objective": ["sft", "uft", "ift"], "data.ratio": [0.25, 0.5, 0.75]} if swept is None else swept
    luck = Random(7)
    cells = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    short = [key.split(".")[-1] for key in swept]
    names = [
        "-".join(f"{k}{v}" if not isinstance(v, str) else v for k, v in zip(short, cell.values(), strict=True)) or "run"
        for cell in cells
    ]
    pairs = [(g, seed) for g in range(len(cells)) for seed in range(1, seeds + 1)]
    runs = [run(i, g, names[g], cells[g], seed, luck) for i, (g, seed) in enumerate(pairs)]
    return assemble(runs, cells, names, axes_of(swept), points, prompts, luck)


def assemble(runs, cells, names, axes, points, prompts, luck) -> dict[str, Any]:
    groups = groups_of(runs, cells, names)
    curves = {
        name: {
            one["id"]: curve(name, one["final"].get(name, 0.5), points, luck, one["id"])
            for one in runs
            if one["status"] != "unreadable"
        }
        for name in CURVES
    }
    speakers = [one for one in runs if one["status"] == "finished"]
    return {
        "format": 1,
        "title": "beta-sweep",
        "made": "2026-11-21T10:15:00+00:00",
        "uft": "0.1.0",
        "headline": HEADLINE,
        "metrics": metrics(),
        "axes": axes,
        "runs": runs,
        "groups": groups,
        "curves": curves,
        "summary": summary(groups),
        "warnings": [],
        "differences": differences(runs, axes),
        "samples": samples(speakers, prompts, luck) if speakers else [],
        "captions": CAPTIONS,
    }
