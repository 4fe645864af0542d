"""What is measured on: random models and random rows, the same for every program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 49_152
SPECIAL = ("<pad>", "</s>", "<unk>", "<user>", "<assistant>")
TEMPLATE = (  # nothing after the stop token: TRL learns that too, uft does not
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
MARKS = 4  # tokens of the template in one prompt with its completion
LONGEST = 512  # words of a prompt or a completion


# median and spread (of the logarithm) of prompts and completions, in words
Lengths = tuple[tuple[float, float], tuple[float, float]]
CHAT = ((90, 0.9), (120, 0.9))  # a question and a longer answer: more than half of the tokens are supervised
HISTORY = ((220, 0.8), (50, 0.8))  # a conversation so far, or a document, and a shorter answer
LONG_PROMPTS = ((320, 0.5), (70, 0.7))


@dataclass(frozen=True)
class Size:
    """A model, how many rows of each kind make a step, and how long demonstrations are."""

    llama: dict[str, Any]  # of transformers' LlamaConfig
    rows: dict[str, int]
    demonstrations: Lengths = CHAT

    def lengths(self, kind: str) -> Lengths:
        return self.demonstrations if kind == "demonstrations" else LONG_PROMPTS


THIRTY = Size(
    {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    {"demonstrations": 8, "pairs": 4, "negatives": 4},
)
SIZES = {
    "toy": Size(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        {"demonstrations": 2, "pairs": 2},
        LONG_PROMPTS,
    ),
    "1b": Size(  # of Llama-3.2-1B's layers
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        {"demonstrations": 64, "pairs": 32},
    ),
    "30m": THIRTY,
    "30m-history": replace(THIRTY, demonstrations=HISTORY),
    "135m": Size(  # SmolLM2-135M: what its weights say makes no difference here
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        {"demonstrations": 4, "pairs": 2, "negatives": 2},
    ),
}

COMPLETIONS = {"demonstrations": ("completion",), "pairs": ("chosen", "rejected"), "negatives": ("response", "a", "b")}

KINDS = {
    "sft": "demonstrations",
    "ift": "demonstrations",
    "uft": "demonstrations",
    "dpo": "pairs",
    "una": "pairs",
    "dft": "negatives",
    "dft2": "negatives",
}
"""Objective -> the rows it is measured on."""


@dataclass(frozen=True)
class Place:
    """A folder with a model, and a file of rows in the order in which they are drawn."""

    folder: Path
    rows: int  # of a step
    tokens: list[int]  # of the sequences of every step

    @classmethod
    def at(cls, folder: Path) -> Place:
        """What `furnish` left there."""
        return cls(folder, **json.loads((folder / "place.json").read_text(encoding="utf-8")))

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def file(self) -> Path:
        return self.folder / "rows.jsonl"

    def in_order(self) -> list[dict[str, Any]]:
        """The rows as uft draws them, step by step."""
        records = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        return [records[number] for number in _order(len(records))]


def furnish(folder: Path, size: str, kind: str, steps: int) -> Place:
    """A place in `folder` for `steps` steps."""
    made, random = SIZES[size], np.random.default_rng(0)
    records = [_record(kind, made.lengths(kind), random) for _ in range(steps * made.rows[kind])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    _save_model(made, folder / "model")
    each, rows = [_tokens(records[number]) for number in _order(len(records))], made.rows[kind]
    tokens = [sum(each[start : start + rows]) for start in range(0, len(each), rows)]
    (folder / "place.json").write_text(json.dumps({"rows": rows, "tokens": tokens}), encoding="utf-8")
    return Place(folder, rows, tokens)


def _order(rows: int) -> list[int]:
    from uft.data.mixture import Mixture

    return [draw.index for draw in Mixture(["rows"], [rows], [1.0], 0).take(rows)]


def _record(kind: str, lengths: Lengths, random: np.random.Generator) -> dict[str, Any]:
    prompts, completions = lengths
    prompt = [{"role": "user", "content": _words(random, *prompts)}]
    said = [[{"role": "assistant", "content": _words(random, *completions)}] for _ in COMPLETIONS[kind]]
    if kind == "negatives":
        return {"prompt": prompt, "response": said[0], "negatives": said[1:]}
    return {"prompt": prompt, **dict(zip(COMPLETIONS[kind], said, strict=True))}


def _words(random: np.random.Generator, median: float, spread: float) -> str:
    length = int(np.clip(median * np.exp(spread * random.standard_normal()), 4, LONGEST))
    return " ".join(f"w{number}" for number in random.integers(len(SPECIAL), VOCABULARY, length))


def _tokens(record: dict[str, Any]) -> int:
    """Of all completions, each with its prompt."""
    prompt, *completions = _contents(list(record.values()))
    return sum(len(prompt.split()) + len(said.split()) + MARKS for said in completions)


def _contents(values: Sequence[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, list):
            yield from _contents(value)
        else:
            yield value["content"]


def chats(count: int) -> list[tuple[str, str]]:
    """Prompts and answers, as many."""
    random = np.random.default_rng(0)
    return [(_words(random, *CHAT[0]), _words(random, *CHAT[1])) for _ in range(count)]


def save_tokenizer(folder: Path) -> Any:
    """Of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCABULARY))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save_model(size: Size, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **size.llama,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
