"""Messages: prompts, replies and conversations in the shapes that data sets give them.

A string, or a list of messages `{role, content}` (OpenAI, TRL) or `{from, value}` (ShareGPT), also as JSON text, or a
transcript as in HH-RLHF. From top to bottom: values and their words in errors, prompts and replies, messages, and
where a prompt ends.
"""

from __future__ import annotations

import ast
import json
import re
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

from uft.data.rows import MESSAGE_FIELDS, Message, Turns

Record = Mapping[str, Any]
ROW = "the row"
MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
"""Columns and fields of messages that hold more than text."""
_ROLE_NAMES = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bot model",
    "tool": "tool function observation ipython tool_response tool_result",
}
ROLES = {theirs: ours for ours, names in _ROLE_NAMES.items() for theirs in names.split()}
"""Their name of a role: ours."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning of an assistant turn."""
LEARNED = ("weight", "train", "training", "loss_mask")
"""Names of the mark, 0 or 1, that tells whether a row or an assistant turn is learned."""
MARKS = (*LEARNED, "loss")
"""Those of a turn."""
_TEXTS = ("role", "from", "content", "value", "function_call")
MESSAGE_KEYS = frozenset({*_TEXTS, *MESSAGE_FIELDS, *REASONING, *MARKS}) - {"name"}
"""All that is read of a message."""

_PLAIN = {"role", "content"}
"""Fields of most messages."""
_TYPES = {"str": "text", "NoneType": "null", "dict": "an object", "list": "a list", "bool": "true/false"}
_PART_TYPES = (None, "text", "input_text", "output_text")
_CALLS = ("function_call", "tool_call")
"""Roles of a turn that is a call of a tool."""
_ARGUMENTS = ("parameters", "input", "args", "kwargs", "params")
"""Other names of the arguments of a call, which no template reads."""
_OBJECTS_TEXT = re.compile(r"\s*(?:\[\s*)?\{\s*['\"]")
_INVISIBLE = re.compile(r"[\s\x00\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]*")
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


class Unreadable(ValueError):
    """A record that cannot be used: the reason, in words that fit after "row 17: ", and lines of advice, in which
    `{source}` stands for the key of the row's source."""

    def __init__(self, why: str, *advice: str) -> None:
        super().__init__(why)
        self.advice = advice


def type_name(value: Any) -> str:
    """The type of a value in a reader's words."""
    name = type(value).__name__
    return _TYPES.get(name, "a number" if isinstance(value, (int, float)) else name)


def excerpt(value: Any) -> str:
    """The start of a value, however long and deep it is."""
    return _SHORT.repr(value)


def read_text(value: Any, field: str) -> str:
    """A string that is not blank and can be encoded as UTF-8."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, str):
        raise Unreadable(f"{field} is {type_name(value)}, not text")
    if is_blank(value):
        raise Unreadable(f"{field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, escaped in JSON or left by a file in another encoding
        raise Unreadable(f"{field} is not valid UTF-8") from None
    return value


def is_invisible(text: str) -> bool:
    """Whether a text has nothing but white space and characters that are not shown."""
    return _INVISIBLE.fullmatch(text) is not None


def optional_text(value: Any, field: str) -> str | None:
    """A text that may be missing; a number is written out."""
    if is_blank(value):
        return None
    return str(value) if is_number(value) else read_text(value, field)


def is_blank(value: Any) -> bool:
    """Whether a field says nothing: it is missing, an empty list, white space, or an object of nothing else."""
    if value is None or isinstance(value, str):  # first: a hundred fields of every row are asked
        return not value or value.isspace()
    return all(map(is_blank, value.values())) if isinstance(value, dict) and value else value == []


def texts_of(value: Any) -> Iterator[str]:
    """All texts within a value; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_of(one)


def facts_of(fields: Record, columns: Collection[str]) -> dict[str, Any]:
    """What a record says in the columns of its source's checker, as JSON would give it back; JSON in a text as well."""
    facts = {column: fields[column] for column in columns if not is_blank(fields.get(column))}
    for column, value in facts.items():
        if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
            with suppress(ValueError, RecursionError):
                facts[column] = json.loads(value)
    return dict(json.loads(json.dumps(facts, default=str)))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_of(value: Any) -> Any:
    """The number that a text, or a decimal of a table, says; else the value."""
    with suppress(ValueError):
        return float(value) if isinstance(value, (str, Decimal)) else value
    return value


def unpacked(value: Any) -> Any:
    """A message as a list of one, and a list of messages that came as JSON or Python text as that list."""
    if isinstance(value, dict) and role_of(value) is not None:
        return [value]
    if isinstance(value, str) and _OBJECTS_TEXT.match(value):
        items = listed(value, "[{")
        items = [items] if isinstance(items, dict) else items
        objects = [one for one in items if isinstance(one, dict)] if isinstance(items, list) else []
        if any(role_of(one) is not None and not {"content", "value"}.isdisjoint(one) for one in objects):
            return items
    return value


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these fields. Raises :class:`Unreadable` where one is named twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise Unreadable(f"names a field twice: {repeated(name for name, _ in pairs)}")
    return fields


def repeated(names: Iterable[str]) -> str:
    return ", ".join(excerpt(name) for name, count in Counter(names).items() if count > 1)


JSON = json.JSONDecoder(object_pairs_hook=object_of)


def refuse_repeated(text: str, field: str) -> None:
    """Raise :class:`Unreadable` where a text is JSON of an object that names a field twice."""
    try:
        JSON.decode(text)
    except Unreadable as error:
        raise Unreadable(f"{field} {error}") from None
    except (ValueError, RecursionError):  # no JSON
        return


def listed(value: Any, begins: str = "[") -> Any:
    """The list that a text cell holds as JSON or Python text; else the value."""
    for parse in (json.loads, ast.literal_eval) if isinstance(value, str) and value.lstrip()[:1] in (*begins,) else ():
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(value)
    return value


def read_prompt(value: Any, field: str = "prompt") -> Turns:
    """Everything before the reply: a string is one user turn."""
    value = unpacked(value)
    if isinstance(value, str) and _is_transcript(value):
        open_end = value.rstrip().removesuffix("Assistant:").rstrip()
        spoken = _TRANSCRIPT.split(open_end)[1::2]
        if len(open_end) < len(value.rstrip()) or ("Assistant" in spoken and spoken[-1] == "Human"):
            return read_dialogue(open_end, field)
    if not isinstance(value, (list, tuple)):
        return (Message("user", read_text(value, field)),)
    return check_prompt(read_conversation(value, field), field)


def read_reply(value: Any, field: str = "completion") -> Turns:
    """The turns after the prompt: a string is one assistant turn, messages start and end with one."""
    value = unpacked(value)
    if isinstance(value, list) and value and isinstance(value[0], str):
        raise Unreadable(f"{field} is a list of texts ({len(value)}), and a row has one: write a row for each")
    if not isinstance(value, (list, tuple)):
        return (Message("assistant", read_text(value, field)),)
    return check_reply(read_conversation(value, field), field)


def with_context(prompt: Turns, record: Record) -> Turns:
    """The prompt with the system text, the earlier turns and the tools that stand in columns of their own."""
    refuse_media(record, ROW)
    prompt = with_history(prompt, record.get("history"))
    if not is_blank(system := record.get("system")):
        first = Message("system", read_text(system, "system"))
        if prompt[0].role != "system":
            prompt = (first, *prompt)
        elif prompt[0].content.strip() != first.content.strip():
            raise Unreadable("system differs from the system turn of the prompt")
    given = {name: record[name] for name in ("tools", "functions") if not is_blank(record.get(name))}
    if not given or not (extra := read_extra(given, "")):
        return prompt
    said = [json.loads(turn.extra or "{}") for turn in prompt]
    tools = json.loads(extra)
    if any(fields.get("tools", tools["tools"]) != tools["tools"] for fields in said):
        raise Unreadable("tools differs from the tools of a message", "leave it unread:  {source}.columns.tools=''")
    return (replace(prompt[0], extra=json.dumps(said[0] | tools, ensure_ascii=False)), *prompt[1:])


def with_reasoning(reply: Turns, reasoning: Any) -> Turns:
    """The reply with the reasoning that stands in a column of its own."""
    said = json.loads(reply[0].extra or "{}")
    if len(reply) > 1 or said.setdefault("reasoning_content", reasoning) != reasoning:
        why = "differs from the message's" if len(reply) == 1 else "is of one reply, and the row has several turns"
        raise Unreadable(f"reasoning_content {why}", "leave it unread:  {source}.columns.reasoning_content=''")
    return (replace(reply[0], extra=read_extra(said, "")),)


def under_system(prompt: Turns, system: str | None) -> Turns:
    """The prompt with `system` in the place of its own system turn; None: as it is."""
    if system is None:
        return prompt
    own = next((turn for turn in prompt if turn.role == "system"), Message("system", ""))
    return (replace(own, content=system), *(turn for turn in prompt if turn.role != "system"))


def with_history(turns: Turns, history: Any) -> Turns:
    """The prompt after earlier turns, which are messages or pairs of a question and its answer."""
    history = listed(history)
    if is_blank(history):
        return turns
    if not isinstance(history, list):
        raise Unreadable(f"history is {type_name(history)}, not a list of [question, answer]")
    earlier: list[Message] = []
    for number, pair in enumerate(history):
        if isinstance(pair, dict):
            earlier += read_conversation([pair], f"history[{number}]")
        elif isinstance(pair, list) and len(pair) == 2:
            roles = zip(("user", "assistant"), pair, strict=True)
            earlier += [Message(role, read_text(text, f"history[{number}] ({role})")) for role, text in roles]
        else:
            raise Unreadable(f"history[{number}] is {type_name(pair)}, not [question, answer]")
    system = turns[:1] if turns[0].role == "system" else ()
    return _check_turns((*system, *earlier, *turns[len(system) :]), "history")


def check_prompt(turns: Turns, field: str) -> Turns:
    """The turns, if a reply can follow them."""
    if not turns:
        raise Unreadable(f"{field} has no prompt")
    if turns[-1].role == "assistant":
        raise Unreadable(f"{field} ends with an assistant turn")
    if all(turn.role == "system" for turn in turns):
        raise Unreadable(f"{field} has no user turn")
    return turns


def check_reply(turns: Turns, field: str) -> Turns:
    """The turns, if they begin and end with the assistant."""
    for turn, place in ((turns[0], "start"), (turns[-1], "end")):
        if turn.role != "assistant":
            raise Unreadable(f"{field} must {place} with an assistant turn, not {turn.role}")
    return turns


def read_conversation(value: Any, field: str) -> Turns:
    """A list of messages whose roles make sense: at most one system turn, first; never two assistant turns running."""
    value = unpacked(value)
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, (list, tuple)):
        text = "" if isinstance(value, str) else "text or "
        raise Unreadable(f"{field} is {type_name(value)}, not {text}a list of messages")
    read = [_read_message(item, f"{field}[{number}]") for number, item in enumerate(value)]
    return _check_turns(tuple(turn for turn in read if turn is not None), field)


def _check_turns(turns: Turns, field: str) -> Turns:
    if not turns:
        raise Unreadable(f"{field} is empty")
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise Unreadable(f"{field} has a system turn after other turns")
        if turn.role == "assistant" and number and turns[number - 1].role == "assistant":
            raise Unreadable(f"{field} has two assistant turns in a row")
    return turns


def _read_message(item: Any, field: str) -> Message | None:
    """One turn; None for a blank system turn, which many data sets have."""
    if not isinstance(item, dict):
        raise Unreadable(f"{field} is {type_name(item)}, not a message")
    if _one_of(item, "role", "from") in _CALLS:  # a turn of its own for a call, in ShareGPT's form
        item = {**item, "role": "assistant", "from": None, "content": None, "value": None} | {
            "function_call": _one_of(item, "content", "value")
        }
    role, content = role_of(item), _one_of(item, "content", "value")
    if role is not None and item.keys() == _PLAIN and not is_blank(content) and isinstance(content, str):
        return Message(role, read_text(content, f"{field} ({role})"))  # as below, in a third of the time
    if role is None:
        name = excerpt(_one_of(item, "role", "from"))
        why = "has no role" if name == "None" else f"has the unknown role {name}"
        raise Unreadable(f"{field} {why} (known: {', '.join(ROLES)}; fields: {', '.join(map(str, item))[:80]})")
    named = [_role(item[key]) for key in ("role", "from") if _role(item.get(key))]
    texts = [item[key] for key in ("content", "value") if not is_blank(item.get(key))]
    thoughts = [item[key] for key in REASONING if not is_blank(item.get(key))]
    for keys, values in (("role, from", named), ("content, value", texts), (", ".join(REASONING), thoughts)):
        if any(value != values[0] for value in values):
            raise Unreadable(f"{field} has fields that contradict each other: {keys}")
    if isinstance(content, list):  # content parts; text is all that can be trained on here
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            is_text = isinstance(part, dict) and isinstance(part.get("text"), str)
            if not is_text or kind not in _PART_TYPES:
                raise Unreadable(f"{field} has a part that is not text" + (f": {excerpt(kind)}" if kind else ""))
        content = "".join(part["text"] for part in parts)
    refuse_media(item, field)
    said = [name for name in (*REASONING, "tool_calls", "function_call") if not is_blank(item.get(name))]
    if said and role != "assistant":
        raise Unreadable(f"{field} ({role}) has {', '.join(said)}, which only an assistant turn can have")
    extra = read_extra(item, field)
    if role == "system" and is_blank(content):
        return Message(role, "", extra) if extra else None
    marks = {name: item[name] for name in MARKS if role == "assistant" and not is_blank(item.get(name))}
    for name, value in marks.items():
        if flag(value) is None:
            raise Unreadable(f"{field}.{name} is {excerpt(value)}, not 0 or 1")
    if len(set(map(flag, marks.values()))) > 1:
        raise Unreadable(f"{field} has marks that contradict each other: {', '.join(marks)}")
    learned = next(map(flag, marks.values()), None)
    if is_blank(content) and {"tool_calls", "function_call"} & set(said):
        return Message(role, "", extra, learned)
    if content is None:
        why = "content is null" if {"content", "value"} & item.keys() else "has neither content nor value"
        raise Unreadable(f"{field} ({role}) {why} (fields: {', '.join(map(str, item))[:80]})")
    return Message(role, read_text(content, f"{field} ({role})"), extra, learned)


def refuse_media(fields: Record, where: str) -> None:
    """Raise :class:`Unreadable` where a row or a message brings more than text, which nothing here can train on."""
    brought = sorted(name for name in MEDIA & fields.keys() if not is_blank(fields[name]))
    if brought:
        left = [f"{{source}}.columns.{name}=''" for name in brought] if where == ROW else []
        advice = [f"leave it unread:  {' '.join(left)}"] if left else []
        raise Unreadable(f"{where} has {', '.join(brought)}: only text can be trained on", *advice)


def read_extra(item: Record, field: str) -> str:
    """JSON of the fields of a message, besides its text, that a template may render; "" where it has none."""
    field = f"{field}." if field else ""
    for old, new in (("function_call", "tool_calls"), ("functions", "tools")):  # OpenAI's older form
        if is_blank(value := item.get(old)):
            continue
        if not is_blank(item.get(new)):
            raise Unreadable(f"{field}{new} and {old} are both there")
        value = _parsed(value, f"{field}{old}")
        functions = value if isinstance(value, list) else [value]
        if not all(isinstance(one, dict) for one in functions):
            raise Unreadable(f"{field}{old} is no function")
        item = {**item, new: [{"type": "function", "function": one} for one in functions]}
    extra = {name: item[name] for name in MESSAGE_FIELDS if not is_blank(item.get(name))}
    if role_of(item) != "tool":  # the name of a speaker is no name of a tool
        extra.pop("name", None)
    reasoning = next((item[name] for name in REASONING if not is_blank(item.get(name))), None)
    if reasoning is not None:
        extra["reasoning_content"] = read_text(reasoning, f"{field}reasoning_content")
    for name in ("tools", "tool_calls"):
        if is_blank(value := listed(extra.get(name))):  # also "[]"
            extra.pop(name, None)
            continue
        value = [_parsed(one, f"{field}{name}") for one in value] if isinstance(value, list) else value
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            items = value if isinstance(value, list) else []
            odd = next((f" with {type_name(one)}" for one in items if not isinstance(one, dict)), "")
            raise Unreadable(f"{field}{name} is {type_name(value)}{odd}, not a list of objects")
        extra[name] = [_read_call(one, f"{field}tool_calls") for one in value] if name == "tool_calls" else value
    try:
        return read_text(json.dumps(extra, ensure_ascii=False), f"{field}{', '.join(extra)}") if extra else ""
    except (TypeError, ValueError) as error:
        raise Unreadable(f"{field}{', '.join(extra)} cannot be written as JSON: {error}") from None


def _parsed(value: Any, field: str) -> Any:
    """The value that a text holds as JSON; else the value."""
    if not isinstance(value, str):
        return value
    refuse_repeated(value, field)
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    return value


def _read_call(call: dict[str, Any], field: str, name: Any = None) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates want them, where they came as JSON text."""
    function = _parsed(call.get("function"), field)
    if isinstance(function, dict):
        return {**call, "function": _read_call(function, field, call.get("name"))}
    if is_blank(call.get("name", name)):
        raise Unreadable(f"{field} has a call without a name")
    arguments = call.get("arguments")
    if "arguments" not in call and (other := [name for name in _ARGUMENTS if not is_blank(call.get(name))]):
        raise Unreadable(f"{field} has a call with {other[0]}: they are called arguments")
    if "arguments" not in call or (isinstance(arguments, str) and is_blank(arguments)):
        return {**call, "arguments": {}}  # templates refuse, or write, a call that has none
    found = _parsed(_parsed(arguments, field), field)  # JSON that was written as JSON once more
    return {**call, "arguments": found} if isinstance(found, dict) else call


def flag(value: Any) -> bool | None:
    """A truth value, also as 0 or 1 or as text; None for all else."""
    if isinstance(value, str):
        word = value.strip().lower()
        value = word == "true" if word in ("true", "false") else number_of(word)
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def role_of(item: Mapping[str, Any]) -> str | None:
    """The role of a message under our name, None where it is none that is known."""
    return _role(_one_of(item, "role", "from"))


def _role(name: Any) -> str | None:
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _one_of(item: Mapping[str, Any], ours: str, theirs: str) -> Any:
    """A message's field under the name that is set: unions of data sets have both, and null under one."""
    return item.get(theirs) if item.get(ours) is None else item.get(ours)


def read_dialogue(value: Any, field: str) -> Turns:
    """A whole conversation: messages, or a transcript as in HH-RLHF (`Human: ...` and `Assistant: ...` paragraphs)."""
    value = unpacked(value)
    if not isinstance(value, str):
        return read_conversation(value, field)
    before, *pieces = _TRANSCRIPT.split(read_text(value, field))
    if before.strip() or not pieces:
        raise Unreadable("prompt is missing")
    turns = [{"role": role.lower(), "content": text} for role, text in zip(pieces[::2], pieces[1::2], strict=True)]
    return read_conversation(turns, field)


def _is_transcript(text: str) -> bool:
    found = _TRANSCRIPT.match(text)
    return found is not None and found[1] == "Human"


def split_conversation(turns: Turns, field: str) -> tuple[Turns, Turns]:
    """(turns before the first assistant turn, the rest)."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), None)
    if first is None:
        raise Unreadable(f"{field} has no assistant turn")
    if first == 0:
        raise Unreadable(f"{field} starts with the assistant: there is no prompt")
    return check_prompt(turns[:first], field), check_reply(turns[first:], field)


def split_pair(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(the shared prompt, the rest of each): the prompt is their longest common start before a reply.

    Of two equal sides that is all before the last reply.
    """
    shared = 0
    for number, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left.role == right.role == "assistant":
            shared = number
        if left != right:
            break
    if shared == 0:
        place = next((n for n, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right), 0)
        texts = ["".join(side[place].content.split()) for side in (chosen, rejected)]
        how = " in white space" if texts[0] == texts[1] and chosen[place].role == rejected[place].role else ""
        raise Unreadable(f"chosen and rejected share no prompt: their turns number {place + 1} differ{how}")
    prompt = check_prompt(chosen[:shared], "chosen")
    return prompt, check_reply(chosen[shared:], "chosen"), check_reply(rejected[shared:], "rejected")


def starts_before_reply(value: Any) -> bool:
    """Whether a side of a pair repeats the prompt in front of its reply."""
    if isinstance(value, str):
        return _is_transcript(value)
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], dict):
        return False
    return role_of(value[0]) not in (None, "assistant")


def whole_prompt(asked: Turns, shared: Turns, column: str) -> Turns:
    """One prompt of two forms of it: `asked` of a column, and `shared` by the conversations of a pair.

    The column may begin with turns that the conversations do not repeat, or be a part of theirs.
    """
    ours, theirs = ([(turn.role, turn.content.strip()) for turn in turns] for turns in (asked, shared))
    for size in range(min(len(ours), len(theirs)), 0, -1):
        if ours[-size:] == theirs[:size]:
            return asked + shared[size:]
    if any(ours == theirs[start : start + len(ours)] for start in range(len(theirs))):
        return shared
    advice = f"leave it unread:  {{source}}.columns.{column}=''"
    raise Unreadable(f"{column} differs from the prompt in chosen and rejected", advice)
