"""Which micro-batches have their gradients made in one visit of the head, and in which parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from uft.data.batch import Example, Layout, micro_batches
from uft.model import head
from uft.model.head import Head
from uft.objectives import make
from uft.objectives.base import StepContext
from uft.training.setup import Prepared
from uft.training.step import forward_backward

CLOCK = StepContext(step=3, steps=10)
VOCABULARY = 61


class Visits:
    """Counts what the head is visited with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[list[slice]] = []
        visit = Head.chunked_backward

        def counted(self_: Head, states: Any, target_ids: Any, parts: Sequence[slice], *rest: Any) -> None:
            self.parts.append(list(parts))
            visit(self_, states, target_ids, parts, *rest)

        monkeypatch.setattr(Head, "chunked_backward", counted)


def run(prepared: Prepared, items: Sequence[Example], layout: Layout) -> None:
    trainer = prepared.trainer
    batches = micro_batches(items, 10_000, trainer.pad_id, layout)
    forward_backward(trainer.objective, batches, trainer.policy, trainer.reference, CLOCK)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("sft", ()),
        ("dpo", ()),
        ("uft", ()),
        ("dft", ()),
        ("ift", ()),
        ("ift", ("objective.lam=0",)),
        ("ift", ("objective.embed_grad=true",)),
    ],
)
def test_objectives_with_one_forward_are_judged_part_by_part(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, objective: str, settings: tuple[str, ...]
) -> None:
    prepared = build(objective, "train.packing=packed", "reference.mode=copy", *settings)
    items, visits = prepared.trainer.sampler.take(8), Visits(monkeypatch)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 20 * VOCABULARY)
    run(prepared, items, Layout.SHARED)
    (parts,) = visits.parts
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) > 2
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    rows = sorted(sum(one.targets for one in item.encoded) for item in items)
    assert all(size <= 20 or size in rows for size in sizes)


def test_padded_batches_and_what_asks_for_more_go_the_ordinary_way(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = build("sft", "train.packing=packed")
    visits = Visits(monkeypatch)
    run(prepared, prepared.trainer.sampler.take(8), Layout.PADDED)
    assert visits.parts == []
    with_anchor = build("sft", "train.packing=packed", "objective.alpha=0.1", "reference.mode=copy", run="anchor")
    run(with_anchor, with_anchor.trainer.sampler.take(8), Layout.SHARED)
    assert visits.parts == []


def test_the_objectives_state_is_written_once_for_every_row(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = build("dft2", "train.packing=packed")
    items = prepared.trainer.sampler.take(8)
    states = []
    for layout in (Layout.PADDED, Layout.SHARED):
        objective = make(prepared.trainer.config.objective)
        objective.start(prepared.trainer.sampler.examples)
        prepared.trainer.objective = objective
        run(prepared, items, layout)
        states.append(objective.state["log_u"])
        assert objective.state["log_u"].abs().sum() > 0
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-5)


def test_the_reference_runs_once_for_all_parts(build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = build("dpo", "train.packing=packed", "reference.mode=copy")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 20 * VOCABULARY)
    reference, asked = prepared.trainer.reference, []

    def counted(batch: Any, *rest: Any) -> Any:
        asked.append(batch)
        assert reference is not None
        return reference(batch, *rest)

    prepared.trainer.reference = counted
    run(prepared, prepared.trainer.sampler.take(8), Layout.SHARED)
    assert len(asked) == 1
