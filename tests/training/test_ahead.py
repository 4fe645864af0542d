"""Rows laid out by a thread are the same rows, and a checkpoint knows nothing of those that were not used yet."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from watched import trained

from uft.data.loader import Prefetcher, use_prefetch_thread
from uft.training import trainer as trainer_module
from uft.training.checkpoint import read_state
from uft.training.setup import Prepared, resume
from uft.training.step import Step
from uft.training.trainer import Trainer

SETTINGS = ("train.packing=packed", "train.micro_batch_tokens=64", "train.steps=5")


@pytest.mark.parametrize("objective", ["sft", "dft", "kto"])
def test_the_same_steps_with_and_without_a_thread(build: Callable[..., Prepared], objective: str) -> None:
    plain, ahead = (
        build(objective, *SETTINGS, f"train.prefetch={asked}", run=f"run-{asked}") for asked in ("false", "true")
    )
    assert trained(ahead).values == trained(plain).values
    assert ahead.trainer.sampler.state_dict() == plain.trainer.sampler.state_dict()
    for name, parameter in plain.trainer.parameters.items():
        assert torch.equal(parameter, ahead.trainer.parameters[name])


def test_a_checkpoint_stands_after_the_last_step_whatever_was_made_ahead(build: Callable[..., Prepared]) -> None:
    expected = trained(build("dpo", *SETTINGS, run="whole")).values
    plain, first = (build("dpo", *SETTINGS, f"train.prefetch={x}", run=f"run-{x}") for x in ("false", "true"))
    states = []
    for prepared in (plain, first):
        before = trained(prepared, until=2).values
        states.append(read_state(prepared.trainer.save_checkpoint())["feed"])
    assert states[0] == states[1]
    second = build("dpo", *SETTINGS, "train.prefetch=true", run="run-true")
    assert resume(second.trainer) == 2
    assert before + trained(second).values == expected


def test_a_hook_that_saves_within_the_loop_saves_the_same(build: Callable[..., Prepared]) -> None:
    class Saves:
        def __init__(self) -> None:
            self.states: list[Any] = []

        def after_step(self, trainer: Trainer, step: Step) -> None:
            self.states.append(read_state(trainer.save_checkpoint())["feed"])

    found = []
    for asked in ("false", "true"):
        prepared = build("sft", *SETTINGS, f"train.prefetch={asked}", run=f"run-{asked}")
        prepared.trainer.hooks = (saves := Saves(),)
        prepared.trainer.fit()
        found.append(saves.states)
    assert found[0] == found[1]


def test_what_goes_wrong_in_the_thread_is_told_by_the_step(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", *SETTINGS, "train.prefetch=true").trainer
    before = threading.active_count()

    def unknown(encoded: Any) -> Any:
        if trainer.progress.step == 0:
            return torch.zeros(encoded.targets).numpy()
        raise KeyError("a sequence that nobody filled in")

    trainer.sampler.reference = unknown
    with pytest.raises(KeyError, match="nobody filled in"):
        trainer.fit()
    assert threading.active_count() <= before


def test_the_collector_looks_at_nothing_old_while_it_trains(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "gc", gc)
    trainer, frozen = build("sft", *SETTINGS).trainer, []

    class Looks:
        def after_step(self, trainer: Any, step: Any) -> None:
            frozen.append(gc.get_freeze_count())
            if len(frozen) == 2:
                raise KeyError("in a hook")

    trainer.hooks = (Looks(),)
    with pytest.raises(KeyError, match="in a hook"):
        trainer.fit()
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_going_back_forgets_what_was_made(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", *SETTINGS).trainer
    ahead = Prefetcher(trainer.sampler, trainer.lay_out, mismatched=False, threaded=True)
    start = ahead.cursor
    first = [item.row.id for item in ahead.take(4, then=4).items]
    second = [item.row.id for item in ahead.take(4, then=4).items]
    assert first != second
    ahead.go_back(start)
    assert [item.row.id for item in ahead.take(4, then=4).items] == first
    ahead.close()
    assert [item.row.id for item in trainer.sampler.take(4)] == second


def test_nobody_asks_for_a_thread_on_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [use_prefetch_thread(None, device) for device in (cpu, gpu)] == [False, True]
    assert [use_prefetch_thread(asked, cpu) for asked in (True, False)] == [True, False]
