"""Row formats: from the columns of a data set to rows, and back.

A file's format is recognised by its columns; `columns` in the configuration maps other names to these first. A format
that explains all the columns of another, and more, wins over it; two that do not are ambiguous, and that is an error.
Every way of writing a prompt and its reply goes with every kind of feedback.
From top to bottom: recognising a format, the formats, annotations, and writing rows. What a format leaves unread is
judged in :mod:`uft.data.unread`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from uft.data.messages import (
    LEARNED,
    Record,
    Unreadable,
    excerpt,
    is_blank,
    is_number,
    optional_text,
    read_conversation,
    read_dialogue,
    read_prompt,
    read_reply,
    read_text,
    split_conversation,
    split_pair,
    starts_before_reply,
    type_name,
    unpacked,
    whole_prompt,
    with_context,
)
from uft.data.rows import ANNOTATIONS, BASELINE, SCORE, SOFT_LABEL, Completion, Kind, Message, Row, Turns
from uft.errors import Problem, UftError
from uft.runs import writing

Range = tuple[float, float] | None  # of scores; None: the format's own
Parsed = tuple[Turns, tuple[Completion, ...]]  # a prompt and its completions
SIDES = ("score_chosen", "score_rejected")
COMMON = frozenset({"answer", "task", "system", "history", "tools", "functions", *LEARNED, *ANNOTATIONS})
"""Columns of any format: the gold answer for a checker, the family of the prompt, a system prompt, earlier turns, the
tools of the conversation (`functions`: in OpenAI's older form), the mark of a row that is not to be learned, and the
numbers that `uft annotate` writes."""
ALIASES = (
    ("response", "completion", ()),
    ("output", "completion", ()),
    ("chosen_response", "chosen", ()),
    ("rejected_response", "rejected", ()),
    ("system_prompt", "system", ()),
    ("kto_tag", "label", ()),
    *((f"{side}_{grade}", f"score_{side}", ()) for grade in ("score", "rating") for side in ("chosen", "rejected")),
    ("question", "prompt", ("completion", "chosen")),
    ("input", "prompt", ("chosen",)),
)
"""Other names of our fields, used where the field itself is absent and, if such are named, one of some others is there.
An `instruction` takes the place of a prompt."""
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

    @property
    def columns(self) -> frozenset[str]:
        return self.required | self.optional

    def beats(self, other: Format) -> bool:
        """Whether this format explains everything the other does, and more."""
        return other.required <= self.columns and not self.required <= other.columns

    def read(self, record: Record, score_range: Range = None) -> Row:
        """The record as a row that has no name and number yet. Raises :class:`Unreadable` with the reason."""
        refuse_unlearned(record)
        prompt, completions = self.parse(record, score_range)
        answer = optional_text(record.get("answer"), "answer")
        if answer is not None and "answer" in self.required:  # GSM8K: a worked answer, the gold one after ####
            answer = answer.rpartition("####")[2].strip() or answer
        prompt = with_context(prompt, record)
        task = optional_text(record.get("task"), "task")
        return Row("", 0, prompt, annotated(record, completions), answer, task)


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
        one = f"kind={kinds}" if "|" in kinds else f"columns.{min(best[0].required)}=COLUMN"
        names = " and ".join(f"{f.name} ({', '.join(sorted(f.required))})" for f in best)
        raise UftError(Problem(key, f"its columns fit {names}", advice=(f"say which:  {key}.{one}",)))
    asked = [f for f in allowed if kind is not None or f.kind is not Kind.PROMPT]
    near = sorted(asked, key=lambda f: (len(f.required - known), -len(f.required & known)))[:3]
    lacks = [f"{f.name} lacks {', '.join(sorted(f.required - known))}" for f in near]
    first = min(near[0].required - known) if near else "prompt"
    theirs = "answer" if first == "completion" and "answer" in known else "THEIR_COLUMN"
    why = f"no known {'row' if kind is None else kind} format has the columns {', '.join(sorted(columns)) or '(none)'}"
    raise UftError(Problem(key, why, advice=(*lacks, f"map them:  {key}.columns.{first}={theirs}")))


def rename(record: Record, columns: Mapping[str, str], kind: str | None = None) -> dict[str, Any]:
    """The record under our field names: mapped columns first, then aliases; what was mapped away is gone.

    A field that is mapped to no name ('') is missing.
    """
    taken = set(columns.values())
    fields = {name: value for name, value in record.items() if name not in taken and columns.get(name) != ""}
    fields.update({ours: record.get(theirs) for ours, theirs in columns.items() if theirs})
    for theirs, ours in aliases(fields, kind).items():
        fields[ours] = fields.pop(theirs)
    return fields


REPLIES = frozenset(
    ("completion", "completions", "generations", "chosen", "rejected", "negatives", "messages", "conversations")
)
"""Columns that hold what an assistant said."""


def aliases(columns: Collection[str], kind: str | None = None) -> dict[str, str]:
    """Those of these columns that have another of our names: that name. `kind`: that of the rows, if it is said."""
    found: dict[str, str] = {}
    known = set(columns)
    for theirs, ours, beside in ALIASES:
        taken = ours in known or (ours == "prompt" and "instruction" in known)
        if theirs in known and not taken and (not beside or not known.isdisjoint(beside)):
            found[theirs] = ours
            known = known - {theirs} | {ours}
    alone = kind == Kind.PROMPT.value
    if (
        known >= {"prompt", "answer"} and known.isdisjoint(REPLIES) and not alone
    ):  # beside a reply it is what a checker compares with
        found["answer"] = "completion"
    return found


def check_mapping(columns: Mapping[str, str], source: str, facts: Collection[str] = ()) -> list[Problem]:
    """Names in a `columns` mapping that are no field of ours, as problems. `facts`: those that a checker reads."""
    where, known = f"data.sources.{source}.columns", FIELDS.union(facts)
    fields = f"fields: {', '.join(sorted(known))}"
    return [
        Problem(f"{where}.{name}", "no such field", advice=(*nearest(f"{where}.{{}}", name, known), fields))
        for name in columns
        if name not in known
    ]


def nearest(pattern: str, name: str, known: Collection[str]) -> tuple[str, ...]:
    """A line of advice with the nearest known name in `pattern`, if there is one."""
    close = get_close_matches(name, sorted(known), n=1)
    return (f"did you mean  {pattern.format(close[0])} ?",) if close else ()


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


# --- The formats. A dialogue finds prompt and reply in a record under our field names; a parser adds the feedback.

HELPSTEER2 = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45}
"""Weights of the attributes, each 0 to 4: the aggregate of the Nemotron reward models without length and complexity."""
_LABEL_WORDS = ("true false", "1 0", "good bad", "positive negative", "desirable undesirable", "chosen rejected")
LABELS: dict[object, bool] = {1: True, 0: False, -1: False}
LABELS |= {word: place == 0 for words in _LABEL_WORDS for place, word in enumerate(words.split())}
Dialogue = Callable[[Record], tuple[Turns, Turns]]


def _plain(record: Record) -> tuple[Turns, Turns]:
    return read_prompt(record.get("prompt")), read_reply(record.get("completion"))


def _alpaca(record: Record) -> tuple[Turns, Turns]:
    return read_instruction(record), read_reply(record.get("completion"), "output")


def read_instruction(record: Record) -> Turns:
    """The prompt of an alpaca row: its instruction, and input or context below."""
    parts = [read_text(record.get("instruction"), "instruction")]
    given = {name: record.get(name) for name in ("input", "context")}
    parts += [read_text(value, name) for name, value in given.items() if not is_blank(value)]
    return (Message("user", "\n\n".join(parts)),)


def _question(record: Record) -> tuple[Turns, Turns]:
    return read_prompt(record.get("question"), "question"), read_reply(read_text(record.get("answer"), "answer"))


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


def refuse_unlearned(record: Record) -> None:
    """Raise :class:`Unreadable` for a row that is marked as not to be learned, or whose mark is neither 0 nor 1."""
    for name in LEARNED:
        if not is_blank(mark := record.get(name)) and mark != 1:
            why = (
                "this row is not to be learned" if mark == 0 else "not 0 or 1, and rows are learned whole or not at all"
            )
            raise Unreadable(f"{name} is {excerpt(mark)}: {why}", f"leave it unread:  {{source}}.columns.{name}=''")


def _binary(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    label = record.get("label")
    if label is None:
        raise Unreadable("label is missing")
    word = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(word, (str, bool, int, float)) or word not in LABELS:
        advice = "leave it unread:  {source}.kind=demonstration"
        raise Unreadable(f"label is {excerpt(label)}, not true/false, 0/1 or 1/-1", advice)
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply, label=LABELS[word]),)


def _scored(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    low, high = score_range or (_bound(record, "score_min", 0.0), _bound(record, "score_max", 1.0))
    score = scale(record.get("score"), low, high, "score")
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply, score=score),)


def _bound(record: Record, field: str, default: float) -> float:
    value = record.get(field)
    if value is None:
        return default
    if not is_number(value) or not abs(value) <= _LARGEST:
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
    found, ratings = record.get(column), record.get("ratings")
    if not isinstance(found, list) or not found:
        raise Unreadable(f"{column} is missing or not a list")
    completions = []
    for number, item in enumerate(found):
        field = f"{column}[{number}]"
        known = item if isinstance(item, dict) else {"response": item}
        rating = ratings[number] if isinstance(ratings, list) and number < len(ratings) else None
        rating = rating if known.get("overall_score") is None else known["overall_score"]
        score = scale(rating, low, high, f"{field}.overall_score")
        completions.append(Completion(read_reply(known.get("response"), f"{field}.response"), score=score))
    return read_prompt(record.get("instruction"), "instruction"), tuple(completions)


def scale(value: Any, low: float, high: float, field: str) -> float:
    """`value` in [low, high] brought to [0, 1]."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not is_number(value):
        raise Unreadable(f"{field} is {type_name(value)}, not a number")
    if not high > low:
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is empty")
    if math.isinf(high - low):
        raise Unreadable(f"the range of {field}, {low:g} to {high:g}, is too wide")
    if not low <= value <= high:  # NaN is in no range
        advice = "on another scale:  {source}.score_range=[LOWEST,HIGHEST]"
        raise Unreadable(f"{field} is {excerpt(value)}, outside {low:g} to {high:g}", advice)
    return float((value - low) / (high - low))


def _preference(column: str, record: Record, score_range: Range) -> Parsed:
    """A pair after the prompt in `column`, which both sides may repeat, or without one that both sides share."""
    sides = {name: unpacked(record.get(name)) for name in ("chosen", "rejected")}
    asked: Turns = ()
    if record.get(column) is not None:
        asked = read_instruction(record) if column == "instruction" else read_prompt(record.get(column), column)
    if asked and not any(map(starts_before_reply, sides.values())):
        prompt, left, right = asked, *(read_reply(value, name) for name, value in sides.items())
    else:
        turns = [read_dialogue(value, name) for name, value in sides.items()]
        if turns[0] == turns[1] and not asked:
            raise Unreadable("chosen and rejected are the same, so nothing tells where the prompt ends")
        prompt, left, right = split_pair(turns[0], turns[1])
        prompt = whole_prompt(asked, prompt, column)
    return prompt, (Completion(left, preferred=True), Completion(right, preferred=False))


def _negatives(dialogue: Dialogue, record: Record, score_range: Range) -> Parsed:
    found, by, log_probs = record.get("negatives"), record.get("sampled_by"), record.get("negative_log_probs")
    if not isinstance(found, list) or not found:
        raise Unreadable("negatives is missing, empty or not a list")
    count = len(found)
    log_probs = [None] * count if log_probs is None else log_probs
    known = [one for one in log_probs if one is not None] if isinstance(log_probs, list) else [math.nan]
    if not all(is_number(one) and -math.inf < one <= 0 for one in known) or len(log_probs) != count:
        raise Unreadable(f"negative_log_probs is not a list of {count} log-probabilities")
    sampled = []
    for number, (item, log_prob) in enumerate(zip(found, log_probs, strict=True)):
        name = by[number] if isinstance(by, list) and len(by) == count else by
        model = "unknown" if name in (None, "") else read_text(name, "sampled_by")
        sampled.append(Completion(read_reply(item, f"negatives[{number}]"), sampled_by=model, log_prob=log_prob))
    prompt, reply = dialogue(record)
    return prompt, (Completion(reply), *sampled)


def _scored_samples(record: Record, score_range: Range) -> Parsed:
    """Samples of a model with their scores, as `uft generate` writes them beside each other."""
    scores, ends = record.get("score"), score_range or (0.0, 1.0)
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
FIELDS = frozenset().union(*(f.columns for f in FORMATS), COMMON, (theirs for theirs, *_ in ALIASES))
"""Every name that `columns` can map to."""


# --- Annotations: numbers written beside completions, as columns of a record and back.
#
# `baseline_logp` is a number where a row has one completion, else a list with one for each: [chosen, rejected] of a
# pair. `soft_label` is likewise, but a pair has one number, the probability that the chosen one is better; the rejected
# one has the rest. null, also within a list, is an absent number. Ratings of both sides of a pair (`score_chosen` and
# `score_rejected`, as binarized UltraFeedback has them) are kept as `score`, on their own scale.


Numbers = Sequence[float | None]  # one per completion
_LARGEST = sys.float_info.max


class Rule(NamedTuple):
    """The values that a column may hold. `shared`: one number says both sides of a pair."""

    low: float
    high: float
    meaning: str
    shared: bool = False


RULES = {
    BASELINE: Rule(-_LARGEST, 0.0, "a mean log-probability, at most 0"),
    SOFT_LABEL: Rule(0.0, 1.0, "a probability from 0 to 1", shared=True),
}


def annotated(record: Record, completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """The completions with the numbers of the record's columns. Raises :class:`Unreadable` with the reason."""
    columns = {name: _per_completion(record[name], name, completions) for name in RULES if record.get(name) is not None}
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


def _per_completion(value: Any, name: str, completions: Sequence[Completion]) -> Numbers:
    rule = RULES[name]
    if rule.shared and _is_pair(completions):
        likely = _bounded_number(value, name, rule)
        return [likely, 1 - likely]
    if len(completions) == 1:
        return [_bounded_number(value, name, rule)]
    if not isinstance(value, list) or len(value) != len(completions):
        found = f"{len(value)} of them" if isinstance(value, list) else type_name(value)
        raise Unreadable(f"{name} is {found}, not a list of {len(completions)} numbers, one per completion")
    return [None if one is None else _bounded_number(one, f"{name}[{n}]", rule) for n, one in enumerate(value)]


def _bounded_number(value: Any, field: str, rule: Rule) -> float:
    if not is_number(value):
        raise Unreadable(f"{field} is {type_name(value)}, not a number")
    if not rule.low <= value <= rule.high:  # NaN is in no range
        raise Unreadable(f"{field} is {str(value)[:24]}, not {rule.meaning}")
    return float(value)


def _rating(value: Any) -> float | None:
    """Few objectives use ratings: a rating that is no number counts as absent."""
    return float(value) if is_number(value) and -_LARGEST <= value <= _LARGEST else None


def _is_pair(completions: Sequence[Completion]) -> bool:
    return len(completions) == 2 and completions[0].preferred is not None


# --- Rows as JSON Lines that :mod:`uft.data.sources` reads back, equal to the last digit.
#
# Every kind has the plainest of the formats that hold it, one line per row; scored completions have one line each and
# meet again in one row. All lines of a file must have one format, so all its rows must be of one kind.


START = '{"row": "'
"""The beginning of every line: the name of the row it was made from."""


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write these rows to `path`, replacing it whole by rename. Raises UftError where the disk refuses it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", encoding="utf-8") as handle:
                for row in rows:
                    handle.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in to_records(row))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def is_rows_file(path: Path) -> bool:
    """Whether a file begins as those of :func:`write_rows` do."""
    with open(path, "rb") as handle:
        return handle.read(len(START)) == START.encode()


def turns_column(turns: Sequence[Message], role: str) -> str | list[dict[str, Any]]:
    """A prompt or a reply as a column: text where it is a single turn of `role` and nothing else, else messages."""
    if len(turns) == 1 and turns[0] == Message(role, turns[0].content):
        return turns[0].content
    return [
        {"role": turn.role, "content": turn.content}
        | (json.loads(turn.extra) if turn.extra else {})
        | ({} if turn.learned is None else {"weight": int(turn.learned)})
        for turn in turns
    ]


def to_records(row: Row) -> list[dict[str, Any]]:
    """The records (lines) of one row: one, or one per scored completion."""
    replies, kind = [turns_column(c.turns, "assistant") for c in row.completions], row.kind
    start = {"row": row.id, "prompt": turns_column(row.prompt, "user")}
    columns: dict[str, Any] = {"completion": replies[0]} if replies else {}
    if kind is Kind.PROMPT:  # as messages: beside a prompt an answer would be read as its reply
        start = {"row": row.id, "messages": turns_column(row.prompt, "")}
    elif kind is Kind.BINARY:
        columns["label"] = row.completions[0].label
    elif kind is Kind.PREFERENCE:
        assert row.completions[0].preferred, "a pair is (chosen, rejected)"
        columns = {"chosen": replies[0], "rejected": replies[1]}
    elif kind is Kind.NEGATIVES:
        sampled = row.completions[1:]
        columns = {"response": replies[0], "negatives": replies[1:], "sampled_by": [c.sampled_by for c in sampled]}
        if any(c.log_prob is not None for c in sampled):
            columns["negative_log_probs"] = [c.log_prob for c in sampled]
    lines: list[tuple[dict[str, Any], Sequence[Completion]]] = [(columns, row.completions)]
    if kind is Kind.SCORED:
        lines = [({"completion": r, "score": c.score}, (c,)) for r, c in zip(replies, row.completions, strict=True)]
    end = {name: value for name, value in (("answer", row.answer), ("task", row.task)) if value is not None}
    return [
        {**start, **columns, **_annotation_columns(completions), **end, **row.facts} for columns, completions in lines
    ]


def _annotation_columns(completions: Sequence[Completion]) -> dict[str, Any]:
    """The columns from which :func:`annotated` reads the same numbers."""
    found: dict[str, Any] = {}
    for name, rule in RULES.items():
        values = [completion.annotations.get(name) for completion in completions]
        if any(value is not None for value in values):
            alone = len(values) == 1 or (rule.shared and _is_pair(completions))
            found[name] = values[0] if alone else values
    ratings = zip(SIDES, completions, strict=False) if _is_pair(completions) else ()
    return found | {side: c.annotations[SCORE] for side, c in ratings if SCORE in c.annotations}
