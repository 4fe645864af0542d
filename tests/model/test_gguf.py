"""What GGUF and Ollama can say of a model; files are written and read back in tests/end_to_end/test_after.py."""

from __future__ import annotations

import jinja2
import pytest

from uft.model.gguf import QWEN_SPLIT, obstacle, splitting, turn_pieces

TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
CHATML = "{% for message in messages %}" + TURN + "{% endfor %}{% if more %}<|im_start|>assistant\n{% endif %}"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
WRITTEN = (
    '{{- range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, (WRITTEN, "")),
        (SYSTEM + CHATML, (WRITTEN, "Be kind.")),
        ("<s>" + CHATML, ("<s>" + WRITTEN, "")),
        (CHATML.replace("message.content", "message.content | upper"), None),
        (CHATML.replace(TURN, "{% if loop.last or message.role != 'assistant' %}" + TURN + "{% endif %}"), None),
        (SYSTEM.replace("Be kind.", "") + CHATML, None),  # Ollama writes no turn without a text
    ],
)
def test_a_chat_template_in_the_language_of_ollama(template, expected):
    compiled = jinja2.Template(template, keep_trailing_newline=True)
    assert turn_pieces(lambda turns, more: compiled.render(messages=turns, more=more)) == expected


def test_how_a_tokenizer_splits_text():
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    def named(*first: dict, use_regex: bool = True) -> str | None:
        return splitting(
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, level | {"use_regex": use_regex}]}}
        )

    assert splitting({"pre_tokenizer": level}) == "gpt-2"
    assert named({"type": "Digits", "individual_digits": True}) == "smollm"
    assert named({"type": "Split", "pattern": {"Regex": QWEN_SPLIT}}, use_regex=False) == "qwen2"
    assert named({"type": "Split", "pattern": {"Regex": r"\w+"}}, use_regex=False) is None
    assert splitting({"pre_tokenizer": level | {"add_prefix_space": True}}) is None
    assert splitting({"pre_tokenizer": {"type": "Whitespace"}}) is None


def test_what_cannot_be_described_is_named(build):
    words = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    assert obstacle(build("llama").config, words) == ""
    assert "architecture is gpt2" in obstacle(build("gpt2").config, words)
    assert "a window of 4 tokens" in obstacle(build("mistral").config, words)
    assert "no byte-level BPE" in obstacle(build("llama").config, {"model": {"type": "WordLevel"}})
    scaled = build("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).config
    assert "scaled (linear)" in obstacle(scaled, words)
