"""Prompts, replies and conversations in the shapes that data sets give them."""

import pytest

from uft.data import messages
from uft.data.messages import Unreadable
from uft.data.rows import Message

USER, REPLY, SYSTEM = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("system", "s")))


def test_messages_are_turns():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages.read_prompt(" q\r\n") == (Message("user", " q\r\n"),), "text is kept to the letter"
    assert messages.read_prompt([{"role": "user", "content": parts}]) == (Message("user", "ab"),)
    assert messages.read_prompt([{"role": "system", "content": ""}, USER]) == (Message("user", "q"),)
    names = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}
    turns = messages.read_conversation([{"from": name, "value": "x"} for name in names], "c")
    assert [turn.role for turn in turns] == list(names.values())


def test_a_conversation_is_split_before_the_first_reply():
    prompt, rest = messages.split_conversation(messages.read_conversation([SYSTEM, USER, REPLY, USER, REPLY], "m"), "m")
    assert [t.role for t in prompt] == ["system", "user"]
    assert [t.role for t in rest] == ["assistant", "user", "assistant"]
    with pytest.raises(Unreadable, match="no prompt"):
        messages.split_conversation(messages.read_conversation([REPLY, USER, REPLY], "m"), "m")


def test_a_system_column_goes_in_front_unless_there_is_one():
    brief, own = {"system": "be brief"}, messages.read_prompt([SYSTEM, USER])
    assert [t.role for t in messages.with_context(messages.read_prompt("q"), brief)] == ["system", "user"]
    assert messages.with_context(own, {"system": " s\n"}) == own
    with pytest.raises(Unreadable, match="system differs"):
        messages.with_context(own, brief)
    assert messages.with_context(own, {"system": None}) == own


def test_a_pair_shares_its_longest_common_start():
    better, worse = ({"role": "assistant", "content": c} for c in ("good", "bad"))
    chosen = messages.read_conversation([USER, REPLY, USER, better], "chosen")
    rejected = messages.read_conversation([USER, REPLY, USER, worse], "rejected")
    prompt, left, right = messages.split_pair(chosen, rejected)
    assert (len(prompt), left[0].content, right[0].content) == (3, "good", "bad")


def test_an_hh_transcript_is_a_conversation():
    turns = messages.read_dialogue("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: so long", "chosen")
    assert [(t.role, t.content) for t in turns] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "bye"),
        ("assistant", "so long"),
    ]


@pytest.mark.parametrize(
    ("read", "value", "why"),
    [
        (messages.read_prompt, None, "prompt is missing"),
        (messages.read_prompt, "  \n", "prompt is empty"),
        (messages.read_prompt, 7, "prompt is a number, not text"),
        (messages.read_prompt, {"a": 1}, "prompt is an object, not text"),
        (messages.read_prompt, [], "prompt is empty"),
        (messages.read_prompt, ["hi"], "prompt[0] is text, not a message"),
        (messages.read_prompt, [USER, REPLY], "ends with an assistant turn"),
        (messages.read_prompt, [SYSTEM], "has no user turn"),
        (messages.read_prompt, [USER, SYSTEM], "system turn after other turns"),
        (messages.read_prompt, [{"role": "wizard", "content": "x"}], "unknown role 'wizard'"),
        (messages.read_prompt, [{"content": "x"}], "has no role"),
        (messages.read_prompt, [{"role": "user"}], "has neither content nor value"),
        (messages.read_prompt, "\ud800", "not valid UTF-8"),
        (messages.read_reply, [USER], "must start with an assistant turn"),
        (messages.read_reply, [REPLY, USER], "must end with an assistant turn"),
        (messages.read_reply, [REPLY, REPLY], "two assistant turns in a row"),
        (messages.read_reply, "", "completion is empty"),
    ],
)
def test_what_cannot_be_read_says_why(read, value, why):
    with pytest.raises(Unreadable) as error:
        read(value)
    assert why in str(error.value)
