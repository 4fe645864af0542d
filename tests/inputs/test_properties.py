"""What holds whatever comes, looked for by hypothesis: row formats, templates, packing, mixtures, settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from uft.data import formats
from uft.data.batch import Layout, Line, forwarded, lay_out
from uft.data.chat import Renderer
from uft.data.messages import Unreadable
from uft.data.mixture import Mixture, Portion, epoch_rows, mixture_weights
from uft.data.readers import READERS
from uft.data.rows import Message
from uft.errors import UftError

EXAMPLES = 60
steady = settings(
    max_examples=EXAMPLES,
    deadline=None,  # the machine may be doing something else
    derandomize=True,  # the same cases everywhere; a failure is found again
    suppress_health_check=list(HealthCheck),
)

any_text = st.text(max_size=40)  # surrogates among them
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 0.5, 10**400, -(10**400), 5e-324]))
leaves = st.one_of(st.none(), st.booleans(), numbers, any_text)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4), max_leaves=12
)
roles = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "nobody", ""])
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": roles, "content": st.one_of(any_text, values)}),
        st.fixed_dictionaries({"from": roles, "value": any_text}),
        values,
    ),
    max_size=5,
)
cells = st.one_of(values, messages, any_text)


@steady
@given(data=st.data(), form=st.sampled_from(formats.FORMATS))
def test_a_record_is_read_or_refused_with_a_reason(data, form):
    """Whatever stands in the columns of a format."""
    names = sorted(form.columns | formats.COMMON)
    record = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(names, cells)))
    low_high = data.draw(st.one_of(st.none(), st.tuples(st.floats(-5, 0), st.floats(1, 5))))
    try:
        fields = form.read(record, low_high)
    except Unreadable as error:
        reason = str(error)
    else:
        reason, made = "", fields
    assert len(reason) < 2000
    if reason:
        return
    assert made.completions
    for turn in (*made.prompt, *(turn for one in made.completions for turn in one.turns)):
        turn.content.encode("utf-8")
        assert turn.content.strip()
        assert turn.role in ("system", "user", "assistant", "tool")
    for one in made.completions:
        assert one.turns[0].role == one.turns[-1].role == "assistant"
        assert one.score is None or 0 <= one.score <= 1
        assert all(math.isfinite(number) for number in one.annotations.values())
        assert one.sampled_by is None or one.sampled_by.encode("utf-8")


@steady
@given(rows=st.lists(st.dictionaries(texts, st.one_of(st.none(), st.booleans(), st.integers(), texts), max_size=4)))
def test_json_lines_give_back_what_was_written(tmp_path_factory, rows):
    file = folder_of(tmp_path_factory) / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    assert [record for _, record in READERS[".jsonl"](file)] == rows


@steady
@given(raw=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]))
def test_any_bytes_are_rows_or_bad_rows_with_a_place(tmp_path_factory, raw, suffix):
    file = folder_of(tmp_path_factory) / f"rows{suffix}"
    file.write_bytes(raw)
    for number, found in READERS[suffix](file):
        assert number > 0
        assert isinstance(found, dict) or found


def folder_of(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp()


# --- templates


@st.composite
def conversations(draw):
    """(prompt, turns): roles in an order that every format allows."""
    content = st.one_of(texts, st.sampled_from(["<|im_end|>", "assistant\n", "\n", " x ", "<think>", "e\u0301"]))
    filled = st.lists(content, min_size=1, max_size=3).map("".join).filter(lambda text: text.strip())
    system = (Message("system", draw(filled)),) if draw(st.booleans()) else ()
    count = draw(st.integers(1, 5))
    said = [Message("user" if number % 2 == 0 else "assistant", draw(filled)) for number in range(2 * count)]
    cut = 2 * draw(st.integers(0, count - 1)) + 1
    return (*system, *said[:cut]), tuple(said[cut:])


@steady
@given(conversation=conversations())
def test_a_supervised_token_is_never_the_prompt_s(byte_level, conversation):
    prompt, turns = conversation
    renderer = Renderer(byte_level)
    encoded = renderer.encode(prompt, turns)
    assert renderer.prompt_ids(prompt) == encoded.ids[: encoded.prompt_length].tolist()
    assert not encoded.supervised[: encoded.prompt_length].any()
    learned = byte_level.decode(encoded.ids[encoded.supervised].tolist())
    assert learned == "".join(turn.content + "<|im_end|>" for turn in turns if turn.role == "assistant")
    assert encoded.supervised[-1]


@steady
@given(conversation=conversations())
def test_nor_is_it_without_a_template(byte_level, conversation):
    prompt, turns = conversation
    byte_level.chat_template = None
    renderer = Renderer(byte_level)
    encoded = renderer.encode(prompt, turns)
    assert renderer.prompt_ids(prompt) == encoded.ids[: encoded.prompt_length].tolist()
    learned = byte_level.decode(encoded.ids[encoded.supervised].tolist())
    assert learned == "".join(turn.content + "<|im_end|>" for turn in turns if turn.role == "assistant")


# --- packing


@st.composite
def groups(draw):
    """Lines in groups that share the beginnings of their prompts, some without a target."""
    lines = []
    for group in range(draw(st.integers(0, 4))):
        prompt = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
        for _ in range(draw(st.integers(1, 4))):
            own = prompt[: draw(st.integers(1, len(prompt)))] + draw(st.lists(st.integers(1, 5), max_size=6))
            marks = draw(st.lists(st.booleans(), min_size=len(own), max_size=len(own)))
            lines.append(Line(np.array(own, np.int32), np.array(marks, bool), group))
    return lines


@steady
@given(lines=groups(), pad=st.integers(0, 5))
def test_every_layout_asks_for_the_same_targets(lines, pad):
    padded, packed, shared = (lay_out(lines, layout, pad) for layout in Layout)
    wanted = [int(line.ids[place]) for line in lines for place in line.targets]
    for laid in (padded, packed, shared):
        assert laid["target_ids"].tolist() == wanted
        assert laid["offset"].tolist() == padded["offset"].tolist()
        assert laid["sequence"].tolist() == padded["sequence"].tolist()
        flat_ids, flat_positions = laid["input_ids"].reshape(-1), laid["position_ids"].reshape(-1)
        for predictor, offset, sequence in zip(
            laid["predictor"].tolist(), laid["offset"].tolist(), laid["sequence"].tolist(), strict=True
        ):
            assert int(flat_positions[predictor]) == offset - 1
            assert int(flat_ids[predictor]) == int(lines[sequence].ids[offset - 1])


@steady
@given(lines=groups())
def test_what_is_fed_is_what_was_counted(lines):
    for layout in (Layout.PACKED, Layout.SHARED):
        laid = lay_out(lines, layout, 0)
        spans = laid["segments"].spans
        assert laid["input_ids"].shape == (1, sum(span.length for span in spans))
        numbers = sorted({line.group for line in lines})
        counted = sum(forwarded([line for line in lines if line.group == one], layout) for one in numbers)
        assert laid["input_ids"].numel() == max(counted, 1)  # a model wants a token
        assert laid["segments"].tokens == sum(len(line.ids) for line in lines)


# --- mixtures

portions = st.builds(
    Portion,
    name=st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=3),
    rows=st.integers(0, 30),
    share=st.one_of(
        st.none(), st.floats(min_value=0, allow_nan=False), st.sampled_from([0.0, 0.5, 1.0, 1e308, 5e-324])
    ),
    demonstration=st.booleans(),
)


@steady
@given(
    found=st.lists(portions, max_size=5, unique_by=lambda one: one.name),
    ratio=st.one_of(st.none(), st.floats(0, 1)),
    seed=st.integers(0, 9),
    exhaustion=st.sampled_from(["repeat", "first", "all"]),
)
def test_shares_are_kept_or_refused(found, ratio, seed, exhaustion):
    try:
        weights = mixture_weights(found, ratio)
        rows = epoch_rows([one.rows for one in found], weights, exhaustion)
    except UftError:
        return
    assert rows >= 1
    assert math.isclose(sum(weights), 1, abs_tol=1e-6)
    if ratio is not None:
        shown = sum(weight for weight, one in zip(weights, found, strict=True) if one.demonstration)
        assert math.isclose(shown, ratio, abs_tol=1e-6)
    made = Mixture([one.name for one in found], [one.rows for one in found], weights, seed)
    assume(all(weight > 1e-6 for weight in weights if weight))  # else nothing is drawn of it for a very long time
    drawn = made.take(80)
    for number, one in enumerate(found):
        indices = [draw.index for draw in drawn if draw.source == number]
        assert abs(len(indices) - 80 * weights[number]) < 1 + 1e-6
        assert sorted(indices[: one.rows]) == sorted(set(indices[: one.rows])), "each once before any twice"
    again = Mixture(made.names, made.sizes, weights, seed)
    again.load_state_dict(json.loads(json.dumps({**made.state_dict(), "counts": dict.fromkeys(made.names, 0)})))
    assert again.take(80) == drawn


# --- settings

KEYS = (
    "seed",
    "train.steps",
    "optim.lr",
    "data.ratio",
    "run.name",
    "tracking.tags",
    "optim.betas",
    "model",
    "nosuch.key",
)
words = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++", "~"]),
    st.sampled_from(KEYS),
    st.one_of(
        texts,
        numbers.map(str),
        st.sampled_from(
            ["null", "true", "[]", "{}", "[1,2", "'", "${seed}", "${oc.env:HOME}", "???", "a,b", "1e999", "nan"]
        ),
    ),
)


@settings(steady, max_examples=15)
@given(line=st.lists(words, max_size=3))
def test_settings_are_understood_or_explained(line):
    from uft.config.compose import examine
    from uft.config.files import Request
    from uft.errors import render

    problems = examine(Request(tuple(line))).problems
    if problems:
        said = render(UftError(*problems))
        said.encode("utf-8")
        assert "Traceback" not in said
