"""Row formats: from the columns of a data set to rows.

A file's format is recognised by its columns; `columns` in the configuration maps other names to these first. A format
that explains all the columns of another, and more, wins over it; two that do not are ambiguous, and that is an error.
Every way of writing a prompt and its reply goes with every kind of feedback.
From top to bottom: recognising a format, numbers beside completions, and the formats. Rows become records again in
:mod:`uft.data.records`; what a format leaves unread is judged in :mod:`uft.data.unread`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from uft.data.messages import (
    LEARNED,
    MEDIA,
    Record,
    Unreadable,
    check_prompt,
    check_reply,
    excerpt,
    flag,
    is_blank,
    is_invisible,
    is_number,
    listed,
    number_of,
    optional_text,
    read_conversation,
    read_dialogue,
    read_prompt,
    read_reply,
    read_text,
    refuse_repeated,
    split_conversation,
    split_pair,
    starts_before_reply,
    type_name,
    unpacked,
    whole_prompt,
    with_context,
    with_reasoning,
)
from uft.data.rows import ANNOTATIONS, BASELINE, SCORE, SOFT_LABEL, Completion, Kind, Message, Row, Turns
from uft.errors import Problem, UftError, did_you_mean, typed

Range = tuple[float, float] | None  # of scores; None: the format's own
Parsed = tuple[Turns, tuple[Completion, ...]]  # a prompt and its completions
_COMMON = ("answer", "task", "system", "history", "tools", "functions", "reasoning_content")
COMMON = frozenset({*_COMMON, *LEARNED, *ANNOTATIONS})
"""Columns of any format: the gold answer for a checker, the family of the prompt, a system prompt, earlier turns, the
tools of the conversation (`functions`: in OpenAI's older form), the reasoning of the reply, the mark of a row that is
not to be learned, and the numbers that `uft annotate` writes."""
_RATINGS = ("score", "rating", "reward")
ALIASES = (
    ("response", "completion", ()),
    ("output", "completion", ()),
    ("generation", "completion", ()),
    ("chosen_response", "chosen", ()),
    ("rejected_response", "rejected", ()),
    *((f"system_{word}", "system", ()) for word in ("prompt", "message", "instruction", "instructions")),
    ("chat_history", "history", ()),
    ("conversation_history", "history", ()),
    ("kto_tag", "label", ()),
    *((f"{side}_{grade}", f"score_{side}", ()) for grade in _RATINGS for side in ("chosen", "rejected")),
    *((f"{grade}_{side}", f"score_{side}", ()) for grade in _RATINGS[1:] for side in ("chosen", "rejected")),
    ("question", "prompt", ("completion", "chosen")),
    ("input", "prompt", ("chosen",)),
    ("prompt", "instruction", ("generations", "completions")),
)
"""Other names of our fields, used where the field itself is absent and, if such are named, one of some others is there.
An `instruction` takes the place of a prompt."""
SIDES = ("score_chosen", "score_rejected")
LARGEST = sys.float_info.max
_NUMBERS = "label score score_min score_max helpfulness correctness coherence"
NUMERIC = frozenset({*_NUMBERS.split(), *SIDES, *LEARNED, *ANNOTATIONS})
"""Fields that are numbers in a file of text cells (CSV)."""


@dataclass(frozen=True)
class Format:
    """One shape of record: the columns it must have, those it also explains, and how it is parsed."""

    name: str
    kind: Kind
    required: frozenset[str]
    optional: frozenset[str]
    parse: Callable[[Record, Range], Parsed]

    @cached_property
    def columns(self) -> frozenset[str]:
        return self.required | self.optional

    def beats(self, other: Format) -> bool:
        """Whether this format explains everything the other does, and more."""
        return other.required <= self.columns and not self.required <= other.columns

    def read(self, record: Record, score_range: Range = None) -> Row:
        """The record as a row that has no name and number yet. Raises :class:`Unreadable` with the reason."""
        for name in LEARNED:
            if not is_blank(mark := record.get(name)) and not flag(mark):
                odd = "not 0 or 1, and rows are learned whole or not at all"
                why = f"{name} is {excerpt(mark)}: {odd if flag(mark) is None else 'this row is not to be learned'}"
                raise Unreadable(why, f"leave it unread:  {{source}}.columns.{name}=''")
        for name in self.columns & record.keys():
            if isinstance(record[name], str) and not isinstance(unpacked(record[name]), str):  # messages as JSON
                refuse_repeated(record[name], name)
        prompt, completions = self.parse(record, score_range)
        answer = optional_text(record.get("answer"), "answer")
        if answer is not None and "answer" in self.required:  # GSM8K: a worked answer, the gold one after ####
            answer = answer.rpartition("####")[2].strip() or answer
        own, prompt = prompt, with_context(prompt, record)
        refuse_told_history(own, prompt, completions)
        if not is_blank(reasoning := record.get("reasoning_content")):
            turns = tuple(turn for one in completions for turn in one.turns)
            completions = (replace(completions[0], turns=with_reasoning(turns, reasoning)), *completions[1:])
        graded = [one.preferred is False or one.label is False or one.score is not None for one in completions]
        right = [one.turns for one, bad in zip(completions, graded, strict=True) if not (bad or one.sampled_by)]
        for turn in (*prompt, *(turn for turns in right for turn in turns)):  # a reply that is not right may be that
            if turn.content and is_invisible(turn.content):
                raise Unreadable(f"a turn of the {turn.role} has nothing but invisible characters")
        task = optional_text(record.get("task"), "task")
        return Row("", 0, prompt, with_annotations(record, completions), answer, task)


def recognise(
    columns: Collection[str], kind: str | None = None, mapped: Collection[str] = (), source: str = "NAME"
) -> Format:
    """The format of a data set with these columns (after mapping); a prompt alone where no column could hold a reply.

    `kind` keeps to formats of that kind, `mapped` (fields that the user named himself) to formats that use them.
    Raises :class:`UftError` naming the columns, the formats near to them and how to map.
    """
    ours, other_names = aliases(columns, kind), {theirs: ours for theirs, ours, _ in ALIASES}
    known = {ours.get(name, name) for name in columns}
    known -= {"generations"} if "chosen" in known else set()  # the pair was made of them
    named = [{name, other_names.get(name, name)} for name in mapped]
    allowed = [
        f
        for f in FORMATS
        if (kind is None or f.kind.value == kind) and all(names & (f.columns | COMMON) for names in named)
    ]
    fitting = [f for f in allowed if f.required <= known]
    answered = [f for f in fitting if f.kind is not Kind.PROMPT]
    fitting = answered if kind is None and (answered or not known.isdisjoint(REPLIES)) else fitting
    best = [f for f in fitting if not any(other.beats(f) for other in fitting)]
    if len(best) == 1:
        return best[0]
    key = f"data.sources.{source}"
    if best:
        kinds = "|".join(sorted({f.kind.value for f in best}))
        lines = [f"say which:  {key}.kind={kinds}"]
        if "|" not in kinds:
            others = {f.name: sorted(frozenset().union(*(o.required for o in best)) - f.required) for f in best}
            lines = [f"{f.name}:  " + " ".join(f"{key}.columns.{one}=''" for one in others[f.name]) for f in best]
        names = " and ".join(f"{f.name} ({', '.join(sorted(f.required))})" for f in best)
        raise UftError(Problem(key, f"its columns fit {names}", advice=tuple(lines)))
    asked = [f for f in allowed if kind is not None or f.kind is not Kind.PROMPT]
    near = sorted(asked, key=lambda f: (len(f.required - known), -len(f.required & known)))[:3]
    lacks = [f"{f.name} lacks {', '.join(sorted(f.required - known))}" for f in near]
    lower = {column.strip().lower(): column for column in columns}
    meant = {ours: next((lower[word] for word in words.split() if word in lower), "") for ours, words in _USUAL.items()}
    guesses = [{ours: meant.get(ours, "") for ours in sorted(f.required - known)} for f in asked]
    guesses = sorted((guess for guess in guesses if all(guess.values())), key=len)[:1]
    if not guesses and kind is None and not any(f.required & known for f in near):  # nothing is ours
        lacks, guesses = [], [dict.fromkeys(("prompt", "completion"), "THEIR_COLUMN"), {"messages": "THEIR_COLUMN"}]
    guesses = guesses or [{min(near[0].required - known): "THEIR_COLUMN"}]
    ways = (" ".join(typed(f"{key}.columns.{ours}", theirs) for ours, theirs in guess.items()) for guess in guesses)
    why = f"no known {'row' if kind is None else kind} format has the columns {', '.join(sorted(columns)) or '(none)'}"
    if len(columns) == 1 and (mark := re.search(r"[;|\t]", next(iter(columns)))):
        lacks.append(f"columns of a CSV file are divided by commas here, not by {mark[0]!r}")
    raise UftError(Problem(key, why, advice=(*lacks, f"map them:  {'   or   '.join(ways)}")))


def of_another_kind(form: Format, record: Mapping[str, Any]) -> str:
    """The format whose columns a record (after mapping) has instead of those of its file's `form`, or ""."""
    held = {name for name, value in record.items() if not is_blank(value)}
    fitting = [f for f in FORMATS if f.kind not in (form.kind, Kind.PROMPT) and f.required <= held]
    best = [f for f in fitting if not any(other.beats(f) for other in fitting)]
    return best[0].name if best and not form.required <= held else ""


_USUAL = {
    "prompt": "prompt query inputs input problem question user human source instruction",
    "completion": "completion response output targets target solution generated_solution answer assistant reply text",
    "messages": "conversation dialog dialogue chat turns message",
    "chosen": "chosen_messages chosen_conversations preferred better_response positive",
    "rejected": "rejected_messages rejected_conversations dispreferred worse_response negative",
}
"""Names that data sets give to our fields: the advice about columns that no format has."""


def rename(record: Record, columns: Mapping[str, str], kind: str | None = None) -> dict[str, Any]:
    """The record under our field names: mapped columns first, then aliases; what was mapped away is gone.

    A field that is mapped to no name ('') is missing; one that is null gives way to its other names.
    """
    taken = set(columns.values())
    fields = {name: value for name, value in record.items() if name not in taken and columns.get(name) != ""}
    fields.update({ours: record.get(theirs) for ours, theirs in columns.items() if theirs})
    for theirs, ours in aliases([name for name, value in fields.items() if value is not None], kind).items():
        fields[ours] = fields.pop(theirs)
    return fields


REPLIES = frozenset(
    ("completion", "completions", "generations", "chosen", "rejected", "negatives", "messages", "conversations")
)
"""Columns that hold what an assistant said."""


def aliases(columns: Collection[str], kind: str | None = None) -> dict[str, str]:
    """Those of these columns that have another of our names: that name. `kind`: that of the rows, if it is said."""
    ours_of: dict[str, str] = {}
    known = set(columns)
    for theirs, ours, beside in ALIASES:
        taken = ours in known or (ours == "prompt" and "instruction" in known)
        if theirs in known and not taken and (not beside or not known.isdisjoint(beside)):
            ours_of[theirs] = ours
            known = known - {theirs} | {ours}
    is_reply = kind != Kind.PROMPT.value and known.isdisjoint(REPLIES)  # beside one it is what a checker compares with
    return ours_of | ({"answer": "completion"} if is_reply and known >= {"prompt", "answer"} else {})


def check_mapping(columns: Mapping[str, str], source: str, facts: Collection[str] = ()) -> list[Problem]:
    """Names in a `columns` mapping that are no field of ours, as problems. `facts`: those that a checker reads."""
    key, known = f"data.sources.{source}.columns.{{}}".format, sorted(FIELDS.union(facts))
    fields = f"fields: {', '.join(known)}"
    return [
        Problem(key(name), "no such field", advice=(*did_you_mean(name, known, shown=key), fields))
        for name, theirs in columns.items()
        if name not in known or (theirs and name in MEDIA)
    ]


def from_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of text cells (CSV) with numbers where they are expected; empty cells are missing values."""
    return {name: _number(value) if name in NUMERIC else (value or None) for name, value in fields.items()}


def _number(cell: Any) -> Any:
    """A text cell as a number or truth value; unchanged where it is neither, so that the row's error can quote it."""
    word = cell.strip().lower() if isinstance(cell, str) else ""
    if not word:
        return None
    if word in ("true", "false"):
        return word == "true"
    try:
        return float(word)
    except ValueError:
        return cell


# --- Annotations: numbers written beside completions, as columns of a record and back.
#
# `baseline_logp` is a number where a row has one completion, else a list with one for each: [chosen, rejected] of a
# pair. `soft_label` is likewise, but a pair has one number, the probability that the chosen one is better; the rejected
# one has the rest. null, also within a list, is an absent number. Ratings of both sides of a pair (`score_chosen` and
# `score_rejected`, as binarized UltraFeedback has them) are kept as `score`, on their own scale.


Numbers = Sequence[float | None]  # one per completion


class Rule(NamedTuple):
    """The values that a column may hold. `shared`: one number says both sides of a pair."""

    low: float
    high: float
    meaning: str
    shared: bool = False


ANNOTATION_RULES = {
    BASELINE: Rule(-LARGEST, 0.0, "a mean log-probability, at most 0"),
    SOFT_LABEL: Rule(0.0, 1.0, "a probability from 0 to 1", shared=True),
}


def with_annotations(record: Record, completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The completions with the numbers of the record's columns. Raises :class:`Unreadable` with the reason."""
    columns, count = dict[str, Numbers](), len(completions)
    for name, rule in ANNOTATION_RULES.items():
        if (value := record.get(name)) is None:
            continue
        if rule.shared and is_pair(completions):
            likely = _bounded_number(value, name, rule)
            columns[name] = [likely, 1 - likely]
        elif count == 1:
            columns[name] = [_bounded_number(value, name, rule)]
        elif isinstance(value, list) and len(value) == count:
            named = ((one, f"{name}[{number}]") for number, one in enumerate(value))
            columns[name] = [None if one is None else _bounded_number(one, field, rule) for one, field in named]
        else:
            given = f"{len(value)} of them" if isinstance(value, list) else type_name(value)
            raise Unreadable(f"{name} is {given}, not a list of {count} numbers, one per completion")
    if is_pair(completions):
        columns[SCORE] = [rating(record.get(side)) for side in SIDES]
    return tuple(
        with_numbers(c, {name: column[n] for name, column in columns.items()}) for n, c in enumerate(completions)
    )


def with_numbers(completion: Completion, numbers: Mapping[str, float | None]) -> Completion:
    """The completion with these numbers in the place of its own of those names; None: without."""
    known = {name: value for name, value in completion.annotations.items() if name not in numbers}
    known |= {name: value for name, value in numbers.items() if value is not None}
    return completion if known == completion.annotations else replace(completion, annotations=known)


def _bounded_number(value: Any, field: str, rule: Rule) -> float:
    if not is_number(value):
        raise Unreadable(f"{field} is {type_name(value)}, not a number")
    if not rule.low <= value <= rule.high:  # NaN is in no range
        raise Unreadable(f"{field} is {str(value)[:24]}, not {rule.meaning}")
    return float(value)


def rating(value: Any) -> float | None:
    """A side's rating as a number, also of a text. Few objectives use ratings: one that is no number is left unread."""
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return float(value) if is_number(value) and -LARGEST <= value <= LARGEST else None


def is_pair(completions: Sequence[Completion]) -> bool:
    return len(completions) == 2 and completions[0].preferred is not None


# --- The formats. A dialogue finds prompt and reply in a record under our field names; a parser adds the feedback.

HELPSTEER2 = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
"""Weights of the attributes, each 0 to 4: the aggregate of the Nemotron reward models without length and complexity."""
_LABEL_WORDS = (
    *("true false", "✅ ❌", "yes no", "good bad", "positive negative", "desirable undesirable", "chosen rejected"),
    *("accepted rejected", "correct incorrect", "like dislike", "upvote downvote", "thumbs_up thumbs_down", "👍 👎"),
    *("up down", "pos neg", "pass fail", "passed failed", "right wrong", "accept reject", "y n", "t f"),
    *("approved disapproved", "valid invalid", "safe unsafe", "helpful unhelpful", "preferred dispreferred"),
    *("win loss", "won lost"),
)
LABELS: dict[object, bool] = {1: True, 0: False, -1: False}
LABELS |= {word: place == 0 for words in _LABEL_WORDS for place, word in enumerate(words.split())}
Dialogue = Callable[[Record], tuple[Turns, Turns]]


def _plain(record: Record) -> tuple[Turns, Turns]:
    return read_prompt(record.get("prompt")), read_reply(record.get("completion"))


def _alpaca(record: Record) -> tuple[Turns, Turns]:
    return read_instruction(record), read_reply(record.get("completion"), "output")


def _question(record: Record) -> tuple[Turns, Turns]:
    return read_prompt(record.get("question"), "question"), read_reply(read_text(record.get("answer"), "answer"))


def read_instruction(record: Record) -> Turns:
    """The prompt of an alpaca row: its instruction, and input or context below."""
    parts = [read_text(record.get("instruction"), "instruction")]
    given = {name: record.get(name) for name in ("input", "context")}
    parts += [read_text(value, name) for name, value in given.items() if not is_blank(value)]
    return (Message("user", "\n\n".join(parts)),)


def _conversation(column: str, record: Record) -> tuple[Turns, Turns]:
    return split_conversation(read_conversation(record.get(column), column), column)


def _demonstration(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply),)


def _shown_conversation(column: str, record: Record, score_range: Range) -> Parsed:
    """A demonstration, or a prompt alone: what ends before a reply, and marks none to be learned."""
    turns = read_conversation(record.get(column), column)
    if turns[-1].role != "assistant" and all(turn.learned is None for turn in turns):
        return read_prompt(record.get(column), column), ()
    prompt, reply = split_conversation(turns, column)
    return prompt, (Completion(reply),)


def _prompt_alone(column: str, record: Record, score_range: Range) -> Parsed:
    return read_instruction(record) if column == "instruction" else read_prompt(record.get(column), column), ()


def refuse_told_history(own: Turns, prompt: Turns, completions: tuple[Completion, ...]) -> None:
    """Raise :class:`Unreadable` where the earlier turns of a column are those that the conversation begins with."""
    turns = (own, prompt, completions[0].turns if completions else ())
    first, whole, reply = ([(t.role, t.content) for t in some if t.role != "system"] for some in turns)
    earlier = whole[: len(whole) - len(first)]
    if earlier and [*first, *reply][: len(earlier)] == earlier:
        advice = "leave it unread:  {source}.columns.history=''"
        raise Unreadable("history holds the turns that the conversation begins with", advice)


def _binary(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    label = record.get("label")
    if label is None:
        raise Unreadable("label is missing")
    word = label_value(label)
    if word not in LABELS:
        advice = ["leave it unread:  {source}.kind=demonstration"]
        if is_number(word):
            advice.insert(0, "read it as a score:  {source}.columns.score=label {source}.score_range=[LOWEST,HIGHEST]")
        raise Unreadable(f"label is {excerpt(label)}, not true/false, 0/1 or 1/-1", *advice)
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply, label=LABELS[word]),)


_LONGEST_LABEL = 64  # characters of a number or word; every text cell of every record is asked


def label_value(label: Any) -> bool | float | str:
    """A label as a truth value, a number or a word in lower case, also of a text; "" for what can be none."""
    if not isinstance(label, str):
        return label if isinstance(label, (bool, int, float)) else ""
    word = label.strip().lower()
    if len(word) > _LONGEST_LABEL:
        return ""
    try:
        return float(word)
    except ValueError:
        return re.sub("[ -]+", "_", word)


def _scored(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    low, high = score_range or (_bound(record, "score_min", 0.0), _bound(record, "score_max", 1.0))
    score = scale(record.get("score"), low, high, "score")
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply, score=score),)


def _bound(record: Record, field: str, default: float) -> float:
    value = record.get(field)
    if value is None:
        return default
    if not is_number(value) or not abs(value) <= LARGEST:
        raise Unreadable(f"{field} is {excerpt(value)}, not a number")
    return float(value)


def _helpsteer2(record: Record, score_range: Range) -> Parsed:
    low, high = score_range or (0.0, 4.0)
    parts = (weight * scale(record.get(name), low, high, name) for name, weight in HELPSTEER2.items())
    score = min(sum(parts) / sum(HELPSTEER2.values()), 1.0)
    prompt, reply = _plain(record)
    return prompt, (Completion(reply, score=score),)


def _rated(column: str, best: float, record: Record, score_range: Range) -> Parsed:
    """Several completions, each with its score, or with `ratings` in a column beside, from 1 to `best`."""
    low, high = score_range or (1.0, best)
    items, ratings = listed(record.get(column)), listed(record.get("ratings"))
    if not isinstance(items, list) or not items:
        raise Unreadable(f"{column} is missing or not a list")
    if ratings is not None and (not isinstance(ratings, list) or len(ratings) != len(items)):
        raise Unreadable(f"ratings is not a list of {len(items)} numbers, one for each of {column}")
    completions = []
    for number, item in enumerate(items):
        field = f"{column}[{number}]"
        known = item if isinstance(item, dict) else {"response": item}
        own = known.get("overall_score")
        rating, name = (own, f"{field}.overall_score") if own is not None or not ratings else (ratings[number], "")
        score = scale(rating, low, high, name or f"ratings[{number}]")
        completions.append(Completion(read_reply(known.get("response"), f"{field}.response"), score=score))
    return read_prompt(record.get("instruction"), "instruction"), tuple(completions)


def scale(value: Any, low: float, high: float, field: str) -> float:
    """`value` in [low, high] brought to [0, 1]."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    value = number_of(value)
    if not is_number(value):
        advice = ["read it as good or bad:  {source}.columns.label=score"] if isinstance(value, bool) else []
        raise Unreadable(f"{field} is {type_name(value)}, not a number", *(advice if field == "score" else ()))
    if not high > low:
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is empty")
    if math.isinf(high - low):
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is too wide")
    if not low <= value <= high:  # NaN is in no range
        advice = ["on another scale:  {source}.score_range=[LOWEST,HIGHEST]"] if abs(value) <= LARGEST else []
        raise Unreadable(f"{field} is {excerpt(value)}, outside {low:g} to {high:g}", *advice)
    return float((value - low) / (high - low))


def _preference(column: str, record: Record, score_range: Range) -> Parsed:
    """A pair after the prompt in `column`, which both sides may repeat, or without one that both sides share."""
    sides = {name: unpacked(record.get(name)) for name in ("chosen", "rejected")}
    asked: Turns = ()
    if record.get(column) is not None:
        asked = read_instruction(record) if column == "instruction" else read_prompt(record.get(column), column)
    whole = [name for name, value in sides.items() if starts_before_reply(value)]
    if len(whole) == 1:  # the other side is another last reply of this conversation
        *shared, last = read_dialogue(sides[whole[0]], whole[0])
        replies = {name: (last,) if name in whole else read_reply(value, name) for name, value in sides.items()}
        prompt, left, right = check_prompt(tuple(shared), whole[0]), *map(check_reply, replies.values(), replies)
    elif asked and not whole:
        prompt, left, right = asked, *(read_reply(value, name) for name, value in sides.items())
    else:
        turns = [read_dialogue(value, name) for name, value in sides.items()]
        if turns[0] == turns[1] and not asked:
            raise Unreadable("chosen and rejected are the same, so nothing tells where the prompt ends")
        prompt, left, right = split_pair(turns[0], turns[1])
    if whole or not asked:
        prompt = whole_prompt(asked, prompt, column)
    return prompt, (Completion(left, preferred=True), Completion(right, preferred=False))


def _negatives(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    replies, by = listed(record.get("negatives")), listed(record.get("sampled_by"))
    log_probs = listed(record.get("negative_log_probs"))
    if not isinstance(replies, list) or not replies:
        raise Unreadable("negatives is missing, empty or not a list")
    count = len(replies)
    log_probs = [None] * count if log_probs is None else log_probs
    known = [one for one in log_probs if one is not None] if isinstance(log_probs, list) else [math.nan]
    if not all(is_number(one) and -math.inf < one <= 0 for one in known) or len(log_probs) != count:
        raise Unreadable(f"negative_log_probs is not a list of {count} log-probabilities")
    sampled = []
    for number, (item, log_prob) in enumerate(zip(replies, log_probs, strict=True)):
        name = by[number] if isinstance(by, list) and len(by) == count else by
        model = "unknown" if name in (None, "") else read_text(name, "sampled_by")
        sampled.append(Completion(read_reply(item, f"negatives[{number}]"), sampled_by=model, log_prob=log_prob))
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply), *sampled)


def _scored_samples(record: Record, score_range: Range) -> Parsed:
    """Samples of a model with their scores, as `uft generate` writes them beside each other."""
    scores, ends = listed(record.get("score")), score_range or (0.0, 1.0)
    prompt, (_, *sampled) = _negatives(lambda one: (read_prompt(one.get("prompt")), ()), record, None)
    if not isinstance(scores, list) or len(scores) != len(sampled):
        raise Unreadable(f"score is not a list of {len(sampled)} numbers, one per sample")
    graded = [scale(score, *ends, f"score[{number}]") for number, score in enumerate(scores)]
    return prompt, tuple(Completion(one.turns, score=score) for one, score in zip(sampled, graded, strict=True))


_PLAIN = "prompt and completion"
_DIALOGUES: dict[str, tuple[Dialogue, str, str]] = {  # reader, columns that it needs, that it also reads
    _PLAIN: (_plain, "prompt completion", ""),
    "alpaca": (_alpaca, "instruction completion", "input context"),
    "messages": (partial(_conversation, "messages"), "messages", ""),
    "sharegpt": (partial(_conversation, "conversations"), "conversations", ""),
    "question and answer": (_question, "question answer", ""),
}
_GRADES: dict[Kind, tuple[Callable[[Dialogue, Record, Range], Parsed], str, str]] = {
    Kind.DEMONSTRATION: (_demonstration, "", ""),
    Kind.BINARY: (_binary, "label", ""),
    Kind.SCORED: (_scored, "score", "score_min score_max"),
    Kind.NEGATIVES: (_negatives, "negatives", "sampled_by negative_log_probs"),
}
_PAIRS = {"prompt": "messages", "instruction": "input context", "conversations": "", "messages": ""}


def _formats() -> Iterator[Format]:
    """Every dialogue with every kind of grade, every column of a prompt with a pair, and formats of their own shape."""

    def form(name: str, kind: Kind, parse: Callable[[Record, Range], Parsed], columns: str, more: str = "") -> Format:
        return Format(name, kind, frozenset(columns.split()), frozenset(more.split()), parse)

    for kind, (parse, grades, more) in _GRADES.items():
        for dialogue, (read, columns, also) in _DIALOGUES.items():
            name = kind.value if dialogue == _PLAIN else f"{dialogue}, {kind.value}"
            name = dialogue if kind is Kind.DEMONSTRATION else name
            how = partial(parse, read)
            if kind is Kind.DEMONSTRATION and dialogue in ("messages", "sharegpt"):
                how = partial(_shown_conversation, columns)
            yield form(name, kind, how, f"{columns} {grades}", f"{also} {more}")
    for column in ("prompt", "question", "instruction"):
        more = "input context" if column == "instruction" else ""
        yield form(f"{column} alone", Kind.PROMPT, partial(_prompt_alone, column), column, more)
    for column, more in _PAIRS.items():
        name = "preference" if column == "prompt" else f"preference, {column}"
        parse_pair = partial(_preference, column)
        yield form(name, Kind.PREFERENCE, parse_pair, f"{column} chosen rejected", " ".join([more, *SIDES]))
    inside = partial(_preference, "prompt")
    yield form("preference, prompt inside", Kind.PREFERENCE, inside, "chosen rejected", " ".join(SIDES))
    samples = _GRADES[Kind.NEGATIVES][2]
    yield form("scored samples", Kind.SCORED, _scored_samples, "prompt negatives score", samples)
    yield form("helpsteer2", Kind.SCORED, _helpsteer2, "prompt completion helpfulness correctness coherence")
    rated, distilabel = partial(_rated, "completions", 10.0), partial(_rated, "generations", 5.0)
    yield form("ultrafeedback", Kind.SCORED, rated, "instruction completions", "ratings")
    yield form("distilabel", Kind.SCORED, distilabel, "instruction generations ratings")


FORMATS = tuple(_formats())
FIELDS = frozenset().union(*(f.columns for f in FORMATS), COMMON, MEDIA, (theirs for theirs, *_ in ALIASES))
"""Every name that `columns` can map to; those of media to nothing only, which leaves them unread."""
