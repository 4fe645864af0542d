"""Answers of all runs to the same held-out prompts, beside each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from uft.report.load import Loaded, number
from uft.report.words import clean, shorten

PROMPTS, FEWEST = 24, 4  # shown: at most, and however many runs there are
LONGEST, SHORTEST = 4000, 300  # characters of one text
BUDGET = 2_000_000  # characters of all answers together

Key = tuple[str, str, str]  # source, row, prompt


def samples(runs: Sequence[Loaded]) -> list[dict[str, Any]]:
    """A record per prompt: those that most runs answered first, sources in turn, texts cut to what a page can hold."""
    found: dict[Key, list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for place, run in enumerate(runs):
        for sample in run.samples:
            found[key_of(sample)].append((place, sample))
    prompts = max(FEWEST, min(PROMPTS, BUDGET // (SHORTEST * max(len(runs), 1))))
    keys = in_turn(sorted(found, key=lambda key: -len({run for run, _ in found[key]})))[:prompts]
    answers = sum(len(found[key]) for key in keys)
    most = min(LONGEST, max(SHORTEST, BUDGET // max(answers, 1)))
    return [record(key, found[key], most) for key in keys]


def key_of(sample: Mapping[str, Any]) -> Key:
    return text(sample.get("source")), text(sample.get("row")), text(sample.get("prompt"))


def text(value: Any) -> str:
    return clean(value if isinstance(value, str) else "" if value is None else str(value))


def in_turn(keys: Sequence[Key]) -> list[Key]:
    """One of each source, then the next of each."""
    seen: dict[str, int] = defaultdict(int)
    turns: list[int] = []
    for source, _, _ in keys:
        turns.append(seen[source])
        seen[source] += 1
    return [key for _, _, key in sorted(zip(turns, range(len(keys)), keys, strict=True))]


def record(key: Key, answers: Sequence[tuple[int, Mapping[str, Any]]], most: int) -> dict[str, Any]:
    source, row, prompt = key
    wanted = next((sample["answer"] for _, sample in answers if sample.get("answer") is not None), None)
    return {
        "source": shorten(source, most),
        "row": shorten(row, most),
        "prompt": shorten(prompt, most),
        "reference": None if wanted is None else shorten(text(wanted), most),
        "answers": [
            {
                "run": run,
                "step": sample["step"],
                "text": shorten(text(sample.get("reply")), most),
                "verdict": verdict(sample.get("verdict")),
            }
            for run, sample in answers
        ],
    }


def verdict(said: Any) -> str | None:
    """`exact_match 1, correct 1, plain 0`; None where nobody checked."""
    if not isinstance(said, dict) or not said:
        return None
    found = ((str(name), number(value)) for name, value in said.items())
    return shorten(text(", ".join(f"{name} {value:g}" for name, value in found if value is not None)), SHORTEST) or None
