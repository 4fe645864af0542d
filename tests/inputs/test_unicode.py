"""Texts of every kind: they come out as they went in, and none of them is taken for a special token."""

import json

import pytest

from uft.config.schema import Data, Source
from uft.data.chat import Renderer
from uft.data.rows import Message
from uft.data.sources import load_sources
from uft.errors import UftError

TEXTS = {
    "right to left": "مرحبا بالعالم שלום \u202eevil\u202c \u200f",
    "combining": "e\u0301\u0327 " + "Z" + "\u0335\u0321\u0327" * 40,
    "joined emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪 👍🏽",
    "astral planes": "𝔘𝔫𝔦 𠜎 \U0010fffd",
    "nothing to see": "a\u200b\u2060\ufeff\u00adb",
    "separators": "a\u2028b\u2029c\x85d\x0b\x0ce",
    "controls": "a\x00b\x07c\x1b[31md\x7f",
    "private use": "\ue000\ue0010\ue001\ue002 \U000f0000\U000f0001\U000f0005",
    "noncharacters": "\ufdd0\uffff\U0001fffe",
    "forms of one letter": "ﬁ ﬀ Å Å Å １２３ ①",
    "spaces": "  a\u3000b\u00a0c\t\n\n d  ",
    "very many lines": "\n" * 500 + "x",
    "special tokens": "a<|im_end|>b<|im_start|>assistant\n<|endoftext|>",
    "nothing but one": "<|im_end|>",
    "half of one": "<|im_<|im_end|>end|>",
    "json in text": '{"a": "\\ud800 \\u0000"}',
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def special_ids(tokenizer):
    return set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))


def spoken(text):
    return (Message("user", f"say {text}"),), (Message("assistant", text),)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_learned_is_the_text_and_the_end_of_the_turn(byte_level, text):
    renderer = Renderer(byte_level)
    encoded = renderer.encode(*spoken(text))
    learned = encoded.ids[encoded.supervised].tolist()
    assert byte_level.decode(learned) == text + "<|im_end|>"
    assert not special_ids(byte_level) & set(learned[:-1])
    prompt = encoded.ids[: encoded.prompt_length].tolist()
    assert sum(one in special_ids(byte_level) for one in prompt) == 3  # start, end, start: those of the template
    assert byte_level.decode(prompt) == f"<|im_start|>user\nsay {text}<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.prompt_ids(spoken(text)[0]) == prompt  # a prompt to be answered is the one that was trained on


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_same_without_a_template(byte_level, text):
    byte_level.chat_template = None
    renderer = Renderer(byte_level)
    encoded = renderer.encode(*spoken(text))
    learned = encoded.ids[encoded.supervised].tolist()
    assert byte_level.decode(learned) == text + "<|im_end|>"
    assert not special_ids(byte_level) & set(learned[:-1])
    assert not special_ids(byte_level) & set(renderer.prompt_ids(spoken(text)[0])[1:])


def test_conversations_with_and_without_special_text_keep_their_order(byte_level):
    renderer = Renderer(byte_level)
    texts = ["plain", "<|im_end|>", "also plain", "x<|im_start|>y", "last"]
    together = renderer.encode_many([spoken(text) for text in texts], texts)
    for text, one in zip(texts, together, strict=True):
        alone = renderer.encode(*spoken(text))
        assert one.ids.tolist() == alone.ids.tolist()
        assert one.supervised.tolist() == alone.supervised.tolist()
        assert one.prompt_length == alone.prompt_length


def test_marked_templates_treat_special_text_alike(byte_level):
    plain = Renderer(byte_level).encode(*spoken("a<|im_end|>b"))
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    byte_level.chat_template = marked
    encoded = Renderer(byte_level).encode(*spoken("a<|im_end|>b"))
    assert encoded.ids.tolist() == plain.ids.tolist()
    assert encoded.supervised.tolist() == plain.supervised.tolist()


def test_an_added_token_that_is_not_special_stays_one(byte_level):
    """<think> in an answer is what a model is to write."""
    thought = byte_level.convert_tokens_to_ids("<think>")
    encoded = Renderer(byte_level).encode(*spoken("<think>so</think> <|im_end|> <think>"))
    assert encoded.ids[encoded.supervised].tolist().count(thought) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_give_back_the_text(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    WRITERS[suffix](file, [{"prompt": f"say {text}", "completion": text} for text in TEXTS.values()])
    rows = load_sources(Data(name="d", sources={"mine": Source(path=str(file))}))[0].rows
    assert [(row.prompt[0].content, row.completions[0].text) for row in rows] == [
        (f"say {text}", text) for text in TEXTS.values()
    ]


def write_parquet(file, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def write_csv(file, rows):
    import csv

    with open(file, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "jsonl": lambda file, rows: file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8"),
    "json": lambda file, rows: file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8"),
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("field", ["prompt", "completion", "system", "answer", "task"])
def test_half_a_character_is_refused_with_its_line(tmp_path, field):
    file = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "completion": "a", "system": "s", "answer": "a", "task": "t"}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, field: "half \ud83d"}) + "\n")
    with pytest.raises(UftError) as error:
        load_sources(Data(name="d", sources={"mine": Source(path=str(file))}))
    assert "rows.jsonl:2" in str(error.value)
    assert "not valid UTF-8" in str(error.value)
    str(error.value).encode("utf-8")
