"""Conversations as tokens without a template: prompt and replies joined."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uft.data.rows import Conversation, Tokens, Turns, finish, learned_turns
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Plain:
    """No template: prompt and completion are tokenised apart and joined.

    The tokenizer's own first token stands before, the end-of-text token, which is learned, after every assistant turn.
    Several turns are set apart by a blank line.
    """

    name = "plain"
    text = "plain"  # decides the tokens besides the tokenizer, and enters the digest
    arguments: Mapping[str, Any] = {}

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str, special_text: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UftError(Problem("data.template=plain", "the tokenizer has no end-of-text token to learn"))
        self.tokenizer, self.train_on, self._spelled = tokenizer, train_on, special_text == "text"
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        bos = tokenizer.bos_token_id
        self._first = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Tokens]:
        texts: list[str] = []  # of each conversation the prompt's, then one per turn that follows
        for (prompt, turns), name in zip(conversations, names, strict=True):
            refuse_fields((*prompt, *turns), name)
            texts.append("\n\n".join(turn.content for turn in prompt))
            texts += [
                self._reply(turn.content) if turn.role == "assistant" else f"\n\n{turn.content}\n\n" for turn in turns
            ]
        pieces = iter(self._tokenize(texts))
        encoded = []
        for _, turns in conversations:
            ids = self._begin(next(pieces))
            supervised = [False] * len(ids)
            learned = learned_turns(turns, 0, self.train_on)
            for number, turn in enumerate(turns):
                piece = next(pieces)
                piece = [*piece, *self.stop_ids] if turn.role == "assistant" else piece
                ids += piece
                supervised += [number in learned] * len(piece)
            encoded.append(finish(np.asarray(ids, np.int32), np.asarray(supervised, bool)))
        return encoded

    def encode_prompts(self, prompts: Sequence[Turns], names: Sequence[str]) -> list[Tokens]:
        return self.encode_many([(prompt, ()) for prompt in prompts], names)

    def _reply(self, content: str) -> str:
        """A reply without the end-of-text token, should it spell that as a token."""
        return content if self._spelled else without_end(content, [str(self.tokenizer.eos_token)])

    def _begin(self, ids: list[int]) -> list[int]:
        return list(ids) if ids[: len(self._first)] == self._first else self._first + list(ids)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; special tokens spelled in it are text, unless `special_text` is tokens."""
        options = {"add_special_tokens": False, "split_special_tokens": self._spelled, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"] if texts else []


def without_end(content: str, ends: Sequence[str]) -> str:
    """A reply without the token that ends it, and the white space after that, where it spells one of `ends`."""
    stripped = content.rstrip()
    end = next(filter(stripped.endswith, ends), "")
    return stripped.removesuffix(end) if end else content


def refuse_fields(turns: Turns, name: str) -> None:
    """Raise UftError where turns carry more than text, which is all that is joined without a template."""
    found = next((field for turn in turns if turn.extra for field in json.loads(turn.extra)), None)
    if found is not None:
        why = f"has {found}, which only a chat template can render"
        raise UftError(Problem(f"row {name}", why, where="data.template=plain", advice=("set another data.template",)))
