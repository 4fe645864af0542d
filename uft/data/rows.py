"""Row: one prompt, its completions, and whatever feedback they carry; and what all ways of rendering make of it.

One frozen record serves every kind of feedback; its kind is derived from what the completions carry, never stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

BASELINE, SOFT_LABEL, SCORE = "baseline_logp", "soft_label", "score"
ANNOTATIONS = (BASELINE, SOFT_LABEL)
"""Numbers written beside a completion: its mean log-prob under other models; the probability that it is the better one
of its pair."""
MESSAGE_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name", "tools")
"""Fields of a turn besides its text; `tools` are those of the whole conversation."""


class Kind(Enum):
    """The feedback that a row carries."""

    DEMONSTRATION = "demonstration"  # one completion, shown as right
    PREFERENCE = "preference"  # a chosen and a rejected completion
    BINARY = "binary"  # one completion, labelled good or bad
    SCORED = "scored"  # completions with scores in [0, 1]
    NEGATIVES = "negatives"  # a demonstration and completions that some model sampled
    ROLLOUT = "rollout"  # completions that the policy sampled, each with its score, maybe beside a demonstration
    PROMPT = "prompt"  # no completion: the policy samples them while it trains


ANSWERED = tuple(kind for kind in Kind if kind is not Kind.PROMPT)
"""Kinds of which there is something to learn; views of objectives are of these."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user", "assistant", ...
    content: str
    extra: str = ""  # JSON of the other fields that a template may render, by the names of MESSAGE_FIELDS
    learned: bool | None = None  # an assistant turn that is marked to be learned, or to be context


Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The turns after a prompt: usually one assistant turn; a multi-turn demonstration has several.

    Every assistant turn in `turns` is supervised, unless it is marked as context. At most one of `preferred`, `label`
    and `score` is set.
    """

    turns: Turns  # the first is an assistant turn
    preferred: bool | None = None  # True: chosen, False: rejected
    label: bool | None = None  # True: good, False: bad
    score: float | None = None  # in [0, 1]
    sampled_by: str | None = None  # the model that sampled it; without a score it is a negative
    log_prob: float | None = None  # of a sampled one with its end token, under the prompt it was sampled with
    annotations: Mapping[str, float] = field(default_factory=dict)  # by a name of ANNOTATIONS

    @property
    def text(self) -> str:
        """The last turn's content: the reply."""
        return self.turns[-1].content


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with its completions. `source` and `index` identify it: the order of a file never changes."""

    source: str
    index: int  # 0-based among the rows of the source
    prompt: Turns
    completions: tuple[Completion, ...]  # none of a prompt alone
    answer: str | None = None  # the gold answer that a checker compares with
    task: str | None = None  # the family of the prompt, for reports
    facts: Mapping[str, Any] = field(default_factory=dict)  # other columns that its checker reads, as JSON

    @property
    def id(self) -> str:
        return f"{self.source}:{self.index}"

    @property
    def kind(self) -> Kind:
        """The kind that the feedback of the completions makes it."""
        if not self.completions:
            return Kind.PROMPT
        sampled = [c for c in self.completions if c.sampled_by is not None]
        if sampled:
            return Kind.NEGATIVES if any(c.score is None for c in sampled) else Kind.ROLLOUT
        first = self.completions[0]
        if first.preferred is not None:
            return Kind.PREFERENCE
        if first.label is not None:
            return Kind.BINARY
        return Kind.DEMONSTRATION if first.score is None else Kind.SCORED


def slice_bounds(part: str, rows: int) -> tuple[int, int, int] | None:
    """(first, end, left) by `part` "r/n": the r-th of n contiguous slices of `rows` rows, and the last rows that are in
    none of them; None where it is no such part.

    All slices have `rows // n` rows: 1003 rows in 5 are 0-200 to 800-1000, and three are left.
    """
    numbers = re.fullmatch(r"0*([1-9]\d{0,8})/0*([1-9]\d{0,8})", part)
    if numbers is None or int(numbers[1]) > int(numbers[2]):
        return None
    number, size = int(numbers[1]), rows // int(numbers[2])
    return (number - 1) * size, number * size, rows - size * int(numbers[2])


# --- Views: the completions of a row that an objective uses, each with its role and explicit reward.
#
# Every objective sees the same rows in the same order. A view is a pure function of the row's feedback (never of its
# texts, see `uft.data.table.grouped`) and of how often the row was drawn before. It returns `None` for a row that the
# objective cannot use (the run stops before step 0), and an empty tuple where the method by its own rule takes nothing
# (a bad completion under supervised fine-tuning).


class Role(IntEnum):
    """The side of the loss on which a completion stands."""

    POSITIVE = 1
    NEGATIVE = 0
    OWN = 2  # a sampled completion whose side its advantage decides


@dataclass(frozen=True, slots=True)
class Selected:
    """One completion of a row, as an objective uses it."""

    completion: int  # index into row.completions
    role: Role = Role.POSITIVE
    target: float = math.nan  # explicit reward in [0, 1]; NaN: none


Selection = tuple[Selected, ...]
View = Callable[[Row, int], Selection | None]  # (row, how often it was drawn before) -> selected completions


# --- The canonical content of a row, and hashes of it.
#
# Digests prove that two runs saw the same rows; the prompt's hash chooses held-out rows, so that a prompt of one source
# never sits on both sides and the choice depends neither on the order of a file nor on a seed.


def encode_row(row: Row) -> bytes:
    """Canonical JSON of a row without its name and number, one line in UTF-8; :func:`decode_row` inverts it."""
    completions = [
        [_turn_lists(c.turns), c.preferred, c.label, c.score, c.sampled_by, c.log_prob]
        + ([sorted(c.annotations.items())] if c.annotations else [])
        for c in row.completions
    ]
    content = [_turn_lists(row.prompt), completions, row.answer, row.task, *([row.facts] if row.facts else [])]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


def decode_row(encoded: bytes, source: str, index: int) -> Row:
    """The row of :func:`encode_row` under a name and number, without loss."""
    prompt, completions, answer, task, *facts = json.loads(encoded)
    made = (
        Completion(_turns(turns), preferred, label, score, sampled_by, log_prob, dict(*numbers))
        for turns, preferred, label, score, sampled_by, log_prob, *numbers in completions
    )
    return Row(source, index, _turns(prompt), tuple(made), answer, task, *facts)


def content_digest(rows: Iterable[Row]) -> str:
    """sha256 over the canonical content of the rows, in their order."""
    digest = hashlib.sha256()
    encoded = getattr(rows, "encoded", None)  # of a `uft.data.table.RowTable`, which stores just that
    for one in encoded() if encoded else map(encode_row, rows):
        digest.update(one)
    return digest.hexdigest()


def prompt_hash(prompt: Sequence[Message]) -> str:
    """sha256 of a prompt, ignoring white space at the ends of its turns."""
    turns = json.dumps([[turn.role, turn.content.strip()] for turn in prompt], ensure_ascii=False)
    return hashlib.sha256(turns.encode("utf-8")).hexdigest()


def claim_word(row: Row) -> int:
    """64 bits of what a row claims: a hash of its kind, prompt and completions in any order; the last bit: which way.

    Rows that are the same repeat each other; those that differ in the last bit alone contradict each other: the same
    reply is labelled good and bad, or the sides of a pair are swapped.
    """
    said = [json.dumps(_turn_lists(one.turns)) for one in row.completions]
    first = row.completions[0] if row.completions else None
    swapped = first is not None and first.preferred is not None and said[0] != min(said)
    content = json.dumps([row.kind.value, _turn_lists(row.prompt), *sorted(said)])
    word = int(hashlib.sha256(content.encode("utf-8")).hexdigest()[:16], 16)
    return (word | 1) - (swapped or (first is not None and first.label is False))


def _turns(turns: list[list[Any]]) -> Turns:
    return tuple(Message(*turn) for turn in turns)


def _turn_lists(turns: Sequence[Message]) -> list[list[Any]]:
    return [
        [turn.role, turn.content, turn.extra, turn.learned]
        if turn.extra or turn.learned is not None
        else [turn.role, turn.content]
        for turn in turns
    ]


# --- The tokens of a conversation.


Conversation = tuple[Turns, Turns]  # (prompt, the turns after it)


class Note(NamedTuple):
    """A difference between a conversation and the text that its template makes of it."""

    what: str  # in words that follow the template's name
    turn: int  # the turn's place in the conversation
    lost: bool = False  # text that was to be supervised is not learned as the row has it


@dataclass(frozen=True)
class Tokens:
    """One prompt with one completion, ready for the model; of a row without any the prompt alone."""

    ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; the last is True, of a prompt alone none
    prompt_length: int  # tokens before the first supervised one
    notes: tuple[Note, ...] = ()  # not kept in a cache

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Supervised tokens that have a predictor: all but the first token of the sequence."""
        return int(self.supervised[1:].sum())


def finish(ids: np.ndarray, supervised: np.ndarray) -> Tokens:
    """Ids cut after the last supervised token; uncut where nothing is supervised, for the check that reports it."""
    (learned,) = supervised.nonzero()
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return Tokens(ids[:end], supervised[:end], int(learned[0]) if len(learned) else end)


def learned_turns(turns: Turns, first: int, train_on: str) -> list[int]:
    """The assistant turns from number `first` on that are learned: all but those marked as context, the last of these,
    or those that are marked to be learned."""
    replies = [number for number, turn in enumerate(turns) if turn.role == "assistant" and number >= first]
    if train_on == "marked":
        return [number for number in replies if turns[number].learned]
    learned = [number for number in replies if turns[number].learned is not False]
    return learned[-1:] if train_on == "last" else learned


# --- Rows that may not be meant as they are.

_REPEATED = 16  # characters of a prompt that stand at the start of a reply by chance no more
_MARKS = re.compile(
    r"<\|[A-Za-z_]{2,24}\|>|<｜[^｜<>]{2,24}｜>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS)\]|</?s>|<(?:start|end)_of_turn>"
    r"|### (?:Instruction|Response|Input):|<(?:image|audio|video)>"
)
_HEADER = re.compile(
    r"(?:<\|im_start\|>\s*assistant|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|<\|(?i:assistant)\|>|<｜Assistant｜>"
    r"|\[/INST\]|<start_of_turn>model|<\|CHATBOT_TOKEN\|>|### (?:Response|Assistant):|\b(?:ASSISTANT|Assistant):)\s*\Z"
)
"""The end of a prompt that was rendered before: what a template writes before a reply."""

_STOPS = re.compile(
    r"(?:(?:\A|\n)\s*#{2,}|(?i:<(?:eo[stmd]|stop|end)>|\[(?:eo[stmd]|stop|end|done)\])|\s(?:END|STOP))\s*\Z"
)
"""A mark of a reply's end that was written by hand."""
_SPEAKERS = re.compile(r"\A\s*(?:assistant|ai|bot|gpt): |\n\n(?:human|user|assistant): ?", re.IGNORECASE)
"""A name of a role, as transcripts have it."""

_VOID = {"nan", "none", "null", "n/a", "<na>"}  # what programs write for a cell that was empty

FLAT = "flat_log_probs"
"""Log-probs of negatives at temperature 1 and without filters, which is not how they were sampled."""


def _has_stray_result(turns: Turns) -> bool:
    """Whether the result of a tool names a call that no turn before it makes."""
    made = ""
    for turn in turns:
        name = json.loads(turn.extra).get("tool_call_id") if turn.role == "tool" and turn.extra else None
        if name is not None and json.dumps(name, ensure_ascii=False) not in made:
            return True
        made += turn.extra if turn.role == "assistant" else ""
    return False


def oddities(row: Row, sampling: Any = None) -> list[str]:
    """What is right by its form and may not be meant so: names of counts in the data report, and `FLAT`.

    `sampling`: the settings that `uft generate` wrote beside the row's negatives.
    """
    said = (*row.prompt, *(turn for one in row.completions for turn in one.turns))
    odd = ["template_marks"] if any(_MARKS.search(turn.content) for turn in said) else []
    if _HEADER.search(row.prompt[-1].content):
        odd.append("rendered_prompts")
    odd += ["null_fields"] if any(": null" in turn.extra for turn in said) else []
    odd += ["text_arguments"] if any('"arguments": "' in turn.extra for turn in said) else []
    odd += ["void_replies"] if any(one.text.strip().lower() in _VOID for one in row.completions) else []
    if not row.completions:
        return odd
    replies = [turn for one in row.completions for turn in one.turns if turn.role == "assistant"]
    odd += ["written_stops"] if any(_STOPS.search(turn.content) for turn in replies) else []
    odd += ["written_speakers"] if any(_SPEAKERS.search(turn.content) for turn in replies) else []
    twice = any('"reasoning_content"' in turn.extra and "<think>" in turn.content for turn in replies)
    odd += ["repeated_reasoning"] if twice else []
    odd += ["stray_results"] if any(_has_stray_result((*row.prompt, *one.turns)) for one in row.completions) else []
    first, last = row.completions[0], row.completions[-1]
    # without the word log_probs earlier versions wrote them, at temperature 1
    known = sampling if isinstance(sampling, dict) and "log_probs" not in sampling else {}
    filtered = (known.get("temperature"), known.get("top_k") or 0, known.get("top_p") or 1) != (1, 0, 1)
    odd += [FLAT] if last.log_prob is not None and "temperature" in known and filtered else []
    if first.preferred is not None:
        scores = [c.annotations[SCORE] for c in (first, last) if SCORE in c.annotations]
        said_by = ([(turn.content.strip(), turn.extra) for turn in side.turns] for side in (first, last))
        odd += ["equal_pairs"] if next(said_by) == next(said_by) else []
        odd += ["contrary_scores"] if len(scores) == 2 and scores[0] < scores[1] else []
    question = row.prompt[-1].content.strip()
    if len(question) >= _REPEATED and all(c.turns[0].content.lstrip().startswith(question) for c in row.completions):
        odd.append("repeated_prompts")
    return odd
