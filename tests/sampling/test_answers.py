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
