"""Rows as objectives use them, with token ids that tell where they come from; for the tests of batches."""

from __future__ import annotations

import numpy as np

from uft.data.batches import Item
from uft.data.rows import Completion, Message, Row
from uft.data.templates import Encoded
from uft.data.views import Part, Role

PAD = 0
POSITIVE, NEGATIVE = Role.POSITIVE, Role.NEGATIVE


def encoded(prompt, reply, start=1):
    """`prompt` unsupervised and `reply` supervised tokens with ids from `start` on."""
    ids = np.arange(start, start + prompt + reply, dtype=np.int32)
    return Encoded(ids, np.arange(prompt + reply) >= prompt, prompt)


def completion(**feedback):
    return Completion((Message("assistant", "a"),), **feedback)


def row(*completions, index=0):
    return Row("s", index, (Message("user", "q"),), completions)


def demonstration(example=0, prompt=2, reply=3, start=1):
    return Item(example, row(completion()), (Part(0),), (encoded(prompt, reply, start),))


def preference(example=1, chosen=(2, 3), rejected=(2, 5)):
    both = row(completion(preferred=True), completion(preferred=False))
    parts = (Part(0, POSITIVE), Part(1, NEGATIVE))
    return Item(example, both, parts, (encoded(*chosen, start=11), encoded(*rejected, start=31)))
