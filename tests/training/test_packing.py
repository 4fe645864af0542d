"""Packed runs: the same steps as padded ones, said on the card, and the same bits again after a stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from watched import trained

from uft.data.batch import Layout
from uft.model import layout
from uft.training.card import stage_card
from uft.training.setup import Prepared, check_start, longest_row, resume


@pytest.mark.parametrize("objective", ["sft", "ift", "uft", "dft", "dpo"])
def test_a_packed_run_is_the_padded_one(build: Callable[..., Prepared], objective: str) -> None:
    padded, ours = (
        build(objective, f"train.packing={packing}", "train.micro_batch_tokens=64", run=packing)
        for packing in ("padded", "packed")
    )
    assert ours.trainer.policy.layout is Layout.SHARED
    assert check_start(ours.trainer, ours.reference).keys() == check_start(padded.trainer, padded.reference).keys()
    expected, found = trained(padded), trained(ours)
    assert found.values == pytest.approx(expected.values, rel=1e-4, abs=1e-5)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("mode", ["copy", "cached"])
def test_the_reference_reads_the_same_packs(build: Callable[..., Prepared], mode: str) -> None:
    prepared = build("dpo", "train.packing=packed", f"reference.mode={mode}")
    found = check_start(prepared.trainer, prepared.reference)
    assert found["targets"] > 0
    assert found["largest_difference"] < 1e-5


def test_the_card_says_how_rows_lie(build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {}
    for packing in ("packed", "padded", "auto"):
        prepared = build("sft", f"train.packing={packing}", run=packing)
        texts[packing] = "\n".join(value for _, value in stage_card(prepared))
    assert "rows packed" in texts["packed"]
    assert "padding counted" not in texts["packed"]
    assert "rows pa" not in texts["padded"]
    assert "padding counted" in texts["padded"]
    assert "rows padded: faster for so small a model" in texts["auto"]


def test_a_resumed_packed_run_repeats_every_bit(build: Callable[..., Prepared], tmp_path: Path) -> None:
    settings = ("train.packing=packed", "train.micro_batch_tokens=64", "train.steps=4")
    whole = build("dpo", *settings, run="whole")
    expected = trained(whole)
    first = build("dpo", *settings, run="parts")
    before = trained(first, until=2)
    first.trainer.save_checkpoint()
    second = build("dpo", *settings, run="parts")
    assert resume(second.trainer) == 2
    after = trained(second)
    assert before.values + after.values == expected.values
    for name, parameter in whole.trainer.parameters.items():
        assert torch.equal(parameter, second.trainer.parameters[name])


def test_what_is_longest_decides_about_windows(build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = build("sft")
    corpus, config = prepared.data.dataset, prepared.trainer.config
    lengths = [one.length for source in corpus.train for row in source.encoded for one in row]
    assert longest_row(corpus, config, prepared.trainer.objective) == max(lengths)
    seen: list[int] = []
    monkeypatch.setattr(layout, "packing_obstacle", lambda policy, longest: seen.append(longest))
    build("sft", "train.packing=packed", run="other")
    assert seen == [max(lengths)]
