"""Chat templates: where the assistant's words are in a rendered conversation.

A conversation is rendered once, whole, and that text alone is tokenised. Where the words of each turn lie in it is
known from the template's skeleton: the same roles rendered with marks for contents. Filling the contents into the
skeleton must give the rendered text back, character by character; a reply that repeats an earlier turn cannot mislead
it. A template that changes contents by what they say (thinking tags) is followed turn by turn instead, again held to
the one rendering. Templates with `{% generation %}` marks say themselves what is learned.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import AddedToken, Tokenizer

from uft.data.rows import Message
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000{}\ue001"  # private-use characters: no template and hardly a text contains them
_MARKED = re.compile("\ue000(\\d+)\ue001")
_END = "\ue002"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EXCERPT = 160  # characters of a row shown in an error


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
        self._marked = _GENERATION.search(text) is not None
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        self.stop_ids = self._end_of_turn()
        self._spelled = LiteralSpecials(tokenizer, self.stop_ids)

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        spelling = [self._spelled.inside((*prompt, *turns)) for prompt, turns in conversations]
        if not any(spelling):
            return self._encode(conversations, names, self.tokenizer)

        def those(spells: bool, items: Sequence[Any]) -> list[Any]:
            return [item for item, one in zip(items, spelling, strict=True) if one == spells]

        hidden = [(self._spelled.hidden(p), self._spelled.hidden(t)) for p, t in those(True, conversations)]
        usual = iter(self._encode(those(False, conversations), those(False, names), self.tokenizer))
        others = iter(self._encode(hidden, those(True, names), self._spelled.tokenizer))
        return [finish(*self._spelled.shown(next(others))) if spells else next(usual) for spells in spelling]

    def _encode(
        self, conversations: Sequence[Conversation], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> list[Tokens]:
        if not conversations:
            return []
        whole = [(*prompt, *turns) for prompt, turns in conversations]
        encode = self._by_marks if self._marked else self._by_offsets
        try:
            return encode(conversations, whole, names, tokenizer)
        except _template_errors():
            for turns, name in zip(whole, names, strict=True):  # one of them is at fault: find it to name it
                self._explained(partial(self._render, turns), turns, name)
            raise

    def prompt_ids(self, prompt: Turns) -> list[int]:
        spells = self._spelled.inside(prompt)
        turns = self._spelled.hidden(prompt) if spells else prompt
        tokenizer = self._spelled.tokenizer if spells else self.tokenizer
        text = self._explained(partial(self._render, turns, add_generation_prompt=True), prompt, "prompt")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._spelled.ids(ids) if spells else ids

    # --- by the characters of the reply

    def _by_offsets(
        self,
        conversations: Sequence[Conversation],
        whole: Sequence[Turns],
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Tokens]:
        texts = self._render_all(whole)
        backend = tokenizer.backend_tokenizer  # offsets without the wrapper's copies of everything: a fifth faster
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False  # whoever called it last may have asked for another way
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        out = []
        for (prompt, _), turns, text, encoding, name in zip(conversations, whole, texts, encodings, names, strict=True):
            spans = self._spans(turns, len(prompt), text, name)
            out.append(self._supervise(text, encoding, spans))
        return out

    def _spans(self, turns: Turns, first: int, text: str, name: str) -> list[Span]:
        """Characters of every assistant turn from number `first` on, in the rendered `text`."""
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        contents = [turn.content for turn in turns]
        for said in (contents, [content.strip() for content in contents]) if skeleton else ():
            places = fill(skeleton, said, text)
            if places is not None:
                return [places[n] for n, t in enumerate(turns) if n >= first and t.role == "assistant" and n in places]
        return [
            self._turn_span(turns, number, text, name)
            for number, turn in enumerate(turns)
            if number >= first and turn.role == "assistant"
        ]

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The template around contents, for these roles; None for a template that refuses to render marks."""
        if roles not in self._skeletons:
            marks = tuple(Message(role, _MARK.format(number)) for number, role in enumerate(roles))
            try:
                pieces = _MARKED.split(self._render(marks))
                self._skeletons[roles] = pieces[::2], [int(number) for number in pieces[1::2]]
            except _template_errors():  # TooMuch among them: a row will show it
                self._skeletons[roles] = None
        return self._skeletons[roles]

    def _turn_span(self, turns: Turns, number: int, text: str, name: str) -> Span:
        """One reply, between the rendering of all before it and a mark at its end, both checked against `text`."""
        before = self._render(turns[:number], add_generation_prompt=True)
        content = turns[number].content
        for said in (content, content.rstrip(), content.strip()):
            marked = Message("assistant", said + _END)
            head, mark, tail = self._render((*turns[:number], marked, *turns[number + 1 :])).partition(_END)
            if mark and head + tail == text and head.startswith(before):
                return len(before), len(head)
        raise UftError(
            Problem(
                f"row {name}",
                f"{self.name} changes this reply so that its tokens cannot be told from the template's",
                where="data.template",
                advice=(
                    f"reply: {_excerpt(content)}",
                    "mark what is learned in the template with {% generation %}, or use another data.template",
                ),
            )
        )

    def _supervise(self, text: str, encoding: Encoding, spans: Sequence[Span]) -> Tokens:
        """Mark every token that holds a character of a span, and on to the stop token that closes it.

        Tokens between (white space before the stop token) are marked too: a model must write them to get there.
        """
        ids = np.asarray(encoding.ids, np.int32)
        supervised = np.zeros(len(ids), bool)
        for span in spans:
            first, last = tokens(encoding, span)
            stop = last
            while (
                stop < len(ids)
                and ids[stop] not in self.stop_ids
                and not text[slice(*characters(encoding, stop))].strip()
            ):
                stop += 1
            closed = stop < len(ids) and ids[stop] in self.stop_ids
            supervised[first : stop + 1 if closed else last] = True
        return finish(ids, supervised)

    # --- by the template's own marks

    def _by_marks(
        self,
        conversations: Sequence[Conversation],
        whole: Sequence[Turns],
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Tokens]:
        self._render_all(whole)  # within limits, which the call below does not know
        encoded: Any = tokenizer.apply_chat_template(
            [_dicts(turns) for turns in whole],
            chat_template=self.text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        out = []
        for number, (_, turns) in enumerate(conversations):
            ids = np.asarray(encoded["input_ids"][number], np.int32)
            runs = mask_spans(np.asarray(encoded["assistant_masks"][number], bool))
            replies, wanted = _assistants(whole[number]), _assistants(turns)
            per_reply = max(1, len(runs) // replies)  # a template may mark the parts of a reply one by one
            supervised = np.zeros(len(ids), bool)
            for start, end in runs[-wanted * per_reply :]:
                supervised[start : self._closed(ids, start, end)] = True
            out.append(finish(ids, supervised))
        return out

    def _closed(self, ids: np.ndarray, start: int, end: int) -> int:
        """The end of a marked run without what stands after its last stop token (a newline, usually)."""
        stops = [place for place in range(start, end) if int(ids[place]) in self.stop_ids]
        return stops[-1] + 1 if stops else end

    # --- rendering

    def _render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._render_within([turns], add_generation_prompt)[0]

    def _render_all(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """All at once, which is faster; one by one where they are too much for the limits of one."""
        try:
            return self._render_within(conversations)
        except TooMuch:
            return [self._render(turns) for turns in conversations]

    def _render_within(
        self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = False
    ) -> list[str]:
        write: Any = partial(
            self.tokenizer.apply_chat_template,
            [_dicts(turns) for turns in conversations],
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return render(write, [sum(len(turn.content) for turn in turns) for turns in conversations])

    def _explained(self, render: Callable[[], str], turns: Turns, name: str) -> str:
        """The rendering, or what the template has against this row."""
        try:
            return render()
        except _template_errors() as error:
            roles = ", ".join(turn.role for turn in turns)
            raise UftError(
                Problem(
                    f"row {name}",
                    f"{self.name} cannot render it: {error or type(error).__name__}",
                    where="data.template",
                    advice=(f"turns: {roles}", f"starts: {_excerpt(turns[0].content)}"),
                )
            ) from error

    def _end_of_turn(self) -> frozenset[int]:
        """The token that this template closes a reply with, and the tokenizer's end-of-text token."""
        stops = {self.tokenizer.eos_token_id} - {None}
        added = set(self.tokenizer.added_tokens_decoder)
        try:
            tail = self._render((Message("user", "?"), Message("assistant", _END))).partition(_END)[2]
        except TooMuch as error:
            raise UftError(Problem("data.template", f"{self.name} cannot be used: {error}")) from None
        except _template_errors():  # a template that needs more than one exchange: its rows are checked one by one
            tail = ""
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in added:
                stops.add(token)
                break
            if str(self.tokenizer.decode([token])).strip():
                break
        return frozenset(int(token) for token in stops)


def _assistants(turns: Sequence[Message]) -> int:
    return sum(turn.role == "assistant" for turn in turns)


def _dicts(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ...")


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template raises about a conversation: its own `raise_exception`, and what its expressions run into."""
    from jinja2 import TemplateError

    return TemplateError, TooMuch, ArithmeticError, AttributeError, LookupError, TypeError, ValueError


# --- Rendering: a prompt and its completion as token ids, with the tokens that are learned.
#
# Supervised are the tokens of the assistant's own turns and the end-of-turn token after each: never the header, nor
# what
# the template puts after the end-of-turn token. Two ways lead there: a chat template (:mod:`uft.data.chat`), and
# `plain`
# for base models without one. Both give ids that end at the last supervised token; nothing after it is ever needed.


Turns = tuple[Message, ...]
Conversation = tuple[Turns, Turns]  # (prompt, what follows it)


@dataclass(frozen=True)
class Tokens:
    """One prompt with one completion, ready for the model."""

    ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; the last is True
    prompt_length: int  # tokens before the first supervised one

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Supervised tokens that a model can be asked for: the first token of a sequence has no predictor."""
        return int(self.supervised[1:].sum())


class Strategy(Protocol):
    """How conversations become tokens. `text` is what decides besides the tokenizer; it enters the digest."""

    name: str
    text: str
    stop_ids: frozenset[int]

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]: ...

    def prompt_ids(self, prompt: Turns) -> list[int]: ...


class Renderer:
    """Renders with the tokenizer's chat template, a template of one's own, or plainly.

    `template`: auto (the tokenizer's chat template, else plain), plain, or the path of a Jinja file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:

        own = getattr(tokenizer, "chat_template", None)
        self.tokenizer = tokenizer
        self._strategy: Strategy
        if template == "plain" or (template == "auto" and not own):
            self._strategy = Plain(tokenizer)
        elif template == "auto":
            self._strategy = ChatTemplate(tokenizer, tokenizer.get_chat_template(), "the tokenizer's chat template")
        else:
            self._strategy = ChatTemplate(tokenizer, _read(template), template)
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


class Plain:
    """No template: prompt and completion are tokenised apart and joined.

    The tokenizer's own first token stands before, the end-of-text token, which is learned, after every assistant turn.
    Several turns are set apart by a blank line.
    """

    name = "plain"
    text = "plain"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UftError(Problem("data.template=plain", "the tokenizer has no end-of-text token to learn"))
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        bos = tokenizer.bos_token_id
        self._first = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        texts = [piece for conversation in conversations for piece in self._pieces(*conversation)]
        ids = iter(self._tokenise(texts))
        return [self._join(turns, [next(ids) for _ in range(len(turns) + 1)]) for _, turns in conversations]

    def prompt_ids(self, prompt: Turns) -> list[int]:
        return self._begin(self._tokenise([self._opening(prompt)])[0])

    def _pieces(self, prompt: Turns, turns: Turns) -> list[str]:
        """The prompt's text, then one text per turn that follows."""
        said = [turn.content if turn.role == "assistant" else f"\n\n{turn.content}\n\n" for turn in turns]
        return [self._opening(prompt), *said]

    def _join(self, turns: Turns, pieces: list[list[int]]) -> Tokens:
        ids = self._begin(pieces[0])
        supervised = [False] * len(ids)
        for turn, piece in zip(turns, pieces[1:], strict=True):
            learned = turn.role == "assistant"
            ending = [*self.stop_ids] if learned else []
            ids += piece + ending
            supervised += [learned] * (len(piece) + len(ending))
        return finish(np.asarray(ids, np.int32), np.asarray(supervised, bool))

    def _begin(self, ids: list[int]) -> list[int]:
        return list(ids) if ids[: len(self._first)] == self._first else self._first + list(ids)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Special tokens that a text spells are text."""
        given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **given)["input_ids"] if texts else []

    @staticmethod
    def _opening(prompt: Turns) -> str:
        return "\n\n".join(turn.content for turn in prompt)


def finish(ids: np.ndarray, supervised: np.ndarray) -> Tokens:
    """Ids cut after the last supervised token; uncut where nothing is supervised, for the check that will say so."""
    learned = np.flatnonzero(supervised)
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return Tokens(ids[:end], supervised[:end], int(learned[0]) if len(learned) else end)


def _read(path: str) -> str:
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        raise UftError(
            Problem(f"data.template={path}", "no such file", advice=("choices: auto, plain, or a Jinja file",))
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UftError(Problem(f"data.template={path}", f"cannot be read: {error}")) from error


def _digest(tokenizer: Any, text: str) -> str:
    """sha256 over the template and everything of the tokenizer that decides ids: vocabulary, merges, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # left over from whoever called it last
            settings.pop(passing, None)
    else:
        settings = sorted(tokenizer.get_vocab().items())
    what = [text, settings, {name: str(value) for name, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8")).hexdigest()


# --- Special tokens that somebody spelled: `<|im_end|>` inside a message is text, and must not end a turn.
#
# A tokenizer finds its special tokens in any text. So before a conversation is rendered, each one that a content
# spells
# gives way to a private-use character, which a second tokenizer takes for a token of its own; of the ids, that one is
# then replaced by those of the spelling. What stands around it becomes the tokens that it would beside a special
# token.


STAND_INS = 0xF0000  # the first of them; nobody writes in this plane


class LiteralSpecials:
    """The special tokens of one tokenizer, and those in `more` (ids), where contents spell them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: frozenset[int] = frozenset()) -> None:
        added = tokenizer.added_tokens_decoder.items()
        special = [token.content for number, token in added if token.special or number in more]
        # a stand-in that a content has already is itself stood in for
        texts = [*special, *(chr(STAND_INS + number) for number in range(2 * len(special)))]
        self._tokenizer = tokenizer
        self._stand_in = {text: chr(STAND_INS + number) for number, text in enumerate(texts) if text}
        longest_first = sorted(self._stand_in, key=len, reverse=True)
        self._first = {text[0] for text in special if text and text[0].isascii()}
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None

    def inside(self, turns: Sequence[Message]) -> bool:
        """Whether a content spells any."""
        return self._pattern is not None and any(map(self._spells, turns))

    def _spells(self, turn: Message) -> bool:
        """Most texts are plain ASCII without the character that special tokens begin with, which is seen at once."""
        text, pattern = turn.content, self._pattern
        if text.isascii() and not any(first in text for first in self._first):
            return False
        return pattern is not None and pattern.search(text) is not None

    def hidden(self, turns: Sequence[Message]) -> tuple[Message, ...]:
        """The turns with stand-ins."""
        pattern = self._pattern
        if pattern is None:
            return tuple(turns)
        return tuple(
            replace(turn, content=pattern.sub(lambda found: self._stand_in[found[0]], turn.content)) for turn in turns
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that also knows the stand-ins."""
        made = copy.deepcopy(self._tokenizer)
        stand_ins = [AddedToken(one, normalized=False, special=True) for one in self._stand_in.values()]
        made.add_tokens(stand_ins, special_tokens=True)
        return made

    @cached_property
    def _plain(self) -> dict[int, list[int]]:
        """A stand-in's id: the ids of what it stands for, as plain text."""
        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        texts, stand_ins = list(self._stand_in), list(self._stand_in.values())
        numbers: Any = self.tokenizer.convert_tokens_to_ids(stand_ins)
        spelled = plain.encode_batch(texts, add_special_tokens=False)
        return {number: one.ids for number, one in zip(numbers, spelled, strict=True)}

    def ids(self, ids: Sequence[int]) -> list[int]:
        """Ids with every stand-in replaced by its spelling."""
        return [token for one in ids for token in self._plain.get(one, (one,))]

    def shown(self, encoded: Tokens) -> tuple[np.ndarray, np.ndarray]:
        """(ids, supervised) likewise; a spelling is supervised where its stand-in is."""
        lengths = [len(self._plain.get(one, (one,))) for one in encoded.ids.tolist()]
        return np.asarray(self.ids(encoded.ids.tolist()), np.int32), np.repeat(encoded.supervised, lengths)


# --- Where pieces of a text lie in it: in characters, and in the tokens that a tokenizer made of it.


Span = tuple[int, int]  # characters [start, end)
Skeleton = tuple[list[str], list[int]]  # texts around the contents (one more than those), and whose content is between
NEAR = 3  # characters


def fill(skeleton: Skeleton | None, contents: Sequence[str], text: str) -> dict[int, Span] | None:
    """Where each content lies if the skeleton filled with `contents` is exactly `text`; else None."""
    assert skeleton is not None
    around, whose = skeleton
    parts, places, length = [around[0]], {}, len(around[0])
    for number, after in zip(whose, around[1:], strict=True):
        places[number] = (length, length + len(contents[number]))
        parts += [contents[number], after]
        length = places[number][1] + len(after)
    return places if "".join(parts) == text else None


def tokens(encoding: Encoding, span: Span) -> Span:
    """[first, last) of the tokens that hold a character of `span`.

    A few look-ups do for most; where they do not settle it, all offsets are looked through. A token that stands for
    trimmed white space, and so for no character, lies at the end of what it stands for.
    """
    start, end = span
    first, last = _near(encoding, start), _near(encoding, end)
    if (
        first is not None
        and last is not None
        and (first == 0 or characters(encoding, first - 1)[1] <= start)
        and (last == 0 or characters(encoding, last - 1)[0] < end)
        and start < characters(encoding, first)[1]
        and end <= characters(encoding, last)[0]
    ):
        return first, last
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))


def _near(encoding: Encoding, place: int) -> int | None:
    """A token at that character or, over white space that is in none, soon after it."""
    for character in range(place, place + NEAR):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return None


def characters(encoding: Encoding, token: int) -> Span:
    span = encoding.token_to_chars(token)
    assert span is not None, "only tokens that a tokenizer adds on its own stand for nothing, and none were asked for"
    return span


def mask_spans(mask: np.ndarray) -> list[Span]:
    """[start, end) of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# --- Limits for what comes with a model and is run here: a chat template gets some processor time, memory and room.
#
# Templates are rendered in Jinja's sandbox, which keeps them from files and from Python's insides, and lets them loop
# and
# write without end. Time is that of the processor, so that a slow or stopped machine refuses nothing.


SECONDS = 5.0  # for one conversation, which takes a thousandth of that
AGAIN = 0.5  # seconds after which time is called again, should the first call have been lost
MEMORY, MEMORY_PER_CHARACTER = 256 * 2**20, 64  # bytes beyond what the process has
ROOM, ROOM_PER_CHARACTER = 1_000_000, 16  # characters written
STATM = Path("/proc/self/statm")

_running = False


class TooMuch(Exception):
    """It took more than it may; the message says what."""


def render(template: Callable[[], list[str]], characters: Sequence[int]) -> list[str]:
    """The texts that `template` writes, each made of so many `characters`. Raises :class:`TooMuch`.

    All of them together have the time and the memory of one. Elsewhere than in the main thread, time is not limited;
    elsewhere than on Linux, memory is not.
    """
    try:
        with _time(), _memory(MEMORY + MEMORY_PER_CHARACTER * sum(characters)):
            texts = template()
    except MemoryError:
        raise TooMuch("it needs too much memory") from None
    except RecursionError:
        raise TooMuch("it calls itself too deeply") from None
    for text, given in zip(texts, characters, strict=True):
        if len(text) > ROOM + ROOM_PER_CHARACTER * given:
            raise TooMuch(f"it writes {len(text):,} characters where the conversation has {given:,}")
    return texts


@contextmanager
def _time() -> Iterator[None]:
    global _running
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGPROF) is not _time_is_up:
        signal.signal(signal.SIGPROF, _time_is_up)
    _running = True
    signal.setitimer(signal.ITIMER_PROF, SECONDS, AGAIN)
    try:
        yield
    finally:
        _running = False  # first: a late call raises nothing
        signal.setitimer(signal.ITIMER_PROF, 0)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    if _running:
        raise TooMuch(f"it takes more than {SECONDS:g} seconds")


@contextmanager
def _memory(more: int) -> Iterator[None]:
    """The process may grow by so many bytes and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _size() + more if STATM.exists() else resource.RLIM_INFINITY
    bounds = [bound for bound in (soft, hard, wanted) if bound != resource.RLIM_INFINITY]
    if wanted == resource.RLIM_INFINITY or min(bounds) != wanted:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _size() -> int:
    """Bytes of address space that this process has."""
    return int(STATM.read_bytes().split()[0]) * resource.getpagesize()
