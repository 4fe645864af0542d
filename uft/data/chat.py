"""Chat templates: where the assistant's words are in a rendered conversation.

A conversation is rendered once, whole, and that text alone is tokenised. Where the words of each turn lie in it is
known from the template's skeleton: the same roles rendered with marks for contents. Filling the contents into the
skeleton must give the rendered text back, character by character; a reply that repeats an earlier turn cannot mislead
it. A template that changes contents by what they say (thinking tags) is followed turn by turn instead, again held to
the one rendering. Templates with `{% generation %}` marks say themselves what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from uft.data import limits, within
from uft.data.rows import Message
from uft.data.spelled import Spelled
from uft.data.templates import Conversation, Encoded, Turns, finish
from uft.data.within import Skeleton, Span
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
        self._spelled = Spelled(tokenizer, self.stop_ids)

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Encoded]:
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
    ) -> list[Encoded]:
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
    ) -> list[Encoded]:
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
            places = within.fill(skeleton, said, text)
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

    def _supervise(self, text: str, encoding: Encoding, spans: Sequence[Span]) -> Encoded:
        """Mark every token that holds a character of a span, and on to the stop token that closes it.

        Tokens between (white space before the stop token) are marked too: a model must write them to get there.
        """
        ids = np.asarray(encoding.ids, np.int32)
        supervised = np.zeros(len(ids), bool)
        for span in spans:
            first, last = within.tokens(encoding, span)
            stop = last
            while (
                stop < len(ids)
                and ids[stop] not in self.stop_ids
                and not text[slice(*within.characters(encoding, stop))].strip()
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
    ) -> list[Encoded]:
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
            runs = within.runs(np.asarray(encoded["assistant_masks"][number], bool))
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
        except limits.TooMuch:
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
        return limits.render(write, [sum(len(turn.content) for turn in turns) for turns in conversations])

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
        except limits.TooMuch as error:
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

    return TemplateError, limits.TooMuch, ArithmeticError, AttributeError, LookupError, TypeError, ValueError
