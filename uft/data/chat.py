"""Chat rendering: a prompt and its completion as token ids, with the mask of supervised tokens.

Supervised are the tokens of the assistant's own turns and the end-of-turn token after each: never the header, nor the
template's text after the end-of-turn token. Ids end at the last supervised token; nothing after it is ever needed.

A conversation is rendered once, whole, and that text alone is tokenised. The mask comes from one of three places:

1. the template's own `{% generation %}` marks, where it has them;
2. its skeleton: the same roles rendered with marks for contents. Filling the contents into the skeleton must give the
   rendered text, character by character, so a reply that repeats an earlier turn cannot mislead it;
3. for a template that changes contents (thinking tags), each reply is found between the rendering of the turns before
   it and a mark at its end, both checked against the one rendering. A reply with reasoning or calls of tools is all
   that stands between its header and its end.

A turn that the template leaves out or changes, and other differences between a row and its text, are notes beside the
tokens.

`plain` is the way for base models without a template.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from uft.data.messages import under_system
from uft.data.rows import Conversation, Message, Note, Row, Tokens, Turns, finish, learned_turns
from uft.data.template import (
    END,
    FORMS,
    RESERVED,
    TEMPLATE_ERRORS,
    CharSpan,
    Encoded,
    LimitExceeded,
    LiteralSpecials,
    Rendered,
    Template,
    as_generated,
    check_arguments,
    fill,
    forms_for,
    marked_parts,
    misplaced,
    missing_text,
    read_template,
    rendering_digest,
    token_span,
    with_date,
    without_end,
)
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)
_CHANNELS = re.compile(
    r"\s*(?:<\|channel\|>analysis<\|message\|>(.*?)<\|end\|><\|start\|>assistant)?<\|channel\|>final<\|message\|>(.*)",
    re.DOTALL,
)
_MARKS = re.compile(r"<\|(?:return|end|start|channel|message|call)\|>")
ADDS = "marks text of its own as learned with assistant turns"
OTHER_START = "begins replies in training after other text than generation starts from"


def advice_about(renderer: Renderer | ChatTemplate) -> tuple[str, ...]:
    """Advice about a template that changes replies unless they are the last turn."""
    if renderer.rendering == "generated":
        return ()
    own = renderer.tokenizer.chat_template  # with its date as it is, as the forms have it
    names = forms_for(own if isinstance(own, str) else renderer.text, renderer.tokenizer.special_tokens_map)
    forms = (f"or a training form of the family:  data.template={name}" for name in names)
    return ("learn every reply as it is generated:  data.rendering=generated", *forms)


class Renderer:
    """Renders with the tokenizer's chat template, a template file, or plainly.

    `template`: auto (the tokenizer's chat template, else plain), plain, a training form (`uft.data.template.FORMS`), or
    the path of a Jinja file. `lost_text`: error or keep rows whose supervised text the template leaves out or changes.
    `date`: the day, as YYYY-MM-DD, for templates that ask for it, so that two days give the same tokens. `arguments`:
    further variables of the template. `train_on`: all, last or marked assistant turns. `special_text`: special tokens
    that a message spells are read as text or as tokens. `rendering`: whole, or every reply as it is generated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        lost_text: str = "error",
        date: str = "2025-01-01",
        arguments: Mapping[str, Any] | None = None,
        train_on: str = "all",
        special_text: str = "text",
        rendering: str = "whole",
    ) -> None:
        self.tokenizer, self.lost_text, self.train_on, self.rendering = tokenizer, lost_text, train_on, rendering
        self._start_told = False
        self.learned = False  # whether the model that answers was trained on replies that this one rendered
        self._strategy: Plain | ChatTemplate
        if template == "plain" or (template == "auto" and not getattr(tokenizer, "chat_template", None)):
            self._strategy = Plain(tokenizer, train_on, special_text)
            check_arguments(arguments or {}, "", "plain")
        else:
            text = read_template(template, tokenizer)
            name = "the tokenizer's chat template" if template == "auto" else template
            check_arguments(arguments or {}, text, name)
            how = (train_on, special_text, rendering)
            self._strategy = ChatTemplate(tokenizer, with_date(text, date, name), name, dict(arguments or {}), *how)
        self.name, self.text = self._strategy.name, self._strategy.text
        self.stop_ids = self._strategy.stop_ids
        settings = [self._strategy.arguments, train_on]
        settings += [one for one in (special_text, rendering) if one not in ("text", "whole")]
        self.digest = rendering_digest(tokenizer, self._strategy.text, settings if settings != [{}, "all"] else None)

    def encode(self, prompt: Turns, turns: Turns, name: str = "") -> Tokens:
        """One conversation; `name` is the row's, for errors."""
        return self.encode_many([(prompt, turns)], [name])[0]

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        """Many at once, which is much faster. A row that the template refuses raises :class:`UftError` naming both."""
        return self._strategy.encode_many(conversations, names)

    def encode_prompts(self, prompts: Sequence[Turns], names: Sequence[str]) -> list[Tokens]:
        """Prompts alone, as :meth:`prompt_ids` has them; nothing is supervised."""
        return self._strategy.encode_prompts(prompts, names)

    def prompt_ids(self, prompt: Turns, system: str | None = None) -> list[int]:
        """The prompt as the model sees it when it is to answer. `system` replaces the prompt's own system turn."""
        ids: list[int] = self._strategy.encode_prompts([under_system(prompt, system)], ["prompt"])[0].ids.tolist()
        return ids

    def asked_ids(self, prompt: Turns, system: str | None = None) -> list[int]:
        """What an answer to a prompt of one's own starts from: with `learned`, the text that a reply to it is trained
        behind, unless that leaves out a part of the prompt; else :meth:`prompt_ids`."""
        prompt = under_system(prompt, system)
        with suppress(UftError):
            encoded = self.encode(prompt, (Message("assistant", "?"),)) if self.learned else None
            if encoded is not None and {note.what for note in encoded.notes} == {OTHER_START}:
                return encoded.ids[: encoded.prompt_length].tolist()
        return self.prompt_ids(prompt)

    def said(self, ids: Sequence[int], strip: bool = True) -> Message:
        """A generated reply as a row would have it: its text without special tokens, and with `strip` without white
        space at its ends; of gpt-oss's channels, which are such tokens, the last, with the first as its reasoning."""
        channels = _CHANNELS.match(str(self.tokenizer.decode(ids))) if "<|channel|>" in self.text else None
        if channels:
            thought, text = ("".join(_MARKS.split(part or "")) for part in channels.groups())
        else:
            thought, text = "", str(self.tokenizer.decode(ids, skip_special_tokens=True))
        extra = json.dumps({"reasoning_content": thought}, ensure_ascii=False) if thought.strip() else ""
        return Message("assistant", text.strip() if strip else text, extra)

    def start_ids(self, row: Row, system: str | None = None) -> list[int]:
        """What an answer to the row's prompt starts from: the text that its first reply is trained behind.

        That is :meth:`prompt_ids` unless the template begins replies in training otherwise. It is so also under another
        `system` prompt, and where the first reply is not learned.
        """
        turns = row.completions[0].turns if row.completions else ()
        if system is not None or learned_turns(turns, 0, self.train_on)[:1] != [0]:
            return self.prompt_ids(row.prompt, system)
        encoded = self.encode(row.prompt, turns, row.id)
        if not self._start_told and any(note.what == OTHER_START for note in encoded.notes):
            self._start_told = True
            log.warning("%s %s: answers start from the text of training", self.name, OTHER_START)
        return encoded.ids[: encoded.prompt_length].tolist()


# --- Without a template.


class Plain:
    """No template: prompt and completion are tokenised apart and joined.

    The tokenizer's own first token stands before, the end-of-text token, which is learned, after every assistant turn.
    Several turns are set apart by a blank line.
    """

    name = "plain"
    text = "plain"  # decides the tokens besides the tokenizer, and enters the digest
    arguments: Mapping[str, Any] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, special_text: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UftError(Problem("data.template=plain", "the tokenizer has no end-of-text token to learn"))
        self.tokenizer, self.train_on, self._spelled = tokenizer, train_on, special_text == "text"
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        bos = tokenizer.bos_token_id
        self._first = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        texts: list[str] = []  # of each conversation the prompt's, then one per turn that follows
        for (prompt, turns), name in zip(conversations, names, strict=True):
            fields = [field for turn in (*prompt, *turns) if turn.extra for field in json.loads(turn.extra)]
            if fields:
                why, advice = f"has {fields[0]}, which only a chat template can render", ("set another data.template",)
                raise UftError(Problem(f"row {name}", why, where="data.template=plain", advice=advice))
            texts.append("\n\n".join(turn.content for turn in prompt))
            for turn in turns:
                own = turn.content if self._spelled else without_end(turn.content, [str(self.tokenizer.eos_token)])
                texts.append(own if turn.role == "assistant" else f"\n\n{turn.content}\n\n")
        options = {"add_special_tokens": False, "split_special_tokens": self._spelled, "verbose": False}
        pieces = iter(self.tokenizer(texts, **options)["input_ids"] if texts else [])
        encoded = []
        for _, turns in conversations:
            ids = list(next(pieces))
            ids = ids if ids[: len(self._first)] == self._first else self._first + ids
            supervised = [False] * len(ids)
            learned = learned_turns(turns, 0, self.train_on)
            for number, turn in enumerate(turns):
                piece = next(pieces)
                piece = [*piece, *self.stop_ids] if turn.role == "assistant" else piece
                ids += piece
                supervised += [number in learned] * len(piece)
            encoded.append(finish(np.asarray(ids, np.int32), np.asarray(supervised, bool)))
        return encoded

    def encode_prompts(self, prompts: Sequence[Turns], names: Sequence[str]) -> list[Tokens]:
        return self.encode_many([(prompt, ()) for prompt in prompts], names)


# --- Chat templates.


_MARK = "\ue000{}\ue001"  # private-use characters: no template and hardly a text contains them
_MARKED = re.compile("\ue000(\\d+)\ue001")
_SPACED = "changes the white space within"
_EXCERPT = 160  # characters of a row shown in an error


class Contents(NamedTuple):
    """The contents of a conversation's turns as the template writes them, and where; a turn left out has no place."""

    contents: Sequence[str]
    places: Mapping[int, CharSpan]


class ChatTemplate:
    """One Jinja template with one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        name: str,
        arguments: dict[str, Any],
        train_on: str,
        special_text: str,
        rendering: str,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            why = "this tokenizer does not say which characters a token stands for, so replies cannot be found"
            advice = ("train without a chat template:  data.template=plain",)
            raise UftError(Problem(f"data.template ({name})", why, advice=advice))
        if taken := RESERVED & arguments.keys():
            raise UftError(Problem(f"data.template_args.{min(taken)}", "is not for the settings to say"))
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self.arguments, self.train_on, self.rendering = arguments, train_on, rendering
        self._template = Template(text, {**tokenizer.special_tokens_map, **arguments})
        self._write, self._has_marks = self._template.write, self._template.has_marks
        self._skeletons: dict[Any, list[str]] = {}  # by the turns without their contents
        closing = self._closing((Message("user", "?"), Message("assistant", END)))
        self.stop_ids = frozenset({tokenizer.eos_token_id} - {None}) | closing  # the end of a text, and of a reply
        self._stops = list(map(str, tokenizer.convert_ids_to_tokens(list(self.stop_ids))))
        self._specials = LiteralSpecials(tokenizer, self.stop_ids, special_text == "tokens")

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        whole = [self._specials.hide((*prompt, *turns)) for prompt, turns in conversations]
        if self.rendering == "generated":
            return self._generated(conversations, whole, names)
        try:  # all at once, which is faster; one by one where a row is at fault, or all exceed the limits of one
            rendered = self._template.render(whole)
        except TEMPLATE_ERRORS:
            rendered = []
            for turns, name in zip(whole, names, strict=True):
                with self._explained(turns, name):
                    rendered += self._template.render([turns])
        encodings = self._specials.encode([one.text for one in rendered])
        firsts = [len(prompt) for prompt, _ in conversations]
        return [self._tokens(*row) for row in zip(whole, firsts, rendered, encodings, names, strict=True)]

    def encode_prompts(self, prompts: Sequence[Turns], names: Sequence[str]) -> list[Tokens]:
        texts, notes = [], []
        for turns, name in zip(map(self._specials.hide, prompts), names, strict=True):
            with self._explained(turns, name):
                texts.append(self._write(turns, add_generation_prompt=True))
                notes.append(tuple(missing_text(turns, texts[-1], ())))
        ids = [np.asarray(one.ids, np.int32) for one in self._specials.encode(texts)]
        return [Tokens(one, np.zeros(len(one), bool), len(one), noted) for one, noted in zip(ids, notes, strict=True)]

    # --- masks

    def _tokens(self, turns: Turns, first: int, rendered: Rendered, encoded: Encoded, name: str) -> Tokens:
        """One row, whose prompt has `first` turns, with its mask and notes."""
        contents = self._find_contents(turns, rendered.text)
        wanted = learned_turns(turns, first, self.train_on)
        with self._explained(turns, name):
            spans = self._spans(turns, wanted, rendered, contents, name)
        tokens = self._supervise(rendered.text, encoded, spans)
        notes = [*self._changes(turns, wanted, contents), *self._omissions(turns, wanted, rendered.text)]
        notes += self._open_ends(tokens, wanted)
        places = contents.places if contents and self._has_marks else {}
        for number in sorted(set(wanted) & set(places)):
            if not tokens.supervised[slice(*token_span(encoded.offsets, places[number]))].all():
                notes.append(Note("does not mark the whole text of assistant turns", number))
        told = self._has_marks and self.name not in FORMS  # what those add is documented
        added = told and self._added_turn(turns, wanted, places, rendered.text, [one for one, _ in spans])
        notes += [Note(ADDS, added)] if added else []
        if tokens.supervised.any():
            prompt, length = turns[: wanted[0]], tokens.prompt_length
            pieces = self._skeleton(prompt, True) if contents is not None else []
            start = fill(pieces, contents.contents)[0] if contents and pieces else self._attempt(prompt, True)
            same_text = start == rendered.text[: encoded.offsets[length][0]]
            if start is None or not (same_text or next(self._specials.encode([start])).ids == encoded.ids[:length]):
                notes.append(Note(OTHER_START, wanted[0]))
        return replace(tokens, notes=tuple(notes)) if notes else tokens

    def _generated(
        self, conversations: Sequence[Conversation], whole: Sequence[Turns], names: Sequence[str]
    ) -> list[Tokens]:
        """Every row with each reply as it is generated, see :func:`uft.data.template.as_generated`."""
        asked, reply = Message("user", "?"), Message("assistant", END)
        closing = self.stop_ids | self._closing((asked, reply, asked))  # which may differ from that of the last turn
        ends = list(map(str, self.tokenizer.convert_ids_to_tokens(list(closing))))
        written = []
        for (prompt, _), turns, name in zip(conversations, whole, names, strict=True):
            with self._explained(turns, name):
                text_or_turn = as_generated(self._template, turns, len(prompt), self._stops, ends)
            if isinstance(text_or_turn, int):
                raise self._unclear(turns[text_or_turn], name)
            written.append(text_or_turn)
        done = []
        encodings = self._specials.encode([text for text, _ in written])
        for (prompt, _), turns, (text, places), encoded in zip(conversations, whole, written, encodings, strict=True):
            wanted = learned_turns(turns, len(prompt), self.train_on)
            tokens = self._supervise(text, encoded, [(places[number], True) for number in wanted])
            notes = (*missing_text(turns, text, wanted), *self._open_ends(tokens, wanted))
            done.append(replace(tokens, notes=notes))
        return done

    def _find_contents(self, turns: Turns, text: str) -> Contents | None:
        """The contents in a rendered `text`, as they are or trimmed; None for a template that changes them."""
        pieces = self._skeleton(turns)
        contents = [turn.content for turn in turns]
        for filling in (contents, [content.strip() for content in contents]):
            filled, places = fill(pieces, filling)
            if filled == text:
                return Contents(filling, places)
        return None

    def _skeleton(self, turns: Turns, add_generation_prompt: bool = False) -> list[str]:
        """The template's texts around contents, and between them the numbers of the turns whose contents stand there.

        Empty for a template that refuses to render marks.
        """
        key = tuple((turn.role, turn.content == "", turn.extra) for turn in turns), add_generation_prompt
        if key in self._skeletons:
            return self._skeletons[key]
        marks = tuple(
            Message(turn.role, _MARK.format(number) if turn.content else "", turn.extra)
            for number, turn in enumerate(turns)
        )
        text = self._attempt(marks, add_generation_prompt)  # where it exceeds a limit, a row will show it
        pieces = [] if text is None else _MARKED.split(text)
        if not any(turn.extra for turn in turns):  # which differs from row to row
            self._skeletons[key] = pieces
        return pieces

    def _spans(
        self, turns: Turns, wanted: Sequence[int], rendered: Rendered, contents: Contents | None, name: str
    ) -> list[tuple[CharSpan, bool]]:
        """Characters of the wanted replies, and whether they reach over a reply's end: by the template's own marks; all
        of a turn that carries more than its content; by the place of the content, or by a mark at its end."""
        if self._has_marks:
            return [(span, True) for span in self._marked_spans(turns, wanted, rendered, name)]
        spans: list[tuple[CharSpan, bool]] = []
        for number in wanted:
            if any(field in turns[number].extra for field in ("reasoning_content", "tool_calls")):
                before = self._header_end(turns, number)
                is_start = rendered.text.startswith(before)
                end = self._turn_end(turns, number, rendered.text, len(before)) if is_start else None
                if end is None:
                    raise self._unclear(turns[number], name)
                spans.append(((len(before), end), True))
            elif contents is None:
                spans.append((self._reply_span(turns, number, rendered.text, name), False))
            elif number in contents.places:
                spans.append((contents.places[number], False))
        return spans

    def _marked_spans(self, turns: Turns, wanted: Sequence[int], rendered: Rendered, name: str) -> Sequence[CharSpan]:
        """Characters of the wanted replies by the template's own marks."""
        runs: list[CharSpan] = []
        for start, end in rendered.marks:
            if end > start:
                before = runs.pop()[0] if runs and runs[-1][1] == start else start
                runs.append((before, end))
        replies = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        if wanted == replies or not runs:
            return runs
        if len(runs) <= len(replies) or len(runs) % len(replies) == 0:  # parts of a reply may be marked one by one
            owners = [number for number in replies for _ in range(max(1, len(runs) // len(replies)))]
            return [run for number, run in zip(owners[-len(runs) :], runs, strict=True) if number in wanted]
        begins = [self._write(turns[:number]) for number in replies]
        if not all(map(rendered.text.startswith, begins)):
            raise self._unclear(turns[wanted[0]], name)
        places = [len(begin) for begin in begins]
        return [run for run in runs if replies[max(0, bisect_right(places, run[0]) - 1)] in wanted]

    def _turn_end(self, turns: Turns, number: int, text: str, begin: int) -> int | None:
        """The end of a reply whose header ends at `begin`, with its stop token; None where it cannot be told."""
        if number + 1 == len(turns):
            return len(text)
        upto = self._write(turns[: number + 1])
        if text.startswith(upto) and len(upto) >= begin:
            return len(upto)
        # the last turn is written otherwise than one in the middle: its first stop token before the next turn's content
        following = replace(turns[number + 1], content=END + turns[number + 1].content)
        marked = self._text_with(turns, number + 1, following)
        if marked is None or marked.replace(END, "") != text:
            return None
        places = [(text.find(stop, begin, marked.index(END)), len(stop)) for stop in self._stops]
        return min((place + length for place, length in places if place >= 0), default=None)

    def _header_end(self, turns: Turns, number: int) -> str:
        """The text before a reply, its header included."""
        before = self._write(turns[:number], add_generation_prompt=True)
        if before != self._write(turns[:number]):
            return before
        # no generation prompt: a mark tells where a header ends
        headed = self._write((*turns[:number], Message("assistant", END))).partition(END)[0]
        return headed if headed.rstrip() != before.rstrip() else before

    def _reply_span(self, turns: Turns, number: int, text: str, name: str) -> CharSpan:
        """One reply, between the rendering of all before it and a mark at its end, both checked against `text`."""
        before = self._header_end(turns, number)
        content = turns[number].content
        for variant in (content, content.rstrip(), content.strip()):
            marked = replace(turns[number], content=variant + END)
            changed = self._write((*turns[:number], marked, *turns[number + 1 :]))
            head, mark, tail = changed.partition(END)
            if mark and head + tail == text and head.startswith(before):
                return len(before), len(head)
        raise self._unclear(turns[number], name)

    def _unclear(self, reply: Message, name: str) -> UftError:
        why = f"{self.name} changes this reply so that its tokens cannot be told from the template's"
        advice = (
            f"reply: {self._excerpt(reply.content)}",
            *advice_about(self),
            "mark what is learned in the template with {% generation %}, or use another data.template",
        )
        return UftError(Problem(f"row {name}", why, "data.template", advice))

    def _supervise(self, text: str, tokens: Encoded, spans: Sequence[tuple[CharSpan, bool]]) -> Tokens:
        """Supervise every token that holds a character of a span, and on to the stop token that closes it.

        Tokens between (white space before the stop token) are supervised too: a model must write them to get there.
        A span that reaches over the end (the template's own marks decide alone) ends at its last stop token: text after
        it (a newline, usually) is not learned.
        """
        ids, offsets = tokens
        supervised = np.zeros(len(ids), bool)
        is_stop = [token in self.stop_ids for token in ids]
        for span, over_end in spans:
            first, last = token_span(offsets, span)
            if over_end:
                last = max((place + 1 for place in range(first, last) if is_stop[place]), default=last)
            else:
                after = (p for p in range(last, len(ids)) if is_stop[p] or text[slice(*offsets[p])].strip())
                following = next(after, last)
                last = following + 1 if following < len(ids) and is_stop[following] else last
            supervised[first:last] = True
        return finish(np.asarray(ids, np.int32), supervised)

    # --- differences between a row and its text

    def _changes(self, turns: Turns, wanted: Sequence[int], contents: Contents | None) -> Iterator[Note]:
        """Turns that the template leaves out, or whose text it changes, white space aside."""
        moved = misplaced(turns, self._skeleton(turns)[1::2]) if contents is not None else {}
        for number, turn in enumerate(turns):
            change, marked = "", turn.content.strip() + END
            if contents is not None:
                change = moved.get(number, "" if number in contents.places or not turn.content else "leaves out")
            elif marked != END and (text := self._text_with(turns, number, replace(turn, content=marked))) is not None:
                if END not in text:
                    change = "leaves out"
                elif "".join(marked.split()) not in "".join(text.split()):
                    change = "changes the text of"
                elif marked not in text:
                    change = _SPACED
            if change:  # of white space no more than is told
                lost = number in moved or (number in wanted and change != _SPACED)
                yield Note(f"{change} {turn.role} turns", number, lost)

    def _omissions(self, turns: Turns, wanted: Sequence[int], text: str) -> Iterator[Note]:
        """Fields of turns that the template does not render. Of reasoning, that of earlier turns may be context."""
        for number, turn in enumerate(turns):
            fields = json.loads(turn.extra) if turn.extra else {}
            for field in [name for name in ("reasoning_content", "tool_calls", "tools") if name in fields]:
                is_text, known = field == "reasoning_content", fields[field]
                changed, marks = (known + END, [END]) if is_text else marked_parts(field, known)
                changed = json.dumps(fields | {field: changed}, ensure_ascii=False)
                other = self._text_with(turns, number, replace(turn, extra=changed))
                if other is None and not is_text:  # it refuses the marks: then it is to differ without the whole of it
                    marks, changed = [], json.dumps(fields | {field: []}, ensure_ascii=False)
                    other = self._text_with(turns, number, replace(turn, extra=changed))
                seen = [any(one in (other or "") for one in (mark, repr(mark)[1:-1])) for mark in marks]  # also escaped
                if other is not None and (not all(seen) if marks else other == text):
                    yield Note(f"does not render {field}", number, number in wanted or not is_text)

    def _text_with(self, turns: Turns, number: int, turn: Message) -> str | None:
        """The text with another turn in the place of one; None where the template refuses that."""
        return self._attempt((*turns[:number], turn, *turns[number + 1 :]))

    def _attempt(self, turns: Turns, add_generation_prompt: bool = False) -> str | None:
        """The text of turns; None where the template refuses them."""
        try:
            return self._write(turns, add_generation_prompt)
        except TEMPLATE_ERRORS:
            return None

    def _added_turn(
        self, turns: Turns, wanted: Sequence[int], places: Mapping[int, CharSpan], text: str, spans: Sequence[CharSpan]
    ) -> int:
        """The first of the wanted turns beside whose text the template marks text of its own, its end aside; or 0.
        Reasoning and calls are written by the template, between tags of its own."""
        plain = [number for number in wanted if number in places and not turns[number].extra]
        stops = sorted(self._stops, key=len)[::-1]
        for number in plain:
            start, end = places[number]
            for first, last in (span for span in spans if span[0] <= start and end <= span[1]):
                after = text[end:last]
                for stop in stops:
                    after = after.replace(stop, "")
                if (text[first:start] + after).strip():
                    return number
        return 0

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

    # --- what the template refuses

    @contextmanager
    def _explained(self, turns: Turns, name: str) -> Iterator[None]:
        """The template's complaint about this row becomes a UftError."""
        try:
            yield
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(turn.role for turn in turns)
            advice = (f"turns: {roles}", f"starts: {self._excerpt(turns[0].content)}")
            why = f"{self.name} cannot render it: {error or type(error).__name__}"
            raise UftError(Problem(f"row {name}", why, "data.template", advice)) from error

    def _excerpt(self, text: str) -> str:
        shown = self._specials.reveal(text)
        return repr(shown if len(shown) <= _EXCERPT else shown[:_EXCERPT] + " ...")

    def _closing(self, turns: Turns) -> frozenset[int]:
        """The token that follows the content that is marked by END; none where other text does."""
        try:
            tail = self._write(turns).partition(END)[2]
        except LimitExceeded as error:
            raise UftError(Problem("data.template", f"{self.name} cannot be used: {error}")) from None
        except TEMPLATE_ERRORS:  # a template that needs more than one exchange: its rows are checked one by one
            return frozenset()
        for token in self.tokenizer(tail, add_special_tokens=False)["input_ids"]:
            if token in self.tokenizer.added_tokens_decoder:
                return frozenset({int(token)})
            if str(self.tokenizer.decode([token])).strip():
                break
        return frozenset()
