"""Chat rendering: a prompt and its completion as token ids, with the mask of supervised tokens.

Supervised are the tokens of the assistant's own turns and the end-of-turn token after each: never the header, nor the
template's text after the end-of-turn token. Ids end at the last supervised token; nothing after it is ever needed.

A conversation is rendered once, whole, and that text alone is tokenised. The mask comes from one of three places:

1. the template's own `{% generation %}` marks, where it has them;
2. its skeleton: the same roles rendered with marks for contents. Filling the contents into the skeleton must give the
   rendered text, character by character, so a reply that repeats an earlier turn cannot mislead it;
3. for a template that changes contents (thinking tags), each reply is found between the rendering of the turns before
   it and a mark at its end, both checked against the one rendering.

`plain` is the way for base models without a template.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, repeat
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from uft.data.rows import Message, Turns
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = tuple[Turns, Turns]  # (prompt, the turns after it)
CharSpan = tuple[int, int]  # characters [start, end)


class Note(NamedTuple):
    """A difference between a conversation and the text that its template makes of it."""

    what: str  # in words that follow the template's name
    turn: int  # the turn's place in the conversation
    lost: bool = False  # text that was to be supervised is not learned as the row has it


@dataclass(frozen=True)
class Tokens:
    """One prompt with one completion, ready for the model."""

    ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; the last is True
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
    learned = np.flatnonzero(supervised)
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return Tokens(ids[:end], supervised[:end], int(learned[0]) if len(learned) else end)


class Renderer:
    """Renders with the tokenizer's chat template, a template file, or plainly.

    `template`: auto (the tokenizer's chat template, else plain), plain, or the path of a Jinja file. `lost_text`: error
    or keep rows whose supervised text the template leaves out or changes. `date`: the day, as YYYY-MM-DD, for templates
    that ask for it, so that two days give the same tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        lost_text: str = "error",
        date: str = "2025-01-01",
    ) -> None:
        self.tokenizer, self.lost_text = tokenizer, lost_text
        self._strategy: Plain | ChatTemplate
        if template == "plain" or (template == "auto" and not getattr(tokenizer, "chat_template", None)):
            self._strategy = Plain(tokenizer)
        elif template == "auto":
            text, name = tokenizer.get_chat_template(), "the tokenizer's chat template"
            self._strategy = ChatTemplate(tokenizer, dated(text, date, name), name)
        else:
            self._strategy = ChatTemplate(tokenizer, dated(_read_template(template), date, template), template)
        self.name = self._strategy.name
        self.stop_ids = self._strategy.stop_ids
        self.digest = _digest(tokenizer, self._strategy.text)

    def encode(self, prompt: Turns, turns: Turns, name: str = "") -> Tokens:
        """One conversation; `name` is the row's, for errors."""
        return self.encode_many([(prompt, turns)], [name])[0]

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        """Many at once, which is much faster. A row that the template refuses raises :class:`UftError` naming both."""
        return self._strategy.encode_many(conversations, names)

    def prompt_ids(self, prompt: Turns, system: str | None = None) -> list[int]:
        """The prompt as the model sees it when it is to answer. `system` replaces the prompt's own system turn."""
        if system is not None:
            prompt = (Message("system", system), *(turn for turn in prompt if turn.role != "system"))
        return self._strategy.prompt_ids(prompt)


def _read_template(path: str) -> str:
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        advice = ("choices: auto, plain, or a Jinja file",)
        raise UftError(Problem(f"data.template={path}", "no such file", advice=advice))
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UftError(Problem(f"data.template={path}", f"cannot be read: {error}")) from error


_NOW = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def dated(template: str, day: str, name: str) -> str:
    """The template with a fixed day in the place of its calls of `strftime_now`: its text alone decides the tokens."""
    try:
        begins = datetime.fromisoformat(day)
    except ValueError:
        raise UftError(Problem(f"data.date={day}", "no date of the form YYYY-MM-DD")) from None
    fixed = _NOW.sub(lambda call: json.dumps(begins.strftime(call[1] or call[2] or "")), template)
    if re.search(r"strftime_now\s*\(", fixed):
        why = "asks for the date in a form that is not written out, so data.date cannot be set in its place"
        raise UftError(Problem("data.template", f"{name} {why}", advice=("use another data.template",)))
    return fixed


def _digest(tokenizer: Any, text: str) -> str:
    """sha256 over the template and everything of the tokenizer that decides ids: vocabulary, merges, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # left over from an earlier call
            settings.pop(transient, None)
    else:
        settings = sorted(tokenizer.get_vocab().items())
    parts = [text, settings, {name: str(value) for name, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


class Plain:
    """No template: prompt and completion are tokenised apart and joined.

    The tokenizer's own first token stands before, the end-of-text token, which is learned, after every assistant turn.
    Several turns are set apart by a blank line.
    """

    name = "plain"
    text = "plain"  # decides the tokens besides the tokenizer, and enters the digest

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UftError(Problem("data.template=plain", "the tokenizer has no end-of-text token to learn"))
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        bos = tokenizer.bos_token_id
        self._first = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        texts: list[str] = []  # of each conversation the prompt's, then one per turn that follows
        for prompt, turns in conversations:
            texts.append(_joined(prompt))
            texts += [turn.content if turn.role == "assistant" else f"\n\n{turn.content}\n\n" for turn in turns]
        pieces = iter(self._tokenize(texts))
        encoded = []
        for _, turns in conversations:
            ids = self._begin(next(pieces))
            supervised = [False] * len(ids)
            for turn in turns:
                learned = turn.role == "assistant"
                piece = [*next(pieces), *(self.stop_ids if learned else ())]
                ids += piece
                supervised += [learned] * len(piece)
            encoded.append(finish(np.asarray(ids, np.int32), np.asarray(supervised, bool)))
        return encoded

    def prompt_ids(self, prompt: Turns) -> list[int]:
        return self._begin(self._tokenize([_joined(prompt)])[0])

    def _begin(self, ids: list[int]) -> list[int]:
        return list(ids) if ids[: len(self._first)] == self._first else self._first + list(ids)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; special tokens spelled in it are text."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []


def _joined(prompt: Turns) -> str:
    return "\n\n".join(turn.content for turn in prompt)


# --- Chat templates.


_MARK = "\ue000{}\ue001"  # private-use characters: no template and hardly a text contains them
_MARKED = re.compile("\ue000(\\d+)\ue001")
_END = "\ue002"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXCERPT = 160  # characters of a row shown in an error


class LimitExceeded(Exception):
    """A template exceeded a limit; the message says which."""


TEMPLATE_ERRORS = (TemplateError, LimitExceeded, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of a template about a conversation: its own `raise_exception`, and those of its expressions."""


class Rendered(NamedTuple):
    """A conversation as the template writes it, and the characters within its `{% generation %}` marks."""

    text: str
    marks: Sequence[CharSpan]


class Contents(NamedTuple):
    """The contents of a conversation's turns as the template writes them, and where; a turn left out has no place."""

    contents: Sequence[str]
    places: Mapping[int, CharSpan]


class ChatTemplate:
    """One Jinja template with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UftError(
                Problem(
                    f"data.template ({name})",
                    "this tokenizer does not say which characters a token stands for, so replies cannot be found",
                    advice=("train without a chat template:  data.template=plain",),
                )
            )
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self._has_marks = _GENERATION.search(text) is not None
        self._skeletons: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        self.stop_ids = self._end_of_turn()
        self._specials = LiteralSpecials(tokenizer, self.stop_ids)

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        whole = [self._specials.hide((*prompt, *turns)) for prompt, turns in conversations]
        rendered = self._render_rows(whole, names)
        encodings = self._specials.encode([one.text for one in rendered])
        return [
            self._tokens(turns, len(prompt), one, encoded, name)
            for (prompt, _), turns, name, one, encoded in zip(
                conversations, whole, names, rendered, encodings, strict=True
            )
        ]

    def prompt_ids(self, prompt: Turns) -> list[int]:
        turns = self._specials.hide(prompt)
        with self._explained(turns, "prompt"):
            text = self._render([turns], add_generation_prompt=True)[0].text
        return self._specials.encode([text])[0].ids

    # --- masks

    def _tokens(self, turns: Turns, first: int, rendered: Rendered, encoded: Encoded, name: str) -> Tokens:
        """One row, whose prompt has `first` turns, with its mask and notes."""
        found = self._find_contents(turns, rendered.text)
        wanted = [number for number, turn in enumerate(turns) if turn.role == "assistant" and number >= first]
        if self._has_marks:
            spans = self._marked_spans(turns, len(wanted), rendered.marks)
        elif found is not None:
            spans = [found.places[number] for number in wanted if number in found.places]
        else:
            with self._explained(turns, name):
                spans = [self._reply_span(turns, number, rendered.text, name) for number in wanted]
        tokens = self._supervise(rendered.text, encoded, spans)
        notes = [*self._changes(turns, first, found), *self._open_ends(tokens, wanted)]
        if tokens.prompt_length < tokens.length:
            start = self._generation_start(turns[:first], found)
            same = start == rendered.text[: encoded.offsets[tokens.prompt_length][0]] or (
                start is not None and self._specials.encode([start])[0].ids == encoded.ids[: tokens.prompt_length]
            )
            notes += (
                [] if same else [Note("begins replies in training after other text than generation starts from", first)]
            )
        return replace(tokens, notes=tuple(notes)) if notes else tokens

    def _find_contents(self, turns: Turns, text: str) -> Contents | None:
        """The contents in a rendered `text`, as they are or trimmed; None for a template that changes them."""
        pieces = self._skeleton(tuple(turn.role for turn in turns))
        contents = [turn.content for turn in turns]
        for filling in (contents, [content.strip() for content in contents]):
            filled, places = fill(pieces, filling)
            if filled == text:
                return Contents(filling, places)
        return None

    def _skeleton(self, roles: tuple[str, ...], add_generation_prompt: bool = False) -> list[str]:
        """The template's texts for these roles, and between them the numbers of the turns whose contents stand there.

        Empty for a template that refuses to render marks.
        """
        key = roles, add_generation_prompt
        if key not in self._skeletons:
            marks = tuple(Message(role, _MARK.format(number)) for number, role in enumerate(roles))
            try:
                self._skeletons[key] = _MARKED.split(self._render([marks], add_generation_prompt)[0].text)
            except TEMPLATE_ERRORS:  # LimitExceeded among them: a row will show it
                self._skeletons[key] = []
        return self._skeletons[key]

    def _marked_spans(self, turns: Turns, wanted: int, marks: Sequence[CharSpan]) -> Sequence[CharSpan]:
        """Characters of the last `wanted` replies by the template's own marks."""
        runs: list[CharSpan] = []
        for start, end in marks:
            before = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((before, end))
        replies = sum(turn.role == "assistant" for turn in turns)
        return runs[-wanted * max(1, len(runs) // replies) :]  # a template may mark the parts of a reply one by one

    def _reply_span(self, turns: Turns, number: int, text: str, name: str) -> CharSpan:
        """One reply, between the rendering of all before it and a mark at its end, both checked against `text`."""
        before = self._render([turns[:number]], add_generation_prompt=True)[0].text
        if before == self._render([turns[:number]])[0].text:  # no generation prompt: a mark tells where a header ends
            headed = self._render([(*turns[:number], replace(turns[number], content=_END))])[0].text.partition(_END)[0]
            before = headed if headed.rstrip() != before.rstrip() else before
        content = turns[number].content
        for variant in (content, content.rstrip(), content.strip()):
            marked = replace(turns[number], content=variant + _END)
            changed = self._render([(*turns[:number], marked, *turns[number + 1 :])])[0].text
            head, mark, tail = changed.partition(_END)
            if mark and head + tail == text and head.startswith(before):
                return len(before), len(head)
        raise UftError(
            Problem(
                f"row {name}",
                f"{self.name} changes this reply so that its tokens cannot be told from the template's",
                where="data.template",
                advice=(
                    f"reply: {self._excerpt(content)}",
                    "mark what is learned in the template with {% generation %}, or use another data.template",
                ),
            )
        )

    def _supervise(self, text: str, tokens: Encoded, spans: Sequence[CharSpan]) -> Tokens:
        """Supervise every token that holds a character of a span, and on to the stop token that closes it.

        Tokens between (white space before the stop token) are supervised too: a model must write them to get there.
        The template's own marks decide alone, up to the last stop token within: text after it (a newline, usually) is
        not learned.
        """
        ids, offsets = tokens
        supervised = np.zeros(len(ids), bool)
        for span in spans:
            first, last = token_span(offsets, span)
            if self._has_marks:
                last = max((place + 1 for place in range(first, last) if ids[place] in self.stop_ids), default=last)
            else:
                stop = last
                while stop < len(ids) and ids[stop] not in self.stop_ids and not text[slice(*offsets[stop])].strip():
                    stop += 1
                last = stop + 1 if stop < len(ids) and ids[stop] in self.stop_ids else last
            supervised[first:last] = True
        return finish(np.asarray(ids, np.int32), supervised)

    # --- differences between a row and its text

    def _changes(self, turns: Turns, first: int, found: Contents | None) -> Iterator[Note]:
        """Turns that the template leaves out, or whose text it changes (white space aside)."""
        for number, turn in enumerate(turns):
            if found is not None:
                change = "" if number in found.places else "leaves out"
            else:
                change = self._change(turns, number)
            if change:
                yield Note(f"{change} {turn.role} turns", number, turn.role == "assistant" and number >= first)

    def _change(self, turns: Turns, number: int) -> str:
        """The change to one turn by a template that changes contents: nothing, or the verb for it."""
        content = turns[number].content.strip() + _END
        try:
            marked = (*turns[:number], replace(turns[number], content=content), *turns[number + 1 :])
            text = self._render([marked])[0].text
        except TEMPLATE_ERRORS:  # it refuses the mark, not the row
            return ""
        if _END not in text:
            return "leaves out"
        return "" if "".join(content.split()) in "".join(text.split()) else "changes the text of"

    def _open_ends(self, tokens: Tokens, wanted: Sequence[int]) -> Iterator[Note]:
        """Replies before the last whose end-of-turn token is not supervised; that of the last is checked for all."""
        if len(wanted) < 2:
            return
        what = "has no supervised end of assistant turns"
        ends = np.flatnonzero(np.diff(tokens.supervised.astype(np.int8), append=0) == -1)
        is_open = [int(tokens.ids[end]) not in self.stop_ids for end in ends]
        if len(ends) == len(wanted):
            yield from (Note(what, turn) for turn, open_end in zip(wanted, is_open[:-1], strict=False) if open_end)
        elif sum(int(token) in self.stop_ids for token in tokens.ids[tokens.supervised]) < len(wanted):
            yield Note(what, wanted[0])

    def _generation_start(self, prompt: Turns, found: Contents | None) -> str | None:
        """The text that generation starts from; None where the template refuses a prompt."""
        pieces = self._skeleton(tuple(turn.role for turn in prompt), True) if found is not None else []
        if found is not None and pieces:
            return fill(pieces, found.contents)[0]
        try:
            return self._render([prompt], add_generation_prompt=True)[0].text
        except TEMPLATE_ERRORS:
            return None

    # --- rendering

    def _render_rows(self, rows: Sequence[Turns], names: Sequence[str]) -> list[Rendered]:
        """All at once, which is faster; one by one where a row is at fault, or all exceed the limits of one."""
        try:
            return self._render(rows)
        except TEMPLATE_ERRORS:
            rendered = []
            for turns, name in zip(rows, names, strict=True):
                with self._explained(turns, name):
                    rendered += self._render([turns])
            return rendered

    def _render(self, conversations: Sequence[Turns], add_generation_prompt: bool = False) -> list[Rendered]:
        from transformers.utils import chat_template_utils

        write: Any = chat_template_utils.render_jinja_template  # typed to return a single text
        sizes = [sum(len(turn.content) for turn in turns) for turns in conversations]
        with limits(sum(sizes)):
            texts, marks = write(
                [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations],
                chat_template=self.text,
                return_assistant_tokens_mask=self._has_marks,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        for text, size in zip(texts, sizes, strict=True):
            if len(text) > ROOM + ROOM_PER_CHARACTER * size:
                raise LimitExceeded(f"it writes {len(text):,} characters where the conversation has {size:,}")
        return list(map(Rendered, texts, marks or repeat(())))

    @contextmanager
    def _explained(self, turns: Turns, name: str) -> Iterator[None]:
        """The template's complaint about this row becomes a UftError."""
        try:
            yield
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(turn.role for turn in turns)
            raise UftError(
                Problem(
                    f"row {name}",
                    f"{self.name} cannot render it: {error or type(error).__name__}",
                    where="data.template",
                    advice=(f"turns: {roles}", f"starts: {self._excerpt(turns[0].content)}"),
                )
            ) from error

    def _excerpt(self, text: str) -> str:
        shown = self._specials.reveal(text)
        return repr(shown if len(shown) <= _EXCERPT else shown[:_EXCERPT] + " ...")

    def _end_of_turn(self) -> frozenset[int]:
        """The token that this template closes a reply with, and the tokenizer's end-of-text token."""
        stops = {self.tokenizer.eos_token_id} - {None}
        added = set(self.tokenizer.added_tokens_decoder)
        try:
            tail = self._render([(Message("user", "?"), Message("assistant", _END))])[0].text.partition(_END)[2]
        except LimitExceeded as error:
            raise UftError(Problem("data.template", f"{self.name} cannot be used: {error}")) from None
        except TEMPLATE_ERRORS:  # a template that needs more than one exchange: its rows are checked one by one
            tail = ""
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in added:
                stops.add(token)
                break
            if str(self.tokenizer.decode([token])).strip():
                break
        return frozenset(int(token) for token in stops)


def fill(pieces: Sequence[str], contents: Sequence[str]) -> tuple[str, dict[int, CharSpan]]:
    """A skeleton's text with `contents` in it, and the characters of each."""
    filled = [contents[int(piece)] if number % 2 else piece for number, piece in enumerate(pieces)]
    ends = list(accumulate(map(len, filled)))
    places = zip(map(int, pieces[1::2]), zip(ends[::2], ends[1::2], strict=False), strict=True)
    return "".join(filled), dict(places)


def token_span(offsets: Sequence[CharSpan], span: CharSpan) -> tuple[int, int]:
    """[first, last) of the tokens that hold a character of `span`.

    A token that stands for trimmed white space, and so for no character, lies at the end of that space.
    """
    start, end = span
    return bisect_right(offsets, start, key=itemgetter(1)), bisect_left(offsets, end, key=itemgetter(0))


# --- Special tokens spelled in contents: `<|im_end|>` inside a message is text, and must not end a turn.
#
# A tokenizer finds its special tokens in any text. So before a conversation is rendered, each one that a content spells
# is replaced by a private-use character, which a second tokenizer takes for a token of its own; in the ids, that one is
# then replaced by those of the spelling. The text around it becomes the tokens that it would beside a special token.
# (`encode_special_tokens` of `tokenizers` alone does not do: it would take the template's own special tokens for text.)


STAND_INS = 0xF0000  # the first of them, in a plane that no text uses


class Encoded(NamedTuple):
    """A text as tokens, each with the characters [start, end) that it stands for."""

    ids: list[int]
    offsets: list[CharSpan]


class LiteralSpecials:
    """A tokenizer for texts whose contents spell its special tokens, and those in `more` (ids)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: frozenset[int] = frozenset()) -> None:
        added = tokenizer.added_tokens_decoder.items()
        special = [token.content for number, token in added if token.special or number in more]
        # a stand-in that a content has already is itself stood in for
        texts = [*special, *(chr(STAND_INS + number) for number in range(2 * len(special)))]
        self._tokenizer = tokenizer.backend_tokenizer
        self._stand_in = {text: chr(STAND_INS + number) for number, text in enumerate(texts) if text}
        longest_first = sorted(self._stand_in, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special else "(?!)")
        self._first_letters = {text[0] for text in special if text and text[0].isascii()}

    def hide(self, turns: Turns) -> Turns:
        """The turns with stand-ins for the special tokens that their contents spell."""
        texts = [turn.content for turn in turns]
        if all(text.isascii() and not any(letter in text for letter in self._first_letters) for text in texts):
            return turns  # most are plain ASCII without the first letter of any, a fast test
        hidden = (self._pattern.sub(lambda found: self._stand_in[found[0]], text) for text in texts)
        return tuple(replace(turn, content=text) for turn, text in zip(turns, hidden, strict=True))

    def reveal(self, text: str) -> str:
        """A text with the spellings instead of their stand-ins."""
        return text.translate({ord(stand_in): spelled for spelled, stand_in in self._stand_in.items()})

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of each text, those of the spelling at the place of a stand-in."""
        literal = any(chr(STAND_INS) <= max(text, default="") for text in texts if not text.isascii())
        backend = self._extended if literal else self._tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False  # an earlier caller may have set it
        encoded = []
        for one in backend.encode_batch(texts, add_special_tokens=False):
            ids, offsets = one.ids, one.offsets
            if literal:
                spelled = [self._spellings.get(token, [token]) for token in ids]
                ids = [token for tokens in spelled for token in tokens]
                offsets = [span for span, tokens in zip(offsets, spelled, strict=True) for _ in tokens]
            encoded.append(Encoded(ids, offsets))
        return encoded

    @cached_property
    def _extended(self) -> Tokenizer:
        """A copy of the tokenizer that also knows the stand-ins."""
        extended = Tokenizer.from_str(self._tokenizer.to_str())
        extended.add_special_tokens([AddedToken(one, normalized=False) for one in self._stand_in.values()])
        return extended

    @cached_property
    def _spellings(self) -> dict[int, list[int]]:
        """A stand-in's id: the ids of its original as plain text."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        spelled = plain.encode_batch(list(self._stand_in), add_special_tokens=False)
        numbers = self._extended.get_vocab()
        return {numbers[mark]: one.ids for mark, one in zip(self._stand_in.values(), spelled, strict=True)}


# --- Limits of templates, which come with a model and are run here: processor time, memory, and length of the output.
#
# Templates are rendered in Jinja's sandbox, which keeps them from files and from Python's insides, but not from loops
# without end. Time is that of the processor, so that a slow or stopped machine refuses nothing.


SECONDS = 5.0  # for one conversation, which takes a thousandth of that
AGAIN = 0.5  # seconds after which the alarm is repeated, should the first have been lost
MEMORY, MEMORY_PER_CHARACTER = 256 * 2**20, 64  # bytes beyond the process's own
ROOM, ROOM_PER_CHARACTER = 1_000_000, 16  # characters written
STATM = Path("/proc/self/statm")

_running = False


@contextmanager
def limits(characters: int) -> Iterator[None]:
    """Time and memory for templates that write conversations of so many `characters`; raises :class:`LimitExceeded`.

    Elsewhere than in the main thread, time is not limited; elsewhere than on Linux, memory is not.
    """
    global _running
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    timed = threading.current_thread() is threading.main_thread()
    if timed and signal.getsignal(signal.SIGPROF) is not _time_is_up:
        signal.signal(signal.SIGPROF, _time_is_up)
    try:
        if STATM.exists():
            size = int(STATM.read_bytes().split()[0]) * resource.getpagesize()
            limit = size + MEMORY + MEMORY_PER_CHARACTER * characters
            if all(bound == resource.RLIM_INFINITY or bound >= limit for bound in (soft, hard)):
                resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        if timed:
            _running = True
            signal.setitimer(signal.ITIMER_PROF, SECONDS, AGAIN)
        yield
    except MemoryError:
        raise LimitExceeded("it needs too much memory") from None
    except RecursionError:
        raise LimitExceeded("it calls itself too deeply") from None
    finally:
        if timed:
            _running = False  # first: a late alarm raises nothing
            signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _time_is_up(number: int, frame: FrameType | None) -> None:
    if _running:
        raise LimitExceeded(f"it takes more than {SECONDS:g} seconds")
