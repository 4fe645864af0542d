from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from uft.data.batch import Batch, Layout
from uft.model import reference
from uft.model.reference import LogProbStore, ReferenceColumn, sequence_key
from uft.objectives.base import ForwardOutput


@dataclass
class Completion:
    ids: np.ndarray
    supervised: np.ndarray


def completion(length: int, first: int = 0) -> Completion:
    return Completion(np.arange(first, first + length, dtype=np.int32), np.arange(length) >= 2)


class Forward:
    """Answers with -token id, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch, **_: object) -> ForwardOutput:
        self.batches.append(batch)
        return ForwardOutput(-batch.target_ids.float())


def column(folder: Path, forward: Forward, layout: Layout = Layout.PADDED) -> ReferenceColumn:
    return ReferenceColumn(LogProbStore.of(folder, {"weights": "abc"}), lambda: forward, 0, torch.device("cpu"), layout)


def replies(prompt: int, *lengths: int) -> list[Completion]:
    """Completions of one prompt of `prompt` tokens, all different."""
    made = [np.arange(prompt), *(np.arange(length) + 100 * length for length in lengths)]
    return [
        Completion(np.concatenate([made[0], own]).astype(np.int32), np.arange(prompt + len(own)) >= prompt)
        for own in made[1:]
    ]


def test_values_come_back_per_sequence_in_reading_order(tmp_path: Path):
    rows = [completion(7), completion(3, 20), completion(12, 5)]
    made = column(tmp_path, Forward())
    assert made.fill(rows, batch_tokens=16)
    for row in rows:
        assert np.array_equal(made(row), -row.ids[2:].astype(np.float32))
        assert made(row).dtype == np.float32


def test_the_budget_is_kept_and_equal_sequences_are_computed_once(tmp_path: Path):
    forward = Forward()
    assert column(tmp_path, forward).fill([completion(n, n) for n in (4, 9, 5, 4, 6, 4)], batch_tokens=12)
    assert sum(len(b.row) for b in forward.batches) == 4
    assert all(b.input_ids.numel() <= 12 for b in forward.batches)


def test_a_second_run_reads_what_the_first_wrote_and_adds_the_rest(tmp_path: Path):
    column(tmp_path, Forward()).fill([completion(5), completion(6)])
    forward = Forward()
    second = column(tmp_path, forward)
    assert second.fill([completion(6), completion(7)])
    assert [len(b.row) for b in forward.batches] == [1]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert column(tmp_path, forward).missing([completion(n) for n in (5, 6, 7)]) == {}


def test_ids_and_mask_both_name_a_sequence():
    one = completion(6)
    other_mask = np.arange(6) >= 3
    keys = {
        sequence_key(one.ids, one.supervised),
        sequence_key(one.ids, other_mask),
        sequence_key(one.ids + 1, one.supervised),
        sequence_key(one.ids.astype(np.int64), one.supervised),  # the same as the first
    }
    assert len(keys) == 3


def test_a_damaged_file_is_made_again(tmp_path: Path):
    for damage in ("cut", "flip", "empty"):
        column(tmp_path, Forward()).fill([completion(5)])
        (file,) = tmp_path.rglob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes({"cut": bytes(data[:-4]), "flip": bytes(data), "empty": b""}[damage])
        forward = Forward()
        again = column(tmp_path, forward)
        assert again.fill([completion(5)])
        assert len(forward.batches) == 1
        assert np.array_equal(again(completion(5)), [-2.0, -3.0, -4.0])
        assert column(tmp_path, Forward()).missing([completion(5)]) == {}


def test_when_asked_to_stop_it_keeps_whole_files_and_batches_the_rest_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reference, "SEQUENCES_PER_FILE", 2)
    rows = [completion(n) for n in (4, 6, 8, 10)]
    whole = Forward()
    assert column(tmp_path / "whole", whole).fill(rows, batch_tokens=1)
    forward = Forward()
    stopped = column(tmp_path, forward)
    assert not stopped.fill(rows, batch_tokens=1, should_stop=lambda: len(forward.batches) == 3)
    assert len(column(tmp_path, forward).missing(rows)) == 2
    again = Forward()
    assert column(tmp_path, again).fill(rows, batch_tokens=1)
    assert [b.input_ids.tolist() for b in again.batches] == [b.input_ids.tolist() for b in whole.batches[2:]]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path: Path):
    folder = column(tmp_path, Forward()).store.folder
    old, young = folder / ".a.safetensors.1.tmp", folder / ".b.safetensors.2.tmp"
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 48 * 3600,) * 2)
    column(tmp_path, Forward())
    assert list(folder.glob(".*")) == [young]


def test_packed_every_prompt_is_read_once_and_the_values_come_back_per_sequence(tmp_path: Path):
    rows = [*replies(6, 3, 2, 4), *replies(5, 2), *replies(6, 5)]
    forward = Forward()
    made = column(tmp_path, forward, Layout.SHARED)
    assert made.fill([rows[n] for n in (3, 0, 4, 1, 2)], batch_tokens=100)
    for row in rows:
        assert np.array_equal(made(row), -row.ids[row.supervised].astype(np.float32))
    (batch,) = forward.batches
    assert batch.input_ids.shape == (1, 6 + (2 + 1 + 3 + 4) + 5 + 1)
    tight = Forward()
    assert column(tmp_path / "tight", tight, Layout.SHARED).fill(rows, batch_tokens=12)
    assert all(b.input_ids.numel() <= 12 for b in tight.batches)
    assert sum(len(b.row) for b in tight.batches) == 5


def test_packed_what_is_computed_after_a_stop_is_packed_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "SEQUENCES_PER_FILE", 2)
    rows = [*replies(6, 3, 2, 4), *replies(5, 2), *replies(7, 1, 2)]
    whole, stopped, again = Forward(), Forward(), Forward()
    assert column(tmp_path / "whole", whole, Layout.SHARED).fill(rows)
    assert not column(tmp_path, stopped, Layout.SHARED).fill(rows, should_stop=lambda: len(stopped.batches) == 1)
    assert column(tmp_path, again, Layout.SHARED).fill(rows)
    packs = [[b.input_ids.tolist() for b in forward.batches] for forward in (whole, stopped, again)]
    assert packs[1] + packs[2] == packs[0]


def test_progress_is_told_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "SEQUENCES_PER_FILE", 2)
    told: list[tuple[int, int]] = []
    column(tmp_path, Forward()).fill([completion(n) for n in (4, 5, 6)], progress=lambda *done: told.append(done))
    assert told == [(2, 3), (3, 3)]


def test_nothing_missing_makes_no_model(tmp_path: Path):
    made = ReferenceColumn(LogProbStore.of(tmp_path, {}), lambda: pytest.fail("made"), 0, torch.device("cpu"))
    assert made.fill([])
