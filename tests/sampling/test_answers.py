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


def test_a_line_of_a_text_file_is_one_prompt(tmp_path):
    file = tmp_path / "asked.txt"
    file.write_bytes("one\u2028still one\r\n\ntwo\x85still two\n".encode())
    assert [prompt[-1].content for prompt in read_prompts(file)] == ["one\u2028still one", "two\x85still two"]
