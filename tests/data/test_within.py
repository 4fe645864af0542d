"""Tokens of a stretch of characters, told by a few look-ups: the same that all offsets tell."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from uft.data import chat

PIECES = ["yes", " yes", "no\n", "é", "12 ", "user\n", "\n\n", "   ", " ", "😀", "Paris.", "<|im_end|>", "[INST]", "\t"]


@pytest.fixture(params=["byte level", "metaspace", "words"])
def backend(request, tokenizer, metaspace_tokenizer):
    words = Tokenizer(models.WordLevel({"yes": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # white space is in no token
    made = {
        "byte level": tokenizer.backend_tokenizer,
        "metaspace": metaspace_tokenizer.backend_tokenizer,
        "words": words,
    }
    return made[request.param]


def test_every_stretch_of_random_texts(backend):
    draw = random.Random(0)
    for _ in range(40):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 8)))
        encoding = backend.encode(text, add_special_tokens=False)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                first = next((n for n, value in enumerate(ends) if value > start), len(ends))
                last = next((n for n, value in enumerate(starts) if value >= end), len(starts))
                assert chat.token_span(encoding, (start, end)) == (first, last), (text, start, end)
