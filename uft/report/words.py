"""Texts and figures for people, and values as JSON takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from uft.config.messages import written

DIGITS = 6  # significant, in compare.json

CAPTIONS = {
    "summary": (
        "Means are over seeds, intervals are 95 % t intervals. Configurations that share seeds are compared seed by "
        "seed (a paired t test: the luck of a seed cancels out), others by Welch's t test. p-values are adjusted by "
        "Holm's method for all comparisons of a metric; a difference counts as more than seed noise when the "
        "adjusted p is below 0.05. The intervals themselves are not adjusted. The best of several configurations was "
        "chosen on these same numbers, so its lead is flattered; seeds that took no part in the choice would tell. "
        "Only finished runs count."
    ),
    "curves": (
        "Training losses of different objectives are different quantities on different scales: a lower one is not a "
        "better model. Compare objectives by the battery (eval/...), which is the same for all. A reward of chosen "
        "answers may fall while the margin rises: the objective sees the difference only. Bands are over the seeds "
        "of a configuration. Long curves are thinned, keeping the lowest and highest value of every stretch."
    ),
    "scatter": (
        "One point per configuration with its 95 % intervals, or per run: any figure against any other. A new skill "
        "against a kept style shows what each objective trades away; what is better in both lies beyond the others."
    ),
    "heatmap": (
        "Mean over seeds for two swept settings. Neighbours that differ by less than the spread of a cell's seeds "
        "tell of noise, not of a trend."
    ),
    "parallel": (
        "One line per run through what was swept and what came of it. Many settings and few runs always show some "
        "pattern: take it as a question for the next sweep."
    ),
    "runs": (
        "Every run that was found, also those that failed, were stopped or cannot be read. Figures are the last of "
        "each run, not its best: choosing the best step on the same held-out rows would flatter it."
    ),
    "differences": (
        "Configuration keys and circumstances that are not the same in all runs, seeds apart. What stands here and "
        "is not meant to vary makes a comparison doubtful."
    ),
    "samples": (
        "Greedy answers to the same held-out prompts, at each run's last evaluation, with what the checker says."
    ),
}


def figure(value: float) -> str:
    """A number in a sentence."""
    return f"{value:.4g}"


def many(count: int, thing: str) -> str:
    """`one seed`, `3 seeds`."""
    return f"one {thing}" if count == 1 else f"{count} {thing}s"


def listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shorten(text: str, most: int) -> str:
    """The text, cut with a note that says how much is missing."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"


def clean(text: str) -> str:
    """Without lone surrogates (half an emoji), which no file takes as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def rounded(value: float) -> float | str:
    """Six significant digits; what is not finite as metrics.jsonl writes it."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def settled(value: Any) -> Any:
    """`value` in terms of JSON: floats rounded, what is not finite as text, no lone surrogates, keys as text."""
    if isinstance(value, float):
        return rounded(value)
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {clean(str(key)): settled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settled(item) for item in value]
    return clean(str(value))


def as_value(value: Any) -> Any:
    """A configuration's value for a cell: numbers, truth and text as they are, lists as they are typed."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else clean(written(value))
