"""The shape of compare.json, format 1, as its readers rely on it."""

from __future__ import annotations

import json
from typing import Any

NUMBER = (int, float, str)  # "nan", "inf", "-inf"
NONE = type(None)

RUN = {
    "id": str,
    "name": str,
    "path": str,
    "group": (str, NONE),
    "color": int,
    "status": str,
    "error": (str, NONE),
    "seed": (int, float, str, NONE),
    "config": dict,
    "final": dict,
    "best": dict,
    "steps": (int, NONE),
    "total_steps": (int, NONE),
    "seconds": (*NUMBER, NONE),
    "tokens": (int, NONE),
    "supervised_tokens": (int, NONE),
    "tokens_per_second": (*NUMBER, NONE),
    "peak_memory_bytes": (int, NONE),
    "command": (str, NONE),
    "facts": dict,
}
GROUP = {"id": str, "name": str, "config": dict, "runs": list, "baseline": bool, "metrics": dict}
SPREAD = {"n": int, "mean": NUMBER} | dict.fromkeys(("sd", "low", "high"), (*NUMBER, NONE))
METRIC = {"name": str, "direction": (str, NONE), "kind": str, "curve": bool, "caption": (str, NONE), "comparable": bool}
AXIS = {"key": str, "values": list, "numeric": bool}
SUMMARY = {
    "metric": str,
    "direction": str,
    "words": list,
    "best": str,
    "runner_up": (str, NONE),
    "baseline": (str, NONE),
}
SUMMARY |= {"comparisons": list}
COMPARISON = {"a": str, "b": str, "difference": NUMBER, "n": int, "paired": bool, "method": str}
COMPARISON |= {"inside_noise": (bool, NONE), "bootstrap": (list, tuple, NONE)}
COMPARISON |= dict.fromkeys(("low", "high", "p", "p_adjusted"), (*NUMBER, NONE))
WARNING = {"what": str, "why": str, "runs": list}
DIFFERENCE = {"key": str, "values": list}
SAMPLE = {"source": str, "row": str, "prompt": str, "reference": (str, NONE), "answers": list}
ANSWER = {"run": str, "step": int, "text": str, "verdict": (str, NONE)}
CAPTIONS = {"curves", "scatter", "heatmap", "parallel", "runs", "differences", "samples", "summary"}
STATES = {"finished", "failed", "stopped", "running", "interrupted", "unreadable"}


def fits(value: dict[str, Any], shape: dict[str, Any]) -> None:
    assert value.keys() == shape.keys()
    for key, kinds in shape.items():
        assert isinstance(value[key], kinds), (key, value[key])


def check(made: dict[str, Any]) -> None:
    """Every part has its keys and types, every id means something, and all of it is strict JSON in UTF-8."""
    json.dumps(made, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert made["format"] == 1
    runs, groups = ({each["id"] for each in made[key]} for key in ("runs", "groups"))
    for run in made["runs"]:
        fits(run, RUN)
        assert run["group"] in {*groups, None}
        assert run["color"] == (len(groups) if run["group"] is None else int(run["group"][1:]))
        assert run["config"].keys() <= {axis["key"] for axis in made["axes"]}
    for group in made["groups"]:
        fits(group, GROUP)
        assert set(group["runs"]) == {run["id"] for run in made["runs"] if run["group"] == group["id"]}
        for spread in group["metrics"].values():
            fits(spread, SPREAD)
    known = {metric["name"] for metric in made["metrics"]}
    assert made["curves"].keys() <= known
    assert {name for run in made["runs"] for name in run["final"]} <= known
    for key, shape in (("metrics", METRIC), ("axes", AXIS), ("summary", SUMMARY), ("warnings", WARNING)):
        for each in made[key]:
            fits(each, shape)
    for metric in made["metrics"]:
        assert metric["kind"] in ("eval", "train", "cost")
        assert metric["curve"] == (metric["name"] in made["curves"])
    for each in made["summary"]:
        assert {each["best"], each["runner_up"], each["baseline"]} <= {*groups, None}
        for comparison in each["comparisons"]:
            fits(comparison, COMPARISON)
            assert comparison["a"] == each["best"]
    for each in made["differences"]:
        fits(each, DIFFERENCE)
        assert len(each["values"]) > 1
        assert {run for value in each["values"] for run in value["runs"]} <= runs
    for each in made["samples"]:
        fits(each, SAMPLE)
        for answer in each["answers"]:
            fits(answer, ANSWER)
            assert answer["run"] in runs
    for of_metric in made["curves"].values():
        assert of_metric.keys() <= runs
        for curve in of_metric.values():
            assert curve.keys() == {"step", "tokens", "seconds", "value"}
            assert len({len(column) for column in curve.values()}) == 1
            assert len(curve["step"]) <= 500
            assert curve["step"] == sorted(curve["step"])
    assert made["captions"].keys() == CAPTIONS
