"""What a template does to a conversation that its row does not say: told with a count, refused where text is lost."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from uft.data.chat import Renderer
from uft.data.rows import Completion, Message, Row
from uft.data.tokens import tokenize
from uft.errors import UftError

HEAD = "{% for m in messages %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
FOOT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
USERS = HEAD + "{% if m['role'] in ('user', 'assistant') %}" + TURN + "{% endif %}" + FOOT
MISTRAL = (  # the system prompt stands before the last user turn, and nowhere once an answer follows
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>' + ("
    "messages[0]['content'] + '\n' if loop.last and messages[0]['role'] == 'system' else '') + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
THOUGHTLESS = (  # as Qwen 3: thoughts of all turns but the last are dropped
    HEAD + "{% set said = m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip() %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}" + FOOT
)
CHANNEL = TURN.replace("m['role'] + '\n'", "m['role'] + ('<final>' if m['role'] == 'assistant' else '') + '\n'")
ENDS = TURN.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last or m['role'] != 'assistant' else '<s>\n')")
MARKS = (
    "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}" + TURN + "{% endif %}"
)
ADDS = "marks text of its own as learned with assistant turns"
OTHER_START = "begins replies in training after other text than generation starts from"


def turns(*pairs):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return tuple(Message(roles[role], text) for role, text in pairs)


def row(index, prompt, following):
    return Row("mine", index, turns(*prompt), (Completion(turns(*following)),))


def with_template(tokenizer, template, **settings):
    tokenizer.chat_template = template
    return Renderer(tokenizer, **settings)


ASKED = ("u", "q")
PLAIN = row(0, [ASKED], [("a", "yes")])
SYSTEM = row(1, [("s", "Be brief."), ASKED], [("a", "yes")])
TOOL = row(2, [ASKED], [("a", "look"), ("t", "sun"), ("a", "sunny")])
THOUGHT = row(3, [ASKED, ("a", "<think>so</think>1"), ASKED], [("a", "<think>so</think>2")])
TWICE = row(4, [ASKED], [("a", "<think>so</think>1"), ASKED, ("a", "<think>so</think>2")])


@pytest.mark.parametrize(
    ("template", "rows", "notes"),
    [
        (HEAD + TURN + FOOT, [PLAIN, SYSTEM, TOOL, THOUGHT, TWICE], []),
        (USERS, [PLAIN, SYSTEM, SYSTEM, TOOL], [("leaves out system turns", 2, 1), ("leaves out tool turns", 1, 2)]),
        (MISTRAL, [PLAIN, SYSTEM], [(OTHER_START, 2, 0), ("leaves out system turns", 1, 1)]),
        (THOUGHTLESS, [THOUGHT], [("changes the text of assistant turns", 1, 3)]),
        (HEAD + CHANNEL + FOOT, [PLAIN, TOOL], [(OTHER_START, 2, 0)]),
        (HEAD + TURN + "{% endfor %}", [PLAIN], [(OTHER_START, 1, 0)]),
        (HEAD + ENDS + FOOT, [PLAIN, TOOL, TWICE], [("has no supervised end of assistant turns", 2, 2)]),
        (
            HEAD + TURN.replace("m['content']", "m['content'].split() | join(' ')") + FOOT,
            [PLAIN, row(5, [("u", "q  r")], [("a", "x\n  y")])],
            [(f"changes the white space within {role} turns", 1, 5) for role in ("user", "assistant")],
        ),
        (
            HEAD + "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + m['content'][:2] }}{% generation %}"
            "{{ m['content'][2:] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
            + TURN
            + "{% endif %}"
            + FOOT,
            [row(6, [ASKED], [("a", "12 34")])],
            [("does not mark the whole text of assistant turns", 1, 6), (OTHER_START, 1, 6)],
        ),
        (HEAD + MARKS + FOOT, [PLAIN, TOOL, TWICE], []),
        (HEAD + MARKS.replace("m['content'] +", "m['content'] + ' Bye.' +") + FOOT, [PLAIN, TWICE], [(ADDS, 2, 0)]),
        (HEAD + MARKS.replace("m['content'] +", "'Well: ' + m['content'] +") + FOOT, [SYSTEM], [(ADDS, 1, 1)]),
    ],
    ids=[
        *("nothing", "no branch", "mistral", "thoughts", "channel", "no generation prompt", "open end"),
        *("white space", "half marked", "marks", "a word behind", "a word before"),
    ],
)
def test_differences_are_told_with_their_count_also_by_a_cache(tokenizer, tmp_path, caplog, template, rows, notes):
    renderer = with_template(tokenizer, template)
    for state in ("miss", "hit"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            done = tokenize("mine", rows, renderer, 200, cache_dir=tmp_path)
        assert done.cache == state
        found = [(what, count, first.split(",")[0]) for what, count, first in done.report.notes]
        assert sorted(found) == sorted((what, count, f"mine:{first}") for what, count, first in notes)
        assert len(caplog.records) == len(notes)
        for what, _, first in notes:
            assert f"{what}: " in caplog.text
            assert f"row mine:{first}" in caplog.text


@pytest.mark.parametrize(
    ("template", "lossy", "why"),
    [
        (THOUGHTLESS, TWICE, "changes the text of assistant turns: turn 2"),
        (
            HEAD + "{% if loop.last or m['role'] == 'user' %}" + TURN + "{% endif %}" + FOOT,
            TOOL,
            "leaves out assistant",
        ),
        (HEAD + TURN.replace("m['content']", "m['content'] | upper") + FOOT, PLAIN, "changes the text of assistant"),
        (
            HEAD.replace("messages", "messages | reverse") + TURN + FOOT,
            PLAIN,
            "changes the order of user turns: turn 1",
        ),
        (
            HEAD + TURN.replace("m['content']", "m['content'] + m['content']") + FOOT,
            PLAIN,
            "repeats user turns: turn 1",
        ),
    ],
)
def test_supervised_text_that_is_lost_is_refused_unless_it_may_be(tokenizer, tmp_path, template, lossy, why):
    with pytest.raises(UftError) as error:
        tokenize("mine", [lossy], with_template(tokenizer, template), 200, cache_dir=tmp_path)
    for words in (
        why,
        f"row {lossy.id}",
        "data.lost_text=keep",
        "data.rendering=generated",
        "would not be learned as the row has it",
    ):
        assert words in str(error.value)
    kept = tokenize("mine", [lossy], with_template(tokenizer, template, lost_text="keep"), 200, cache_dir=tmp_path)
    assert any(what.startswith(why.partition(":")[0]) for what, _, _ in kept.report.notes)
    with pytest.raises(UftError):  # what was kept before is refused still
        tokenize("mine", [lossy], with_template(tokenizer, template), 200, cache_dir=tmp_path)


def test_a_header_is_never_supervised_where_there_is_no_generation_prompt(tokenizer):
    template = HEAD + TURN.replace("m['content']", "m['content'] | upper") + "{% endfor %}"
    encoded = with_template(tokenizer, template).encode(PLAIN.prompt, PLAIN.completions[0].turns)
    assert tokenizer.decode(encoded.ids[encoded.supervised].tolist()) == "YES<|im_end|>"


def text(tokenizer, encoded):
    """The text of a row, the supervised part between brackets."""
    told, inside = "", False
    for token, supervised in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True):
        told += ("[" if supervised else "]") * (supervised != inside) + tokenizer.decode([token])
        inside = supervised
    return told + "]"


@pytest.mark.parametrize(
    ("template", "which", "expected"),
    [
        (
            MISTRAL,
            row(0, [("s", "Be brief."), ASKED], [("a", "yes"), ("u", "r"), ("a", "no")]),
            "<|im_start|>Be brief.\nq[ yes<|im_end|>]<|im_start|>Be brief.\nr[ no<|im_end|>]",
        ),
        (
            THOUGHTLESS,
            TWICE,
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[<think>so</think>1<|im_end|>]\n"
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[<think>so</think>2<|im_end|>]",
        ),
        (
            HEAD + CHANNEL + FOOT.replace("assistant\n", "assistant"),
            TOOL,
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant[<final>\nlook<|im_end|>]\n"
            "<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant[<final>\nsunny<|im_end|>]",
        ),
        (
            HEAD + ENDS + FOOT,
            TOOL,
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[look<|im_end|>]\n"
            "<|im_start|>tool\nsun<|im_end|>\n<|im_start|>assistant\n[sunny<|im_end|>]",
        ),
        (
            HEAD + TURN + FOOT,
            row(0, [ASKED], [("a", " a ")]),
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[ a <|im_end|>]",
        ),
    ],
    ids=["mistral", "thoughts", "channel", "other ends", "as it is"],
)
def test_every_reply_can_be_learned_as_it_is_generated(tokenizer, tmp_path, template, which, expected):
    renderer = with_template(tokenizer, template, rendering="generated")
    done = tokenize("mine", [which], renderer, 200, cache_dir=tmp_path)
    (encoded,) = done.encoded[0]
    assert (text(tokenizer, encoded), done.report.notes) == (expected, ())
    assert (
        encoded.ids[: encoded.prompt_length].tolist() == renderer.prompt_ids(which.prompt) == renderer.start_ids(which)
    )
    assert renderer.digest != with_template(tokenizer, template).digest
    last = with_template(tokenizer, template, rendering="generated", train_on="last")
    assert text(tokenizer, last.encode(which.prompt, which.completions[0].turns)).count("[") == 1


FAMILIES = {
    "qwen3": ("<|im_end|>", "assistant\n[<think>\n{}\n</think>\n\n{}<|im_end|>]\n<|im_start|>user\nr<|im_end|>"),
    "gptoss": (
        "<|return|>",
        "assistant[<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>]"
        "<|start|>user<|message|>r<|end|>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_of_every_turn_is_learned_under_templates_that_drop_it(tokenizer, family):
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    end, expected = FAMILIES[family]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in ("start", "end", "return", "channel", "message")]}
    )
    tokenizer.eos_token = end
    thought = '{"reasoning_content": "why so"}'
    said = (Message("assistant", "yes", thought), Message("user", "r"), Message("assistant", "no", thought))
    which, template = Row("mine", 0, turns(ASKED), (Completion(said),)), (folder / f"{family}.jinja").read_text()
    with pytest.raises(UftError, match=r"data\.rendering=generated"):
        tokenize("mine", [which], with_template(tokenizer, template), 2000)
    done = tokenize("mine", [which], with_template(tokenizer, template, rendering="generated"), 2000)
    assert done.report.notes == ()
    assert expected.format("why so", "yes") in text(tokenizer, done.encoded[0][0])


SYSTEM_LAST = (  # as Mistral v0.3 and Nemo, apart from spaces
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]SPACE' + (system if loop.last else '') }}"
    "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ 'SPACE' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
FORMS = {  # the family's own template in TRL or here, its end token, others
    "qwen3": ("qwen3", "<|im_end|>", ()),
    "deepseek_r1": (
        "deepseek_r1_distill",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "mistral_v3": (SYSTEM_LAST.replace("SPACE", " "), "</s>", ("[INST]", "[/INST]")),
    "mistral_nemo": (SYSTEM_LAST.replace("SPACE", ""), "</s>", ("[INST]", "[/INST]")),
    "gpt_oss": ("gptoss", "<|return|>", ("<|start|>", "<|end|>", "<|channel|>", "<|message|>")),
}
WHY = '{"reasoning_content": "why so"}'


@pytest.mark.parametrize("form", FORMS)
def test_a_training_form_is_what_the_family_s_own_template_generates(tokenizer, form):
    """Text, mask and the start of generation; a reply that the family's own refuses stands behind that start too."""
    own, end, more = FORMS[form]
    if "{" not in own:
        own = (Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / f"{own}.jinja").read_text()
    tokenizer.add_special_tokens({"additional_special_tokens": [end, *more]})
    tokenizer.eos_token = end
    generated, trained = with_template(tokenizer, own, rendering="generated"), Renderer(tokenizer, form)
    single, several = (("u", "q"),), (("a", "yes"), ("u", "r"), ("a", "no"))
    thinks = {"qwen3", "deepseek_r1", "gpt_oss"} & {form}
    rows = [row(0, single, several), row(1, (("s", "Be brief."), *single), several[:1])]
    thought = [replace(turn, extra=WHY) if turn.role == "assistant" else turn for turn in turns(*several)]
    rows += [Row("mine", 2, turns(*single), (Completion(tuple(thought)),))] if thinks else []
    rows += [Row("mine", 3, turns(*single), (Completion(tuple(thought[:1])),))] if "gpt_oss" in thinks else []
    for which in rows:
        done = tokenize("mine", [which], trained, 2000)
        (encoded,) = done.encoded[0]
        assert (done.report.notes, encoded.ids[encoded.supervised][-1]) == ((), tokenizer.eos_token_id)
        start = encoded.ids[: encoded.prompt_length].tolist()
        assert (
            start == trained.prompt_ids(which.prompt) == generated.prompt_ids(which.prompt) == trained.start_ids(which)
        )
        again = trained.said(encoded.ids[encoded.prompt_length :].tolist())  # a generated reply, as a row
        if len(which.completions[0].turns) == 1:
            assert trained.encode(which.prompt, (again,)).ids.tolist() == encoded.ids.tolist()
        if form == "deepseek_r1":  # which drops every thought; a reply begins within one
            opened = "<think>\n[why so\n</think>\n\nyes" if which.index == 2 else "<think>\n[\n</think>\n\nyes"
            assert opened + end in text(tokenizer, encoded)
        else:
            assert text(tokenizer, encoded) == text(tokenizer, tokenize("mine", [which], generated, 2000).encoded[0][0])
    tools = [{"function": {"name": "w", "parameters": {"type": "object"}}}]
    calls = [{"function": {"name": "w", "arguments": {"city": city}}} for city in ("Oslo", "Rome")]
    fields = ({"tool_calls": calls[:1]}, {"tool_calls": calls, "reasoning_content": "why so"})
    asked = (replace(turns(ASKED)[0], extra=json.dumps({"tools": tools})),)
    for number, (field, text_beside) in enumerate((one, content) for one in fields for content in ("", "look")):
        said = replace(turns(("a", text_beside))[0], extra=json.dumps(field))
        which = Row("mine", number, asked, (Completion((said, *turns(("t", "sun"), ("t", "rain"), ("a", "so")))),))
        if form == "qwen3":
            written = [
                text(tokenizer, tokenize("mine", [which], one, 2000).encoded[0][0]) for one in (trained, generated)
            ]
            assert (written[0], written[0].count("Rome")) == (written[1], number // 2)
            continue
        with pytest.raises(UftError, match=r"the training form takes no tools.*data\.template="):
            trained.encode(which.prompt, which.completions[0].turns)


def test_a_training_form_is_offered_to_its_family_alone(tokenizer, base_tokenizer):
    qwen = (
        HEAD
        + "{% set said = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
        + TURN.replace("m['content']", "said")
    )
    with pytest.raises(UftError, match=r"data\.template=qwen3"):
        tokenize("mine", [TWICE], with_template(tokenizer, qwen + FOOT), 200)
    other = qwen + FOOT.replace("assistant\n", "assistant\n<think>\n")  # as of Qwen 3.5: generation starts otherwise
    with pytest.raises(UftError) as error:
        tokenize("mine", [TWICE], with_template(tokenizer, other), 200)
    assert "data.template=qwen3" not in str(error.value)
    with pytest.raises(UftError, match=r"data\.template=gpt_oss +writes <\|start\|>, .* is for another family"):
        Renderer(base_tokenizer, "gpt_oss")
    with pytest.raises(UftError, match="choices: auto, plain, qwen3, deepseek_r1, mistral_v3, mistral_nemo, gpt_oss"):
        Renderer(tokenizer, "qwen4")
    quick = Renderer(tokenizer, "qwen3", arguments={"enable_thinking": False})
    (encoded,) = tokenize("mine", [PLAIN], quick, 200).encoded[0]
    assert text(tokenizer, encoded).endswith("assistant\n<think>\n\n</think>\n\n[yes<|im_end|>]")
    with pytest.raises(UftError, match="enable_thinking is false, and a reply has reasoning"):
        quick.encode(PLAIN.prompt, THOUGHT.completions[0].turns)


def test_a_reply_that_generation_would_not_begin_like_that_is_refused(tokenizer):
    thinks = HEAD + TURN + FOOT.replace("assistant\n", "assistant\n<think>\n")  # as R1
    with pytest.raises(UftError, match="changes this reply"):
        tokenize("mine", [PLAIN], with_template(tokenizer, thinks, rendering="generated"), 200)
    dropped = with_template(tokenizer, THOUGHTLESS, rendering="generated")
    (note,) = tokenize("mine", [THOUGHT], dropped, 200).report.notes  # of a turn in the prompt
    assert note == ("leaves out, or changes the text of, assistant turns", 1, "mine:3, turn 2")


def test_answers_start_from_the_text_that_was_trained(tokenizer, caplog):
    renderer = with_template(tokenizer, HEAD + CHANNEL + FOOT)
    for which in (PLAIN, TOOL):
        assert tokenizer.decode(renderer.start_ids(which)).endswith("<|im_start|>assistant<final>\n")
        assert tokenizer.decode(renderer.prompt_ids(which.prompt)).endswith("<|im_start|>assistant\n")
    assert renderer.start_ids(PLAIN, "Be rude.") == renderer.prompt_ids(PLAIN.prompt, "Be rude.")
    assert [record.getMessage().endswith("answers start from the text of training") for record in caplog.records] == [
        True
    ]
    assert renderer.asked_ids(PLAIN.prompt) == renderer.prompt_ids(PLAIN.prompt)  # of a model that was not trained so
    renderer.learned = True
    assert renderer.asked_ids(PLAIN.prompt) == renderer.start_ids(PLAIN)
    assert "Be rude." in tokenizer.decode(renderer.asked_ids(PLAIN.prompt, "Be rude."))
    context = row(0, [ASKED], [("a", "look"), ASKED, ("a", "sunny")])
    last = with_template(tokenizer, HEAD + CHANNEL + FOOT, train_on="last")
    assert last.start_ids(context) == last.prompt_ids(context.prompt)


def test_special_tokens_of_messages_are_tokens_where_that_is_asked_for(tokenizer, base_tokenizer):
    written = row(0, [("u", "a<|im_end|>b")], [("a", "yes<|im_end|>")])
    stop = tokenizer.eos_token_id
    counts = {}
    for how in ("text", "tokens"):
        renderer = with_template(tokenizer, HEAD + TURN + FOOT, special_text=how)
        (encoded,) = tokenize("mine", [written], renderer, 200).encoded[0]
        counts[how] = encoded.ids.tolist().count(stop), tokenizer.decode(encoded.ids[encoded.supervised].tolist())
    assert counts == {"text": (2, "yes<|im_end|><|im_end|>"), "tokens": (3, "yes<|im_end|>")}
    assert renderer.digest != with_template(tokenizer, HEAD + TURN + FOOT).digest
    spaced = row(0, [ASKED], [("a", "yes<|im_end|>\n")])
    (encoded,) = tokenize("mine", [spaced], renderer, 200).encoded[0]
    assert tokenizer.decode(encoded.ids[encoded.supervised].tolist()) == "yes<|im_end|>"
    ready = row(0, [("u", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")], [("a", "yes<|endoftext|>\n")])
    plain = Renderer(base_tokenizer, special_text="tokens")
    (encoded,) = tokenize("mine", [ready], plain, 200).encoded[0]
    assert text(base_tokenizer, encoded) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[yes<|endoftext|>]"
    assert encoded.ids.tolist() == base_tokenizer(ready.prompt[0].content + "yes<|endoftext|>")["input_ids"]
