"""Where the assistant's words are, under templates of every shape."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from uft.data.chat import Renderer, token_span
from uft.data.rows import Message
from uft.errors import UftError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') "
    "+ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # another name for the assistant, contents trimmed, no system turn
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>model\n'}}{% endif %}"
)
THINKING = (  # as Qwen 3: thoughts are dropped from earlier turns and set apart in the last
    "{% for message in messages %}{% set content = message['content'] %}{% set thoughts = '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last and thoughts %}"
    "{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # the newline after the stop token is marked too, as in templates one meets
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turns(*pairs):
    return tuple(Message({"s": "system", "u": "user", "a": "assistant"}[role], text) for role, text in pairs)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def trained(renderer, prompt, following):
    encoded = renderer.encode(prompt, following)
    return renderer.tokenizer.decode(encoded.ids[encoded.supervised].tolist())


def whole_ids(tokenizer, conversation):
    text = tokenizer.apply_chat_template([{"role": t.role, "content": t.content} for t in conversation], tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_reply_and_its_stop_token_are_learned_the_header_and_the_newline_are_not(tokenizer):
    renderer = Renderer(tokenizer)
    prompt, reply = turns(("s", "Be brief."), ("u", "The capital of France?")), turns(("a", "Paris."))
    encoded = renderer.encode(prompt, reply)
    assert trained(renderer, prompt, reply) == "Paris.<|im_end|>"
    assert encoded.ids[: encoded.prompt_length].tolist() == renderer.prompt_ids(prompt)
    assert encoded.supervised[encoded.prompt_length :].all()
    assert whole_ids(tokenizer, (*prompt, *reply))[: encoded.length] == encoded.ids.tolist()
    assert renderer.stop_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_every_assistant_turn_after_the_prompt_is_learned_where_it_stands_those_inside_it_are_not(tokenizer):
    renderer = Renderer(tokenizer)
    prompt = turns(("u", "assistant\nyes"), ("a", "yes"), ("u", "yes"))
    following = turns(("a", "yes"), ("u", "five"), ("a", "six"))
    assert trained(renderer, prompt, following) == "yes<|im_end|>six<|im_end|>"
    encoded = renderer.encode(prompt, following)
    assert encoded.ids[: encoded.prompt_length].tolist() == renderer.prompt_ids(prompt)


def test_a_template_that_joins_system_and_user_and_closes_with_the_end_of_text(metaspace_tokenizer):
    renderer = with_template(metaspace_tokenizer, LLAMA2)
    prompt, reply = turns(("s", "Be brief."), ("u", "The capital?")), turns(("a", "Paris."))
    encoded = renderer.encode(prompt, reply)
    # one token may hold the template's space and the reply's first letter: it is the reply's
    assert trained(renderer, prompt, reply).replace(" ", "") == "Paris.</s>"
    assert encoded.ids.tolist().count(metaspace_tokenizer.bos_token_id) == 1
    assert encoded.ids.tolist() == whole_ids(metaspace_tokenizer, (*prompt, *reply))
    more = turns(("a", "Paris."), ("u", "and?"), ("a", "Paris."))
    assert trained(renderer, prompt, more).replace(" ", "") == "Paris.</s>Paris.</s>"


def test_a_template_that_changes_contents_by_what_they_say(tokenizer):
    renderer = with_template(tokenizer, THINKING)
    prompt = turns(("u", "1+1"), ("a", "<think>\nhm\n</think>\n\n2"), ("u", "2+2"))
    assert trained(renderer, prompt, turns(("a", "4"))) == "4<|im_end|>"
    thought = turns(("a", "<think>\nwell\n</think>\n\n4"))
    assert trained(renderer, prompt, thought) == "<think>\nwell\n</think>\n\n4<|im_end|>"


REWRITING = "message['content'] | upper"


def test_a_reply_that_the_template_rewrites_is_learned_as_it_is_written_or_refused_not_guessed(tokenizer):
    template = tokenizer.chat_template.replace("message['content']", REWRITING)
    assert trained(with_template(tokenizer, template), turns(("u", "q")), turns(("a", "yes"))) == "YES<|im_end|>"
    opening = "{{ '<|im_start|>assistant\n' }}"
    assert opening in template
    renderer = with_template(tokenizer, template.replace(opening, "{{ '<|im_start|>assistant\n<think>' }}"))
    with pytest.raises(UftError) as error:
        renderer.encode(turns(("u", "q")), turns(("a", "yes")), "mine:3")
    assert "row mine:3" in str(error.value)
    assert "the tokenizer's chat template" in str(error.value)


def test_a_template_s_own_marks_decide_up_to_the_stop_token(tokenizer):
    conversation = turns(("u", "one"), ("a", "two"), ("u", "three")), turns(("a", "four"), ("u", "five"), ("a", "six"))
    plain = Renderer(tokenizer).encode(*conversation)
    encoded = with_template(tokenizer, MARKED).encode(*conversation)
    assert encoded.ids.tolist() == plain.ids.tolist()
    assert encoded.supervised.tolist() == plain.supervised.tolist()


def test_marks_that_leave_the_stop_token_out_are_not_mended_and_hold_whole_letters(tokenizer):
    renderer = with_template(
        tokenizer,
        MARKED.replace(
            "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
            "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
        ),
    )
    for reply in ("yes", "yes 😀"):  # several tokens stand for the last letter
        assert trained(renderer, turns(("u", "q")), turns(("a", reply))) == reply


def test_marks_that_begin_with_white_space_that_no_token_holds():
    words = Tokenizer(models.WordLevel({"yes": 0, "?": 1, "<end>": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    template = MARKED.replace("<|im_start|>", "").replace("<|im_end|>\n", " <end> ")
    assert trained(with_template(tokenizer, template), turns(("u", "q")), turns(("a", "  yes"))) == "yes <end>"


def test_what_a_template_refuses_is_told_with_template_row_and_excerpt(tokenizer):
    renderer = with_template(tokenizer, GEMMA)
    good = (turns(("u", "q")), turns(("a", "a")))
    bad = (turns(("s", "You are a pirate."), ("u", "q")), turns(("a", "a")))
    with pytest.raises(UftError) as error:
        renderer.encode_many([good, bad, good], ["mine:0", "mine:1", "mine:2"])
    said = str(error.value)
    assert "row mine:1" in said
    assert "the tokenizer's chat template cannot render it: System role not supported" in said
    assert "You are a pirate." in said


def test_a_template_that_does_not_render_replies_teaches_nothing(tokenizer):
    renderer = with_template(
        tokenizer, "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert not renderer.encode(turns(("u", "q")), turns(("a", "a"))).supervised.any()


def test_white_space_is_learned_before_the_stop_token_and_not_where_the_template_trims_it(tokenizer):
    spaced = tokenizer.chat_template.replace("'<|im_end|>' + '\n'", "'\n<|im_end|>\n'")
    assert trained(with_template(tokenizer, spaced), turns(("u", "q")), turns(("a", "yes"))) == "yes\n<|im_end|>"
    renderer = with_template(tokenizer, GEMMA)
    assert trained(renderer, turns(("u", " q ")), turns(("a", "\n Paris. \n"))) == "Paris.<|im_end|>"


def test_a_tokenizer_without_offsets_is_refused_with_advice(tokenizer):
    class Slow:
        is_fast = False
        chat_template = "{{ messages }}"

        def get_chat_template(self):
            return self.chat_template

    with pytest.raises(UftError, match=r"data\.template=plain"):
        Renderer(Slow())


def test_random_conversations_agree_with_the_one_rendering(tokenizer, metaspace_tokenizer):
    draw = random.Random(0)
    words = ["yes", " yes", "no\n", "é", "12 ", "assistant", "user\n", "\n\n", " ", "😀", "Paris.", "<|im", "[INST]"]
    for this, template in ((tokenizer, None), (tokenizer, GEMMA), (tokenizer, MARKED), (metaspace_tokenizer, LLAMA2)):
        renderer = with_template(this, template or this.chat_template)
        for _ in range(60):
            said = [
                "x" + "".join(draw.choices(words, k=draw.randint(1, 6))) + "y" for _ in range(2 * draw.randint(1, 3))
            ]
            conversation = turns(*zip("ua" * 3, said, strict=False))
            cut = draw.randrange(1, len(conversation), 2)
            encoded = renderer.encode(conversation[:cut], conversation[cut:])
            assert whole_ids(this, conversation)[: encoded.length] == encoded.ids.tolist()
            assert int(encoded.ids[-1]) in renderer.stop_ids
            learned = this.decode(encoded.ids[encoded.supervised].tolist())
            for stop in ("<|im_end|>", "</s>"):
                learned = learned.replace(stop, "")
            wanted = "".join(t.content for t in conversation[cut:] if t.role == "assistant")
            if this is tokenizer:  # the other one has letters it does not know, and glues spaces to words
                assert learned == wanted


def test_tokens_of_a_span_are_those_that_hold_a_character_of_it(tokenizer, metaspace_tokenizer):
    words = Tokenizer(models.WordLevel({"yes": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # white space is in no token
    pieces = ["yes", " yes", "no\n", "é", "12 ", "\n\n", "   ", " ", "😀", "Paris.", "<|im_end|>", "[INST]", "\t"]
    draw = random.Random(0)
    for backend in (tokenizer.backend_tokenizer, metaspace_tokenizer.backend_tokenizer, words):
        for _ in range(40):
            text = "".join(draw.choices(pieces, k=draw.randint(1, 8)))
            encoding = backend.encode(text, add_special_tokens=False)
            starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
            for start in range(len(text)):
                for end in range(start + 1, len(text) + 1):
                    first = next((n for n, value in enumerate(ends) if value > start), len(ends))
                    last = next((n for n, value in enumerate(starts) if value >= end), len(starts))
                    assert token_span(encoding.offsets, (start, end)) == (first, last), (text, start, end)
