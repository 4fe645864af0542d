"""Rows as objectives use them, with token ids that tell where they come from; for the tests of batches."""

from __future__ import annotations

import numpy as np

from uft.data.batch import Example
from uft.data.chat import Tokens
from uft.data.rows import Completion, Message, Role, Row, Selected

PAD = 0
POSITIVE, NEGATIVE = Role.POSITIVE, Role.NEGATIVE


def encoded(prompt, reply, start=1):
    """`prompt` unsupervised and `reply` supervised tokens with ids from `start` on."""
    ids = np.arange(start, start + prompt + reply, dtype=np.int32)
    return Tokens(ids, np.arange(prompt + reply) >= prompt, prompt)


def completion(**feedback):
    return Completion((Message("assistant", "a"),), **feedback)


def row(*completions, index=0):
    return Row("s", index, (Message("user", "q"),), completions)


def demonstration(example=0, prompt=2, reply=3, start=1):
    return Example(example, row(completion()), (Selected(0),), (encoded(prompt, reply, start),))


def preference(example=1, chosen=(2, 3), rejected=(2, 5)):
    both = row(completion(preferred=True), completion(preferred=False))
    parts = (Selected(0, POSITIVE), Selected(1, NEGATIVE))
    return Example(example, both, parts, (encoded(*chosen, start=11), encoded(*rejected, start=31)))
