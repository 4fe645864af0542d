"""Row formats: what the columns of a data set mean.

Each format is one line of :data:`FORMATS` and one short function of `parsing`. A file's format is recognised by its
columns; `columns` in the configuration maps other names to these first. A format that explains all the columns of
another, and more, wins over it; two that do not are ambiguous, and that is an error.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uft.data.rows import ANNOTATIONS, BASELINE, SOFT_LABEL, Completion, Kind, Message, Row
from uft.errors import Problem, UftError
from uft.runs import writing

# --- Turns: prompts, replies and conversations in the shapes that data sets give them.
#
# A prompt or a reply may be a string or a list of messages, a message `{role, content}` (OpenAI, TRL) or `{from,
# value}`
# (ShareGPT). Whatever cannot be read raises :class:`Unreadable` with the reason, in words that fit after "row 17: ".


Turns = tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Their name of a role: ours."""

_TYPES = {"str": "text", "NoneType": "null", "dict": "an object", "list": "a list", "bool": "true/false"}
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


class Unreadable(ValueError):
    """Why one row cannot be used."""


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    name = type(value).__name__
    return _TYPES.get(name, "a number" if isinstance(value, (int, float)) else name)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def excerpt(value: Any) -> str:
    """The start of a value, whatever it is and however long and deep."""
    return _SHORT.repr(value)


def read_text(value: Any, field: str) -> str:
    """A string with something in it that can be encoded as UTF-8."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, str):
        raise Unreadable(f"{field} is {kind_of(value)}, not text")
    if not value.strip():
        raise Unreadable(f"{field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, escaped in JSON or left by a file in another encoding
        raise Unreadable(f"{field} is not valid UTF-8") from None
    return value


def read_prompt(value: Any, field: str = "prompt") -> Turns:
    """Everything before the reply: a string is one user turn."""
    if not isinstance(value, (list, tuple)):
        return (Message("user", read_text(value, field)),)
    return checked_prompt(read_conversation(value, field), field)


def read_reply(value: Any, field: str = "completion") -> Turns:
    """What follows the prompt: a string is one assistant turn, messages start and end with one."""
    if not isinstance(value, (list, tuple)):
        return (Message("assistant", read_text(value, field)),)
    return checked_reply(read_conversation(value, field), field)


def with_system(turns: Turns, system: Any) -> Turns:
    """The prompt with a system turn in front, unless there is nothing to say or it has one of its own."""
    if not isinstance(system, str) or not system.strip() or turns[0].role == "system":
        return turns
    return (Message("system", read_text(system, "system")), *turns)


def checked_prompt(turns: Turns, field: str) -> Turns:
    if turns[-1].role == "assistant":
        raise Unreadable(f"{field} ends with an assistant turn")
    if all(turn.role == "system" for turn in turns):
        raise Unreadable(f"{field} has no user turn")
    return turns


def checked_reply(turns: Turns, field: str) -> Turns:
    for turn, place in ((turns[0], "start"), (turns[-1], "end")):
        if turn.role != "assistant":
            raise Unreadable(f"{field} must {place} with an assistant turn, not {turn.role}")
    return turns


def read_conversation(value: Any, field: str) -> Turns:
    """A list of messages whose roles make sense: at most one system turn, first; never two assistant turns running."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, (list, tuple)):
        raise Unreadable(f"{field} is {kind_of(value)}, not text or a list of messages")
    read = [_message(item, f"{field}[{number}]") for number, item in enumerate(value)]
    turns = tuple(turn for turn in read if turn is not None)
    if not turns:
        raise Unreadable(f"{field} is empty")
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise Unreadable(f"{field} has a system turn after other turns")
        if turn.role == "assistant" and number and turns[number - 1].role == "assistant":
            raise Unreadable(f"{field} has two assistant turns in a row")
    return turns


def split_conversation(turns: Turns, field: str) -> tuple[Turns, Turns]:
    """(turns before the first assistant turn, the rest)."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), None)
    if first is None:
        raise Unreadable(f"{field} has no assistant turn")
    if first == 0:
        raise Unreadable(f"{field} starts with the assistant: there is no prompt")
    return checked_prompt(turns[:first], field), checked_reply(turns[first:], field)


def split_pair(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(the prompt both share, what follows in each): the prompt is their longest common start before a reply."""
    shared = 0
    for number, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left.role == right.role == "assistant":
            shared = number
        if left != right:
            break
    if shared == 0:
        raise Unreadable("chosen and rejected share no prompt")
    prompt = checked_prompt(chosen[:shared], "chosen")
    return prompt, checked_reply(chosen[shared:], "chosen"), checked_reply(rejected[shared:], "rejected")


def read_dialogue(value: Any, field: str) -> Turns:
    """A whole conversation: messages, or a transcript as in HH-RLHF (`Human: ...` and `Assistant: ...` paragraphs)."""
    if not isinstance(value, str):
        return read_conversation(value, field)
    before, *pieces = _TRANSCRIPT.split(read_text(value, field))
    if before.strip() or not pieces:
        raise Unreadable("prompt is missing")
    turns = [{"role": role.lower(), "content": said} for role, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return read_conversation(turns, field)


def _message(item: Any, field: str) -> Message | None:
    """One turn; None for a system turn that says nothing, as many data sets have."""
    if not isinstance(item, dict):
        raise Unreadable(f"{field} is {kind_of(item)}, not a message")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Unreadable(f"{field} has the unknown role {excerpt(name)} (known: {', '.join(ROLES)})")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # content parts; text is all that can be trained on here
        content = "".join(_part(part, field) for part in content)
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    return Message(role, read_text(content, f"{field} ({role})"))


def _part(part: Any, field: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise Unreadable(f"{field} has a part that is not text")
    return part["text"]


# --- Annotations: numbers written beside completions, as columns of a record and back.
#
# `baseline_logp` is a number where a row has one completion, else a list with one for each: [chosen, rejected] of a
# pair.
# `soft_label` is likewise, but a pair has one number, the probability that the chosen one is better; the rejected one
# has
# the rest. null, also within a list, is an absent number. Ratings of both sides of a pair (`score_chosen` and
# `score_rejected`, as binarized UltraFeedback has them) are kept as `score`, on their own scale.


SCORE = "score"
SIDES = ("score_chosen", "score_rejected")
Numbers = Sequence[float | None]  # one per completion

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Rule:
    """What may stand in a column. `shared`: one number says both sides of a pair."""

    low: float
    high: float
    meaning: str
    shared: bool = False


RULES = {
    BASELINE: Rule(-_LARGEST, 0.0, "a mean log-probability, at most 0"),
    SOFT_LABEL: Rule(0.0, 1.0, "a probability from 0 to 1", shared=True),
}


def annotated(record: Mapping[str, Any], completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The completions with what the record's columns say of them. Raises :class:`Unreadable` with the reason."""
    columns = {name: _spread(record[name], name, completions) for name in RULES if record.get(name) is not None}
    if _is_pair(completions):
        columns[SCORE] = [_rating(record.get(side)) for side in SIDES]
    return tuple(
        with_numbers(c, {name: column[n] for name, column in columns.items()}) for n, c in enumerate(completions)
    )


def with_numbers(completion: Completion, numbers: Mapping[str, float | None]) -> Completion:
    """The completion with these numbers in the place of its own of those names; None: without."""
    known = {name: value for name, value in completion.annotations.items() if name not in numbers}
    known |= {name: value for name, value in numbers.items() if value is not None}
    return completion if known == completion.annotations else replace(completion, annotations=known)


def columns(completions: Sequence[Completion]) -> dict[str, Any]:
    """The columns from which :func:`annotated` reads the same numbers."""
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        values = [completion.annotations.get(name) for completion in completions]
        if any(value is not None for value in values):
            alone = len(values) == 1 or (rule.shared and _is_pair(completions))
            found[name] = values[0] if alone else values
    ratings = zip(SIDES, completions, strict=False) if _is_pair(completions) else ()
    return found | {side: c.annotations[SCORE] for side, c in ratings if SCORE in c.annotations}


def _spread(value: Any, name: str, completions: Sequence[Completion]) -> Numbers:
    if RULES[name].shared and _is_pair(completions):
        likely = _finite_number(value, name)
        return [likely, 1 - likely]
    if len(completions) == 1:
        return [_finite_number(value, name)]
    if not isinstance(value, list) or len(value) != len(completions):
        found = f"{len(value)} of them" if isinstance(value, list) else kind_of(value)
        raise Unreadable(f"{name} is {found}, not a list of {len(completions)} numbers, one per completion")
    return [None if one is None else _finite_number(one, f"{name}[{n}]", RULES[name]) for n, one in enumerate(value)]


def _finite_number(value: Any, field: str, rule: Rule | None = None) -> float:
    rule = rule or RULES[field]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unreadable(f"{field} is {kind_of(value)}, not a number")
    if not rule.low <= value <= rule.high:  # NaN is in no range
        raise Unreadable(f"{field} is {str(value)[:24]}, not {rule.meaning}")
    return float(value)


def _rating(value: Any) -> float | None:
    """Most who read these rows have no use for ratings: one that is no number is as if it were not there."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    return float(value) if usable else None


def _is_pair(completions: Sequence[Completion]) -> bool:
    return len(completions) == 2 and completions[0].preferred is not None


# --- From one record to its prompt and completions: one short function per row format.
#
# Each takes a record under our field names and the range of its scores (None: the format's own), and raises
# :class:`~uft.data.formats.Unreadable` with the reason when the record cannot be used.


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
    completion = Completion(read_reply(record.get("completion")))
    return Fields(_prompt(record), (completion,))


def alpaca(record: Record, score_range: Range) -> Fields:
    asked = read_text(record.get("instruction"), "instruction")
    given = record.get("input", record.get("context"))
    if isinstance(given, str) and given.strip():
        asked = f"{asked}\n\n{read_text(given, 'input')}"
    completion = Completion(read_reply(record.get("completion"), "output"))
    return Fields(read_prompt(asked), (completion,))


def conversation(column: str) -> Callable[[Record, Range], Fields]:
    def parse(record: Record, score_range: Range) -> Fields:
        prompt, rest = split_conversation(read_conversation(record.get(column), column), column)
        return Fields(prompt, (Completion(rest),))

    return parse


def question(record: Record, score_range: Range) -> Fields:
    """GSM8K: the worked answer is the completion, what follows `####` (else all of it) the gold answer."""
    worked = read_text(record.get("answer"), "answer")
    prompt = read_prompt(record.get("question"), "question")
    return Fields(prompt, (Completion(read_reply(worked)),), answer=worked.rpartition("####")[2].strip() or None)


def preference(record: Record, score_range: Range) -> Fields:
    chosen, rejected = record.get("chosen"), record.get("rejected")
    whole = record.get("prompt") is None or _starts_before_reply(chosen) or _starts_before_reply(rejected)
    if whole:
        turns = read_dialogue(chosen, "chosen"), read_dialogue(rejected, "rejected")
        if turns[0] == turns[1]:
            raise Unreadable("chosen and rejected are the same, so nothing tells where the prompt ends")
        prompt, left, right = split_pair(*turns)
    else:
        prompt, left, right = _prompt(record), read_reply(chosen, "chosen"), read_reply(rejected, "rejected")
    return Fields(prompt, (Completion(left, preferred=True), Completion(right, preferred=False)))


def binary(record: Record, score_range: Range) -> Fields:
    label = record.get("label")
    if label is None:
        raise Unreadable("label is missing")
    if not isinstance(label, (bool, int, float)) or label not in (0, 1):
        raise Unreadable(f"label is {excerpt(label)}, not true/false or 0/1")
    return Fields(_prompt(record), (Completion(read_reply(record.get("completion")), label=bool(label)),))


def scored(record: Record, score_range: Range) -> Fields:
    low, high = score_range or (_end(record, "score_min", 0.0), _end(record, "score_max", 1.0))
    score = scale(record.get("score"), low, high, "score")
    return Fields(_prompt(record), (Completion(read_reply(record.get("completion")), score=score),))


def helpsteer2(record: Record, score_range: Range) -> Fields:
    low, high = score_range or (0.0, 4.0)
    parts = (weight * scale(record.get(name), low, high, name) for name, weight in HELPSTEER2.items())
    score = min(sum(parts) / sum(HELPSTEER2.values()), 1.0)
    return Fields(_prompt(record), (Completion(read_reply(record.get("completion")), score=score),))


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
        completions.append(Completion(read_reply(known.get("response"), f"{field}.response"), score=score))
    prompt = read_prompt(record.get("instruction"), "instruction")
    return Fields(prompt, tuple(completions))


def negatives(record: Record, score_range: Range) -> Fields:
    found, by = record.get("negatives"), record.get("sampled_by")
    if not isinstance(found, list) or not found:
        raise Unreadable("negatives is missing, empty or not a list")
    names = by if isinstance(by, list) and len(by) == len(found) else [by] * len(found)
    log_probs = _log_probs(record.get("negative_log_probs"), len(found))
    sampled = [
        Completion(read_reply(item, f"negatives[{number}]"), sampled_by=_sampler(name), log_prob=log_prob)
        for number, (item, name, log_prob) in enumerate(zip(found, names, log_probs, strict=True))
    ]
    return Fields(_prompt(record), (Completion(read_reply(record.get("completion"))), *sampled))


def _sampler(name: Any) -> str:
    return read_text(name, "sampled_by") if name not in (None, "") else "unknown"


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
        raise Unreadable(f"{field} is {kind_of(value)}, not a number")
    if not high > low:
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is empty")
    if math.isinf(high - low):
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is too wide")
    if not low <= value <= high:  # NaN is in no range
        raise Unreadable(f"{field} is {excerpt(value)}, outside {low:g} to {high:g}")
    return (value - low) / (high - low)


def _prompt(record: Record) -> Turns:
    return read_prompt(record.get("prompt"))


def _starts_before_reply(value: Any) -> bool:
    """Whether a side of a pair repeats the prompt in front of its reply."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], dict):
        return False
    role = value[0].get("role", value[0].get("from"))
    return ROLES.get(role, "assistant") != "assistant" if isinstance(role, str) else False


def _end(record: Record, field: str, default: float) -> float:
    value = record.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise Unreadable(f"{field} is {excerpt(value)}, not a number")
    return float(value)


def plain(value: Any, field: str) -> str | None:
    """An optional text; a number is written out."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return read_text(value, field)


COMMON = frozenset({"answer", "task", "system", *ANNOTATIONS})
"""Columns any format may have: the gold answer for a checker, the family of the prompt, a system prompt, numbers that
`uft annotate` writes."""

ALIASES = {"response": "completion", "output": "completion"}
"""Other names of our fields, used where the field itself is absent."""

NUMERIC = frozenset(
    {"label", "score", "score_min", "score_max", "helpfulness", "correctness", "coherence", *SIDES, *ANNOTATIONS}
)
"""Fields that a file of bare text cells (CSV) must have turned into numbers."""


@dataclass(frozen=True)
class Format:
    """One shape of record: the columns it must have, those it also explains, and how it is read."""

    name: str
    kind: Kind
    required: frozenset[str]
    parse: Callable[[Record, Range], Fields]
    optional: frozenset[str] = frozenset()

    @property
    def columns(self) -> frozenset[str]:
        return self.required | self.optional

    def beats(self, other: Format) -> bool:
        """Whether this format explains everything the other does, and more."""
        return other.required <= self.columns and not self.required <= other.columns

    def read(self, record: Record, score_range: Range = None) -> Fields:
        """The record's prompt and completions. Raises :class:`Unreadable` with the reason."""
        fields = self.parse(record, score_range)
        answer = fields.answer if fields.answer is not None else plain(record.get("answer"), "answer")
        return replace(
            fields,
            prompt=with_system(fields.prompt, record.get("system")),
            completions=annotated(record, fields.completions),
            answer=answer,
            task=plain(record.get("task"), "task"),
        )


def _format(
    name: str, kind: Kind, parse: Callable[[Record, Range], Fields], required: str, optional: str = ""
) -> Format:
    return Format(name, kind, frozenset(required.split()), parse, frozenset(optional.split()))


FORMATS = (
    _format("prompt and completion", Kind.DEMONSTRATION, demonstration, "prompt completion"),
    _format("alpaca", Kind.DEMONSTRATION, alpaca, "instruction completion", "input context"),
    _format("messages", Kind.DEMONSTRATION, conversation("messages"), "messages"),
    _format("sharegpt", Kind.DEMONSTRATION, conversation("conversations"), "conversations"),
    _format("question and answer", Kind.DEMONSTRATION, question, "question answer"),
    _format(
        "preference",
        Kind.PREFERENCE,
        preference,
        "prompt chosen rejected",
        "messages score_chosen score_rejected",
    ),
    _format("preference, prompt inside", Kind.PREFERENCE, preference, "chosen rejected"),
    _format("binary", Kind.BINARY, binary, "prompt completion label"),
    _format("scored", Kind.SCORED, scored, "prompt completion score", "score_min score_max"),
    _format("helpsteer2", Kind.SCORED, helpsteer2, "prompt completion helpfulness correctness coherence"),
    _format("ultrafeedback", Kind.SCORED, ultrafeedback, "instruction completions", "ratings"),
    _format("negatives", Kind.NEGATIVES, negatives, "prompt completion negatives", "sampled_by"),
)

FIELDS = frozenset().union(*(f.columns for f in FORMATS)) | COMMON | frozenset(ALIASES)
"""Every name that `columns` can map to."""


def recognise(
    columns: Collection[str], kind: str | None = None, mapped: Collection[str] = (), source: str = "NAME"
) -> Format:
    """The format of a data set with these columns (after mapping).

    `kind` keeps to formats of that kind, `mapped` (fields that the user named himself) to formats that use them.
    Raises :class:`UftError` naming the columns, the formats near to them and how to map.
    """
    known = {*columns, *(ours for theirs, ours in ALIASES.items() if theirs in columns)}
    named = {ALIASES.get(name, name) for name in mapped} - COMMON
    allowed = [f for f in FORMATS if (kind is None or f.kind.value == kind) and named <= f.columns | COMMON]
    fitting = [f for f in allowed if f.required <= known]
    best = [f for f in fitting if not any(other.beats(f) for other in fitting)]
    if len(best) == 1:
        return best[0]
    raise UftError(_unclear(best, source) if best else _unknown(columns, known, allowed, kind, source))


def rename(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record under our field names: mapped columns first, then aliases; what was mapped away is gone."""
    taken = set(columns.values())
    fields = {name: value for name, value in record.items() if name not in taken}
    fields.update({ours: record.get(theirs) for ours, theirs in columns.items()})
    for theirs, ours in ALIASES.items():
        if ours not in fields and theirs in fields:
            fields[ours] = fields.pop(theirs)
    return fields


def check_mapping(columns: Mapping[str, str], source: str) -> list[Problem]:
    """What is wrong with a `columns` mapping whatever the file: names that are no field of ours."""
    where = f"data.sources.{source}.columns"
    return [
        Problem(
            f"{where}.{name}",
            "no such field",
            advice=(*nearest(f"{where}.{{}}", name, FIELDS), f"fields: {', '.join(sorted(FIELDS))}"),
        )
        for name in columns
        if name not in FIELDS
    ]


def from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a text cell format (CSV) with numbers where we expect them; empty cells are missing values."""
    return {name: _number(value) if name in NUMERIC else (value or None) for name, value in fields.items()}


def _number(cell: Any) -> Any:
    """A text cell as a number or truth value; as it is where it is neither, so that the row's error can quote it."""
    if not isinstance(cell, str) or not cell.strip():
        return None
    word = cell.strip().lower()
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return cell


def nearest(pattern: str, name: str, known: Collection[str]) -> tuple[str, ...]:
    close = get_close_matches(name, sorted(known), n=1)
    return (f"did you mean  {pattern.format(close[0])} ?",) if close else ()


def _unclear(best: Sequence[Format], source: str) -> Problem:
    kinds = sorted({f.kind.value for f in best})
    names = " and ".join(f"{f.name} ({', '.join(sorted(f.required))})" for f in best)
    say = (
        f"say which:  data.sources.{source}.kind={'|'.join(kinds)}"
        if len(kinds) > 1
        else f"say which:  data.sources.{source}.columns.{min(best[0].required)}=COLUMN"
    )
    return Problem(f"data.sources.{source}", f"its columns fit {names}", advice=(say,))


def _unknown(
    columns: Collection[str], known: Collection[str], allowed: Sequence[Format], kind: str | None, source: str
) -> Problem:
    """Columns that fit nothing: what was found, the formats that lack least, and how to map the rest."""
    near = sorted(allowed, key=lambda f: (len(f.required - set(known)), -len(f.required & set(known))))[:3]
    lines = [f"{f.name} lacks {', '.join(sorted(f.required - set(known)))}" for f in near]
    first = min(near[0].required - set(known)) if near else "prompt"
    return Problem(
        f"data.sources.{source}",
        f"no known {'row' if kind is None else kind} format has the columns {', '.join(sorted(columns)) or '(none)'}",
        advice=(*lines, f"map them:  data.sources.{source}.columns.{first}=THEIR_COLUMN"),
    )


# --- Rows as JSON Lines that :mod:`uft.data.sources` takes back: what is read is what was written, to the last digit.
#
# Every kind has the plainest of the formats that hold it, one line per row; scored completions have one line each,
# which
# meet again in one row. All lines of a file must have one format, so all its rows must be of one kind.


OutputRecord = dict[str, Any]
Part = tuple[OutputRecord, Sequence[Completion]]  # the columns of a line, and the completions it is about
START = '{"row": "'
"""How every line begins: the name of the row it was made from."""


def written(turns: Sequence[Message], role: str) -> str | list[dict[str, str]]:
    """A prompt or a reply as a column: text where it is a single turn of `role`, else messages."""
    if len(turns) == 1 and turns[0].role == role:
        return turns[0].content
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def records(row: Row) -> list[OutputRecord]:
    """The lines of one row."""
    extras = {"answer": row.answer, "task": row.task}
    last = {name: value for name, value in extras.items() if value is not None}
    prompt = written(row.prompt, "user")
    parts = PARTS[row.kind](row.completions)
    return [{"row": row.id, "prompt": prompt, **fields, **columns(about), **last} for fields, about in parts]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """A file of these rows in the place of what was there: it is whole or not there, whatever happens on the way.

    Raises UftError where the disk refuses it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", encoding="utf-8") as handle:
                for row in rows:
                    handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records(row))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def written_here(path: Path) -> bool:
    """Whether a file begins as those of :func:`write_rows` do."""
    with open(path, "rb") as handle:
        return handle.read(len(START)) == START.encode()


# --- one function per kind of row


def _reply(completion: Completion) -> str | list[dict[str, str]]:
    return written(completion.turns, "assistant")


def _demonstration(completions: Sequence[Completion]) -> list[Part]:
    (shown,) = completions
    return [({"completion": _reply(shown)}, completions)]


def _preference(completions: Sequence[Completion]) -> list[Part]:
    chosen, rejected = completions
    assert chosen.preferred, "a pair is (chosen, rejected)"
    return [({"chosen": _reply(chosen), "rejected": _reply(rejected)}, completions)]


def _binary(completions: Sequence[Completion]) -> list[Part]:
    (labelled,) = completions
    return [({"completion": _reply(labelled), "label": labelled.label}, completions)]


def _scored(completions: Sequence[Completion]) -> list[Part]:
    return [({"completion": _reply(c), "score": c.score}, (c,)) for c in completions]


def _negatives(completions: Sequence[Completion]) -> list[Part]:
    shown, *sampled = completions
    fields: OutputRecord = {
        "response": _reply(shown),
        "negatives": [_reply(c) for c in sampled],
        "sampled_by": [c.sampled_by for c in sampled],
    }
    if any(c.log_prob is not None for c in sampled):
        fields["negative_log_probs"] = [c.log_prob for c in sampled]
    return [(fields, completions)]


PARTS: dict[Kind, Callable[[Sequence[Completion]], list[Part]]] = {
    Kind.DEMONSTRATION: _demonstration,
    Kind.PREFERENCE: _preference,
    Kind.BINARY: _binary,
    Kind.SCORED: _scored,
    Kind.NEGATIVES: _negatives,
}
