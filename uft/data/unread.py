"""What a format leaves unread of its records: counted and told, and refused where it changes what a row means.

Refused are grades of completions that the format takes as right, a word about which side of a pair is better, the other
side of a pair that the format does not know, and text that the prompt lacks. All else (ids, sources, dates) is told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from uft.data.formats import ALIASES, COMMON, FIELDS, LABELS, SIDES, Format, aliases, label_value, rating, rename
from uft.data.messages import (
    MARKS,
    MEDIA,
    MESSAGE_KEYS,
    Record,
    is_blank,
    is_number,
    listed,
    number_of,
    role_of,
    texts_of,
    unpacked,
)
from uft.data.rows import Kind, Row
from uft.errors import Problem, typed


def _set(*words: str) -> frozenset[str]:
    return frozenset(" ".join(words).split())


COMPLETION_KEYS = _set("response overall_score")
"""All that is read of an item of UltraFeedback's completions."""
FEEDBACK = _set(
    "label labels score scores rating ratings reward rewards feedback grade preference quality helpful helpfulness",
    "overall_score human_score reward_score quality_score user_feedback correct is_correct is_good accepted winner",
    "vote votes upvotes downvotes likes dislikes thumbs thumbs_up thumbs_down safe helpfulness correctness coherence",
)
"""Columns that say how good a completion is, by their usual names."""
_FAULTS = _set(
    "bad rejected incorrect wrong toxic toxicity harmful unsafe hallucination hallucinated dislike flagged downvoted",
    "error edited needs_edit rank ranking negative disliked downvote downs harmfulness hate spam discard drop remove",
    "nsfw refusal refused hallucinates bug bugs buggy severity flag",
)
_FAULT_WORDS = _FAULTS | _set("down downvotes dislikes not no")
_IF_GRADES = _FAULTS | _set(
    "good chosen preferred accept acceptable acceptability approve approved verdict pass passed pass_rate success",
    "successful solved valid verified right harmless safety stars judge judgment judgement win won like thumb",
    "reaction sentiment evaluation eval eval_result accuracy utility advantage return returns value outcome",
    "result annotation upvoted ok okay best selected keep kept use usable useful usefulness include included",
    "positive polarity points karma ups upvote exact_match acc solve pass_at_1 resolved likert rm nps",
)
"""Further names, of columns that hold nothing but truth values, numbers or words for good and bad; of a fault: those
that are true of a bad completion."""
_IS = _set("is was has")
_OF_WHOM = _IS | _set(
    "kto human user annotator rater expert response answer completion reply output assistant model llm final overall"
)
"""First words of a grade's name that say whose or of what it is."""
_BEFORE = _OF_WHOM | _set("n num number total mean avg")
_BEHIND = _set("label flag value count")
"""First and last words that a grade's name may have around it, where nothing but grades stands in the column."""
_GRADE_ENDS = re.compile("(?:score|rating|reward|vote)s?|feedback|grade|helpful|correct")
_OF_OTHERS = _set(
    "language lang lid langid fasttext similarity embedding retrieval rerank bm25 dedup overlap url domain source",
    "document question prompt instruction query input difficulty complexity perplexity category topic intent cluster",
    "page domain image repo repository github",
)
"""First words of a score or rating that is no grade of the completion: language_score, prompt_rating."""
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_CHOICES = _set("preference preferences preferred winner better safer choice flipped swapped tie")
CHOICES = _CHOICES | _set("label labels")
"""Words of columns that say which of two completions is the better one; these two are by themselves."""
_MARGINS = _set("margin gap delta difference diff")
_CLEAR = _set("score scores rating ratings quality rank stars star passed failed reward")
"""Words that make a grade of a column of nothing but grades wherever they stand in its name: rating_1_to_5. Others do
so at its end alone: correct_answer is the right one, grade_level a pupil's."""
_RECORDS = _set("id ids idx index model version type name date time at by hash key split count class threshold")
"""Words of bookkeeping, which make none: rating_id."""
VERDICTS = _set(
    "good bad desirable undesirable chosen rejected accepted correct incorrect like dislike upvote downvote thumbs_up",
    "thumbs_down 👍 👎 ✅ ❌ pass fail passed failed accept reject approved disapproved preferred dispreferred",
)
"""Words for good and bad that make a column a grade whatever its name is."""
_LONGEST_VERDICT = 24  # characters; every text of every record is asked
CONTEXT = ("input", "context")
INPUTS = (*CONTEXT, "prompt", "question", "instruction")
"""Columns whose text belongs to the prompt."""
_TEXTS = re.compile(
    "(?:.*_)?(?:passages?|documents?|docs|background|knowledge|evidence|paragraphs?|articles?|story|stories|abstract"
    "|snippets?|excerpts?|transcript|choices|options)|(?:table|db|sql)?_?schemas?|tables?|query|instructions|pre_?prompt"
)
"""Other names of a context, or of a part of the question."""
_MEDIA = "images? imgs? pictures? photos? audios? videos? screenshots? pixel_values attachments?".replace(" ", "|")
_THOUGHT = "reasoning thinking think thoughts? cot rationales? scratchpad chain_of_thought monologue".replace(" ", "|")
_ABOUT = "effort|model|type|mode|level|style|language|source|id|tokens|length|score"
_PARTS = {  # the field that reads a part of a conversation, "" for none: names of columns that hold one
    "system": "(?:system|sys|developer)(?:_(?:prompt|message|msg|instructions?|text|content))?|preamble|persona",
    "history": "(?:.*_)?history|(?:previous|earlier|past|prior)_(?:turns|messages|conversations?|dialogue?s?|context)"
    "|context_(?:turns|messages)",
    "tools": "(?:.*_)?(?:tools|functions|apis)|(?:tool|function|api)_(?:schemas?|def(?:inition)?s?|description|specs?)",
    "reasoning_content": f"(?:.*_)?(?:{_THOUGHT})(?:_(?!(?:.*_)?(?:{_ABOUT})$).*)?",
    "": "(?:tool|function)_calls?|chat_template_kwargs|"
    f"(?:.*_)?(?:{_MEDIA})(?:_(?:urls?|paths?|files?|bytes|data|base64))?",
}
_ADDRESSED = _set("channel recipient analysis reflection")
"""Fields of messages that say that a turn is a thought or a call, or hold one."""
_REPLIES = re.compile(
    "(?:model_|assistant_|bot_)?(?:responses?|completions?|outputs?|reply|replies|generations?)(?:_?[a-z0-9])?"
)
"""Columns of replies beside a prompt."""
_WEIGHS = re.compile(
    "(?:.*_)?(?:masks?|weights?)|is_(?:train|target)|train(?:able|_on(?:_.*)?|_detail)|training_detail|learn|supervised?"
    "|(?:mask|loss|train)_(?:spans?|ranges?|tokens?)"
)
_MAY_WEIGH = re.compile(
    r"(?!in_.+_train$)(?:.*_)?(?:train|trainable|trained|learn|learned|supervised?|masked|mask)(?:_(?!(?:.*_)?(?:id|idx|index|split)$).*)?"
    r"|(?:is|do|no|not|in|use|skip|ignore|compute|only|.*_in|.*_only)_loss|loss_(?:scale|factor)"
)
"""The same, of columns that hold nothing but truth values and numbers."""
_UNLEARNED = re.compile("(?:do_not|no|not)_train|(?:is_)?(?:ignored?|skip(?:ped)?|excluded?|deleted|masked)")
"""Names of a weight or mark that tells how much is learned; those of the second are not read as one."""
_SIDES = {
    "chosen": "chosen preferred positive better best good corrected correction improved revised edited",
    "rejected": "rejected dispreferred loser losing worse worst negative bad incorrect distractor",
}
_SIDE_WORDS = _set("message response answer completion conversation output reply text")
_SIDE_TEXTS = {"hard", *_SIDE_WORDS, *(f"{word}s" for word in _SIDE_WORDS)}
_SIDE = {word: ours for ours, words in _SIDES.items() for word in words.split()}
"""Words for a side of a pair."""


@dataclass
class Said:
    """Rows of a file by what a column, or `column.field`, says in them."""

    rows: Counter[str] = field(default_factory=Counter)  # something
    texts: Counter[str] = field(default_factory=Counter)  # more than a grade
    words: Counter[str] = field(default_factory=Counter)  # a word for good or bad

    def add(self, name: str, value: Any, cell: bool = True) -> None:
        """Count a row. A grade is a truth value, a number (as text too in a `cell`), or a word for good or bad."""
        word, is_text = label_value(value), isinstance(value, str)
        is_grade = word in LABELS or (isinstance(word, (bool, int, float)) and (cell or not is_text))
        self.rows[name] += not is_blank(value)
        self.texts[name] += not (is_blank(value) or is_grade)
        if is_text and len(value) < _LONGEST_VERDICT and word in VERDICTS:
            self.words[name] += 1

    def renamed(self, columns: Mapping[str, str], kind: str | None) -> Said:
        """The same under our names of fields, see :func:`uft.data.formats.rename`."""
        return Said(*(Counter(rename(one, columns, kind)) for one in (self.rows, self.texts, self.words)))


@dataclass
class Unread(Said):
    """Counts over the records of a file that one format reads: `rows` of what it leaves unread."""

    lacking: Counter[str] = field(default_factory=Counter)  # column -> rows whose prompt lacks its text
    replies: Counter[str] = field(default_factory=Counter)  # column -> rows whose replies lack its text
    against: Counter[str] = field(default_factory=Counter)  # column of a pair -> rows in which rejected is the better
    contrary: Counter[tuple[str, str]] = field(default_factory=Counter)  # a field's other name, and the field
    labels: set[float] = field(default_factory=set)  # that are numbers

    def add_row(self, form: Format, fields: Record, row: Row, settled: bool = False) -> None:
        """Count a record, of which `row` was made; `settled`: its kind is, and so what other columns may be."""
        told = dict(unread(form, fields))
        for name, value in told.items():
            if name in fields:  # what a column says was counted when the file was first read
                self.rows[name] += 1
            else:
                self.add(name, value)
        if form.kind is Kind.PREFERENCE and not settled:
            self.against.update(name for name, value in told.items() if _is_against(name, value, fields))
        if not {"messages", "conversations"}.isdisjoint(form.required) and form.kind is not Kind.PREFERENCE:
            said = {turn.content.strip() for one in row.completions for turn in one.turns}
            names = [name for name in told if _REPLIES.fullmatch(name) and (name in FIELDS or not settled)]
            self.replies.update(n for n in names if any(text.strip() not in said for text in texts_of(told[n])))
        contexts = [] if settled else [name for name in told if _TEXTS.fullmatch("_".join(_words(name)))]
        for name in (*INPUTS, *contexts):
            if name in fields and name not in form.columns:
                self.lacking[name] += not _within(fields[name], row)
        for name, ours, _ in ALIASES:
            if name in fields and name not in INPUTS and not (is_blank(fields[name]) or is_blank(fields.get(ours))):
                self.contrary[name, ours] += fields[name] != fields[ours]
        if form.kind is Kind.BINARY and is_number(value := label_value(fields["label"])):
            self.labels.add(float(value))


def _is_against(name: str, value: Any, fields: Record) -> bool:
    """Whether a number of a pair says that the rejected side is the better one: a margin below 0, its rank or grade."""
    words, number = _words(name), number_of(value)
    if not is_number(number):
        return False
    if not _MARGINS.isdisjoint(words):
        return bool(number < 0)
    other = number_of(fields.get(name.replace("chosen", "rejected")))
    if "chosen" not in words or not is_number(other):
        return False
    return bool(number > other) if "rank" in words else _grades(name) and bool(number < other)


def _within(value: Any, row: Row) -> bool:
    """Whether the texts of a column stand in the row's turns that are not replies."""
    shown = (turn for one in row.completions[:1] for turn in one.turns)  # none of a prompt alone
    asked = [turn.content for turn in (*row.prompt, *shown) if turn.role != "assistant"]
    items = value if isinstance(value := unpacked(value), list) else [value]
    said = [one.get("content", one.get("value")) if isinstance(one, dict) and role_of(one) else one for one in items]
    return all(any(text.strip() in turn for turn in asked) for text in texts_of(said))


def unread(form: Format, fields: Record) -> Iterator[tuple[str, Any]]:
    """Fields that say something and are not read, with their values: columns, and as `column.key` those of messages and
    completions, and grades within other objects."""
    known = form.columns | COMMON | {"row"}  # row: a name, in the files of `write_rows`
    for column in fields:
        if column not in known and not is_blank(fields[column]):
            yield from ((column, fields[column]), *_grades_within(column, fields[column]))
    whole = fields.get("messages") if "messages" in form.optional else None
    if not is_blank(whole) and whole != fields["chosen"]:  # the pair's prompt with its chosen reply, once more
        yield "messages", whole
    sides = ((side, fields.get(side)) for side in SIDES if side in form.columns)
    yield from ((side, value) for side, value in sides if value and rating(value) is None)
    for column in form.columns & fields.keys():
        keys = COMPLETION_KEYS if column == "completions" else MESSAGE_KEYS
        value = listed(unpacked(fields[column]))
        items = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
        for item in items:
            role = role_of(item)
            for key, inner in item.items():
                if key in MARKS:  # which say whether a reply is learned
                    is_read = not inner or role in ("assistant", None)
                else:
                    is_read = key in keys or (key == "name" and role == "tool")
                if not (is_read or is_blank(inner)):
                    yield f"{column}.{key}", inner
        contents = (content for item in items if isinstance(content := item.get("content"), list))
        for part in (part for content in contents for part in content if isinstance(part, dict)):
            named = ((key, inner) for key, inner in part.items() if key not in ("type", "text"))
            yield from ((f"{column}.content.{key}", inner) for key, inner in named if not is_blank(inner))


def _grades_within(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Grades in an object, a list of objects, or a text that holds one as JSON."""
    value = listed(value, "[{")
    for item in value if isinstance(value, list) else ():
        yield from _grades_within(path, item) if isinstance(item, dict) else ()
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, (dict, list)):
            yield from _grades_within(f"{path}.{key}", inner)
        elif not is_blank(inner) and (_grades(key) or _grade_word(key) in _IF_GRADES):
            yield f"{path}.{key}", inner


@dataclass(frozen=True)
class FileFormat:
    """The format of a source's file, and the names of its columns."""

    form: Format
    source: str
    mapped: Mapping[str, str]  # our field -> their column, as the source's settings say
    columns: Collection[str]  # all of the file

    @property
    def key(self) -> str:
        return f"data.sources.{self.source}"

    @property
    def leave(self) -> str:
        """Advice to take the format for what it is."""
        return f"leave it unread:  {self.key}.kind={self.form.kind.value}"

    def leave_out(self, names: Sequence[str]) -> str:
        """Advice to leave these columns unread."""
        return "leave it unread:  " + " ".join(f"{self.key}.columns.{name}=''" for name in names)

    def read(self, ours: str, theirs: str) -> str:
        """The word of a command line that maps a field of ours to a column."""
        return typed(f"{self.key}.columns.{ours}", theirs)

    def original(self, ours: str) -> str:
        """The file's own name of a field."""
        other_names = (name for name, field in aliases(self.columns).items() if field == ours)
        return self.mapped.get(ours) or next(other_names, ours)

    def problem(self, names: Sequence[str], rows: Mapping[str, int], why: str, *advice: str) -> Problem:
        """The problem of some columns, each with the rows that it is about."""
        counted = (f"{name} ({rows[name]:,} row{'s' * (rows[name] != 1)})" for name in names)
        return Problem(self.key, f"{', '.join(counted)} {why}", advice=advice)


def unread_feedback(file: FileFormat, said: Said) -> Iterator[Problem]:
    """Problems of columns that say how good completions are, or hold others, or parts of the conversation, beside a
    format that takes them as right, or as a pair, and knows no such parts. The first is the one to tell: a column may
    look like several of them, and the more certain look comes first.
    """
    form, leave = file.form, file.leave
    told = [name for name, count in sorted(said.rows.items()) if count and name not in form.columns | COMMON]
    words = {name: "_".join(_words(name)) for name in told}
    full = {name for name in told if said.texts.get(name)}
    weights, unlearned = ([n for n in told if names.fullmatch(words[n])] for names in (_WEIGHS, _UNLEARNED))
    weights += [n for n in told if ".content." in n and words[n] in MARKS and n not in weights]  # of a part of a turn
    may = [n for n in told if n not in full and words[n] not in MARKS and _MAY_WEIGH.fullmatch(words[n])]
    if names := weights or unlearned or may:
        whole = not words[names[0]].startswith("train_on_")  # which turns or parts of the row: no weight of the reply
        line = [f"read it:  {file.read('weight', names[0])}"] if weights and names[0] not in full and whole else []
        line = ["call it weight in the messages: 1 is learned, 0 is context; or"] if "." in names[0] else line
        yield file.problem(names, said.rows, "may say how much is learned of the reply", *line, leave)
    for ours, pattern in _PARTS.items():
        addressed = {name for name in told if not ours and "." in name and words[name] in _ADDRESSED}
        held = [name for name in told if name in full and name not in MEDIA]  # those are refused row by row
        if names := [name for name in held if re.fullmatch(pattern, words[name]) or name in addressed]:
            part = "reply" if ours == "reasoning_content" or "call" in words[names[0]] else "conversation"
            readable = ours and "." not in names[0] and not _side(names[0].partition("_")[0])
            line = [f"read it:  {file.read(ours, names[0])}"] if readable else []
            yield file.problem(names, said.rows, f"may be a part of the {part}", *line, leave)
    if form.kind is Kind.PROMPT and (replies := [n for n in told if _REPLIES.fullmatch(words[n])]):
        pair = " ".join(map(file.read, ("chosen", "rejected") if len(replies) == 2 else ("completion",), replies))
        why = f"may hold replies, but the format {form.name} has none"
        yield file.problem(replies, said.rows, why, f"read them:  {pair}", leave)
    chosen = [name for name in told if name in CHOICES or not _CHOICES.isdisjoint(_words(name))]
    if form.kind is Kind.PREFERENCE and chosen:
        why = f"may say which side is better, but the format {form.name} takes chosen for it"
        yield file.problem(chosen, said.rows, why, "make chosen the better side of every pair, or", leave)
    if form.kind not in (Kind.DEMONSTRATION, Kind.NEGATIVES):
        return
    sides = {side: name for name in told if name in full and (side := _side(name))}
    if len(sides) == 1:  # both: a row of another format, which is told with its line
        other = "rejected" if "chosen" in sides else "chosen"
        reply = next((one for one in ("completion", "messages", "conversations") if one in form.required), "answer")
        named = {other: file.original(reply)} | sides
        pair = " ".join(file.read(ours, name) for ours, name in sorted(named.items()) if ours != name)
        sampled = [f"read a list of them:  {file.read('negatives', sides['rejected'])}"] if "rejected" in sides else []
        why = f"is a side of a pair, but the format {form.name} takes one reply"
        yield file.problem([*sides.values()], said.rows, why, f"read both as a pair:  {pair}", *sampled, leave)
    verdict = {name for name in told if said.words.get(name) == said.rows[name]}
    graded = [n for n in told if _grades(n) or n in verdict or (n not in full and _may_grade(n))]
    if not graded:
        return
    first = min(graded, key=lambda name: "." in name)
    lines: tuple[str, ...] = (
        f"read it as a score:  {file.read('score', first)} {file.key}.score_range=[LOWEST,HIGHEST]",
        f"read it as good or bad:  {file.read('label', first)}",
    )[first in verdict :]
    if "." in first and first not in file.columns:
        lines = ("make a column of it, or a weight of 0 or 1 in each message",)
    elif not _FAULT_WORDS.isdisjoint(_words(first)):  # the lower, the better
        lines = ("make a column label of it, which is true where the completion is good, or",)
    why = f"may say how good a completion is, but the format {form.name} takes every completion as right"
    yield file.problem(graded, said.rows, why, *lines, leave)


def unread_meaning(file: FileFormat, left: Unread) -> Problem | None:
    """The problem of what only the rows tell: text that the prompt lacks, and labels on two scales."""
    key, required = file.key, file.form.required
    if {-1, 0} <= left.labels:
        scored = f"{file.read('score', file.original('label'))} {key}.score_range=[-1,1]"
        why = "label is -1 in some rows and 0 in others, and either may mean bad"
        return Problem(key, why, advice=(f"read it as a score:  {scored}",))
    for (name, ours), count in left.contrary.items():
        if count:
            why, read = f"says something else than {ours}, which it is another name of", file.read(ours, name)
            return file.problem([name], {name: count}, why, f"read it:  {read}", file.leave_out([name]))
    if names := sorted(left.against):
        why = "may say that the rejected side is the better one"
        return file.problem(names, left.against, why, "make chosen the better side of every pair, or", file.leave)
    if names := sorted(left.replies):
        conversation = next(name for name in ("messages", "conversations") if name in required)
        follows = f"it follows the conversation:  {file.read('prompt', file.original(conversation))}"
        own = [file.original(name) for name in names]
        leave = file.leave_out(own) if all(name in FIELDS for name in own) else file.leave
        rows = dict(zip(own, left.replies.values(), strict=True))
        return file.problem(own, rows, "holds text that the replies lack", follows, leave)
    lacking = sorted(name for name, count in left.lacking.items() if count)
    if not lacking:
        return None
    advice = [file.leave_out(lacking)]
    if others := [name for name in lacking if name not in INPUTS]:
        asked = [name for name in ("prompt", "question") if name in required]
        mapped = [file.read("instruction", file.original(name)) for name in asked] + [file.read("context", others[0])]
        readable = "." not in others[0] and (asked or "instruction" in required)
        advice = [f"read it with the prompt:  {' '.join(mapped)}"] * bool(readable) + [file.leave]
    elif not set(lacking) <= set(CONTEXT):
        pass  # a second prompt
    elif "prompt" in required:
        advice.insert(0, f"read it with the prompt:  {file.read('instruction', file.original('prompt'))}")
    elif "question" in required:
        reply = f" {key}.columns.completion=answer" if "answer" in required else ""
        advice.insert(0, f"read it with the prompt:  {key}.columns.instruction=question{reply}")
    where = "prompt" if set(lacking) <= set(CONTEXT) else "conversation"
    return file.problem(lacking, left.lacking, f"holds text that the {where} lacks", *advice)


@lru_cache(1024)  # every row asks for its columns
def _words(name: str) -> tuple[str, ...]:
    """The words of a column's name, or of a field's (`messages.userRating`), in lower case."""
    return tuple(word.lower() for word in _WORD.findall(name.rpartition(".")[2].replace("CoT", "Cot")))


def _side(name: str) -> str:
    """The side of a pair that a column holds by its name, or ""."""
    words = [word for word in _words(name) if word not in _SIDE_TEXTS] if "." not in name else []
    return _SIDE.get(words[0].rstrip("0123456789s"), _SIDE.get(words[0], "")) if len(words) == 1 else ""


def _grade_word(name: str) -> str:
    """The name of a column or field without the words that say whose grade it is."""
    words = _words(name)
    while words[1:] and words[0] in _OF_WHOM:
        words = words[1:]
    return "_".join(words)


def _may_grade(name: str) -> bool:
    """Whether a column that holds nothing but grades is one by its name: num_thumbs_up, is_valid_answer, rlhf_label."""
    first, *words = _words(name) or ("",)
    if words and words[-1] in ("label", "labels") and first not in _OF_OTHERS:
        return True
    words, nouns = [first, *words], _OF_WHOM if first in _IS else frozenset[str]()
    while words[1:] and words[0] in _BEFORE:
        words = words[1:]
    while words[1:] and words[-1] in _BEHIND | nouns:
        words = words[:-1]
    whole = _words(name)
    if not _CLEAR.isdisjoint(whole) and _RECORDS.isdisjoint(whole) and _OF_OTHERS.isdisjoint(whole):
        return True
    return not {_grade_word(name), "_".join(words)}.isdisjoint(_IF_GRADES) or "_".join(words) in FEEDBACK


def _grades(name: str) -> bool:
    """Whether a column, or a field of messages (`messages.rating`), grades completions by its name, however it is
    written: userRating, gpt4_score, thumbs-up."""
    words = _words(name)
    if not FEEDBACK.isdisjoint({"_".join(words), _grade_word(name)}):
        return True
    return bool(words) and _GRADE_ENDS.fullmatch(words[-1]) is not None and words[0] not in _OF_OTHERS
