"""A comparison in which whatever a run, a model or a config may write means harm, or is merely absurd."""

from __future__ import annotations

from typing import Any

from pages import mixed

SCRIPT = "<script>window.pwned=1</script>"
CLOSING = "</script><script>window.pwned=2</script><!--<script>"
IMAGE = "<img src=x onerror=window.pwned=3><svg onload=window.pwned=4>"
LINK = "<a href='javascript:window.pwned=5'>press</a><b>bold</b><br>&lt;&amp;&#60;"
RTL = "abc\u202egpj.exe\u200f\u2066"
MARKS = "\u2028\u2029\x00\x07\x1b[31m\ufeff"
TEMPLATE = "{{ 7*7 }}{% raw %}%{x} %{customdata} ${1+1} $\\alpha$"
HALF = "half an emoji \ud83d"
LONG = "very-long-" * 30
MILLION = "x" * 500_000 + "</script>" + "y" * 500_000
EVERYTHING = " ".join((SCRIPT, CLOSING, IMAGE, LINK, RTL, MARKS, TEMPLATE, HALF))
BAD_NAMES = ("__proto__", "constructor", "toString", f"eval/{IMAGE}")


def hostile() -> dict[str, Any]:
    made = mixed()
    runs, groups = made["runs"], made["groups"]
    made.update(title=EVERYTHING, uft=SCRIPT, made=CLOSING)
    names = [EVERYTHING, LONG, SCRIPT, IMAGE, LINK, RTL, TEMPLATE, HALF, MARKS]
    for one, name in zip(runs, names * 3, strict=False):
        one.update(name=name, path=f"outputs/{name}", command=f"uft train run.name='{name}'")
        one["facts"] = {"commit": name, "constructor": SCRIPT}
    for group, name in zip(groups, names, strict=True):
        group["name"] = name
    runs[4]["error"] = EVERYTHING + "\n" + MILLION
    runs[5]["status"] = CLOSING
    bad = ["nan", "inf", "-inf"]
    for one, value in zip(runs[9:12], bad, strict=True):
        one["final"] = dict.fromkeys(one["final"], value)
    not_a_number = {"n": 3, "mean": "nan", "sd": "nan", "low": "nan", "high": "inf"}
    groups[3]["metrics"] = dict.fromkeys(groups[3]["metrics"], not_a_number)
    for number, name in enumerate(BAD_NAMES):
        known = {"name": name, "direction": "min", "kind": "train", "curve": True, "caption": EVERYTHING}
        made["metrics"].append(known | {"comparable": number % 2 == 0})
        made["curves"][name] = {one["id"]: broken_curve() for one in runs[:6]}
        for one in runs[:6]:
            one["final"][name] = 0.5
    made["axes"][0] = {"key": IMAGE, "values": [SCRIPT, None, RTL], "numeric": False}
    for i, one in enumerate(runs):
        if one["status"] != "unreadable":
            one["config"] = {IMAGE: [SCRIPT, None, RTL][i % 3], "data.ratio": one["config"]["data.ratio"]}
    made["warnings"] += [{"what": EVERYTHING, "why": MILLION, "runs": ["r0", "gone"]}]
    made["differences"] += [
        {
            "key": EVERYTHING,
            "values": [{"value": EVERYTHING, "runs": ["r0"]}, {"value": {"a": [SCRIPT]}, "runs": ["r1", "gone"]}],
        }
    ]
    made["summary"][0].update(words=[EVERYTHING, LONG], metric=IMAGE)
    made["summary"][0]["comparisons"][0].update(low="nan", high="inf", p="nan", method=SCRIPT, inside_noise=None)
    answers = [EVERYTHING, MILLION, "السلام عليكم \u202e", ""]
    sample = {"source": SCRIPT, "row": IMAGE, "prompt": EVERYTHING, "reference": MILLION}
    made["samples"] = [
        sample
        | {"answers": [{"run": f"r{i}", "step": 5, "text": text, "verdict": SCRIPT} for i, text in enumerate(answers)]},
        sample | {"reference": None, "answers": [{"run": "gone", "step": 0, "text": "", "verdict": None}]},
    ]
    made["captions"] = dict.fromkeys(made["captions"], EVERYTHING)
    return made


def broken_curve() -> dict[str, list[Any]]:
    return {
        "step": [0, 1, 2, 3, 4],
        "tokens": [None] * 5,
        "seconds": [0, 1, "nan", 3, 4],
        "value": [1, "nan", "inf", "-inf", 1e300],
    }
