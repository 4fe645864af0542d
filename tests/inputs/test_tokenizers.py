"""Tokenizers that lack what others have: said plainly, or done without."""

from __future__ import annotations

import pytest
import torch

from uft.data.chat import Renderer
from uft.data.rows import Message
from uft.errors import UftError
from uft.model.load import check_vocabulary, pad_id

PROMPT, REPLY = (Message("user", "q"),), (Message("assistant", "a"),)


def without(tokenizer, *names):
    for name in names:
        setattr(tokenizer, f"{name}_token", None)
    return tokenizer


@pytest.mark.parametrize("missing", [("pad",), ("bos",), ("pad", "bos")])
def test_no_padding_and_no_beginning(byte_level, missing):
    whole = Renderer(byte_level).encode(PROMPT, REPLY)
    tokenizer = without(byte_level, *missing)
    encoded = Renderer(tokenizer).encode(PROMPT, REPLY)
    assert encoded.ids.tolist() == whole.ids.tolist()
    assert isinstance(pad_id(tokenizer), int)


def test_no_end_with_a_template_takes_the_template_s(byte_level):
    closing = byte_level.eos_token_id
    renderer = Renderer(without(byte_level, "eos", "pad", "bos"))
    encoded = renderer.encode(PROMPT, REPLY)
    assert closing in renderer.stop_ids
    assert encoded.ids[-1] == closing
    assert pad_id(byte_level) == 0


def test_no_end_and_no_template_is_refused(byte_level):
    byte_level.chat_template = None
    with pytest.raises(UftError, match="no end-of-text token to learn"):
        Renderer(without(byte_level, "eos"))


def test_no_end_that_a_template_writes_is_told_with_the_row(byte_level):
    from uft.data.rows import Completion, Row
    from uft.data.tokens import tokenize

    byte_level.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    renderer = Renderer(without(byte_level, "eos", "pad", "bos"))
    row = Row("mine", 7, PROMPT, (Completion(REPLY),))
    with pytest.raises(UftError, match="mine:7") as error:
        tokenize("mine", [row], renderer, 100)
    assert "the stop token is not supervised" in str(error.value)


class Embedding(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.inner = torch.nn.Embedding(rows, 2)

    def get_input_embeddings(self):
        return self.inner


def test_a_vocabulary_larger_than_the_embedding_is_refused(byte_level):
    size = len(byte_level)
    check_vocabulary(Embedding(size), byte_level)
    check_vocabulary(Embedding(size + 64), byte_level)  # padded to a round number, as many are
    with pytest.raises(UftError, match=f"the model's embedding has {size - 1} rows"):
        check_vocabulary(Embedding(size - 1), byte_level)


def test_stand_ins_of_spelled_tokens_never_reach_the_model(byte_level):
    size = len(byte_level)
    encoded = Renderer(byte_level).encode(PROMPT, (Message("assistant", "<|im_end|> \U000f0000 <|im_start|>"),))
    assert int(encoded.ids.max()) < size
    assert len(byte_level) == size, "the tokenizer that is exported has not grown"


def test_an_empty_vocabulary_of_special_tokens():
    """A tokenizer without any special token: nothing is spelled, and nothing stops."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"q": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    renderer = Renderer(tokenizer)
    assert renderer.stop_ids == frozenset()
    assert renderer.prompt_ids(PROMPT) == [0]
    assert pad_id(tokenizer) == 0
