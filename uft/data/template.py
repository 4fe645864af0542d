"""Chat templates: rendered in Jinja's sandbox within limits of time and memory, with a fixed date, and with special
tokens in contents taken as text. From top to bottom: templates, replies as they are generated, special tokens, limits.
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
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, groupby, repeat
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer

from uft.data.messages import texts_of
from uft.data.rows import Message, Note, Turns
from uft.errors import Problem, UftError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CharSpan = tuple[int, int]  # characters [start, end)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
"""The tags that say what is learned."""
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of a template that the rendering itself sets."""


class LimitExceeded(Exception):
    """A template exceeded a limit; the message says which."""


TEMPLATE_ERRORS = (TemplateError, LimitExceeded, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""Errors of a template about a conversation: its own `raise_exception`, and those of its expressions."""


class Rendered(NamedTuple):
    """A conversation as the template writes it, and the characters within its `{% generation %}` marks."""

    text: str
    marks: Sequence[CharSpan]


class Template:
    """The text of a template and its variables."""

    def __init__(self, text: str, variables: Mapping[str, Any]) -> None:
        self.text, self.variables = text, variables
        self.has_marks = GENERATION.search(text) is not None

    def render(self, conversations: Sequence[Turns], add_generation_prompt: bool = False) -> list[Rendered]:
        """The texts of these conversations. Raises one of TEMPLATE_ERRORS."""
        from transformers.utils import chat_template_utils

        write: Any = chat_template_utils.render_jinja_template  # typed to return a single text
        sizes = [sum(len(turn.content) + len(turn.extra) for turn in turns) for turns in conversations]
        rendered: list[Rendered] = []
        with limits(sum(sizes)):
            for tools, group in groupby(conversations, key=_tools):
                texts, marks = write(
                    [list(map(_fields, turns)) for turns in group],
                    tools=json.loads(tools) if tools else None,
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.has_marks,
                    add_generation_prompt=add_generation_prompt,
                    **self.variables,
                )
                rendered += map(Rendered, texts, marks or repeat(()))
        for one, size in zip(rendered, sizes, strict=True):
            if len(one.text) > ROOM + ROOM_PER_CHARACTER * size:
                raise LimitExceeded(f"it writes {len(one.text):,} characters where the conversation has {size:,}")
        return rendered

    def write(self, turns: Turns, add_generation_prompt: bool = False) -> str:
        """The text of one conversation."""
        return self.render([turns], add_generation_prompt)[0].text


FORMS = {
    "qwen3": "<|im_start|> <|im_end|>",
    "deepseek_r1": "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜>",
    "mistral_v3": "[INST] [/INST]",
    "mistral_nemo": "[INST] [/INST]",
    "gpt_oss": "<|start|> <|message|> <|end|> <|channel|> <|return|>",
}
"""Training forms of chat templates by name, each with the tokens that mark turns, in the family's own template as well.
They are for families whose own template loses text, or begins replies in training otherwise than generation does."""
_SIGNS = {"qwen3": "</think>", "mistral_v3": "[INST] "}
"""What tells a family's own template from others with the same tokens."""
NAMES = ("auto", "plain", *FORMS)
"""Values of `data.template` that are no files."""


def template_file(template: str) -> Path:
    """The Jinja file of a form's name or of a path."""
    named = Path(__file__).parent / "templates" / f"{template}.jinja"
    return named if template in FORMS else Path(template).expanduser()


def rival_templates(folder: Path) -> str:
    """A sentence about a model's folder that has two chat templates or one that is not read; "" where it has neither.

    transformers reads chat_template.jinja before tokenizer_config.json, and chat_template.json for processors alone.
    """
    file = folder / "chat_template.jinja"
    own = file.read_text(encoding="utf-8") if file.is_file() else None
    if own is not None and not own.strip():
        return "chat_template.jinja is empty: turns are joined without a template"
    for name in ("tokenizer_config.json", "chat_template.json"):
        beside: Any = None
        with suppress(OSError, ValueError, AttributeError):
            beside = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        named = beside if isinstance(beside, list) else [{"name": "default", "template": beside}]
        texts = [one["template"] for one in named if isinstance(one, dict) and one.get("name") == "default"]
        unread = own is not None or name == "chat_template.json"
        if unread and any(isinstance(text, str) and text.strip() != (own or "").strip() for text in texts):
            which = "chat_template.jinja is read" if own is not None else "it is not read"
            return f"{name} has another chat template than the one in use: {which}"
    return ""


def read_template(path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a value of `data.template`. Raises UftError where it cannot be had, or writes marks of turns that the
    tokenizer lacks: they would be learned letter by letter."""
    vocabulary = tokenizer.get_vocab() if path in FORMS else {}
    if missing := [mark for mark in FORMS.get(path, "").split() if mark not in vocabulary]:
        why = f"writes {', '.join(missing)}, which this tokenizer does not have: it is for another family"
        raise UftError(Problem(f"data.template={path}", why))
    if path == "auto":
        try:
            return str(tokenizer.get_chat_template())
        except ValueError:
            names = ", ".join(sorted(map(str, tokenizer.chat_template)))  # a dictionary
            why = f"the tokenizer has templates of the names {names}, and no default"
            advice = ("write the one to be used into a file:  data.template=FILE.jinja",)
            raise UftError(Problem("data.template=auto", why, advice=advice)) from None
    file = template_file(path)
    if not os.path.isfile(file):
        advice = (f"choices: {', '.join(NAMES)}, or a Jinja file",)
        raise UftError(Problem(f"data.template={path}", "no such file", advice=advice))
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UftError(Problem(f"data.template={path}", f"cannot be read: {error}")) from error


def forms_for(template: str, variables: Mapping[str, Any]) -> list[str]:
    """The form that a family's own template, as Jinja, may be replaced by, if there is one: it writes the family's
    marks, and generation starts from the same text."""
    alike = (name for name, marks in FORMS.items() if all(mark in template for mark in marks.split()))
    likely = [name for name in alike if _SIGNS.get(name, "") in template]

    def start(text: str) -> str:
        with suppress(*TEMPLATE_ERRORS):
            return Template(text, variables).write((Message("user", "?"),), True)
        return ""

    own = start(template) if likely else ""
    return [name for name in likely if own and own == start(template_file(name).read_text(encoding="utf-8"))][:1]


def _fields(turn: Message) -> dict[str, Any]:
    """A turn as templates read it."""
    more = json.loads(turn.extra) if turn.extra else {}
    more.pop("tools", None)
    if "reasoning_content" in more:
        more["thinking"] = more["reasoning_content"]  # its name in gpt-oss
    return {"role": turn.role, "content": turn.content, **more}


def _tools(turns: Turns) -> str:
    """The tools of a conversation as JSON; "" without any."""
    with_extra = (json.loads(turn.extra).get("tools") for turn in turns if turn.extra)
    return next((json.dumps(tools, ensure_ascii=False) for tools in with_extra if tools), "")


_NOW = re.compile(r"""strftime_now\(\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")


def with_date(template: str, day: str, name: str) -> str:
    """The template with a fixed day in the place of its calls of `strftime_now`: its text alone decides the tokens."""
    try:
        begins = datetime.fromisoformat(day)
    except ValueError:
        raise UftError(Problem(f"data.date={day}", "no date of the form YYYY-MM-DD")) from None
    fixed = _NOW.sub(lambda call: json.dumps(begins.strftime(call[1] or call[2] or "")), template)
    for pattern, does in CHANGING.items():
        if re.search(pattern, fixed):
            raise UftError(Problem("data.template", f"{name} {does}", advice=("use another data.template",)))
    return fixed


CHANGING = {
    r"strftime_now(?!\s+is\s)": "asks for the date in a form that is not written out, so data.date cannot be set "
    "in its place",
    r"\|\s*random\b|\blipsum\b": "writes something else each time (random): what is trained is not what is generated",
}
"""Words of templates whose text depends on more than the conversation, each with what they do."""


# --- Replies as they are generated. A template may write a reply otherwise where it is not the last one, or drop a part
# of the conversation once it ends with a reply. Here each reply stands as the template writes it at the end, behind the
# text that its generation starts from; between the end of one and the next, what the template writes there.


END = "\ue002"
"""A private-use character that marks a place in contents."""


def as_generated(
    template: Template, turns: Turns, first: int, stops: Sequence[str], ends: Sequence[str]
) -> tuple[str, dict[int, CharSpan]] | int:
    """(the text, the characters of every reply from turn `first` on with its stop token); or the number of a turn
    whose text cannot be told apart. Raises one of TEMPLATE_ERRORS.

    `stops` close the last turn, `ends` that or one before it.
    """
    text, places = "", dict[int, CharSpan]()
    for number in (place for place in range(first, len(turns)) if turns[place].role == "assistant"):
        prompt = turns[:number]
        before = _between(template, prompt, max(places), ends) if places else template.write(prompt, True)
        reply = _last_reply(template, turns[: number + 1], stops)
        if before is None or reply is None:
            return number
        places[number] = (len(text) + len(before), len(text) + len(before) + len(reply))
        text += before + reply
    return text, places


def _last_reply(template: Template, turns: Turns, stops: Sequence[str]) -> str | None:
    """What stands between the text that generation starts from and the end of the last turn; where the template drops
    the system prompt before a reply, of the conversation without it."""
    for known in (turns, tuple(turn for turn in turns if turn.role != "system")):
        start, text = template.write(known[:-1], True), template.write(known)
        if text.startswith(start):
            ends = [place + len(stop) for stop in stops if (place := text.find(stop, len(start))) >= 0]
            return text[len(start) : min(ends)] if ends else None
    return None


def _between(template: Template, prompt: Turns, last: int, ends: Sequence[str]) -> str | None:
    """What generation of a reply starts from, after the end of the reply `last` in its prompt."""
    start, following = template.write(prompt, True), prompt[last + 1]
    for content in (following.content, following.content.strip()):
        marked = (*prompt[: last + 1], replace(following, content=END + content), *prompt[last + 2 :])
        before, mark, after = template.write(marked, True).partition(END)
        places = [place + len(end) for end in ends if (place := before.rfind(end)) >= 0]
        if mark and before + after == start and places:
            return start[max(places) :]
    return None


def fill(pieces: Sequence[str], contents: Sequence[str]) -> tuple[str, dict[int, CharSpan]]:
    """A skeleton's text with `contents` in it, and the characters of each."""
    filled = [contents[int(piece)] if number % 2 else piece for number, piece in enumerate(pieces)]
    ends = list(accumulate(map(len, filled)))
    places = zip(map(int, pieces[1::2]), zip(ends[::2], ends[1::2], strict=False), strict=True)
    return "".join(filled), dict(places)


def check_arguments(arguments: Mapping[str, Any], text: str, name: str) -> None:
    """Raise UftError for the variables that the template's text never names: a slip, or meant for another template."""
    words = set(re.findall(r"\w+", text))
    for unknown in sorted(arguments.keys() - words):
        advice = did_you_mean(unknown, sorted(words), cutoff=0.8, shown="data.template_args.{}".format)
        raise UftError(Problem(f"data.template_args.{unknown}", f"{name} reads no such variable", advice=advice))
    for key, value in arguments.items():
        if isinstance(value, str) and value.lower() in ("false", "no", "off", "none", "null"):
            why = f"{value!r} is a text here, which templates take for true"
            advice = (f"without quotation marks:  data.template_args.{key}=false",)
            raise UftError(Problem(f"data.template_args.{key}", why, advice=advice))


def rendering_digest(tokenizer: Any, text: str, more: Any) -> str:
    """sha256 over the template, its settings, and everything of the tokenizer that decides ids: vocabulary, merges,
    special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for transient in ("truncation", "padding"):  # left over from an earlier call
            settings.pop(transient, None)
    else:
        settings = sorted(tokenizer.get_vocab().items())
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    parts = [text, settings, special] if more is None else [text, settings, special, more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def missing_text(turns: Turns, text: str, wanted: Sequence[int]) -> Iterator[Note]:
    """Turns and fields whose words, white space aside, are not in the text: notes."""
    squeezed = "".join(text.split())
    for number, turn in enumerate(turns):
        fields = json.loads(turn.extra) if turn.extra else {}
        required = {}
        for name in (name for name in ("tools", "tool_calls") if name in fields):
            functions = [one.get("function", one) for one in fields[name]]
            said = [[one.get("name"), one.get("arguments")] for one in functions]
            required[f"does not render {name}"] = [*texts_of(said)]
        required["does not render reasoning_content"] = [fields.get("reasoning_content", "")]
        required[f"leaves out, or changes the text of, {turn.role} turns"] = [turn.content]
        for what, words in required.items():
            forms = ((word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1]) for word in words)
            if not all(any("".join(one.split()) in squeezed for one in ones) for ones in forms):  # also within JSON
                yield Note(what, number, number in wanted or "tool" in what)


def misplaced(turns: Turns, written: Sequence[str]) -> dict[int, str]:
    """Turns whose contents a template writes twice, or behind a later turn, each with the verb for it. A system prompt
    may stand anywhere. `written`: the numbers of the turns in the template's order."""
    order = [int(number) for number in written]
    said = [number for number in order if turns[number].role != "system"]
    late = {one for place, one in enumerate(said) if max(said[:place], default=-1) > one}
    return dict.fromkeys(late, "changes the order of") | {one: "repeats" for one in said if said.count(one) > 1}


def marked_parts(field: str, value: Any) -> tuple[Any, list[str]]:
    """Tools, or calls of them, with a mark of its own at every name and behind the texts of every call's arguments, and
    the marks."""
    marks, changed = list[str](), []
    for number, one in enumerate(value):
        function = dict(one.get("function", one))
        function["name"] = f"{function.get('name', '')}{END}{number}N"
        marks.append(f"{END}{number}N")
        if field == "tool_calls" and any(texts_of(function.get("arguments"))):
            function["arguments"] = _with_mark(function["arguments"], f"{END}{number}A")
            marks.append(f"{END}{number}A")
        changed.append(one | {"function": function} if "function" in one else function)
    return changed, marks


def _with_mark(value: Any, mark: str) -> Any:
    """A value with a mark behind every text in it."""
    if isinstance(value, dict):
        return {name: _with_mark(one, mark) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_mark(one, mark) for one in value]
    return value + mark if isinstance(value, str) else value


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


def without_end(content: str, ends: Sequence[str]) -> str:
    """A reply without the token that ends it, and the white space after that, where it spells one of `ends`."""
    stripped = content.rstrip()
    end = next(filter(stripped.endswith, ends), "")
    return stripped.removesuffix(end) if end else content


def token_span(offsets: Sequence[CharSpan], span: CharSpan) -> tuple[int, int]:
    """[first, last) of the tokens that hold a character of `span`.

    A token that stands for trimmed white space, and so for no character, lies at the end of that space.
    """
    start, end = span
    return bisect_right(offsets, start, key=itemgetter(1)), bisect_left(offsets, end, key=itemgetter(0))


class LiteralSpecials:
    """A tokenizer for texts whose contents spell its special tokens, and those in `more` (ids), which end a turn.

    `as_tokens`: what they spell are tokens; one that ends a reply is left out, since the template writes it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, more: frozenset[int] = frozenset(), as_tokens: bool = False
    ) -> None:
        added = tokenizer.added_tokens_decoder.items()
        special = [token.content for number, token in added if token.special or number in more]
        # a stand-in that a content has already is itself stood in for
        texts = [*special, *(chr(STAND_INS + number) for number in range(2 * len(special)))]
        self._tokenizer = tokenizer.backend_tokenizer
        self._stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in more] if as_tokens else None
        self._stand_in = {text: chr(STAND_INS + number) for number, text in enumerate(texts) if text}
        longest_first = sorted(self._stand_in, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) if special else "(?!)")
        self._first_letters = {text[0] for text in special if text and text[0].isascii()}

    def hide(self, turns: Turns) -> Turns:
        """The turns with stand-ins for the special tokens that their contents spell."""
        if self._stops is not None:
            return tuple(
                replace(turn, content=without_end(turn.content, self._stops)) if turn.role == "assistant" else turn
                for turn in turns
            )
        texts = [turn.content + turn.extra for turn in turns]
        if all(text.isascii() and not any(letter in text for letter in self._first_letters) for text in texts):
            return turns  # most are plain ASCII without the first letter of any, a fast test

        def hidden(text: str) -> str:
            return self._pattern.sub(lambda found: self._stand_in[found[0]], text)

        return tuple(replace(turn, content=hidden(turn.content), extra=hidden(turn.extra)) for turn in turns)

    def reveal(self, text: str) -> str:
        """A text with the spellings instead of their stand-ins."""
        return text.translate({ord(stand_in): spelled for spelled, stand_in in self._stand_in.items()})

    def encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        """Tokens of each text, those of the spelling at the place of a stand-in."""
        literal = any(chr(STAND_INS) <= max(text, default="") for text in texts if not text.isascii())
        backend = self._extended if literal else self._tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False  # an earlier caller may have set it
        for one in backend.encode_batch(texts, add_special_tokens=False):
            ids, offsets = one.ids, one.offsets
            if literal:
                spelled = [self._spellings.get(token, [token]) for token in ids]
                ids = [token for tokens in spelled for token in tokens]
                offsets = [span for span, tokens in zip(offsets, spelled, strict=True) for _ in tokens]
            yield Encoded(ids, offsets)

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
