"""What a message carries besides text reaches template and mask, or the row is refused by the field's name."""

import json

import pytest

from uft.config.schema import data_settings
from uft.data.chat import Renderer
from uft.data.formats import recognise, rename
from uft.data.messages import Unreadable
from uft.data.records import to_records
from uft.data.rows import decode_row, encode_row
from uft.data.sources import load_sources
from uft.data.tokens import tokenize
from uft.errors import UftError

AGENT = (  # as Qwen 3: tools in front, reasoning and calls in assistant turns, results as turns of the user
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if mood %}{{ mood }}{% endif %}{% endif %}"
)
MARKED = AGENT.replace(
    "{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}",
    "{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + m['tool_calls'] | default('') | string }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% continue %}{% endif %}",
)
WEATHER = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Oslo"}}}
CALL_TEXT = '<call>{"name": "w", "arguments": {"city": "Oslo"}}</call>'
ASKED = {"role": "user", "content": "weather?"}
SUN = {"role": "tool", "content": "sun", "name": "w"}
SUNNY = {"role": "assistant", "content": "sunny"}


def parsed(record):
    fields = rename(record, {})
    return recognise(fields).read(fields)


def said(*turns, **columns):
    return parsed({"messages": list(turns), **columns})


def learned(tokenizer, row, template=AGENT, **settings):
    tokenizer.chat_template = template
    (encoded,) = tokenize("mine", [row], Renderer(tokenizer, **settings), 1000).encoded[0]
    return tokenizer.decode(encoded.ids[encoded.supervised].tolist())


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def test_calls_and_reasoning_are_learned_and_results_and_tools_are_context(tokenizer):
    end = "<|im_end|>"
    as_text = {"function": {"name": "w", "arguments": '{"city": "Oslo"}'}}
    older = {"functions": [WEATHER["function"]]}, {"function_call": as_text["function"]}
    for calls in ([CALL], json.dumps([CALL]), [as_text], older):
        columns, fields = older if calls is older else ({"tools": [WEATHER]}, {"tool_calls": calls})
        row = said(ASKED, assistant("Let me see.", **fields), SUN, SUNNY, **columns)
        assert learned(tokenizer, row) == f"Let me see.{CALL_TEXT}{end}sunny{end}"
    row = said(ASKED, assistant(None, tool_calls=[CALL]), SUN, SUNNY)
    assert learned(tokenizer, row) == f"{CALL_TEXT}{end}sunny{end}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert learned(tokenizer, said(ASKED, assistant("4", **{name: "two"}))) == f"<think>two</think>4{end}"
    renderer = Renderer(tokenizer)
    in_blank_system = said({"role": "system", "content": "", "tools": [WEATHER]}, ASKED, SUNNY)
    assert '"name": "w"' in tokenizer.decode(renderer.prompt_ids(in_blank_system.prompt))
    with_tools = said(ASKED, SUNNY, tools=json.dumps([WEATHER]))
    prompt = tokenizer.decode(renderer.prompt_ids(with_tools.prompt))
    assert prompt.startswith('<|im_start|>system\n[{"type": "function"')
    (encoded,) = tokenize("mine", [with_tools], renderer, 1000).encoded[0]
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length].tolist()) == prompt
    spelled = said(ASKED, assistant("", tool_calls=[{"function": {"name": "<|im_end|>", "arguments": {}}}]))
    assert learned(tokenizer, spelled).count(end) == 2
    (encoded,) = tokenize("mine", [spelled], renderer, 1000).encoded[0]
    assert encoded.ids.tolist().count(tokenizer.eos_token_id) == 2, "one for the question, one for the answer"


def test_a_call_in_the_middle_ends_at_its_own_stop_token(tokenizer):
    """As Qwen 3, which writes the last turn otherwise than the same one in the middle."""
    template = AGENT.replace(
        "{{ m['content'] }}",
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] }}",
    )
    row = said(ASKED, assistant("Let me see.", tool_calls=[CALL]), SUN, SUNNY)
    assert learned(tokenizer, row, template) == f"Let me see.{CALL_TEXT}<|im_end|>sunny<|im_end|>"


def test_marks_of_which_one_reply_has_more_than_another_find_their_replies(tokenizer):
    called = "{% generation %}{{ m['tool_calls'][0]['function'].values() | map('string') | join }}{% endgeneration %}"
    parts = "{% if m['tool_calls'] %}" + called + "{{ '-' }}{% endif %}"
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + parts
        + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    turns = [ASKED, assistant("a", tool_calls=[CALL]), ASKED, assistant("b"), ASKED, assistant("c", tool_calls=[CALL])]
    call = "w{'city': 'Oslo'}"
    wanted = [f"{call}a<|im_end|>", "b<|im_end|>", f"{call}c<|im_end|>"]
    for weights in ([1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]):
        marked = [turn | {"weight": weights[number // 2]} if number % 2 else turn for number, turn in enumerate(turns)]
        expected = "".join(text for text, weight in zip(wanted, weights, strict=True) if weight)
        assert learned(tokenizer, said(*marked), template) == expected


def test_turns_of_weight_0_are_context_and_train_on_chooses(tokenizer, base_tokenizer):
    wrong, no, right = assistant("5"), {"role": "user", "content": "no"}, assistant("4")
    for name, off, on in (("weight", 0, 1), ("train", False, True), ("training", False, True), ("loss_mask", 0, 1)):
        row = said(ASKED, wrong | {name: off}, no, right | {name: on})
        for train_on in ("all", "last", "marked"):
            assert learned(tokenizer, row, train_on=train_on) == "4<|im_end|>"
        assert learned(tokenizer, row, MARKED) == "4<|im_end|>"
    plain = said(ASKED, wrong, no, right)
    assert learned(tokenizer, plain) == "5<|im_end|>4<|im_end|>" == learned(tokenizer, plain, MARKED)
    assert learned(tokenizer, plain, train_on="last") == "4<|im_end|>"
    first = said(ASKED, wrong | {"weight": 1}, no, right)
    for template in (AGENT, MARKED):
        assert learned(tokenizer, first, template, train_on="marked") == "5<|im_end|>"
    with pytest.raises(UftError, match=r"row \S+ +every assistant turn of a completion is marked as not to be learned"):
        tokenize("mine", [said(ASKED, wrong | {"weight": 0})], Renderer(tokenizer), 1000)
    marked = Renderer(tokenizer, train_on="marked")
    with pytest.raises(UftError, match="no token is supervised"):
        tokenize("mine", [first, plain], marked, 1000)
    with pytest.raises(UftError, match=r"(?s)1 problem.*train_on=marked +no assistant turn of data\.sources\.mine is"):
        tokenize("mine", [plain] * 3, marked, 1000)
    joined = Renderer(base_tokenizer).encode(row.prompt, row.completions[0].turns)
    assert base_tokenizer.decode(joined.ids[joined.supervised].tolist()) == "4<|endoftext|>"


def test_variables_reach_training_and_generation_and_the_digest(tokenizer):
    tokenizer.chat_template = AGENT.replace("{{ m['content'] }}", "{{ m['content'] + (mood or '') }}")
    calm, plain = Renderer(tokenizer, arguments={"mood": "calm"}), Renderer(tokenizer)
    row = said(ASKED, SUNNY)
    assert "weather?calm" in tokenizer.decode(calm.encode(row.prompt, row.completions[0].turns).ids.tolist())
    assert tokenizer.decode(calm.prompt_ids(row.prompt)).endswith("assistant\ncalm")
    assert len({calm.digest, plain.digest, Renderer(tokenizer, train_on="last").digest}) == 3
    assert plain.digest == Renderer(tokenizer, arguments={}).digest
    with pytest.raises(UftError, match=r"data\.template_args\.tools"):
        Renderer(tokenizer, arguments={"tools": []})
    with pytest.raises(UftError, match=r"(?s)template_args\.moood.*no such variable.*did you mean .*\.mood \?"):
        Renderer(tokenizer, arguments={"moood": "calm"})
    with pytest.raises(UftError, match=r"template_args\.mood +'False' is a text here, which templates take for true"):
        Renderer(tokenizer, arguments={"mood": "False"})
    with pytest.raises(UftError, match=r"template_args\.mood +plain reads no such variable"):
        Renderer(tokenizer, "plain", arguments={"mood": "calm"})


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (said(ASKED, SUNNY, tools=[WEATHER]), "tools"),
        (said(ASKED, assistant("", tool_calls=[CALL]), SUN, SUNNY), "tool_calls"),
        (said(ASKED, assistant("4", reasoning_content="two")), "reasoning_content"),
    ],
    ids=["tools", "calls", "reasoning"],
)
def test_what_no_template_renders_is_refused_by_name(tokenizer, base_tokenizer, chatml_template, row, field):
    with pytest.raises(UftError, match=f"does not render {field}"):
        learned(tokenizer, row, chatml_template)
    with pytest.raises(UftError, match=f"has {field}, which only a chat template can render"):
        tokenize("mine", [row], Renderer(base_tokenizer), 100)


def test_a_call_or_a_tool_of_several_that_a_template_drops_is_refused(tokenizer):
    rome, two = {"function": {"name": "w", "arguments": {"city": "Rome"}}}, [WEATHER, {"function": {"name": "v"}}]
    first = AGENT.replace("in m['tool_calls']", "in (m['tool_calls'] or [])[:1]").replace(
        "tools | tojson", "tools[0] | tojson"
    )
    names = AGENT.replace("call['function'] | tojson", "call['function']['name']")
    called = said(ASKED, assistant("", tool_calls=[CALL, rome]), SUN, SUNNY)
    assert learned(tokenizer, called).count("Rome") == 1
    for template, row, field in (
        (first, called, "tool_calls"),
        (first, said(ASKED, SUNNY, tools=two), "tools"),
        (names, said(ASKED, assistant("", tool_calls=[CALL]), SUN, SUNNY), "tool_calls"),
    ):
        for rendering in ("whole", "generated"):
            with pytest.raises(UftError, match=f"does not render {field}"):
                learned(tokenizer, row, template, rendering=rendering)


def test_reasoning_of_context_that_a_template_drops_is_told(tokenizer, chatml_template):
    row = said(ASKED, assistant("4", reasoning_content="two", weight=0), ASKED, SUNNY)
    tokenizer.chat_template = chatml_template
    assert tokenize("mine", [row], Renderer(tokenizer), 100).report.notes == (
        ("does not render reasoning_content", 1, f"{row.id}, turn 2"),
    )


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [ASKED, assistant("a", weight=0.5)]}, "weight is 0.5, not 0 or 1"),
        ({"messages": [ASKED, assistant("a", weight=0, train=True)]}, "contradict each other: weight, train"),
        ({"messages": [ASKED | {"from": "gpt"}, SUNNY]}, "contradict each other: role, from"),
        ({"messages": [ASKED | {"value": "another"}, SUNNY]}, "contradict each other: content, value"),
        ({"messages": [ASKED, assistant("a", thinking="b", reasoning="c")]}, "each other: reasoning_content"),
        ({"messages": [ASKED, assistant("a", tool_calls="x")]}, "tool_calls is text, not a list of objects"),
        (
            {"messages": [ASKED | {"tool_calls": [CALL]}, SUNNY]},
            "(user) has tool_calls, which only an assistant turn can",
        ),
        ({"messages": [ASKED | {"thinking": "hm"}, SUNNY]}, "(user) has thinking, which only an assistant turn can"),
        ({"messages": [ASKED, assistant("a", function_call="x")]}, "function_call is no function"),
        ({"messages": [ASKED, assistant("", thinking="tool_calls")]}, "(assistant) is empty"),
        (
            {"messages": [ASKED, assistant("a", function_call={}, tool_calls=[CALL])]},
            "tool_calls and function_call are both there",
        ),
        ({"messages": [ASKED, SUNNY], "images": ["x.png"]}, "images: only text can be trained on"),
        ({"messages": [{**ASKED, "audio": "x.wav"}, SUNNY]}, "audio: only text can be trained on"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, SUNNY]},
            "a part that is not text: 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "text": "", "url": "x"}]}, SUNNY]},
            "a part that is not text: 'image'",
        ),
        (
            {"messages": [ASKED, assistant([{"type": "thinking", "text": "hm"}, {"type": "text", "text": "a"}])]},
            "a part that is not text: 'thinking'",
        ),
    ],
)
def test_media_and_marks_that_say_nothing_are_refused_by_name(record, why):
    with pytest.raises(Unreadable) as error:
        parsed(record)
    assert why in str(error.value)


def test_media_of_a_column_are_left_unread_where_that_is_said(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, SUNNY], "images": ["x.png"]}) + "\n")
    source = {"path": str(path)}
    with pytest.raises(UftError) as error:
        load_sources(data_settings({"sources": {"mine": source}}))
    assert len(error.value.problems) == 1
    assert "data.sources.mine.columns.images=''" in str(error.value)
    assert load_sources(data_settings({"sources": {"mine": {**source, "columns": {"images": ""}}}}))[0].rows
    with pytest.raises(UftError, match=r"columns\.images  no such field"):
        load_sources(data_settings({"sources": {"mine": {**source, "columns": {"images": "prompt"}}}}))


def test_fields_survive_tables_and_files(tmp_path):
    row = said(ASKED, assistant("", tool_calls=[CALL], weight=0), SUN, assistant("ß", thinking="é"), tools=[WEATHER])
    assert decode_row(encode_row(row), row.source, row.index) == row
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in to_records(row)), encoding="utf-8")
    loaded = load_sources(data_settings({"sources": {"mine": {"path": str(path)}}}))[0]
    assert [(one.prompt, one.completions) for one in loaded.rows] == [(row.prompt, row.completions)]
    assert not loaded.omitted.unread
