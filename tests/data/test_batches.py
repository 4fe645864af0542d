"""Rows as tensors: every index of the contract, checked against a slow and plain reading of it."""

import math
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from items import NEGATIVE, PAD, POSITIVE, completion, demonstration, encoded, preference, row

from uft.data.batch import Example, Layout, collate, is_good, make_example, micro_batches
from uft.data.rows import Kind, Selected


def test_targets_say_which_token_where_and_what_predicts_it():
    batch = collate([demonstration(), preference()], PAD)
    length = batch.input_ids.shape[1]
    assert batch.input_ids.shape == (3, 7)
    expected = [
        (s, t) for s, (prompt, reply) in enumerate([(2, 3), (2, 3), (2, 5)]) for t in range(prompt, prompt + reply)
    ]
    assert list(zip(batch.sequence.tolist(), batch.offset.tolist(), strict=True)) == expected
    assert batch.place.tolist() == [s * length + t for s, t in expected]
    assert batch.predictor.tolist() == [s * length + t - 1 for s, t in expected]
    assert torch.equal(batch.target_ids, batch.input_ids.reshape(-1)[batch.place])
    assert batch.target_ids.tolist() == [3, 4, 5, 13, 14, 15, 33, 34, 35, 36, 37]
    assert batch.lengths.tolist() == [3, 3, 5]
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5, PAD, PAD], "padding is on the right"
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert batch.position_ids.tolist() == [list(range(7))] * 3
    types = {"target": torch.float32, "good": torch.bool}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == types.get(name, torch.int64), name
            assert value.is_contiguous(), name


def test_rows_and_roles_and_explicit_rewards():
    rewarded = replace(demonstration(7), parts=(Selected(0, POSITIVE, 0.25),))
    batch = collate([rewarded, preference(9), rewarded], PAD)
    assert batch.row.tolist() == [0, 1, 1, 2], "the same row twice is two rows"
    assert batch.role.tolist() == [1, 1, 0, 1]
    assert batch.example.tolist() == [7, 9, 7]
    assert [tuple(Kind)[number] for number in batch.kind.tolist()] == [
        Kind.DEMONSTRATION,
        Kind.PREFERENCE,
        Kind.DEMONSTRATION,
    ]
    assert batch.target[0] == 0.25
    assert math.isnan(batch.target[1])


def test_pairs_are_every_positive_with_every_negative_of_the_same_row():
    sampled = row(completion(), *(completion(sampled_by="m") for _ in range(3)))
    item = Example(
        0, sampled, (Selected(0), *(Selected(n, NEGATIVE) for n in (1, 2, 3))), tuple(encoded(1, 2) for _ in range(4))
    )
    batch = collate([item, demonstration(), preference(), item], PAD)
    assert batch.pairs.tolist() == [[0, 1], [0, 2], [0, 3], [5, 6], [7, 8], [7, 9], [7, 10]]
    assert collate([demonstration()], PAD).pairs.shape == (0, 2)


def test_nll_is_measured_on_good_completions_that_the_parts_take():
    good: list[dict] = [{}, {"preferred": True}, {"label": True}, {"score": 0.5}]
    bad: list[dict] = [{"preferred": False}, {"label": False}, {"score": 0.49}, {"sampled_by": "m"}]
    assert [is_good(completion(**feedback)) for feedback in good + bad] == [True] * 4 + [False] * 4
    item = preference()
    turned = replace(item, parts=item.parts[::-1], encoded=item.encoded[::-1])
    assert collate([turned, demonstration()], PAD).good.tolist() == [False, True, True]


def test_a_supervised_first_token_has_no_predictor_and_is_no_target():
    item = Example(0, row(completion()), (Selected(0),), (encoded(0, 3),))
    batch = collate([item], PAD)
    assert batch.offset.tolist() == [1, 2]
    assert batch.predictor.min() >= 0


def test_reference_log_probs_travel_with_their_targets():
    first, second = demonstration(), preference()
    columns = [[-1.0, -2.0, -3.0]], [[-4.0, -5.0, -6.0], [-7.0] * 5]
    items = [
        replace(item, reference=tuple(np.array(c, np.float32) for c in column))
        for item, column in zip((first, second), columns, strict=True)
    ]
    batch = collate(items, PAD)
    assert batch.columns["reference"].tolist() == [-1, -2, -3, -4, -5, -6, *[-7] * 5]
    assert batch.columns["reference"].dtype == torch.float32
    assert collate([items[0], second], PAD).columns == {}
    with pytest.raises(AssertionError, match="log-probs for"):
        collate([replace(first, reference=(np.zeros(2, np.float32),))], PAD)


def test_nothing_makes_an_empty_batch():
    batch = collate([], PAD)
    assert batch.input_ids.numel() == batch.target_ids.numel() == batch.row.numel() == 0
    assert batch.pairs.shape == (0, 2)
    assert micro_batches([], 100, PAD) == []


# --- micro-batches


def test_micro_batches_hold_the_budget_padding_counted_lose_nothing_and_begin_with_the_longest():
    items = [demonstration(n, 1 + n % 5, 1 + (7 * n) % 11) for n in range(60)]
    for budget in (16, 50, 333):
        batches = micro_batches(items, budget, PAD)
        assert all(batch.input_ids.numel() <= budget for batch in batches)
        assert sorted(n for batch in batches for n in batch.example.tolist()) == list(range(60))
        lengths = [int(batch.attention_mask.sum(1).max()) for batch in batches]
        assert lengths == sorted(lengths, reverse=True)
    padding = sum(int((batch.attention_mask == 0).sum()) for batch in micro_batches(items, 50, PAD))
    assert padding < sum(item.length for item in items) / 4
    assert len(micro_batches(items, 10**6, PAD)) == 1


def test_a_row_is_never_divided_and_may_exceed_the_budget_alone():
    batches = micro_batches([demonstration(0), preference(1), demonstration(2)], 6, PAD)
    assert [batch.example.tolist() for batch in batches] == [[1], [0], [2]]
    assert batches[0].input_ids.shape == (2, 7)


def test_rows_of_one_length_and_visits_of_one_example_keep_their_order():
    """An objective that remembers an example (DFT's moving average) has it as it was drawn, in every layout."""
    assert micro_batches([demonstration(n) for n in (5, 3, 4)], 10**6, PAD)[0].example.tolist() == [5, 3, 4]
    lengths = [(4, 2), (4, 5), (7, 4), (4, 9), (7, 8), (4, 1)]  # (example, length)
    items = [demonstration(example, 1, length) for example, length in lengths]
    for layout, budget in product(Layout, (1, 16, 10**6)):
        batches = micro_batches(items, budget, PAD, layout)
        found = [(int(b.example[b.row[n]]), int(length)) for b in batches for n, length in enumerate(b.lengths)]
        assert sorted(found) == sorted(lengths)
        for example in (4, 7):
            assert [pair for pair in found if pair[0] == example] == [pair for pair in lengths if pair[0] == example]


# --- items


def test_an_item_is_what_the_view_takes():
    both = preference().row
    tokens = (encoded(1, 1), encoded(1, 2))
    rejected_only = make_example(both, tokens, 3, 0, lambda row, visit: (Selected(1, NEGATIVE, 0.0),))
    assert rejected_only.encoded == (tokens[1],)
    assert (rejected_only.example, rejected_only.length) == (3, 3)
    assert make_example(both, tokens, 3, 0, lambda row, visit: ()) is None
    assert make_example(both, tokens, 3, 0, lambda row, visit: None) is None
    seen = []
    make_example(both, tokens, 3, 5, lambda row, visit: seen.append((row, visit)))
    assert seen == [(both, 5)]


def test_what_a_sampler_gave_its_negatives_is_a_column_whose_sums_are_its_log_probs():
    sampled = row(completion(), *(completion(sampled_by="model", log_prob=value) for value in (-3.5, -1.25)))
    parts = (Selected(0), Selected(1, NEGATIVE), Selected(2, NEGATIVE))
    batch = collate([Example(0, sampled, parts, (encoded(2, 3), encoded(2, 6), encoded(2, 2)))], PAD)
    assert batch.sum(batch.columns["sampling_log_probs"]).tolist() == [0, -3.5, -1.25]


def test_annotations_are_per_sequence_and_nan_where_there_is_none():
    first = replace(demonstration(), row=row(completion(annotations={"baseline_logp": -0.5})))
    batch = collate([first, preference(), replace(demonstration(), row=row(completion(score=0.25)))], PAD)
    assert batch.annotations.keys() == {"baseline_logp", "score"}
    assert batch.annotations["baseline_logp"].dtype == torch.float32
    for name, expected in (("baseline_logp", [-0.5, None, None, None]), ("score", [None, None, None, 0.25])):
        found = [None if math.isnan(value) else value for value in batch.annotations[name].tolist()]
        assert found == expected, name
    assert collate([preference()], PAD).annotations == {}
    sides = row(completion(preferred=True, annotations={"soft_label": 0.75}), completion(preferred=False))
    item = replace(preference(), row=sides)
    turned = replace(item, parts=item.parts[::-1], encoded=item.encoded[::-1])
    assert collate([item], PAD).annotations["soft_label"][0] == 0.75
    assert collate([turned], PAD).annotations["soft_label"][1] == 0.75


# --- packed


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.SHARED])
def test_packed_batches_hold_the_budget_in_real_tokens_and_lose_nothing(layout: Layout):
    items = [demonstration(n, 1 + n % 5, 1 + (7 * n) % 11) for n in range(60)] + [preference(n) for n in range(60, 70)]
    for budget in (16, 50, 333):
        batches = micro_batches(items, budget, PAD, layout)
        assert all(batch.input_ids.shape[0] == 1 and batch.input_ids.shape[1] <= budget for batch in batches)
        assert sorted(n for batch in batches for n in batch.example.tolist()) == list(range(70))
        sizes = [batch.input_ids.shape[1] for batch in batches]
        assert all(size + after > budget for size, after in pairwise(sizes))
    assert [batch.example.tolist() for batch in micro_batches(items[:3], 1, PAD, layout)] == [[1], [2], [0]]


def test_a_row_that_shares_its_prompt_takes_less_of_the_budget():
    pairs = [replace(preference(n), encoded=(encoded(2, 3), encoded(2, 5))) for n in range(4)]
    one = {layout: micro_batches(pairs[:1], 99, PAD, layout)[0].input_ids.numel() for layout in Layout}
    assert one == {Layout.PADDED: 2 * 7, Layout.PACKED: 4 + 6, Layout.SHARED: 2 + 2 + 4}
    assert len(micro_batches(pairs, 16, PAD, Layout.SHARED)) == 2
    assert len(micro_batches(pairs, 16, PAD, Layout.PACKED)) == 4


def test_the_layout_changes_the_model_level_alone():
    items = [demonstration(4), preference(2)]
    padded, *packed = (collate(items, PAD, layout) for layout in Layout)
    model_level = {"input_ids", "attention_mask", "position_ids", "predictor", "place", "segments"}
    for batch in packed:
        for name, value in vars(padded).items():
            if name not in model_level and isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(batch, name)) or name == "target", name
        assert batch.to("cpu").segments == batch.segments
        part = batch.only(torch.tensor([False, True]))
        assert part.segments == batch.segments
        assert part.target_ids.tolist() == padded.only(torch.tensor([False, True])).target_ids.tolist()
