"""Rows, tokens and log-probs in the plainest way that torch and transformers allow. Nothing of uft is imported.

One sequence at a time, so there is no padding; every conversation rendered whole; full logits in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Tensor = torch.Tensor
Turns = list[dict[str, str]]


# --- rows


@dataclass(frozen=True)
class Answer:
    """One completion and what its row says of it: the reward is 1 for what is shown, chosen or good, 0 for the rest."""

    turns: Turns
    reward: float
    scored: bool = False  # the reward is a given number
    sampling: float | None = None  # its log-prob where it was sampled

    @property
    def good(self) -> bool:
        return self.reward >= 0.5


@dataclass(frozen=True)
class Row:
    kind: str  # the name of its file
    prompt: Turns
    answers: list[Answer]


def one_turn(value: str | Turns, role: str) -> Turns:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def demonstration(record: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one_turn(record["response"], "assistant"), 1.0)]


def pair(record: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one_turn(record[side], "assistant"), float(side == "chosen")) for side in ("chosen", "rejected")]


def label(record: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one_turn(record["completion"], "assistant"), float(record["label"]))]


def score(record: Mapping[str, Any]) -> list[Answer]:
    return [Answer(one_turn(record["completion"], "assistant"), record["score"], scored=True)]


def negatives(record: Mapping[str, Any]) -> list[Answer]:
    sampled = zip(record["negatives"], record["negative_log_probs"], strict=True)
    return demonstration(record) + [Answer(one_turn(text, "assistant"), 0.0, sampling=at) for text, at in sampled]


ANSWERS = {"demonstrations": demonstration, "pairs": pair, "labels": label, "scores": score, "negatives": negatives}


def read(file: Path) -> list[Row]:
    """The rows of a file named as in ROWS; scored completions of one prompt stand together."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if file.stem == "conversations":
        starts = [[turn["role"] for turn in record["messages"]].index("assistant") for record in records]
        return [
            Row("conversations", record["messages"][:start], [Answer(record["messages"][start:], 1.0)])
            for record, start in zip(records, starts, strict=True)
        ]
    rows: list[Row] = []
    for record in records:
        row = Row(file.stem, one_turn(record["prompt"], "user"), ANSWERS[file.stem](record))
        if file.stem == "scores" and rows and rows[-1].prompt == row.prompt:
            rows[-1].answers.extend(row.answers)
        else:
            rows.append(row)
    return rows


# --- tokens


@dataclass(frozen=True)
class Tokens:
    """One conversation: ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]

    def cut(self, length: int) -> Tokens:
        return Tokens(self.ids[:length], self.learned[:length])


Render = Callable[[Any, Turns, Turns], Tokens]


def chatml(tokenizer: Any, prompt: Turns, turns: Turns) -> Tokens:
    """By the tokens themselves: learned is what stands between an assistant's header and <|im_end|>, that included."""
    ids = tokenizer.apply_chat_template([*prompt, *turns], tokenize=True, return_dict=False)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header = tokenizer.encode("<|im_start|>assistant\n")
    learned, turn, inside = [False] * len(ids), -1, False
    for place, token in enumerate(ids):
        turn += token == start
        inside = inside or (turn >= len(prompt) and ids[place - len(header) : place] == header)
        learned[place] = inside
        inside = inside and token != end
    return Tokens(ids, learned)


def plain(tokenizer: Any, prompt: Turns, turns: Turns) -> Tokens:
    """No template: the prompt's contents and every turn tokenised apart, a stop token after what the assistant says."""
    pieces = [("\n\n".join(turn["content"] for turn in prompt), False)]
    for turn in turns:
        spoken = turn["role"] == "assistant"
        pieces.append((turn["content"] if spoken else f"\n\n{turn['content']}\n\n", spoken))
    ids: list[int] = []
    learned: list[bool] = []
    for text, spoken in pieces:
        piece = tokenizer.encode(text) + [tokenizer.eos_token_id] * spoken
        ids += piece
        learned += [spoken] * len(piece)
    return Tokens(ids, learned)


def between(header: Callable[[str], str], footer: Callable[[str], str]) -> Render:
    """A template of `header(role) + content + footer(role)`: learned is every token with a character of a reply in it,
    and the stop token, with which the footer of a reply must begin."""

    def render(tokenizer: Any, prompt: Turns, turns: Turns) -> Tokens:
        text, replies = "", []
        for number, turn in enumerate([*prompt, *turns]):
            text += header(turn["role"])
            if turn["role"] == "assistant" and number >= len(prompt):
                replies.append((len(text), len(text + turn["content"] + tokenizer.eos_token)))
            text += turn["content"] + footer(turn["role"])
        encoded = tokenizer(text, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
        learned = [any(start < end_of and end > start_of for start_of, end_of in replies) for start, end in places]
        return Tokens(encoded["input_ids"], learned)

    return render


# --- models


class Model:
    """A folder in float64; `render` is how conversations become tokens, of which `length` are kept."""

    def __init__(self, folder: Path, render: Render = chatml, length: int = 10_000) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
        self.render, self.length = render, length

    def tokens(self, row: Row, answer: Answer) -> Tokens:
        return self.render(self.tokenizer, row.prompt, answer.turns).cut(self.length)

    def log_probs(self, row: Row, answer: Answer) -> Tensor:
        """(N,) of the learned tokens."""
        tokens = self.tokens(row, answer)
        return gather(self.lm(torch.tensor([tokens.ids])).logits[0], tokens)

    def sum(self, row: Row, answer: Answer) -> Tensor:
        return self.log_probs(row, answer).sum()

    def mean(self, row: Row, answer: Answer) -> Tensor:
        return self.log_probs(row, answer).mean()

    def grad_norm(self, loss: Tensor) -> float:
        self.lm.zero_grad()
        loss.backward()
        found = [parameter.grad for parameter in self.lm.parameters() if parameter.grad is not None]
        return math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in found))


def gather(logits: Tensor, tokens: Tokens) -> Tensor:
    """(T, V) logits -> (N,): position t predicts token t + 1."""
    following = torch.tensor(tokens.ids[1:])
    every = torch.log_softmax(logits[:-1].double(), -1).gather(1, following[:, None])[:, 0]
    return every[torch.tensor(tokens.learned[1:])]
