"""What a format leaves unread of its records: counted and told, and refused where it changes what a row means.

Refused are grades of completions that the format takes as right, a word about which side of a pair is better, the other
side of a pair that the format does not know, and text that the prompt lacks. All else (ids, sources, dates) is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from uft.data.formats import ALIASES, COMMON, Format, aliases, label_value
from uft.data.messages import MARKS, MESSAGE_KEYS, REASONING, Record, is_blank, is_number, role_of, unpacked
from uft.data.records import SIDES, rating
from uft.data.rows import Kind, Row
from uft.errors import Problem

COMPLETION_KEYS = frozenset({"response", "overall_score"})
"""All that is read of an item of UltraFeedback's completions."""
_GRADE_NAMES = (
    "label labels score scores rating ratings reward rewards feedback grade preference quality helpful helpfulness",
    "overall_score human_score reward_score quality_score user_feedback correct is_correct is_good accepted winner",
    "vote votes upvotes downvotes likes dislikes thumbs thumbs_up thumbs_down safe helpfulness correctness coherence",
)
FEEDBACK = frozenset(" ".join(_GRADE_NAMES).split())
"""Columns that say how good a completion is, by their usual names."""
_GRADE_ENDS = re.compile("(?:score|rating|reward|vote)s?|feedback|grade|helpful|correct")
_OTHERS = (
    "language lang lid langid fasttext similarity embedding retrieval rerank bm25 dedup overlap url domain source",
    "document question prompt instruction query input difficulty complexity perplexity category",
)
_OF_OTHERS = frozenset(" ".join(_OTHERS).split())
"""First words of a score or rating that is no grade of the completion: language_score, prompt_rating."""
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
CHOICES = frozenset({"label", "labels", "preference", "preferences", "preferred", "winner", "better", "choice"})
"""Columns that say which of two completions is the better one."""
CONTEXT = ("input", "context")
INPUTS = (*CONTEXT, "prompt", "question", "instruction")
"""Columns whose text belongs to the prompt."""
REPLY_PARTS = (*REASONING, "tool_calls", "function_call")
"""Columns that are a part of the reply."""
_SIDES = {"chosen": "chosen preferred", "rejected": "rejected dispreferred loser losing worse"}
_SIDE_TEXTS = {*"message messages response answer completion conversation conversations output text".split()}  # noqa: SIM905
_SIDE = {word: ours for ours, words in _SIDES.items() for word in words.split()}
"""Words for a side of a pair."""


@dataclass
class Unread:
    """Counts over the records of a file that one format reads."""

    columns: Counter[str] = field(default_factory=Counter)  # column or column.field -> rows in which it says something
    lacking: Counter[str] = field(default_factory=Counter)  # column -> rows whose prompt lacks its text
    contrary: Counter[tuple[str, str]] = field(default_factory=Counter)  # a field's other name, and the field
    labels: set[float] = field(default_factory=set)  # that are numbers

    def add(self, form: Format, fields: Record, row: Row) -> None:
        """Count a record, of which `row` was made."""
        self.columns.update(unread(form, fields))
        for name in INPUTS:
            self.lacking[name] += not (name in form.columns or _within(fields.get(name), row))
        for name, ours, _ in ALIASES:
            if name not in INPUTS and not (is_blank(fields.get(name)) or is_blank(fields.get(ours))):
                self.contrary[name, ours] += fields[name] != fields[ours]
        if form.kind is Kind.BINARY and is_number(value := label_value(fields["label"])):
            self.labels.add(float(value))


def _within(value: Any, row: Row) -> bool:
    """Whether the texts of a column stand in the row's turns that are not replies."""
    items = value if isinstance(value := unpacked(value), list) else [value]
    texts = [item.get("content", item.get("value")) if isinstance(item, dict) else item for item in items]
    shown = (turn for one in row.completions[:1] for turn in one.turns)  # none of a prompt alone
    asked = [turn.content for turn in (*row.prompt, *shown) if turn.role != "assistant"]
    found = (text.strip() for text in texts if isinstance(text, str))
    return all(any(text in turn for turn in asked) for text in found)


def unread(form: Format, fields: Record) -> Iterator[str]:
    """Fields that say something and are not read: columns, and as `column.key` those of messages and completions, and
    grades within other objects."""
    known = form.columns | COMMON | {"row"}  # row: a name, in the files of `write_rows`
    for column in fields.keys() - known:
        if not is_blank(fields[column]):
            yield from (column, *_grades_within(column, fields[column]))
    whole = fields.get("messages") if "messages" in form.optional else None
    if not is_blank(whole) and whole != fields["chosen"]:  # the pair's prompt with its chosen reply, once more
        yield "messages"
    yield from (side for side in SIDES if side in form.columns and rating(value := fields.get(side)) is None and value)
    for column in form.columns & fields.keys():
        keys = COMPLETION_KEYS if column == "completions" else MESSAGE_KEYS
        items = fields[column] if isinstance(fields[column], list) else [fields[column]]
        named = ((key, value, item) for item in items if isinstance(item, dict) for key, value in item.items())
        yield from {
            f"{column}.{key}" for key, value, item in named if not is_blank(value) and _ignored(key, keys, item)
        }


def _ignored(key: str, keys: frozenset[str], item: Mapping[str, Any]) -> bool:
    """Whether a field of a message is left unread: a tool has a name, and a mark says which replies are learned."""
    if key in MARKS:
        return bool(item[key]) and role_of(item) not in ("assistant", None)
    return key not in keys and not (key == "name" and role_of(item) == "tool")


def _grades_within(path: str, value: Any) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, dict):
            yield from _grades_within(f"{path}.{key}", inner)
        elif not is_blank(inner) and _grades(key):
            yield f"{path}.{key}"


def unread_feedback(
    form: Format, columns: Mapping[str, int], source: str, mapped: Mapping[str, str], theirs: Mapping[str, int]
) -> Problem | None:
    """The problem of columns that say how good completions are, or hold others, beside a format that takes them as
    right, or as a pair.

    `columns`: rows that have each under our names; `theirs`: all columns of the file; `mapped`: ours -> theirs.
    """
    told = [name for name, count in sorted(columns.items()) if count and name not in form.columns | COMMON]
    key = f"data.sources.{source}"
    leave = f"leave it unread:  {key}.kind={form.kind.value}"
    weights, parts = ([name for name in told if test(name)] for test in (_weighs, REPLY_PARTS.__contains__))
    if names := weights or parts:
        why = (
            f"{_counted(names, columns)} may "
            + ("say how much is learned" if weights else "be a part")
            + " of the reply"
        )
        ours = "weight" if weights else "reasoning_content"
        readable = "." not in names[0] and (weights or names[0] in REASONING)
        line = (f"read it:  {key}.columns.{ours}={names[0]}",) if readable else ()
        return Problem(key, why, advice=(*line, leave))
    if form.kind is Kind.PREFERENCE and (chosen := [name for name in told if name in CHOICES]):
        why = (
            f"{_counted(chosen, columns)} may say which side is better, but the format {form.name} takes chosen for it"
        )
        return Problem(key, why, advice=("make chosen the better side of every pair, or", leave))
    if form.kind not in (Kind.DEMONSTRATION, Kind.NEGATIVES):
        return None
    sides = {side: name for name in told if (side := _side(name))}
    if len(sides) == 1:  # both: a row of another format, which is told with its line
        other = "rejected" if "chosen" in sides else "chosen"
        reply = next((one for one in ("completion", "messages", "conversations") if one in form.required), "answer")
        named = {other: _original(reply, mapped, theirs)} | sides
        pair = " ".join(f"{key}.columns.{ours}={name}" for ours, name in sorted(named.items()) if ours != name)
        why = f"{_counted([*sides.values()], columns)} is a side of a pair, but the format {form.name} takes one reply"
        return Problem(key, why, advice=(f"read both as a pair:  {pair}", leave))
    graded = [name for name in told if _grades(name)]
    if not graded:
        return None
    first = min(graded, key=lambda name: "." in name)
    lines = (
        f"read it as a score:  {key}.columns.score={first} {key}.score_range=[LOWEST,HIGHEST]",
        f"read it as good or bad:  {key}.columns.label={first}",
    )
    inside = ("make a column of it, or a weight of 0 or 1 in each message",)
    why = f"{_counted(graded, columns)} may say how good a completion is"
    why += f", but the format {form.name} takes every completion as right"
    return Problem(key, why, advice=(*(inside if "." in first else lines), leave))


def unread_meaning(
    form: Format, found: Unread, source: str, mapped: Mapping[str, str], theirs: Mapping[str, int]
) -> Problem | None:
    """The problem of what only the rows tell: text that the prompt lacks, and labels on two scales."""
    key = f"data.sources.{source}"
    if {-1, 0} <= found.labels:
        scored = f"{key}.columns.score={_original('label', mapped, theirs)} {key}.score_range=[-1,1]"
        why = "label is -1 in some rows and 0 in others, and either may mean bad"
        return Problem(key, why, advice=(f"read it as a score:  {scored}",))
    for (name, ours), count in found.contrary.items():
        if count:
            why = f"{_counted([name], {name: count})} says something else than {ours}, which it is another name of"
            lines = (f"read it:  {key}.columns.{ours}={name}", f"leave it unread:  {key}.columns.{name}=''")
            return Problem(key, why, advice=lines)
    lacking = sorted(name for name, count in found.lacking.items() if count)
    if not lacking:
        return None
    advice = ["leave it unread:  " + " ".join(f"{key}.columns.{name}=''" for name in lacking)]
    if not set(lacking) <= set(CONTEXT):
        pass  # a second prompt
    elif "prompt" in form.required:
        advice.insert(0, f"read it with the prompt:  {key}.columns.instruction={_original('prompt', mapped, theirs)}")
    elif "question" in form.required:
        asked = f"{key}.columns.instruction=question"
        asked += f" {key}.columns.completion=answer" if "answer" in form.required else ""
        advice.insert(0, f"read it with the prompt:  {asked}")
    where = "prompt" if set(lacking) <= set(CONTEXT) else "conversation"
    return Problem(key, f"{_counted(lacking, found.lacking)} holds text that the {where} lacks", advice=tuple(advice))


def _counted(names: list[str], counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counts[name]:,} row{'s' * (counts[name] != 1)})" for name in names)


def _original(ours: str, mapped: Mapping[str, str], theirs: Mapping[str, int]) -> str:
    """The file's own name of a field."""
    return mapped.get(ours) or next((name for name, field in aliases(theirs).items() if field == ours), ours)


def _words(name: str) -> list[str]:
    """The words of a column's name, or of a field's (`messages.userRating`), in lower case."""
    return [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]


def _weighs(name: str) -> bool:
    """Whether a column, or a field of messages, says by its name how much is learned: sample_weight, train_detail."""
    words = _words(name)
    return words[-1:] in (["mask"], ["masks"], ["weight"], ["weights"]) or words in (
        ["train", "detail"],
        ["training", "detail"],
    )


def _side(name: str) -> str:
    """The side of a pair that a column holds by its name, or ""."""
    words = [word for word in _words(name) if word not in _SIDE_TEXTS] if "." not in name else []
    return _SIDE.get(words[0], "") if len(words) == 1 else ""


def _grades(name: str) -> bool:
    """Whether a column, or a field of messages (`messages.rating`), grades completions by its name, however it is
    written: userRating, gpt4_score, thumbs-up."""
    words = _words(name)
    asked = words[1:] if words[:1] in (["is"], ["was"], ["kto"]) else words
    if not FEEDBACK.isdisjoint({"_".join(words), "_".join(asked)}):
        return True
    return bool(words) and _GRADE_ENDS.fullmatch(words[-1]) is not None and words[0] not in _OF_OTHERS
