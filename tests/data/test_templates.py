"""The renderer: which way of rendering is taken, and the plain one."""

import numpy as np
import pytest

from uft.data.chat import Renderer, Tokens, finish
from uft.data.rows import Message
from uft.errors import UftError

QUESTION = (Message("user", "The capital of France?"),)
ANSWER = (Message("assistant", " Paris."),)


def trained(encoded, tokenizer):
    return tokenizer.decode(encoded.ids[encoded.supervised].tolist())


def test_the_tokenizer_s_template_or_plain_or_one_s_own(tokenizer, base_tokenizer, tmp_path, chatml_template):
    assert Renderer(tokenizer).name == "the tokenizer's chat template"
    assert Renderer(base_tokenizer).name == Renderer(tokenizer, "plain").name == "plain"
    file = tmp_path / "mine.jinja"
    file.write_text(chatml_template)
    assert Renderer(base_tokenizer, str(file)).name == str(file)
    own = Renderer(tokenizer, str(file)).encode(QUESTION, ANSWER)
    assert own.ids.tolist() == Renderer(tokenizer).encode(QUESTION, ANSWER).ids.tolist()
    tokenizer.chat_template = {"tool_use": chatml_template, "rag": chatml_template}
    with pytest.raises(UftError, match="has templates of the names rag, tool_use, and no default"):
        Renderer(tokenizer)
    with pytest.raises(UftError, match="no such file"):
        Renderer(tokenizer, str(tmp_path / "none.jinja"))


def test_plain_begins_once_with_the_tokenizer_s_first_token(metaspace_tokenizer):
    renderer = Renderer(metaspace_tokenizer)
    bos = metaspace_tokenizer.bos_token_id
    for prompt in (QUESTION, (Message("user", "<s>The capital"),)):
        ids = renderer.encode(prompt, ANSWER).ids.tolist()
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert renderer.prompt_ids(QUESTION)[0] == bos


def test_plain_supervises_every_assistant_turn_and_nothing_between(base_tokenizer):
    turns = (Message("assistant", "one"), Message("user", "more"), Message("assistant", "two"))
    renderer, prompt = Renderer(base_tokenizer), (Message("system", "count"), *QUESTION)
    encoded = renderer.encode(prompt, turns)
    assert encoded.ids[: encoded.prompt_length].tolist() == renderer.prompt_ids(prompt)
    assert renderer.stop_ids == {base_tokenizer.eos_token_id}
    end = base_tokenizer.eos_token
    assert trained(encoded, base_tokenizer) == f"one{end}two{end}"
    whole = base_tokenizer.decode(encoded.ids.tolist())
    assert whole == f"count\n\nThe capital of France?one{end}\n\nmore\n\ntwo{end}"


def test_plain_needs_an_end_of_text_token(base_tokenizer):
    base_tokenizer.eos_token = None
    with pytest.raises(UftError, match="no end-of-text token"):
        Renderer(base_tokenizer)


def test_a_system_prompt_for_sampling_takes_the_place_of_the_row_s_own(tokenizer):
    renderer = Renderer(tokenizer)
    prompt = (Message("system", "old"), *QUESTION)
    text = tokenizer.decode(renderer.prompt_ids(prompt, system="new"))
    assert "new" in text
    assert "old" not in text
    assert tokenizer.decode(renderer.prompt_ids(prompt)).count("old") == 1


def test_the_digest_follows_template_and_tokenizer(tokenizer, base_tokenizer, tmp_path, chatml_template):
    digest = Renderer(tokenizer).digest
    tokenizer("a text", truncation=True, max_length=2)  # leaves settings behind in the tokenizer
    assert Renderer(tokenizer).digest == digest
    other = tmp_path / "other.jinja"
    other.write_text(chatml_template.replace("assistant\n", "assistant "))
    assert len({digest, Renderer(tokenizer, "plain").digest, Renderer(tokenizer, str(other)).digest}) == 3
    plain = Renderer(base_tokenizer).digest
    base_tokenizer.add_tokens(["Paris"])
    assert Renderer(base_tokenizer).digest != plain


def test_a_template_that_asks_for_the_date_is_told_the_one_of_the_settings(tokenizer, chatml_template):
    dates = "{{ strftime_now('%d %b %Y') }}{% set year = strftime_now( \"%Y\" ) %}{{ year }}\n"
    tokenizer.chat_template = dates + chatml_template
    default, other, again = (
        Renderer(tokenizer, **{"date": day} if day else {}) for day in ("", "2024-07-26", "2024-07-26")
    )
    told = tokenizer.decode(other.encode(QUESTION, ANSWER).ids.tolist())
    assert told.startswith("26 Jul 20242024\n")
    assert tokenizer.decode(other.prompt_ids(QUESTION)).startswith("26 Jul 20242024\n")
    assert tokenizer.decode(default.prompt_ids(QUESTION)).startswith("01 Jan 20252025\n")
    assert default.digest != other.digest == again.digest
    with pytest.raises(UftError, match=r"data\.date=yesterday"):
        Renderer(tokenizer, date="yesterday")
    for changing, why in (
        ("{% set form = '%d' %}{{ strftime_now(form) }}", "asks for the date in a form"),
        ("{% set now = strftime_now %}{{ now('%d') }}", "asks for the date in a form"),
        ("{{ ['a', 'b'] | random }}", "writes something else each time"),
    ):
        tokenizer.chat_template = changing + chatml_template
        with pytest.raises(UftError, match=why):
            Renderer(tokenizer)
    tokenizer.chat_template = chatml_template
    assert Renderer(tokenizer).digest == Renderer(tokenizer, date="2024-07-26").digest


def test_tokens_end_at_the_last_supervised_one_and_the_first_is_no_target():
    ids, mask = np.arange(6, dtype=np.int32), np.array([0, 0, 1, 0, 1, 0], bool)
    encoded = finish(ids, mask)
    assert (encoded.ids.tolist(), encoded.prompt_length, encoded.length) == ([0, 1, 2, 3, 4], 2, 5)
    assert finish(ids, np.zeros(6, bool)).length == 6
    assert Tokens(np.arange(3, dtype=np.int32), np.ones(3, bool), 0).targets == 2
