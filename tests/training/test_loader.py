"""Every objective draws the same rows in the same order; rows it cannot use are named; looking ahead draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from uft.data.chat import Tokens
from uft.data.loader import Collator, Prefetcher, RowSampler, use_prefetch_thread
from uft.data.mixture import Mixture, RowIndex
from uft.data.rows import Completion, Kind, Message, Row
from uft.data.table import TableFile
from uft.data.tokens import EncodedRows, record_batch
from uft.objectives import make

SIZES = {"demonstration": 7, "preference": 5, "binary": 6, "scored": 4, "negatives": 3}
TURN = (Message("assistant", "yes"),)
COMPLETIONS = {
    "demonstration": (Completion(TURN),),
    "preference": (Completion(TURN, preferred=True), Completion(TURN, preferred=False)),
    "binary": (Completion(TURN, label=False),),
    "scored": (Completion(TURN, score=0.9), Completion(TURN, score=0.1)),
    "negatives": (Completion(TURN), *(Completion(TURN, sampled_by="m"),) * 3),
}
OBJECTIVES = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo", "kto", "orpo", "anchored_sft", "per_kind")


@dataclass(frozen=True)
class Source:
    """A tokenised source, as far as the feed looks at it."""

    source: str
    rows: tuple[Row, ...]
    encoded: EncodedRows


def source_of(kind: str) -> Source:
    rows = tuple(Row(kind, i, (Message("user", f"{i}"),), COMPLETIONS[kind]) for i in range(SIZES[kind]))

    def encoded(row: int, completion: int) -> Tokens:
        more = [2] * (row % 3 + completion)
        ids = np.array([1, row, completion, *more, 2], np.int32)
        return Tokens(ids, np.arange(len(ids)) >= 2, 2)

    batch = record_batch((i, tuple(encoded(i, c) for c in range(len(row.completions)))) for i, row in enumerate(rows))
    return Source(kind, rows, EncodedRows(TableFile((batch,))))


@pytest.fixture
def feed(configure):
    """feed("dpo"): five sources of five kinds under the objective's views, or those of `kinds` alone."""

    def build(objective: str, max_length: int = 100, kinds: Sequence[str] = tuple(SIZES)) -> RowSampler:
        sources, sizes = [source_of(kind) for kind in kinds], [SIZES[kind] for kind in kinds]
        mixture = Mixture(list(kinds), sizes, [size / sum(sizes) for size in sizes], 3)
        return RowSampler(sources, mixture, make(configure(objective).objective).views, max_length)

    return build


def test_all_objectives_draw_the_same_rows(feed):
    streams = {name: feed(name) for name in OBJECTIVES}
    seen: dict[str, list[list[str]]] = {name: [] for name in OBJECTIVES}
    for _ in range(12):
        for name, stream in streams.items():
            seen[name].append([item.row.id for item in stream.take(4)])
        states = [stream.state_dict() for stream in streams.values()]
        assert all(state == states[0] for state in states)
    names = list(SIZES)
    assert seen["uft"][0] == [f"{names[draw.source]}:{draw.index}" for draw in feed("uft").mixture.take(4)]
    for name in OBJECTIVES:
        for step, ids in enumerate(seen[name]):
            assert ids == [row for row in seen["uft"][step] if row in ids], (name, step)
    assert all("binary" not in row for ids in seen["sft"] for row in ids)  # all of them are bad
    assert sum(map(len, seen["dpo"])) < sum(map(len, seen["uft"]))


def test_examples_number_the_rows_of_the_mixture(feed):
    stream = feed("uft")
    assert stream.row_count == sum(SIZES.values())
    items = stream.take(stream.row_count)
    assert sorted(item.example for item in items) == list(range(stream.row_count))
    offsets = dict(zip(SIZES, stream.first_example, strict=False))
    assert all(item.example == offsets[item.row.source] + item.row.index for item in items)


def test_later_visits_take_other_negatives(feed):
    stream = feed("dft")
    taken = [
        tuple(part.completion for part in item.parts)
        for item in stream.take(3 * stream.row_count)
        if item.row.id == "negatives:0"
    ]
    assert taken == [(0, 1, 2), (0, 3, 1), (0, 2, 3)]


def test_unusable_rows_are_named_by_source_and_kind(feed):
    found = feed("dpo").unusable()
    assert found == {
        "demonstration": {Kind.DEMONSTRATION: (7, "demonstration:0")},
        "binary": {Kind.BINARY: (6, "binary:0")},
    }
    assert feed("sft").unusable() == {}  # a bad completion is nothing to learn from, and that is no mistake


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_view_looks_at_no_text(feed, objective):
    """What is asked once for all rows with the same feedback rests on that."""
    stream = feed(objective)
    other = (Message("assistant", "another"), Message("user", "and"), Message("assistant", "more"))
    for kind, completions in COMPLETIONS.items():
        row = Row(kind, 0, (Message("user", "q"),), completions)
        changed = Row(kind, 9, (Message("user", "p"),), tuple(replace(c, turns=other) for c in completions), "answer")
        for visit in range(3):
            assert repr(stream._view(row, visit)) == repr(stream._view(changed, visit))


def test_looking_ahead_draws_nothing_and_a_sampler_goes_on_from_its_state(feed):
    stream, resumed = feed("dft"), feed("dft")
    stream.take(37)
    before = stream.state_dict()
    ahead = list(stream.preview(60))
    assert stream.state_dict() == before
    resumed.load_state_dict(before)
    for _ in range(5):
        pairs = zip(stream.take(9), resumed.take(9), strict=True)
        assert all((ours.row.id, ours.parts) == (theirs.row.id, theirs.parts) for ours, theirs in pairs)
    resumed.load_state_dict(before)
    assert ahead == resumed.mixture.take(60)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_prefetcher_rewinds_and_leaves_the_sampler_after_the_last_step(feed, threaded):
    stream = feed("sft")
    prefetcher = Prefetcher(stream, Collator(64, 0), mismatched=False, threaded=threaded)
    start = prefetcher.cursor
    first, second = ([item.row.id for item in prefetcher.take(9, then=9).examples] for _ in range(2))
    assert first != second
    prefetcher.rewind(start)
    assert [item.row.id for item in prefetcher.take(9, then=9).examples] == first
    prefetcher.close()
    assert [item.row.id for item in stream.take(9)] == second


def test_only_a_gpu_has_a_prefetch_thread_unasked():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [use_prefetch_thread(None, device) for device in (cpu, gpu)] == [False, True]
    assert [use_prefetch_thread(asked, cpu) for asked in (True, False)] == [True, False]


@pytest.mark.parametrize("objective", ["dpo", "sft", "uft"])
def test_the_longest_items_are_found_without_making_all(feed, objective):
    stream = feed(objective)
    draws = list(stream.preview(60))
    items = sorted(stream.examples_of(draws), key=lambda item: -item.length)
    assert len({item.length for item in items}) > 2
    for count in (1, 4, 9, 100):
        assert [item.row.id for item in stream.longest(draws, count)] == [item.row.id for item in items[:count]]
    made: list[RowIndex] = []
    make_one = stream._example
    stream._example = lambda draw: made.append(draw) or make_one(draw)
    stream.longest(draws, 1)
    assert len(made) < len(draws) / 2


def test_every_row_that_is_met_is_met_once(feed):
    stream = feed("uft")
    draws = list(stream.preview(40))
    met = [row[0].ids.tolist() for row in stream.distinct_tokens(iter(draws))]
    rows = sorted({(draw.source, draw.index) for draw in draws})
    assert met == [stream.sources[source].encoded[index][0].ids.tolist() for source, index in rows]


def test_the_cached_reference_stands_beside_the_parts_it_is_of(feed):
    stream = feed("dpo")
    stream.reference = lambda encoded: np.array([encoded.ids[1], encoded.ids[2]], np.float32)
    for item in stream.take(20):
        assert item.reference is not None
        rows_and_completions = [tuple(map(int, column)) for column in item.reference]
        assert rows_and_completions == [(item.row.index, part.completion) for part in item.parts]


def test_mismatched_completions_bring_a_reference_of_their_own(feed):
    """The column is asked for the completion under the other prompt, which is another sequence."""
    stream = feed("kto")
    items = stream.take(12)
    plain = stream.mismatched(items)
    assert sum(len(item.parts) for item in items) == len(plain)
    assert [item.reference for item in plain] == [None] * len(plain)
    stream.reference = lambda encoded: np.array([encoded.ids[1], encoded.ids[2]], np.float32)
    for item in stream.mismatched(items):
        ((prompt, completion),) = item.reference or ()
        assert (prompt, completion) == (item.encoded[0].ids[1], item.encoded[0].ids[2])
        assert completion == item.parts[0].completion
    assert feed("kto", max_length=2).mismatched(items) == [], "no room for a target"


def test_a_feed_knows_whether_anything_is_ever_taken(feed):
    """All labels are bad here: nothing for SFT, everything for KTO, no pair for DPO."""
    taken = {name: feed(name, kinds=["binary"]).takes_anything() for name in ("sft", "kto", "dpo")}
    assert taken == {"sft": False, "kto": True, "dpo": False}
    assert feed("sft", kinds=["binary", "scored"]).takes_anything()
