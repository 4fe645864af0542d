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
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from uft.data.rows import Message, Turns
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Conversation = tuple[Turns, Turns]  # (prompt, the turns after it)
CharSpan = tuple[int, int]  # characters [start, end)


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
        """Supervised tokens that have a predictor: all but the first token of the sequence."""
        return int(self.supervised[1:].sum())


def finish(ids: np.ndarray, supervised: np.ndarray) -> Tokens:
    """Ids cut after the last supervised token; uncut where nothing is supervised, for the check that reports it."""
    learned = np.flatnonzero(supervised)
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return Tokens(ids[:end], supervised[:end], int(learned[0]) if len(learned) else end)


class Renderer:
    """Renders with the tokenizer's chat template, a template file, or plainly.

    `template`: auto (the tokenizer's chat template, else plain), plain, or the path of a Jinja file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:
        own = getattr(tokenizer, "chat_template", None)
        self.tokenizer = tokenizer
        self._strategy: Plain | ChatTemplate
        if template == "plain" or (template == "auto" and not own):
            self._strategy = Plain(tokenizer)
        elif template == "auto":
            self._strategy = ChatTemplate(tokenizer, tokenizer.get_chat_template(), "the tokenizer's chat template")
        else:
            self._strategy = ChatTemplate(tokenizer, _read_template(template), template)
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
            texts.append(_joined_prompt(prompt))
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
        return self._begin(self._tokenize([_joined_prompt(prompt)])[0])

    def _begin(self, ids: list[int]) -> list[int]:
        return list(ids) if ids[: len(self._first)] == self._first else self._first + list(ids)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; special tokens spelled in it are text."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []


def _joined_prompt(prompt: Turns) -> str:
    return "\n\n".join(turn.content for turn in prompt)


# --- Chat templates.


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
        self._has_marks = _GENERATION.search(text) is not None
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}
        self.stop_ids = self._end_of_turn()
        self._specials = LiteralSpecials(tokenizer, self.stop_ids)

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        specials, encoded = self._specials, dict[int, Tokens]()
        spelling = [specials.spelled_in((*prompt, *turns)) for prompt, turns in conversations]
        for literal in sorted(set(spelling)):
            places = [place for place, one in enumerate(spelling) if one == literal]
            chosen = [conversations[place] for place in places]
            labels = [names[place] for place in places]
            if literal:
                hidden = [(specials.hide(prompt), specials.hide(turns)) for prompt, turns in chosen]
                done = [specials.restore(one) for one in self._encode_batch(hidden, labels, specials.tokenizer)]
            else:
                done = self._encode_batch(chosen, labels, self.tokenizer)
            encoded |= zip(places, done, strict=True)
        return [encoded[place] for place in range(len(conversations))]

    def prompt_ids(self, prompt: Turns) -> list[int]:
        literal = self._specials.spelled_in(prompt)
        turns, tokenizer = (
            (self._specials.hide(prompt), self._specials.tokenizer) if literal else (prompt, self.tokenizer)
        )
        text = self._explain(partial(self._render, turns, add_generation_prompt=True), prompt, "prompt")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._specials.restore_ids(ids) if literal else ids

    def _encode_batch(
        self, conversations: Sequence[Conversation], names: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> list[Tokens]:
        whole = [(*prompt, *turns) for prompt, turns in conversations]
        try:
            texts = self._render_all(whole)
            if self._has_marks:
                return self._encode_by_marks(conversations, whole, tokenizer)
            backend = tokenizer.backend_tokenizer  # offsets without the wrapper's copies of everything: a fifth faster
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = False  # an earlier caller may have set it
            encodings = backend.encode_batch(texts, add_special_tokens=False)
            parts = zip(conversations, whole, texts, encodings, names, strict=True)
            return [
                self._supervise(text, encoding, self._reply_spans(turns, len(prompt), text, name))
                for (prompt, _), turns, text, encoding, name in parts
            ]
        except _template_errors():
            for turns, name in zip(whole, names, strict=True):  # one of them is at fault: find it to name it
                self._explain(partial(self._render, turns), turns, name)
            raise

    # --- masks by the characters of the replies

    def _reply_spans(self, turns: Turns, first: int, text: str, name: str) -> list[CharSpan]:
        """Characters of every assistant turn from number `first` on, in the rendered `text`."""
        replies = [n for n, turn in enumerate(turns) if n >= first and turn.role == "assistant"]
        skeleton = self._skeleton(tuple(turn.role for turn in turns))
        if skeleton is not None:
            contents = [turn.content for turn in turns]
            for filling in (contents, [content.strip() for content in contents]):
                places = fill(skeleton, filling, text)
                if places is not None:
                    return [places[n] for n in replies if n in places]
        return [self._reply_span(turns, n, text, name) for n in replies]

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The template around contents, for these roles; None for a template that refuses to render marks."""
        if roles not in self._skeletons:
            marks = tuple(Message(role, _MARK.format(number)) for number, role in enumerate(roles))
            try:
                pieces = _MARKED.split(self._render(marks))
                self._skeletons[roles] = pieces[::2], [int(number) for number in pieces[1::2]]
            except _template_errors():  # LimitExceeded among them: a row will show it
                self._skeletons[roles] = None
        return self._skeletons[roles]

    def _reply_span(self, turns: Turns, number: int, text: str, name: str) -> CharSpan:
        """One reply, between the rendering of all before it and a mark at its end, both checked against `text`."""
        before = self._render(turns[:number], add_generation_prompt=True)
        content = turns[number].content
        for variant in (content, content.rstrip(), content.strip()):
            marked = Message("assistant", variant + _END)
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

    def _supervise(self, text: str, encoding: Encoding, spans: Sequence[CharSpan]) -> Tokens:
        """Mark every token that holds a character of a span, and on to the stop token that closes it.

        Tokens between (white space before the stop token) are marked too: a model must write them to get there.
        """
        ids = np.asarray(encoding.ids, np.int32)
        supervised = np.zeros(len(ids), bool)
        for span in spans:
            first, last = token_span(encoding, span)
            stop = last
            while (
                stop < len(ids)
                and ids[stop] not in self.stop_ids
                and not text[slice(*_characters_of(encoding, stop))].strip()
            ):
                stop += 1
            closed = stop < len(ids) and ids[stop] in self.stop_ids
            supervised[first : stop + 1 if closed else last] = True
        return finish(ids, supervised)

    # --- masks by the template's own marks

    def _encode_by_marks(
        self, conversations: Sequence[Conversation], whole: Sequence[Turns], tokenizer: PreTrainedTokenizerBase
    ) -> list[Tokens]:
        """The caller has rendered `whole` within the limits, which this call does not have."""
        found: Any = tokenizer.apply_chat_template(
            [_dicts(turns) for turns in whole],
            chat_template=self.text,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        encoded = []
        for number, (_, turns) in enumerate(conversations):
            ids = np.asarray(found["input_ids"][number], np.int32)
            mask = np.concatenate(([False], np.asarray(found["assistant_masks"][number], bool), [False]))
            edges = np.flatnonzero(np.diff(mask.astype(np.int8))).tolist()
            runs = list(zip(edges[::2], edges[1::2], strict=True))  # [start, end) of every marked stretch
            replies, wanted = (sum(turn.role == "assistant" for turn in of) for of in (whole[number], turns))
            per_reply = max(1, len(runs) // replies)  # a template may mark the parts of a reply one by one
            supervised = np.zeros(len(ids), bool)
            for start, end in runs[-wanted * per_reply :]:
                # text after the last stop token of a run (a newline, usually) is not learned
                stops = [place for place in range(start, end) if int(ids[place]) in self.stop_ids]
                supervised[start : stops[-1] + 1 if stops else end] = True
            encoded.append(finish(ids, supervised))
        return encoded

    # --- rendering

    def _render(self, turns: Sequence[Message], add_generation_prompt: bool = False) -> str:
        return self._render_batch([turns], add_generation_prompt)[0]

    def _render_all(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """All at once, which is faster; one by one where they exceed the limits of one."""
        try:
            return self._render_batch(conversations)
        except LimitExceeded:
            return [self._render(turns) for turns in conversations]

    def _render_batch(
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

    def _explain(self, render: Callable[[], str], turns: Turns, name: str) -> str:
        """The rendering, or UftError with the template's complaint about this row."""
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
        except LimitExceeded as error:
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


def _dicts(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ...")


def _template_errors() -> tuple[type[Exception], ...]:
    """Errors of a template about a conversation: its own `raise_exception`, and those of its expressions."""
    from jinja2 import TemplateError

    return TemplateError, LimitExceeded, ArithmeticError, AttributeError, LookupError, TypeError, ValueError


# --- Spans: where a content lies in a text, in characters and in tokens.


Skeleton = tuple[list[str], list[int]]  # texts around the contents (one more than those), and whose content is between
NEAR = 3  # characters


def fill(skeleton: Skeleton, contents: Sequence[str], text: str) -> dict[int, CharSpan] | None:
    """Where each content lies if the skeleton filled with `contents` is exactly `text`; else None."""
    around, whose = skeleton
    parts, places, length = [around[0]], {}, len(around[0])
    for number, after in zip(whose, around[1:], strict=True):
        places[number] = (length, length + len(contents[number]))
        parts += [contents[number], after]
        length = places[number][1] + len(after)
    return places if "".join(parts) == text else None


def token_span(encoding: Encoding, span: CharSpan) -> tuple[int, int]:
    """[first, last) of the tokens that hold a character of `span`.

    A few look-ups suffice for most; where they do not settle it, all offsets are searched. A token that stands for
    trimmed white space, and so for no character, lies at the end of that space.
    """
    start, end = span
    first, last = _token_near(encoding, start), _token_near(encoding, end)
    if (
        first is not None
        and last is not None
        and (first == 0 or _characters_of(encoding, first - 1)[1] <= start)
        and (last == 0 or _characters_of(encoding, last - 1)[0] < end)
        and start < _characters_of(encoding, first)[1]
        and end <= _characters_of(encoding, last)[0]
    ):
        return first, last
    starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
    return int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left"))


def _token_near(encoding: Encoding, place: int) -> int | None:
    """A token at that character or, over white space that is in none, soon after it."""
    for character in range(place, place + NEAR):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return None


def _characters_of(encoding: Encoding, token: int) -> CharSpan:
    span = encoding.token_to_chars(token)
    assert span is not None, "only tokens that a tokenizer adds on its own have no characters, and none were asked for"
    return span


# --- Special tokens spelled in contents: `<|im_end|>` inside a message is text, and must not end a turn.
#
# A tokenizer finds its special tokens in any text. So before a conversation is rendered, each one that a content spells
# is replaced by a private-use character, which a second tokenizer takes for a token of its own; in the ids, that one is
# then replaced by those of the spelling. The text around it becomes the tokens that it would beside a special token.
# (`encode_special_tokens` of `tokenizers` alone does not do: it would take the template's own special tokens for text.)


STAND_INS = 0xF0000  # the first of them, in a plane that no text uses


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
        self._first_letters = {text[0] for text in special if text and text[0].isascii()}
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special else "(?!)")

    def spelled_in(self, turns: Sequence[Message]) -> bool:
        """Whether a content spells any. Most are plain ASCII without the first letter of one, a fast test."""
        return any(
            self._pattern.search(turn.content) is not None
            for turn in turns
            if not turn.content.isascii() or any(letter in turn.content for letter in self._first_letters)
        )

    def hide(self, turns: Sequence[Message]) -> Turns:
        """The turns with stand-ins."""
        substitute = partial(self._pattern.sub, lambda found: self._stand_in[found[0]])
        return tuple(replace(turn, content=substitute(turn.content)) for turn in turns)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that also knows the stand-ins."""
        extended = copy.deepcopy(self._tokenizer)
        stand_ins = [AddedToken(one, normalized=False, special=True) for one in self._stand_in.values()]
        extended.add_tokens(stand_ins, special_tokens=True)
        return extended

    @cached_property
    def _spellings(self) -> dict[int, list[int]]:
        """A stand-in's id: the ids of its original as plain text."""
        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        spelled = plain.encode_batch(list(self._stand_in), add_special_tokens=False)
        numbers: Any = self.tokenizer.convert_tokens_to_ids(list(self._stand_in.values()))
        return {number: one.ids for number, one in zip(numbers, spelled, strict=True)}

    def restore_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids with every stand-in replaced by its spelling."""
        return [token for one in ids for token in self._spellings.get(one, (one,))]

    def restore(self, encoded: Tokens) -> Tokens:
        """Tokens likewise; a spelling is supervised where its stand-in is."""
        ids = encoded.ids.tolist()
        lengths = [len(self._spellings.get(one, (one,))) for one in ids]
        return finish(np.asarray(self.restore_ids(ids), np.int32), np.repeat(encoded.supervised, lengths))


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


class LimitExceeded(Exception):
    """A template exceeded a limit; the message says which."""


def render(template: Callable[[], list[str]], characters: Sequence[int]) -> list[str]:
    """The texts that `template` writes, each made of so many `characters`. Raises :class:`LimitExceeded`.

    All of them together have the time and the memory of one. Elsewhere than in the main thread, time is not limited;
    elsewhere than on Linux, memory is not.
    """
    try:
        with _time_limit(), _memory_limit(MEMORY + MEMORY_PER_CHARACTER * sum(characters)):
            texts = template()
    except MemoryError:
        raise LimitExceeded("it needs too much memory") from None
    except RecursionError:
        raise LimitExceeded("it calls itself too deeply") from None
    for text, given in zip(texts, characters, strict=True):
        if len(text) > ROOM + ROOM_PER_CHARACTER * given:
            raise LimitExceeded(f"it writes {len(text):,} characters where the conversation has {given:,}")
    return texts


@contextmanager
def _time_limit() -> Iterator[None]:
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
        _running = False  # first: a late alarm raises nothing
        signal.setitimer(signal.ITIMER_PROF, 0)


def _time_is_up(number: int, frame: FrameType | None) -> None:
    if _running:
        raise LimitExceeded(f"it takes more than {SECONDS:g} seconds")


@contextmanager
def _memory_limit(more: int) -> Iterator[None]:
    """Within, the process may grow by `more` bytes of address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if not STATM.exists():
        yield
        return
    limit = int(STATM.read_bytes().split()[0]) * resource.getpagesize() + more
    if any(bound != resource.RLIM_INFINITY and bound < limit for bound in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
