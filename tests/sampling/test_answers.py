"""Prompts of a file are asked whole, or refused."""

import json

import pytest

from uft.errors import UftError
from uft.sampling.answers import read_prompts


def test_what_stands_beside_an_instruction_is_asked_too(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": "sort :", "input": "lion bear"}, {"instruction": "count : fox", "input": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt[-1].content for prompt in read_prompts(file)] == ["sort :\n\nlion bear", "count : fox"]
    file.write_text(json.dumps({"question": "Who won?", "context": "The fox won."}) + "\n")
    with pytest.raises(UftError, match="its context is not in its question"):
        read_prompts(file)
    file.write_text(json.dumps({"prompt": "The fox won. Who won?", "context": "The fox won."}) + "\n")
    assert len(read_prompts(file)) == 1


def test_messages_are_asked_with_all_that_they_carry(tmp_path):
    file, call = tmp_path / "rows.jsonl", {"type": "function", "function": {"name": "w", "arguments": {}}}
    said = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    said += [{"role": "tool", "content": "sun"}, {"role": "assistant", "content": "sunny"}]
    file.write_text(json.dumps({"messages": said, "tools": [call], "system_prompt": "Be brief."}) + "\n")
    (prompt,) = read_prompts(file)
    assert [turn.role for turn in prompt] == ["system", "user", "assistant", "tool"]
    assert (json.loads(prompt[0].extra), json.loads(prompt[2].extra)) == ({"tools": [call]}, {"tool_calls": [call]})


def test_a_line_of_a_text_file_is_one_prompt(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_bytes("one\u2028still one\r\n\ntwo\x85still two\n".encode())
    assert [prompt[-1].content for prompt in read_prompts(file)] == ["one\u2028still one", "two\x85still two"]
