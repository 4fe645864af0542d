"""Some of the rows of a batch, and completions of a step under other rows' prompts."""

from dataclasses import replace
from itertools import product

import numpy as np
import torch
from items import NEGATIVE, PAD, completion, demonstration, encoded, preference, row

from uft.data.batch import Example, collate, mismatched
from uft.data.chat import Tokens
from uft.data.rows import Selected

# --- some of the rows of a batch


def test_only_some_rows_are_what_a_batch_of_them_would_ask_on_the_same_inputs():
    sampled = Example(
        5,
        row(completion(annotations={"baseline_logp": -1.0}), completion(sampled_by="m")),
        (Selected(0), Selected(1, NEGATIVE)),
        SIDES,
    )
    items = [
        replace(item, reference=column(item)) for item in (demonstration(3), preference(4), sampled, demonstration(6))
    ]
    whole = collate(items, PAD)
    for chosen in product((False, True), repeat=4):
        part = whole.only(torch.tensor(chosen))
        alone = collate([item for item, on in zip(items, chosen, strict=True) if on], PAD)
        assert torch.equal(part.input_ids, whole.input_ids), "the model reads what it read before"
        for name in ("target_ids", "offset", "sequence", "row", "role", "good", "pairs", "example", "kind"):
            assert torch.equal(getattr(part, name), getattr(alone, name)), (name, chosen)
            assert getattr(part, name).dtype == getattr(whole, name).dtype
        assert torch.equal(part.input_ids.reshape(-1)[part.place], alone.target_ids)
        assert torch.equal(part.predictor, part.place - 1)
        assert torch.equal(whole.target_ids[whole.targets_of(torch.tensor(chosen))], alone.target_ids)
        assert torch.equal(part.lengths, alone.lengths)
        for name, values in alone.columns.items():
            assert torch.equal(part.columns[name], values)
        for name, values in alone.annotations.items():
            torch.testing.assert_close(part.annotations[name], values, equal_nan=True)


SIDES = (encoded(1, 2, start=41), encoded(1, 4, start=51))


def column(item):
    """As if the reference's log-prob of a token were its id."""
    return tuple(side.ids[side.supervised].astype(np.float32) for side in item.encoded)


# --- completions under other rows' prompts


def sides_of(items):
    """(prompt ids, completion ids, supervised) of the one sequence of each."""
    found = []
    for item in items:
        (side,) = item.encoded
        cut = side.prompt_length
        found.append((side.ids[:cut].tolist(), side.ids[cut:].tolist(), side.supervised.tolist()))
    return found


def test_each_completion_stands_under_the_next_prompt_of_another_row():
    """Two sides of a pair share a prompt: the first one's next is its own sibling, which is passed over."""
    items = [demonstration(0, 2, 3, start=1), preference(1, (2, 3), (2, 5)), demonstration(2, 1, 2, start=51)]
    found = mismatched(items, 100)
    assert sides_of(found) == [
        ([11, 12], [3, 4, 5], [False] * 2 + [True] * 3),
        ([51], [13, 14, 15], [False] + [True] * 3),
        ([51], [33, 34, 35, 36, 37], [False] + [True] * 5),
        ([1, 2], [52, 53], [False] * 2 + [True] * 2),
    ]
    assert [item.row for item in found] == [items[k].row for k in (0, 1, 1, 2)]
    assert [item.parts[0].completion for item in found] == [0, 0, 1, 0]


def test_a_row_that_was_drawn_twice_is_no_other_row():
    assert mismatched([demonstration(4), demonstration(4)], 100) == []
    assert len(mismatched([demonstration(4), demonstration(4), demonstration(5)], 100)) == 3
    assert mismatched([preference()], 100) == []
    assert mismatched([], 100) == []


def test_mismatched_completions_keep_to_the_longest_length_and_need_a_target():
    items = [demonstration(0, 6, 1), demonstration(1, 2, 9, start=20)]
    short, long = mismatched(items, 8)
    assert sides_of([long]) == [([1, 2, 3, 4, 5, 6], [22, 23], [False] * 6 + [True] * 2)]
    assert sides_of([short]) == [([20, 21], [7], [False, False, True])]
    assert sides_of(mismatched(items, 6)) == sides_of([short])


def test_only_the_completion_is_supervised_and_no_reference_is_carried_over():
    """A turn of the user between two answers stays unsupervised; the column was of another prompt."""
    turns = Tokens(np.arange(60, 66, dtype=np.int32), np.array([False, True, True, False, False, True]), 1)
    several = Example(1, row(completion()), (Selected(0),), (turns,), (np.zeros(3, np.float32),))
    found = mismatched([demonstration(0, 2, 1), several], 100)[1]
    assert sides_of([found]) == [([1, 2], [61, 62, 63, 64, 65], [False, False, True, True, False, False, True])]
    assert found.reference is None
    batch = collate(mismatched([demonstration(0, 2, 1), several], 100), PAD)
    assert batch.target_ids.tolist() == [3, 61, 62, 65]
    assert "reference" not in batch.columns
