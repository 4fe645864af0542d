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

from uft.data.formats import COMMON, Format, aliases
from uft.data.messages import LEARNED, MESSAGE_KEYS, Record, is_blank, role_of
from uft.data.rows import Kind, Row
from uft.errors import Problem

COMPLETION_KEYS = frozenset({"response", "overall_score"})
"""All that is read of an item of UltraFeedback's completions."""
_GRADE_NAMES = (
    "label labels score scores rating ratings reward rewards feedback grade preference quality helpful helpfulness",
    "overall_score human_score reward_score quality_score user_feedback correct is_correct is_good accepted winner",
    "vote votes upvotes downvotes likes dislikes thumbs thumbs_up thumbs_down safe",
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
INPUTS = ("input", "context")
"""Columns whose text belongs to the prompt."""
OTHER_SIDES = ("chosen", "rejected")


@dataclass
class Unread:
    """Counts over the records of a file that one format reads."""

    columns: Counter[str] = field(default_factory=Counter)  # column or column.field -> rows in which it says something
    lacking: Counter[str] = field(default_factory=Counter)  # column -> rows whose prompt lacks its text
    labels: set[float] = field(default_factory=set)  # that are numbers

    def add(self, form: Format, fields: Record, row: Row) -> None:
        """Count a record, of which `row` was made."""
        self.columns.update(unread(form, fields))
        for name in INPUTS:
            value = fields.get(name)
            within = isinstance(value, str) and any(value.strip() in turn.content for turn in row.prompt)
            self.lacking[name] += not (name in form.columns or is_blank(value) or within)
        if form.kind is Kind.BINARY and isinstance(fields["label"], (int, float)):
            self.labels.add(fields["label"])


def unread(form: Format, fields: Record) -> Iterator[str]:
    """Fields that say something and are not read: columns, and as `column.key` those of messages and completions, and
    grades within other objects."""
    known = form.columns | COMMON | {"row"}  # row: a name, in the files of `write_rows`
    for column in fields.keys() - known:
        if not is_blank(fields[column]):
            yield from (column, *_grades_within(column, fields[column]))
    for column in form.columns & fields.keys():
        keys = COMPLETION_KEYS if column == "completions" else MESSAGE_KEYS
        items = fields[column] if isinstance(fields[column], list) else [fields[column]]
        named = ((key, value, item) for item in items if isinstance(item, dict) for key, value in item.items())
        yield from {
            f"{column}.{key}" for key, value, item in named if not is_blank(value) and _ignored(key, keys, item)
        }


def _ignored(key: str, keys: frozenset[str], item: Mapping[str, Any]) -> bool:
    """Whether a field of a message is left unread: a tool has a name, and a mark says which replies are learned."""
    if key in LEARNED:
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
    told = [name for name, count in sorted(columns.items()) if count and name not in form.columns]
    key = f"data.sources.{source}"
    leave = f"leave it unread:  {key}.kind={form.kind.value}"
    if form.kind is Kind.PREFERENCE and (chosen := [name for name in told if name in CHOICES]):
        why = (
            f"{_counted(chosen, columns)} may say which side is better, but the format {form.name} takes chosen for it"
        )
        return Problem(key, why, advice=("make chosen the better side of every pair, or", leave))
    if form.kind not in (Kind.DEMONSTRATION, Kind.NEGATIVES):
        return None
    sides = [name for name in told if name in OTHER_SIDES]
    if len(sides) == 1:  # both: a row of another format, which is told with its line
        other = "rejected" if sides == ["chosen"] else "chosen"
        pair = f"read both as a pair:  {key}.columns.{other}={_original('completion', mapped, theirs)}"
        why = f"{_counted(sides, columns)} is a side of a pair, but the format {form.name} takes one completion"
        return Problem(key, why, advice=(*((pair,) if "completion" in form.required else ()), leave))
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
    lacking = sorted(name for name, count in found.lacking.items() if count)
    if not lacking:
        return None
    advice = ["leave it unread:  " + " ".join(f"{key}.columns.{name}=''" for name in lacking)]
    if "prompt" in form.required:
        advice.insert(0, f"read it with the prompt:  {key}.columns.instruction={_original('prompt', mapped, theirs)}")
    elif "question" in form.required:
        asked = f"{key}.columns.instruction=question"
        asked += f" {key}.columns.completion=answer" if "answer" in form.required else ""
        advice.insert(0, f"read it with the prompt:  {asked}")
    return Problem(key, f"{_counted(lacking, found.lacking)} holds text that the prompt lacks", advice=tuple(advice))


def _counted(names: list[str], counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counts[name]:,} row{'s' * (counts[name] != 1)})" for name in names)


def _original(ours: str, mapped: Mapping[str, str], theirs: Mapping[str, int]) -> str:
    """The file's own name of a field."""
    return mapped.get(ours) or next((name for name, field in aliases(theirs).items() if field == ours), ours)


def _grades(name: str) -> bool:
    """Whether a column, or a field of messages (`messages.rating`), grades completions by its name, however it is
    written: userRating, gpt4_score, thumbs-up."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]
    asked = words[1:] if words[:1] in (["is"], ["was"], ["kto"]) else words
    if not FEEDBACK.isdisjoint({"_".join(words), "_".join(asked)}):
        return True
    return bool(words) and _GRADE_ENDS.fullmatch(words[-1]) is not None and words[0] not in _OF_OTHERS
