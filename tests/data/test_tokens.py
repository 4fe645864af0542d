"""Rows as tokens: what is checked, what is cut, what is kept for the next run."""

import logging

import pytest

from uft.data.chat import Renderer
from uft.data.rows import Completion, Message, Row
from uft.data.tokens import tokenize, tokenize_all
from uft.errors import UftError
from uft.heartbeat import heartbeat


def row(index, *replies, prompt="q", source="mine"):
    completions = tuple(Completion((Message("assistant", reply),)) for reply in replies)
    return Row(source, index, (Message("user", prompt),), completions)


def pair(index, chosen, rejected):
    sides = ((chosen, True), (rejected, False))
    completions = tuple(Completion((Message("assistant", text),), preferred=side) for text, side in sides)
    return Row("mine", index, (Message("user", "q"),), completions)


@pytest.fixture
def renderer(tokenizer):
    return Renderer(tokenizer)


def lengths(rows, renderer):
    return [len(renderer.encode(r.prompt, c.turns).ids) for r in rows for c in r.completions]


def ids_of(source):
    return [[one.ids.tolist() for one in row] for row in source.encoded]


def test_every_completion_of_every_row_in_order(renderer):
    rows = [pair(0, "yes", "no"), row(1, "Paris."), pair(2, "a", "b")]
    done = tokenize("mine", rows, renderer, 100)
    assert done.rows == tuple(rows)
    assert [len(of_row) for of_row in done.encoded] == [2, 1, 2]
    for r, of_row in zip(rows, done.encoded, strict=True):
        for completion, encoded in zip(r.completions, of_row, strict=True):
            expected = renderer.encode(r.prompt, completion.turns)
            assert encoded.ids.tolist() == expected.ids.tolist()
            assert encoded.supervised.tolist() == expected.supervised.tolist()
            assert encoded.prompt_length == expected.prompt_length
    report = done.report
    assert (report.rows, report.completions) == (3, 5)
    assert report.tokens == sum(lengths(rows, renderer))
    assert report.supervised == sum(e.supervised.sum() for of_row in done.encoded for e in of_row)
    assert (report.touched, report.dropped, report.supervised_lost) == (0, 0, 0)
    assert sum(count for _, count in report.lengths) == 5
    assert report.longest == max(lengths(rows, renderer))


def test_more_rows_than_are_tokenised_at_once(renderer, monkeypatch):
    rows = [pair(n, f"yes {n}", f"no {n}") for n in range(10)]
    whole = tokenize("mine", rows, renderer, 100)
    monkeypatch.setattr("uft.data.tokens.CHUNK", 3)
    before = heartbeat.signs
    apart = tokenize("mine", rows, renderer, 100)
    assert ids_of(whole) == ids_of(apart)
    assert heartbeat.signs >= before + 5  # one for each time that two rows, of two completions each, were tokenised


# --- too long


def test_rows_that_are_too_long_stop_with_count_longest_and_advice(renderer):
    rows = [row(0, "a"), row(1, "b" * 40), row(2, "c" * 60)]
    limit = lengths(rows, renderer)[0]
    with pytest.raises(UftError) as error:
        tokenize("mine", rows, renderer, limit)
    said = str(error.value)
    assert f"2 of 3 rows are longer than train.max_length={limit}" in said
    assert f"the longest has {max(lengths(rows, renderer))} tokens" in said
    assert "data.too_long=drop|truncate" in said
    assert f"train.max_length={max(lengths(rows, renderer))}" in said


def test_drop_leaves_out_rows_with_any_completion_too_long(renderer):
    rows = [pair(0, "a", "b"), pair(1, "a", "b" * 40), row(2, "c")]
    limit = lengths(rows[:1], renderer)[0]
    done = tokenize("mine", rows, renderer, limit, "drop")
    assert [r.index for r in done.rows] == [0, 2]
    assert len(done.encoded) == 2
    lost = sum(renderer.encode(rows[1].prompt, c.turns).supervised.sum() for c in rows[1].completions)
    assert (done.report.dropped, done.report.touched, done.report.supervised_lost) == (1, 0, lost)


def test_truncate_cuts_the_end_of_the_completion_and_counts_what_is_lost(renderer):
    rows = [row(0, "a"), row(1, "b" * 40)]
    short, long = lengths(rows, renderer)
    done = tokenize("mine", rows, renderer, long - 3, "truncate")
    whole = renderer.encode(rows[1].prompt, rows[1].completions[0].turns)
    assert done.encoded[1][0].ids.tolist() == whole.ids[:-3].tolist()
    assert done.encoded[1][0].prompt_length == whole.prompt_length
    assert done.encoded[0][0].length == short
    assert (done.report.touched, done.report.dropped, done.report.supervised_lost) == (1, 0, 3)


def test_truncate_ends_at_a_supervised_token_and_drops_a_row_without_any(renderer):
    rows = [row(0, "a"), row(1, "a", prompt="q" * 50), pair(2, "a", "b")]
    done = tokenize("mine", rows, renderer, lengths(rows, renderer)[0], "truncate")
    assert [r.index for r in done.rows] == [0, 2]
    assert (done.report.dropped, done.report.touched) == (1, 0)
    assert done.report.supervised_lost == renderer.encode(rows[1].prompt, rows[1].completions[0].turns).supervised.sum()
    following = (Message("assistant", "one"), Message("user", "more " * 10), Message("assistant", "two"))
    conversation = Row("mine", 0, (Message("user", "q"),), (Completion(following),))
    whole = renderer.encode(conversation.prompt, following)
    done = tokenize("mine", [conversation], renderer, whole.length - 8, "truncate")
    (encoded,) = done.encoded[0]
    assert encoded.supervised[-1]
    assert renderer.tokenizer.decode(encoded.ids[encoded.supervised].tolist()) == "one<|im_end|>"


# --- masks


SENSELESS = {
    "{{ '<|im_start|>' }}": "no token is supervised",
    "{{ 'x' + m['content'] }}{% generation %}{% endgeneration %}": "no token is supervised",
    "{{ m['content'] + '<|im_end|>' if m['role'] == 'assistant' else '' }}": "every token is supervised",
    "{{ m['role'] + ': ' + m['content'] + '\n' }}": "the stop token is not supervised",
    "{{ bos_token * 2 if loop.first else '' }}{{ m['content'] + '<|im_end|>' }}": "two beginning-of-text tokens",
}


def test_a_mask_that_makes_no_sense_stops_and_names_template_and_row(tokenizer):
    for template, why in SENSELESS.items():
        tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
        with pytest.raises(UftError) as error:
            tokenize("mine", [row(n, "yes") for n in range(9)], Renderer(tokenizer), 100)
        for words in (why, "row mine:0", "the tokenizer's chat template", "4 more rows"):
            assert words in str(error.value)


def test_problems_of_several_sources_come_together(renderer):
    rows = {"a": [row(0, "x" * 50)], "b": [row(0, "y")], "c": [row(0, "z" * 50)]}
    with pytest.raises(UftError) as error:
        tokenize_all(rows, renderer, 20, "error", None)
    assert [problem.what for problem in error.value.problems] == ["data.sources.a", "data.sources.c"]
    assert [done.source for done in tokenize_all(rows, renderer, 100, "error", None)] == ["a", "b", "c"]


# --- the cache


def test_a_second_run_finds_the_same_tokens_on_disk(renderer, tmp_path, monkeypatch):
    rows = [pair(0, "yes", "no" * 30), row(1, "Paris.")]
    first = tokenize("mine", rows, renderer, 25, "truncate", tmp_path)
    assert first.cache == "miss"
    monkeypatch.setattr(renderer, "encode_many", lambda *a: pytest.fail("tokenised again"))
    second = tokenize("mine", rows, renderer, 25, "truncate", tmp_path)
    assert second.cache == "hit"
    assert (second.rows, second.report) == (first.rows, first.report)
    for mine, theirs in zip(first.encoded, second.encoded, strict=True):
        assert [(e.ids.tolist(), e.supervised.tolist(), e.prompt_length) for e in mine] == [
            (e.ids.tolist(), e.supervised.tolist(), e.prompt_length) for e in theirs
        ]


def test_everything_the_tokens_depend_on_is_in_the_key(renderer, tokenizer, tmp_path, monkeypatch):
    rows = [row(0, "yes"), row(1, "no")]
    asked = [
        (rows, renderer, 100, "drop"),
        (rows[::-1], renderer, 100, "drop"),
        (rows, Renderer(tokenizer, "plain"), 100, "drop"),
        (rows, renderer, 99, "drop"),
        (rows, renderer, 100, "truncate"),
    ]
    assert [tokenize("mine", *this, tmp_path).cache for this in asked] == ["miss"] * 5
    assert tokenize("another name", *asked[0], tmp_path).cache == "hit"
    monkeypatch.setattr("uft.data.tokens.CODE_VERSION", 999)
    assert tokenize("mine", *asked[0], tmp_path).cache == "miss"


def test_a_damaged_cache_is_rebuilt_and_said(renderer, tmp_path, caplog):
    rows = [row(0, "yes"), row(1, "no")]
    first = tokenize("mine", rows, renderer, 100, "error", tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    ids, about = folder / "table.arrow", folder / "about.json"
    content = ids.read_bytes()
    for damage in (
        lambda: ids.write_bytes(content[:-5]),
        lambda: ids.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        ids.unlink,
        lambda: about.write_text("{"),
    ):
        damage()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = tokenize("mine", rows, renderer, 100, "error", tmp_path)
        assert again.cache == "rebuilt"
        assert "corrupt" in caplog.text
        assert ids_of(again) == ids_of(first)
        assert tokenize("mine", rows, renderer, 100, "error", tmp_path).cache == "hit"


def test_a_cache_that_cannot_be_written_costs_only_the_cache(renderer, tmp_path, caplog):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert tokenize("mine", [row(0, "yes")], renderer, 100, "error", tmp_path).cache == "off"
    assert "not kept" in caplog.text


def test_no_rows_at_all(renderer, tmp_path):
    for state in ("miss", "hit"):
        done = tokenize("mine", [], renderer, 100, "error", tmp_path)
        assert (len(done.encoded), done.report.rows, done.cache) == (0, 0, state)
