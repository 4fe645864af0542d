"""Special tokens that somebody spelled: `<|im_end|>` inside a message is text, and must not end a turn.

A tokenizer finds its special tokens in any text. So before a conversation is rendered, each one that a content spells
gives way to a private-use character, which a second tokenizer takes for a token of its own; of the ids, that one is
then replaced by those of the spelling. What stands around it becomes the tokens that it would beside a special token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from uft.data.rows import Message
from uft.data.templates import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_INS = 0xF0000  # the first of them; nobody writes in this plane


class Spelled:
    """The special tokens of one tokenizer, and those in `more` (ids), where contents spell them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more: frozenset[int] = frozenset()) -> None:
        added = tokenizer.added_tokens_decoder.items()
        special = [token.content for number, token in added if token.special or number in more]
        # a stand-in that a content has already is itself stood in for
        texts = [*special, *(chr(STAND_INS + number) for number in range(2 * len(special)))]
        self._tokenizer = tokenizer
        self._stand_in = {text: chr(STAND_INS + number) for number, text in enumerate(texts) if text}
        longest_first = sorted(self._stand_in, key=len, reverse=True)
        self._first = {text[0] for text in special if text and text[0].isascii()}
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if special else None

    def inside(self, turns: Sequence[Message]) -> bool:
        """Whether a content spells any."""
        return self._pattern is not None and any(map(self._spells, turns))

    def _spells(self, turn: Message) -> bool:
        """Most texts are plain ASCII without the character that special tokens begin with, which is seen at once."""
        text, pattern = turn.content, self._pattern
        if text.isascii() and not any(first in text for first in self._first):
            return False
        return pattern is not None and pattern.search(text) is not None

    def hidden(self, turns: Sequence[Message]) -> tuple[Message, ...]:
        """The turns with stand-ins."""
        pattern = self._pattern
        if pattern is None:
            return tuple(turns)
        return tuple(
            replace(turn, content=pattern.sub(lambda found: self._stand_in[found[0]], turn.content)) for turn in turns
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that also knows the stand-ins."""
        made = copy.deepcopy(self._tokenizer)
        stand_ins = [AddedToken(one, normalized=False, special=True) for one in self._stand_in.values()]
        made.add_tokens(stand_ins, special_tokens=True)
        return made

    @cached_property
    def _plain(self) -> dict[int, list[int]]:
        """A stand-in's id: the ids of what it stands for, as plain text."""
        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        texts, stand_ins = list(self._stand_in), list(self._stand_in.values())
        numbers: Any = self.tokenizer.convert_tokens_to_ids(stand_ins)
        spelled = plain.encode_batch(texts, add_special_tokens=False)
        return {number: one.ids for number, one in zip(numbers, spelled, strict=True)}

    def ids(self, ids: Sequence[int]) -> list[int]:
        """Ids with every stand-in replaced by its spelling."""
        return [token for one in ids for token in self._plain.get(one, (one,))]

    def shown(self, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """(ids, supervised) likewise; a spelling is supervised where its stand-in is."""
        lengths = [len(self._plain.get(one, (one,))) for one in encoded.ids.tolist()]
        return np.asarray(self.ids(encoded.ids.tolist()), np.int32), np.repeat(encoded.supervised, lengths)
