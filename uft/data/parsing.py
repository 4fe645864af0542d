"""From one record to its prompt and completions: one short function per row format.

Each takes a record under our field names and the range of its scores (None: the format's own), and raises
:class:`~uft.data.messages.Unreadable` with the reason when the record cannot be used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.data import messages
from uft.data.messages import Turns, Unreadable
from uft.data.rows import Completion

Record = Mapping[str, Any]
Range = tuple[float, float] | None

HELPSTEER2 = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
"""Weights of the attributes, each 0 to 4: the aggregate of the Nemotron reward models without length and complexity."""


@dataclass(frozen=True)
class Fields:
    """What one record says, before it has a name and a number."""

    prompt: Turns
    completions: tuple[Completion, ...]
    answer: str | None = None
    task: str | None = None


def demonstration(record: Record, score_range: Range) -> Fields:
    completion = Completion(messages.reply(record.get("completion")))
    return Fields(_prompt(record), (completion,))


def alpaca(record: Record, score_range: Range) -> Fields:
    asked = messages.text(record.get("instruction"), "instruction")
    given = record.get("input", record.get("context"))
    if isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{messages.text(given, 'input')}"
    completion = Completion(messages.reply(record.get("completion"), "output"))
    return Fields(messages.prompt(asked), (completion,))


def conversation(column: str) -> Callable[[Record, Range], Fields]:
    def parse(record: Record, score_range: Range) -> Fields:
        prompt, rest = messages.split_conversation(messages.conversation(record.get(column), column), column)
        return Fields(prompt, (Completion(rest),))

    return parse


def question(record: Record, score_range: Range) -> Fields:
    """GSM8K: the worked answer is the completion, what follows `####` (else all of it) the gold answer."""
    worked = messages.text(record.get("answer"), "answer")
    prompt = messages.prompt(record.get("question"), "question")
    return Fields(prompt, (Completion(messages.reply(worked)),), answer=worked.rpartition("####")[2].strip() or None)


def preference(record: Record, score_range: Range) -> Fields:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    whole = record.get("prompt") is None or _starts_before_reply(chosen) or _starts_before_reply(rejected)
    if whole:
        turns = messages.whole(chosen, "chosen"), messages.whole(rejected, "rejected")
        if turns[0] == turns[1]:
            raise Unreadable("chosen and rejected are the same, so nothing tells where the prompt ends")
        prompt, left, right = messages.split_pair(*turns)
    else:
        prompt, left, right = _prompt(record), messages.reply(chosen, "chosen"), messages.reply(rejected, "rejected")
    return Fields(prompt, (Completion(left, preferred=True), Completion(right, preferred=False)))


def binary(record: Record, score_range: Range) -> Fields:
    label = record.get("label")
    if label is None:
        raise Unreadable("label is missing")
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise Unreadable(f"label is {messages.excerpt(label)}, not true/false or 0/1")
    return Fields(_prompt(record), (Completion(messages.reply(record.get("completion")), label=bool(label)),))


def scored(record: Record, score_range: Range) -> Fields:
    low, high = score_range or (_end(record, "score_min", 0.0), _end(record, "score_max", 1.0))
    score = scale(record.get("score"), low, high, "score")
    return Fields(_prompt(record), (Completion(messages.reply(record.get("completion")), score=score),))


def helpsteer2(record: Record, score_range: Range) -> Fields:
    low, high = score_range or (0.0, 4.0)
    parts = (weight * scale(record.get(name), low, high, name) for name, weight in HELPSTEER2.items())
    score = min(sum(parts) / sum(HELPSTEER2.values()), 1.0)
    return Fields(_prompt(record), (Completion(messages.reply(record.get("completion")), score=score),))


def ultrafeedback(record: Record, score_range: Range) -> Fields:
    low, high = score_range or (1.0, 10.0)
    found, ratings = record.get("completions"), record.get("ratings")
    if not isinstance(found, list) or not found:
        raise Unreadable("completions is missing or not a list")
    completions = []
    for number, item in enumerate(found):
        field = f"completions[{number}]"
        known = item if isinstance(item, dict) else {"response": item}
        rating = ratings[number] if isinstance(ratings, list) and number < len(ratings) else None
        score = scale(known.get("overall_score", rating), low, high, f"{field}.overall_score")
        completions.append(Completion(messages.reply(known.get("response"), f"{field}.response"), score=score))
    prompt = messages.prompt(record.get("instruction"), "instruction")
    return Fields(prompt, tuple(completions))


def negatives(record: Record, score_range: Range) -> Fields:
    found, by = record.get("negatives"), record.get("sampled_by")
    if not isinstance(found, list) or not found:
        raise Unreadable("negatives is missing, empty or not a list")
    names = by if isinstance(by, list) and len(by) == len(found) else [by] * len(found)
    log_probs = _log_probs(record.get("negative_log_probs"), len(found))
    sampled = [
        Completion(messages.reply(item, f"negatives[{number}]"), sampled_by=_sampler(name), log_prob=log_prob)
        for number, (item, name, log_prob) in enumerate(zip(found, names, log_probs, strict=True))
    ]
    return Fields(_prompt(record), (Completion(messages.reply(record.get("completion"))), *sampled))


def _sampler(name: Any) -> str:
    return messages.text(name, "sampled_by") if name not in (None, "") else "unknown"


def _log_probs(value: Any, count: int) -> Sequence[float | None]:
    """One log-probability per negative, or none at all."""
    if value is None:
        return [None] * count
    right = isinstance(value, list) and len(value) == count
    if not right or not all(type(one) in (int, float) and -math.inf < one <= 0 for one in value):
        raise Unreadable(f"negative_log_probs is not a list of {count} log-probabilities")
    return value


def scale(value: Any, low: float, high: float, field: str) -> float:
    """`value` in [low, high] brought to [0, 1]."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unreadable(f"{field} is {messages.kind_of(value)}, not a number")
    if not high > low:
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is empty")
    if math.isinf(high - low):
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is too wide")
    if not low <= value <= high:  # NaN is in no range
        raise Unreadable(f"{field} is {messages.excerpt(value)}, outside {low:g} to {high:g}")
    return (value - low) / (high - low)


def _prompt(record: Record) -> Turns:
    return messages.prompt(record.get("prompt"))


def _starts_before_reply(value: Any) -> bool:
    """Whether a side of a pair repeats the prompt in front of its reply."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role", value[0].get("from"))
    return messages.ROLES.get(role, "assistant") != "assistant" if isinstance(role, str) else False


def _end(record: Record, field: str, default: float) -> float:
    value = record.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise Unreadable(f"{field} is {messages.excerpt(value)}, not a number")
    return float(value)


def plain(value: Any, field: str) -> str | None:
    """An optional text; a number is written out."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return messages.text(value, field)
