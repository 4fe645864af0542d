"""Packed lines of tokens: every target is predicted from exactly what stands before it in its own sequence."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest

from uft.data.batch import NOT_AN_INPUT, PER_TARGET, Batch, Layout, Line, Span, lay_out

PAD = 0


def line(ids, supervised, group=0) -> Line:
    return Line(np.array(ids, np.int32), np.array(supervised, bool), group)


def random_lines(seed: int, groups: int = 6) -> list[Line]:
    """Groups of one to four completions whose prompts are the same, or the same up to some point."""
    random = np.random.default_rng(seed)
    lines = []
    for group in range(groups):
        prompt = random.integers(1, 50, random.integers(1, 9))
        for _ in range(random.integers(1, 5)):
            own = prompt.copy()
            if random.random() < 0.3:
                own[random.integers(len(own)) :] += 50
            completion = random.integers(1, 50, random.integers(0, 6))
            supervised = np.concatenate([np.zeros(len(own)), random.random(len(completion)) < 0.8])
            lines.append(line(np.concatenate([own, completion]), supervised, group))
    return lines


def context(laid: dict, target: int) -> list[int]:
    """The tokens that the predictor of a target attends to, itself included, in the order of their positions."""
    spans = laid["segments"].spans
    starts = [0, *accumulate(span.length for span in spans)]
    predictor = int(laid["predictor"][target])
    number = next(n for n, start in enumerate(starts[1:]) if predictor < start)
    before = starts[spans[number].prompt]
    seen = [*range(before, before + spans[number].prefix), *range(starts[number], predictor + 1)]
    assert laid["position_ids"][0, seen].tolist() == list(range(len(seen)))
    return laid["input_ids"][0, seen].tolist()


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.SHARED])
def test_every_target_is_predicted_from_what_stands_before_it(layout: Layout):
    for seed in range(20):
        lines = random_lines(seed)
        laid = lay_out(lines, layout, PAD)
        for target, (sequence, offset) in enumerate(zip(laid["sequence"], laid["offset"], strict=True)):
            assert context(laid, target) == lines[int(sequence)].ids[: int(offset)].tolist()
            place = int(laid["place"][target])
            assert place == NOT_AN_INPUT or laid["input_ids"][0, place] == laid["target_ids"][target]


def test_without_padding_each_sequence_follows_the_last_and_ends_before_its_last_target():
    lines = [line([5, 6, 7, 8], [0, 0, 1, 1]), line([5, 6, 9], [0, 0, 1])]
    laid = lay_out(lines, Layout.PACKED, PAD)
    assert laid["input_ids"].tolist() == [[5, 6, 7, 5, 6]]
    assert laid["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert laid["segments"].spans == (Span(3, 0, 0), Span(2, 1, 0))
    assert laid["predictor"].tolist() == [1, 2, 4]
    assert laid["place"].tolist() == [2, NOT_AN_INPUT, NOT_AN_INPUT]


def test_a_shared_prompt_stands_once_and_predicts_the_first_target_of_each():
    lines = [line([5, 6, 7, 8], [0, 0, 1, 1]), line([5, 6, 9, 4, 3], [0, 0, 1, 1, 1]), line([5, 6, 9], [0, 0, 1])]
    laid = lay_out(lines, Layout.SHARED, PAD)
    assert laid["input_ids"].tolist() == [[5, 6, 7, 9, 4]]
    assert laid["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert laid["segments"].spans == (Span(3, 0, 0), Span(2, 0, 2))  # the last has nothing of its own to put in
    assert laid["predictor"].tolist() == [1, 2, 1, 3, 4, 1]
    assert laid["place"].tolist() == [2, NOT_AN_INPUT, 3, 4, NOT_AN_INPUT, NOT_AN_INPUT]


def test_supervised_tokens_and_those_of_other_groups_are_never_shared():
    lines = [line([5, 6, 7, 8], [0, 1, 1, 1]), line([5, 6, 7, 9], [0, 0, 1, 1])]
    assert lay_out(lines, Layout.SHARED, PAD)["segments"].spans == (Span(3, 0, 0), Span(2, 0, 1))
    lines = [line([5, 6, 7], [0, 0, 1], 0), line([5, 6, 8], [0, 0, 1], 1)]
    assert lay_out(lines, Layout.SHARED, PAD)["input_ids"].tolist() == [[5, 6, 5, 6]]


def test_sequences_without_targets_cost_nothing_and_a_batch_of_them_is_still_one():
    lines = [line([5, 6, 7], [0, 0, 0]), line([5, 6, 8], [0, 0, 1]), line([5, 6], [1, 0])]
    laid = lay_out(lines, Layout.SHARED, PAD)
    assert laid["input_ids"].tolist() == [[5, 6]]
    assert laid["sequence"].tolist() == [1]
    empty = lay_out([lines[0]], Layout.SHARED, PAD)
    assert empty["input_ids"].tolist() == [[PAD]]
    assert [empty[name].numel() for name in PER_TARGET] == [0] * 5


def test_the_tokens_of_a_batch_are_counted_alike_in_every_layout():
    lines = random_lines(3)
    fields = [lay_out(lines, layout, PAD) for layout in Layout]
    names = ("row", "role", "target", "good", "pairs", "example", "kind")
    nothing = dict.fromkeys(names, fields[0]["sequence"][:0])
    assert {Batch(**laid, **nothing, columns={}).tokens for laid in fields} == {sum(len(one.ids) for one in lines)}
