"""Comparisons a page must cope with: gone wrong, large, small, empty."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from pages import comparison, curve, fail, groups_of, metric, summary


def rebuilt(made: dict[str, Any]) -> dict[str, Any]:
    """The same after its runs were changed: groups, summary and curves follow."""
    cells, names = [g["config"] for g in made["groups"]], [g["name"] for g in made["groups"]]
    made["groups"] = groups_of(made["runs"], cells, names)
    made["summary"] = summary(made["groups"])
    unreadable = {one["id"] for one in made["runs"] if one["status"] == "unreadable"}
    for of_metric in made["curves"].values():
        for name in unreadable & set(of_metric):
            del of_metric[name]
    return made


def mixed() -> dict[str, Any]:
    """Nine groups of three seeds in which things went wrong, and digests that differ."""
    made = comparison()
    runs = made["runs"]
    fail(runs[4], "failed", "the gradient is not a number at step 310: rows instruct/17, instruct/90")
    fail(runs[8], "stopped", None)
    fail(runs[13], "running", None)
    fail(
        runs[20],
        "interrupted",
        "killed; the newest checkpoint is step 300\nTraceback (most recent call last):\n  ...\nKilled",
    )
    fail(runs[26], "unreadable", "metrics.jsonl: cut in the middle of line 41")
    runs[3]["facts"]["data digest"] = "00aa11bb"
    rest = [one["id"] for one in runs if one is not runs[3]]
    made["differences"].append(
        {"key": "data digest", "values": [{"value": "9f2c41d0", "runs": rest}, {"value": "00aa11bb", "runs": ["r3"]}]}
    )
    made["warnings"] = [
        {"what": "Not all runs saw the same rows.", "runs": ["r3"]}
        | {
            "why": "The data digest of one run differs from that of the 26 others: its figures answer another question."
        },
        {"what": "Budgets differ.", "why": "Steps range from 310 to 800.", "runs": ["r4", "r8", "r13", "r20"]},
    ]
    return rebuilt(made)


@cache
def wide(seeds: int = 4, points: int = 500) -> dict[str, Any]:
    """200 runs: two numbers and an objective vary."""
    betas, ratios = [0.01, 0.03, 0.1, 0.3, 1.0], [0.1, 0.3, 0.5, 0.7, 0.9]
    made = comparison({"objective": ["uft", "dpo"], "objective.beta": betas, "data.ratio": ratios}, seeds, points)
    for name in ("objective/uft", "objective/nll", "objective/kl", "tokens_per_second", "margin"):
        made["metrics"].append(metric(name, comparable=False))
        made["curves"][name] = {
            one["id"]: curve("loss", 0.3, points, Random(one["id"] + name), one["id"]) for one in made["runs"]
        }
    return made


def only(made: dict[str, Any], number: int) -> dict[str, Any]:
    """The first `number` runs of a comparison."""
    made["runs"] = made["runs"][:number]
    kept = {one["id"] for one in made["runs"]}
    made["curves"] = {name: {key: c for key, c in of.items() if key in kept} for name, of in made["curves"].items()}
    for sample in made["samples"]:
        sample["answers"] = [answer for answer in sample["answers"] if answer["run"] in kept]
    return rebuilt(made)


def one_run() -> dict[str, Any]:
    return only(comparison({}, seeds=1), 1)


def one_group() -> dict[str, Any]:
    return comparison({}, seeds=3)


def no_curves() -> dict[str, Any]:
    made = comparison({"objective": ["sft", "uft"]}, seeds=1)
    return {**made, "curves": {}, "samples": []}


def all_failed() -> dict[str, Any]:
    made = comparison({"objective": ["sft", "uft"]}, seeds=2)
    for one in made["runs"]:
        fail(one, "failed", "CUDA out of memory. Tried to allocate 2.00 GiB.")
    return rebuilt({**made, "samples": []})


def nothing() -> dict[str, Any]:
    made = only(comparison({}, seeds=1), 0)
    return {**made, "groups": [], "summary": [], "axes": [], "differences": [], "headline": []}
