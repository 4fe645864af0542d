"""The shape of compare.json, format 1, as its readers rely on it."""

from __future__ import annotations

import json
from typing import Any

NONE = type(None)
NUMBER = (int, float, str)  # "nan", "inf", "-inf"


def shape(*groups: tuple[str, Any]) -> dict[str, Any]:
    """Keys, separated by spaces, with the types that their values may have."""
    return {key: kinds for keys, kinds in groups for key in keys.split()}


RUN = shape(
    ("id name path status", str),
    ("group error command wandb", (str, NONE)),
    ("color", int),
    ("seed", (int, float, str, NONE)),
    ("config final best facts", dict),
    ("steps total_steps tokens supervised_tokens peak_memory_bytes", (int, NONE)),
    ("seconds tokens_per_second", (*NUMBER, NONE)),
)
GROUP = shape(("id name", str), ("config metrics", dict), ("runs", list), ("baseline", bool))
SPREAD = shape(("n", int), ("mean", NUMBER), ("sd low high", (*NUMBER, NONE)))
METRIC = shape(
    ("name kind", str), ("direction caption", (str, NONE)), ("curve comparable", bool), ("possible", (list, tuple))
)
AXIS = shape(("key", str), ("values", list), ("numeric", bool))
SUMMARY = shape(
    ("metric direction best", str),
    ("runner_up baseline", (str, NONE)),
    ("words comparisons leading against_baseline", list),
    ("beyond_noise", bool),
)
AGAINST = shape(
    ("group method", str),
    ("n", int),
    ("paired", bool),
    ("inside_noise", (bool, NONE)),
    ("difference", NUMBER),
    ("low high p p_adjusted", (*NUMBER, NONE)),
)
COMPARISON = shape(
    ("a b method", str),
    ("n", int),
    ("paired", bool),
    ("inside_noise", (bool, NONE)),
    ("difference", NUMBER),
    ("low high p p_adjusted", (*NUMBER, NONE)),
    ("bootstrap", (list, NONE)),
    ("detectable", (*NUMBER, NONE)),
    ("seeds_needed", (int, NONE)),
    ("rows", (dict, NONE)),
)
WARNING = shape(("what why", str), ("runs", list))
DIFFERENCE = shape(("key", str), ("values", list))
SAMPLE = shape(("source row prompt", str), ("reference", (str, NONE)), ("answers", list))
ANSWER = shape(("run text", str), ("step", int), ("verdict", (str, NONE)))
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
        assert each["leading"][0] == each["best"]
        for difference in each["against_baseline"]:
            fits(difference, AGAINST)
            assert difference["group"] in groups - {each["baseline"]}
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
