"""Turns: prompts, replies and conversations in the shapes that data sets give them.

A prompt or a reply may be a string or a list of messages, a message `{role, content}` (OpenAI, TRL) or `{from, value}`
(ShareGPT). Whatever cannot be read raises :class:`Unreadable` with the reason, in words that fit after "row 17: ".
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

from uft.data.rows import Message

Turns = tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Their name of a role: ours."""

_TYPES = {"str": "text", "NoneType": "null", "dict": "an object", "list": "a list", "bool": "true/false"}
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


class Unreadable(ValueError):
    """Why one row cannot be used."""


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    name = type(value).__name__
    return _TYPES.get(name, "a number" if isinstance(value, (int, float)) else name)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


def excerpt(value: Any) -> str:
    """The start of a value, whatever it is and however long and deep."""
    return _SHORT.repr(value)


def text(value: Any, field: str) -> str:
    """A string with something in it that can be encoded as UTF-8."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, str):
        raise Unreadable(f"{field} is {kind_of(value)}, not text")
    if not value.strip():
        raise Unreadable(f"{field} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, escaped in JSON or left by a file in another encoding
        raise Unreadable(f"{field} is not valid UTF-8") from None
    return value


def prompt(value: Any, field: str = "prompt") -> Turns:
    """Everything before the reply: a string is one user turn."""
    if not isinstance(value, (list, tuple)):
        return (Message("user", text(value, field)),)
    return checked_prompt(conversation(value, field), field)


def reply(value: Any, field: str = "completion") -> Turns:
    """What follows the prompt: a string is one assistant turn, messages start and end with one."""
    if not isinstance(value, (list, tuple)):
        return (Message("assistant", text(value, field)),)
    return checked_reply(conversation(value, field), field)


def with_system(turns: Turns, system: Any) -> Turns:
    """The prompt with a system turn in front, unless there is nothing to say or it has one of its own."""
    if not isinstance(system, str) or not system.strip() or turns[0].role == "system":
        return turns
    return (Message("system", text(system, "system")), *turns)


def checked_prompt(turns: Turns, field: str) -> Turns:
    if turns[-1].role == "assistant":
        raise Unreadable(f"{field} ends with an assistant turn")
    if all(turn.role == "system" for turn in turns):
        raise Unreadable(f"{field} has no user turn")
    return turns


def checked_reply(turns: Turns, field: str) -> Turns:
    for turn, place in ((turns[0], "start"), (turns[-1], "end")):
        if turn.role != "assistant":
            raise Unreadable(f"{field} must {place} with an assistant turn, not {turn.role}")
    return turns


def conversation(value: Any, field: str) -> Turns:
    """A list of messages whose roles make sense: at most one system turn, first; never two assistant turns running."""
    if value is None:
        raise Unreadable(f"{field} is missing")
    if not isinstance(value, (list, tuple)):
        raise Unreadable(f"{field} is {kind_of(value)}, not text or a list of messages")
    read = [_message(item, f"{field}[{number}]") for number, item in enumerate(value)]
    turns = tuple(turn for turn in read if turn is not None)
    if not turns:
        raise Unreadable(f"{field} is empty")
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise Unreadable(f"{field} has a system turn after other turns")
        if turn.role == "assistant" and number and turns[number - 1].role == "assistant":
            raise Unreadable(f"{field} has two assistant turns in a row")
    return turns


def split_conversation(turns: Turns, field: str) -> tuple[Turns, Turns]:
    """(turns before the first assistant turn, the rest)."""
    first = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), None)
    if first is None:
        raise Unreadable(f"{field} has no assistant turn")
    if first == 0:
        raise Unreadable(f"{field} starts with the assistant: there is no prompt")
    return checked_prompt(turns[:first], field), checked_reply(turns[first:], field)


def split_pair(chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(the prompt both share, what follows in each): the prompt is their longest common start before a reply."""
    shared = 0
    for number, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left.role == right.role == "assistant":
            shared = number
        if left != right:
            break
    if shared == 0:
        raise Unreadable("chosen and rejected share no prompt")
    prompt = checked_prompt(chosen[:shared], "chosen")
    return prompt, checked_reply(chosen[shared:], "chosen"), checked_reply(rejected[shared:], "rejected")


def whole(value: Any, field: str) -> Turns:
    """A whole conversation: messages, or a transcript as in HH-RLHF (`Human: ...` and `Assistant: ...` paragraphs)."""
    if not isinstance(value, str):
        return conversation(value, field)
    before, *pieces = _TRANSCRIPT.split(text(value, field))
    if before.strip() or not pieces:
        raise Unreadable("prompt is missing")
    turns = [{"role": role.lower(), "content": said} for role, said in zip(pieces[::2], pieces[1::2], strict=True)]
    return conversation(turns, field)


def _message(item: Any, field: str) -> Message | None:
    """One turn; None for a system turn that says nothing, as many data sets have."""
    if not isinstance(item, dict):
        raise Unreadable(f"{field} is {kind_of(item)}, not a message")
    name = item.get("role", item.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise Unreadable(f"{field} has the unknown role {excerpt(name)} (known: {', '.join(ROLES)})")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # content parts; text is all that can be trained on here
        content = "".join(_part(part, field) for part in content)
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return None
    return Message(role, text(content, f"{field} ({role})"))


def _part(part: Any, field: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        raise Unreadable(f"{field} has a part that is not text")
    return part["text"]
