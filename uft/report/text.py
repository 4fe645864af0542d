"""Numbers and lists in sentences, and values as JSON takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from uft.config.suggest import written

DIGITS = 6  # significant, in compare.json


def plural(count: int, noun: str) -> str:
    """`one seed`, `3 seeds`."""
    return f"one {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def truncated(text: str, most: int) -> str:
    """The text, cut with a note that says how much is missing."""
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most:,} more characters]"


def encodable(text: str) -> str:
    """Without lone surrogates (half an emoji), which UTF-8 does not encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def rounded(value: float) -> float | str:
    """Six significant digits; a value that is not finite as metrics.jsonl writes it."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def jsonable(value: Any) -> Any:
    """`value` in terms of JSON: floats rounded, non-finite ones as text, no lone surrogates, keys as text."""
    if isinstance(value, float):
        return rounded(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {encodable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return encodable(str(value))


def config_value(value: Any) -> Any:
    """A configuration's value for a cell: numbers, booleans and text as they are, lists as they are typed."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else encodable(written(value))
