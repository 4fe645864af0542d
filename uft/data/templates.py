"""Rendering: a prompt and its completion as token ids, with the tokens that are learned.

Supervised are the tokens of the assistant's own turns and the end-of-turn token after each: never the header, nor what
the template puts after the end-of-turn token. Two ways lead there: a chat template (:mod:`uft.data.chat`), and `plain`
for base models without one. Both give ids that end at the last supervised token; nothing after it is ever needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from uft.data.rows import Message
from uft.errors import Problem, UftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = tuple[Message, ...]
Conversation = tuple[Turns, Turns]  # (prompt, what follows it)


@dataclass(frozen=True)
class Encoded:
    """One prompt with one completion, ready for the model."""

    ids: np.ndarray  # (L,) int32
    supervised: np.ndarray  # (L,) bool; the last is True
    prompt_length: int  # tokens before the first supervised one

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Supervised tokens that a model can be asked for: the first token of a sequence has no predictor."""
        return int(self.supervised[1:].sum())


class Strategy(Protocol):
    """How conversations become tokens. `text` is what decides besides the tokenizer; it enters the digest."""

    name: str
    text: str
    stop_ids: frozenset[int]

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Encoded]: ...

    def prompt_ids(self, prompt: Turns) -> list[int]: ...


class Renderer:
    """Renders with the tokenizer's chat template, a template of one's own, or plainly.

    `template`: auto (the tokenizer's chat template, else plain), plain, or the path of a Jinja file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> None:
        from uft.data.chat import ChatTemplate

        own = getattr(tokenizer, "chat_template", None)
        self.tokenizer = tokenizer
        self._strategy: Strategy
        if template == "plain" or (template == "auto" and not own):
            self._strategy = Plain(tokenizer)
        elif template == "auto":
            self._strategy = ChatTemplate(tokenizer, tokenizer.get_chat_template(), "the tokenizer's chat template")
        else:
            self._strategy = ChatTemplate(tokenizer, _read(template), template)
        self.name = self._strategy.name
        self.stop_ids = self._strategy.stop_ids
        self.digest = _digest(tokenizer, self._strategy.text)

    def encode(self, prompt: Turns, turns: Turns, name: str = "") -> Encoded:
        """One conversation; `name` is the row's, for errors."""
        return self.encode_many([(prompt, turns)], [name])[0]

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Encoded]:
        """Many at once, which is much faster. A row that the template refuses raises :class:`UftError` naming both."""
        return self._strategy.encode_many(conversations, names)

    def prompt_ids(self, prompt: Turns, system: str | None = None) -> list[int]:
        """The prompt as the model sees it when it is to answer. `system` replaces the prompt's own system turn."""
        if system is not None:
            prompt = (Message("system", system), *(turn for turn in prompt if turn.role != "system"))
        return self._strategy.prompt_ids(prompt)


class Plain:
    """No template: prompt and completion are tokenised apart and joined.

    The tokenizer's own first token stands before, the end-of-text token, which is learned, after every assistant turn.
    Several turns are set apart by a blank line.
    """

    name = "plain"
    text = "plain"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UftError(Problem("data.template=plain", "the tokenizer has no end-of-text token to learn"))
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({int(tokenizer.eos_token_id)})
        bos = tokenizer.bos_token_id
        self._first = [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []

    def encode_many(self, conversations: Sequence[Conversation], names: Sequence[str]) -> list[Encoded]:
        texts = [piece for conversation in conversations for piece in self._pieces(*conversation)]
        ids = iter(self._tokenise(texts))
        return [self._join(turns, [next(ids) for _ in range(len(turns) + 1)]) for _, turns in conversations]

    def prompt_ids(self, prompt: Turns) -> list[int]:
        return self._begin(self._tokenise([self._opening(prompt)])[0])

    def _pieces(self, prompt: Turns, turns: Turns) -> list[str]:
        """The prompt's text, then one text per turn that follows."""
        said = [turn.content if turn.role == "assistant" else f"\n\n{turn.content}\n\n" for turn in turns]
        return [self._opening(prompt), *said]

    def _join(self, turns: Turns, pieces: list[list[int]]) -> Encoded:
        ids = self._begin(pieces[0])
        supervised = [False] * len(ids)
        for turn, piece in zip(turns, pieces[1:], strict=True):
            learned = turn.role == "assistant"
            ending = [*self.stop_ids] if learned else []
            ids += piece + ending
            supervised += [learned] * (len(piece) + len(ending))
        return finish(np.asarray(ids, np.int32), np.asarray(supervised, bool))

    def _begin(self, ids: list[int]) -> list[int]:
        return list(ids) if ids[: len(self._first)] == self._first else self._first + list(ids)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Special tokens that a text spells are text."""
        given = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(texts, **given)["input_ids"] if texts else []

    @staticmethod
    def _opening(prompt: Turns) -> str:
        return "\n\n".join(turn.content for turn in prompt)


def finish(ids: np.ndarray, supervised: np.ndarray) -> Encoded:
    """Ids cut after the last supervised token; uncut where nothing is supervised, for the check that will say so."""
    learned = np.flatnonzero(supervised)
    end = int(learned[-1]) + 1 if len(learned) else len(ids)
    return Encoded(ids[:end], supervised[:end], int(learned[0]) if len(learned) else end)


def _read(path: str) -> str:
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        raise UftError(
            Problem(f"data.template={path}", "no such file", advice=("choices: auto, plain, or a Jinja file",))
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UftError(Problem(f"data.template={path}", f"cannot be read: {error}")) from error


def _digest(tokenizer: Any, text: str) -> str:
    """sha256 over the template and everything of the tokenizer that decides ids: vocabulary, merges, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # left over from whoever called it last
            settings.pop(passing, None)
    else:
        settings = sorted(tokenizer.get_vocab().items())
    what = [text, settings, {name: str(value) for name, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode("utf-8")).hexdigest()
