"""Rows on disk are the rows in memory: the same content, order, digests, held-out prompts and tokens."""

import errno
import json
import logging
import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uft.config.schema import data_settings
from uft.data import sources, table, tokens
from uft.data.chat import Renderer
from uft.data.rows import ANNOTATIONS, Completion, Message, Row, content_digest, decode_row, encode_row
from uft.data.sources import load_sources
from uft.data.table import RowTable, RowWriter, grouped, hold_out, kinds, like, pick, prompt_words
from uft.data.tokens import tokenize
from uft.errors import UftError

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
turns = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), texts), min_size=1).map(
    tuple
)
completions = st.builds(
    Completion,
    turns,
    preferred=st.none() | st.booleans(),
    label=st.none() | st.booleans(),
    score=st.none() | numbers,
    sampled_by=st.none() | texts,
    log_prob=st.none() | numbers | st.integers(-(10**30), 0),
    annotations=st.dictionaries(st.sampled_from([*ANNOTATIONS, "score"]), numbers),
)
rows_of = st.builds(
    Row,
    st.just("mine"),
    st.integers(0, 10**9),
    turns,
    st.lists(completions, min_size=1, max_size=3).map(tuple),
    answer=st.none() | texts,
    task=st.none() | texts,
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=rows_of)
def test_a_line_says_what_the_row_says(row):
    read = decode_row(encode_row(row), row.source, row.index)
    assert read == row
    assert content_digest([read]) == content_digest([row])  # -0.0 and 0.0, 1 and 1.0 are equal, and not the same
    assert encode_row(row).count(b"\n") == 1


# --- both ways


def demonstration(n):
    return {"prompt": f"question {n % 31} \u2028 é", "completion": f"answer {n}", "task": f"t{n % 3}"}


def pair(n):
    numbers = {"soft_label": n % 7 / 7, "score_chosen": n, "score_rejected": -n} if n % 3 else {}
    return {"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": "no", **numbers}


def scored(n):
    """Prompts that come again soon, late, and never; some rows are other words for nearly the same prompt."""
    about = n % 5 if n % 4 == 0 else n // 2
    return {"prompt": f"about {about}" + " " * (n % 11 == 0), "completion": f"reply {n}", "score": n * 0.37 % 1}


def sampled(n):
    log_probs = {"negative_log_probs": [-0.1 * n, -3]} if n % 2 else {}
    baseline = {"baseline_logp": [-1.5, None, -n]} if n % 5 == 0 else {}
    return {"prompt": f"q{n}", "response": "r", "negatives": ["a", "b"], "sampled_by": "m", **log_probs, **baseline}


SHAPES = {"demonstration": demonstration, "pair": pair, "scored": scored, "sampled": sampled}
PINNED = {  # (digest of the training rows, numbers of the first held-out rows), from before any row was on disk
    "demonstration": ("8334d64aeb2541cf83ea1dcfaaedab6bba4c8c0e87d94071bb5f77588dcbc282", [11, 16, 22, 27, 42]),
    "pair": ("88b1574b5c65bd2585e526b9a25cc873e9c75db3ae8c275bf55d57e6d36aeab3", [7, 10, 19, 23, 24]),
    "scored": ("6326597cd7fca4d9c47f39e4c8bfa833a74141da1cb91e1881f897d4f1b61600", [3, 9, 17, 23, 25]),
    "sampled": ("335ea815ca23f0e98e672f7793bf6f6c7a5f9eb04cfb61f06770b7b31841890d", [7, 10, 19, 23, 24]),
}
COUNT = 200


def file_of(tmp_path, shape, count=COUNT):
    path = tmp_path / f"{shape}.jsonl"
    path.write_text("".join(json.dumps(SHAPES[shape](n)) + "\n" for n in range(count)), encoding="utf-8")
    return path


def loaded(path, **source):
    return load_sources(data_settings({"holdout": 0.1, "sources": {"mine": {"path": str(path), **source}}}))[0]


@pytest.fixture
def large(monkeypatch, tmp_path):
    """From here on everything is much: 20 rows, a block of 500 bytes, tokens of a few rows."""

    def set_in():
        monkeypatch.setenv("UFT_CACHE", str(tmp_path / "cache"))
        for module, name, value in (
            (table, "LARGE_ROWS", 20),
            (table, "BATCH_ROWS", 6),
            (table, "PART", 7),
            (table, "FEEDBACKS", 4),
            (table, "SPILL", 1000),
            (tokens, "CHUNK", 13),
            (sources, "KEPT_BYTES", 0),
            (sources, "CACHED_BYTES", 0),
        ):
            monkeypatch.setattr(module, name, value)

    return set_in


@pytest.mark.parametrize("limit", [None, 3, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_disk_is_as_in_memory(tmp_path, large, shape, limit):
    path = file_of(tmp_path, shape)
    memory = loaded(path, limit=limit)
    large()
    disk = loaded(path, limit=limit)
    assert isinstance(memory.rows, tuple)
    assert isinstance(disk.rows, RowTable) == (limit != 3 or shape == "scored")
    for ours, theirs in ((disk.rows, memory.rows), (disk.held_out, memory.held_out)):
        assert list(ours) == list(theirs)
        assert [ours[n] for n in range(len(ours))] == list(theirs)
        assert content_digest(ours) == content_digest(theirs)
        assert prompt_words(ours) == prompt_words(theirs)
    assert disk.digest == memory.digest
    assert list(disk.kinds.items()) == list(memory.kinds.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_digests_and_held_out_rows_are_those_of_every_version(tmp_path, large, shape):
    path = file_of(tmp_path, shape)
    for prepare in (lambda: None, large):
        prepare()
        source = loaded(path)
        assert (source.digest, [row.index for row in source.held_out][:5]) == PINNED[shape]


def test_any_amount_is_held_out_alike(tmp_path, large):
    path = file_of(tmp_path, "demonstration")
    memory = loaded(path, holdout=0).rows
    large()
    disk = loaded(path, holdout=0).rows
    for amount in (0, 1, 7, 0.01, 0.5, 0.99, 200, 10**6, -1):
        for ours, theirs in zip(hold_out(disk, amount), hold_out(memory, amount), strict=True):
            assert tuple(ours) == theirs


def test_long_texts_are_much_before_rows_are_many(tmp_path, monkeypatch):
    path = file_of(tmp_path, "demonstration")
    assert isinstance(loaded(path).rows, tuple)
    monkeypatch.setattr(table, "LARGE_TEXT", 2000)
    assert isinstance(loaded(path).rows, RowTable)


# --- a store


@pytest.fixture
def both(tmp_path, large):
    """The same rows (in memory, on disk): scored ones of few and of many scores, and demonstrations between them."""
    large()

    def row(n):
        score = None if n % 5 == 0 else n % 3 / 2 if n % 2 else n / 100
        return Row("mine", n, (Message("user", f"q{n}"),), (Completion((Message("assistant", "é" * n),), score=score),))

    memory = tuple(row(n) for n in range(60))
    writer = RowWriter(tmp_path / "rows")
    for one in memory:
        writer.add(one)
    return memory, RowTable("mine", writer.to_table(None))


def test_a_store_is_a_sequence(both):
    memory, disk = both
    assert (len(disk), disk[-1], tuple(disk[3:50:7]), tuple(reversed(disk))) == (
        60,
        memory[-1],
        memory[3:50:7],
        memory[::-1],
    )
    assert not disk[:0]
    with pytest.raises(IndexError):
        disk[60]
    places = [5, 6, 7, 7, 59, 0, 1, *range(20, 50)]
    chosen = pick(disk, places)
    assert tuple(chosen) == pick(memory, places) == tuple(memory[n] for n in places)
    assert content_digest(chosen) == content_digest(memory[n] for n in places)
    assert tuple(pick(chosen, [1, 3])) == (memory[6], memory[7])
    assert pick(disk, range(60)) is disk


def test_rows_that_are_alike_stand_for_each_other(both):
    memory, disk = both
    feedback = [[(c.score, c.preferred) for c in row.completions] for row in memory]
    found = list(grouped(disk))
    assert sum(count for _, count in found) == 60
    assert len(found) < 40  # four feedbacks are numbered
    assert all(before[0].index < after[0].index for before, after in pairwise(found))
    assert [
        next(n for n, f in enumerate(feedback) if f == feedback[row.index]) for row, count in found if count > 1
    ] == [row.index for row, count in found if count > 1]
    for n in range(60):
        assert [(c.score, c.preferred) for c in like(disk, n).completions] == feedback[n]
    assert [count for _, count in grouped(memory)] == [1] * 60
    assert like(memory, 7) is memory[7]
    assert kinds(disk[10:]) == kinds(memory[10:])


def fill_disk(monkeypatch, room):
    """Tables that are opened from here on take `room` writes and a part of the next, and then the disk is full."""

    def open_full(place, mode="r", *given, **more):
        file = open(place, mode, *given, **more)  # noqa: SIM115
        if mode != "wb":
            return file
        left = iter(range(room))

        def write(data):
            if next(left, None) is None:
                file.write(bytes(data)[:10])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return file.write(data)

        return SimpleNamespace(write=write, flush=file.flush, close=file.close)

    monkeypatch.setattr(table, "open", open_full, raising=False)


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_is_said(both, tmp_path, monkeypatch, room):
    def write(writer):
        for row in both[0]:
            writer.add(row)

    fill_disk(monkeypatch, room)
    with pytest.raises(UftError, match="no space is left"):
        write(RowWriter(tmp_path / "rows"))


def test_a_cache_that_cannot_be_written_sends_rows_elsewhere(tmp_path, large, monkeypatch):
    path = file_of(tmp_path, "demonstration")
    memory = loaded(path)
    large()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "file"))
    assert tuple(loaded(path).rows) == memory.rows


def test_rows_are_parsed_once_for_all_processes(tmp_path, large, monkeypatch, caplog):
    path = file_of(tmp_path, "scored")
    path.write_text(path.read_text() + "{broken\n")
    large()
    data = {"bad_rows": "drop", "holdout": 0.1, "sources": {"mine": {"path": str(path)}}}
    first = load_sources(data_settings(data))[0]
    (entry,) = (tmp_path / "cache" / "rows").iterdir()  # nothing half-written is left beside
    with monkeypatch.context() as patched:
        patched.setitem(sources.READERS, ".jsonl", lambda path: pytest.fail("read again"))
        again = load_sources(data_settings(data))[0]
    assert (again, list(again.rows)) == (replace(first, rows=again.rows, held_out=again.held_out), list(first.rows))
    assert [row.where for row in again.omitted.bad] == [f"{path}:{COUNT + 1}"]
    for change in ({"limit": 30}, {"score_range": [0, 2]}, {"columns": {"score": "score"}}):  # each its own entry
        load_sources(data_settings({**data, "sources": {"mine": {"path": str(path), **change}}}))
    path.write_text(path.read_text() + json.dumps({**scored(COUNT), "prompt": "new"}) + "\n")
    assert len(load_sources(data_settings(data))[0].rows) > len(first.rows)
    assert len(list(entry.parent.iterdir())) == 5
    damaged = entry / "table.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"\0" * 9)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with caplog.at_level(logging.WARNING):
        rebuilt = load_sources(data_settings(data))[0]
    assert "reading the rows again" in caplog.text
    assert (rebuilt.digest, rebuilt.omitted.bad) == (first.digest, first.omitted.bad)


def test_nothing_is_left_of_rows_that_have_no_file(tmp_path, large, monkeypatch):
    large()
    source = load_sources(data_settings({"sources": {"mine": {"path": "builtin:playground/instruct"}}}))[0]
    assert isinstance(source.rows, RowTable)
    assert list((tmp_path / "cache").glob("rows/*")) == list((tmp_path / "cache").glob("rows/.*")) == []
    assert len(list(source.rows)) == len(source.rows)


# --- tokens


def same(ours, theirs):
    assert tuple(ours.rows) == tuple(theirs.rows)
    assert ours.report == theirs.report
    assert ours.encoded.numbers.tolist() == theirs.encoded.numbers.tolist()
    for number, (mine, other) in enumerate(zip(ours.encoded, theirs.encoded, strict=True)):
        for one, two in zip(mine, other, strict=True):
            assert (one.ids.dtype, one.ids.tolist()) == (two.ids.dtype, two.ids.tolist()) != (np.int64, [])
            assert (one.supervised.dtype, one.supervised.tolist()) == (bool, two.supervised.tolist())
            assert one.prompt_length == two.prompt_length
        assert ours.encoded.targets_of(number).tolist() == [one.targets for one in other]
    assert ours.encoded.longest.tolist() == [max(one.length for one in row) for row in theirs.encoded]


@pytest.mark.parametrize(
    "too_long", ["drop", *(pytest.param(do, marks=pytest.mark.slow) for do in ("truncate", "error"))]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_much_are_those_of_little(tokenizer, tmp_path, large, shape, too_long):
    path, renderer = file_of(tmp_path, shape), Renderer(tokenizer)
    lengths = tokenize("mine", loaded(path).rows, renderer, 10**6).encoded.longest
    room = 10**6 if too_long == "error" else int(np.median(lengths))
    memory = tokenize("mine", loaded(path).rows, renderer, room, too_long, tmp_path / "small")
    if too_long == "drop":
        assert 0 < memory.report.dropped < len(lengths)
    large()
    rows = loaded(path).rows
    for state in ("miss", "hit"):
        disk = tokenize("mine", rows, renderer, room, too_long, tmp_path / "large")
        assert disk.cache == state
        assert disk.encoded.table.memory is not None
        same(disk, memory)
    assert {f.name for f in (tmp_path / "large" / "tokens").iterdir()} == {
        f.name for f in (tmp_path / "small" / "tokens").iterdir()
    }
    same(tokenize("mine", rows, renderer, room, too_long, None), memory)


def test_what_is_said_of_long_rows_and_wrong_masks_counts_all_chunks(tokenizer, tmp_path, large):
    path, messages = file_of(tmp_path, "demonstration"), []
    for prepare in (lambda: None, large):
        prepare()
        rows = loaded(path).rows
        tokenizer.chat_template = None
        with pytest.raises(UftError) as long:
            tokenize("mine", rows, Renderer(tokenizer), 20)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(UftError) as wrong:
            tokenize("mine", rows, Renderer(tokenizer), 20)
        messages.append((str(long.value), str(wrong.value)))
    assert messages[0] == messages[1]
    assert f"of {len(rows)} rows are longer" in messages[0][0]
    assert f"and {len(rows) - 5} more rows" in messages[0][1]


def test_a_hit_reads_no_row(tokenizer, tmp_path, large, monkeypatch):
    path, renderer = file_of(tmp_path, "demonstration"), Renderer(tokenizer)
    large()
    tokenize("mine", loaded(path).rows, renderer, 1000, "error", tmp_path)
    rows = loaded(path).rows
    monkeypatch.setattr(table, "decode_row", lambda *a: pytest.fail("a row was read"))
    assert tokenize("mine", rows, renderer, 1000, "error", tmp_path).cache == "hit"


@pytest.mark.parametrize("room", [0, 2, 6])
def test_a_disk_that_fills_while_tokens_are_written_costs_only_the_cache(
    tokenizer, tmp_path, large, monkeypatch, caplog, room
):
    """It takes so many writes and a part of the next."""
    path, renderer = file_of(tmp_path, "demonstration"), Renderer(tokenizer)
    memory = tokenize("mine", loaded(path).rows, renderer, 1000, "error", None)
    large()
    rows = loaded(path).rows
    fill_disk(monkeypatch, room)
    with caplog.at_level(logging.WARNING):
        disk = tokenize("mine", rows, renderer, 1000, "error", tmp_path / "full")
    assert disk.cache == "off"
    assert "not kept for the next run" in caplog.text
    same(disk, memory)
    assert list((tmp_path / "full" / "tokens").iterdir()) == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tokenizer, tmp_path, monkeypatch):
    """Bytes that Python holds at the peak, for 300 rows and for 1,000, of which a hundred may be in memory."""
    monkeypatch.setattr(table, "BATCH_ROWS", 64)
    monkeypatch.setattr(table, "PART", 64)
    monkeypatch.setattr(table, "SPILL", 1 << 14)
    monkeypatch.setattr(tokens, "CHUNK", 64)
    monkeypatch.setattr(sources, "KEPT_BYTES", 0)
    monkeypatch.setattr(sources, "CACHED_BYTES", 0)
    renderer = Renderer(tokenizer)

    def read(path, large_rows):
        tokenize("mine", loaded(path).rows, renderer, 1000, "error", tmp_path / f"cache{large_rows}")

    def grown(large_rows):
        monkeypatch.setattr(table, "LARGE_ROWS", large_rows)
        monkeypatch.setenv("UFT_CACHE", str(tmp_path / f"rows{large_rows}"))
        peaks = []
        for count in (300, 1000):
            path = file_of(tmp_path, "demonstration", count)
            tracemalloc.start()
            read(path, large_rows)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return (peaks[1] - peaks[0]) / 700

    read(file_of(tmp_path, "demonstration", 120), 100)  # what is imported and made once does not count
    assert grown(100) < 200 < 500 < grown(math.inf)  # about 30, and 610


def test_reading_rows_imports_no_pandas():
    """Pyarrow does with its first array, where it is installed; and works on without it."""
    program = (
        "import sys\n"
        "from uft.data.table import keep_pandas_out\n"
        "keep_pandas_out()\n"
        "import numpy, pyarrow\n"
        "assert pyarrow.array(numpy.arange(3)).to_numpy().tolist() == [0, 1, 2]\n"
        "assert 'pandas' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
