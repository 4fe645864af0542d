"""What was probably meant, in words."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "rft": (
        "rft is the name of two methods: reward-learning fine-tuning (2405.17888; objective=irft is its implicit form)",
        "and reinforcement fine-tuning (2505.16984), which is not in this version",
    ),
    "rdpo": (
        "three methods are called so: objective=rdpo_length (length-regularised, 2403.19159),",
        "objective=robust_dpo (flipped labels, 2403.00409) and objective=ld_dpo (length-desensitised, 2409.06411)",
    ),
    "grpo": ("GRPO samples at every step of training, which is not in this version",),
    "spin": ("one round of SPIN is objective=irft on sampled negatives; rounds are not in this version",),
    "gdpo": ("objective=gdpo_soft is geometric-averaged DPO (2409.06691); another GDPO normalises groups of rewards",),
    "unified": (
        "two methods are called UFT: objective=uft is 2410.21438;",
        "unified supervised and reinforcement fine-tuning (2505.16984) is not in this version",
    ),
}
"""Names of objectives that mean several things, or something else elsewhere: explained, not guessed."""


def ambiguous(name: str) -> tuple[str, ...]:
    """Lines that explain an ambiguous name of an objective; () when there is nothing to explain."""
    return OTHER_NAMES.get(name.lower().removesuffix("_ft"), ())


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that `word` was probably meant to be: by spelling, else the only one that begins with it."""
    known = {option.lower(): option for option in options}
    close = get_close_matches(word.lower(), known, 1, 0.6)
    starts = [key for key in known if word and key.startswith(word.lower())]
    found = close or (starts if len(starts) == 1 else [])
    return known[found[0]] if found else None


def hint(meant: str | None, label: str, options: Collection[str]) -> str:
    """`did you mean  data=mix ?   choices: ...`; the two halves stand in columns when there are several problems."""
    listed = f"{label}: {listing(options)}" if options else ""
    return f"{f'did you mean  {meant} ?':<30}   {listed}".rstrip() if meant else listed


def listing(options: Collection[str], most: int = 14) -> str:
    names = list(options)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def written(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return f"[{','.join(written(item) for item in value)}]"
    return json.dumps(value, default=str)


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers, like [0,1]",
    list[float]: "a list of numbers, like [0.9,0.95]",
    list[str]: "a list, like [a,b]",
}


def expected(kind: Any) -> str:
    """A type in words: `a whole number or null`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        parts = [expected(part) for part in typing.get_args(kind) if part is not type(None)]
        return " or ".join([*parts, "null"])
    return WORDS.get(kind, "a group of keys")


def right_type(kind: Any, value: Any) -> tuple[str, ...]:
    """Advice for a value of the wrong type."""
    number = as_float(value)
    if "whole number" in expected(kind) and number is not None and number.is_integer():
        return (f"write {int(number)}",)
    return ()


def as_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
