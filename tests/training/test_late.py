"""A GPU is asked whether a step's numbers are finite while it works on the next step: the same run, the same end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from dying import UNEVEN
from test_trainer import fit_until_it_fails, poisoned_model, poisoned_rows  # noqa: F401 (fixtures)
from watched import trained

from uft.errors import UftError
from uft.training import checkpoint
from uft.training.optim import asks_late
from uft.training.setup import Prepared
from uft.training.step import FiniteCheck, Step, idle_step, optimiser_step
from uft.training.trainer import Trainer

Build = Callable[..., Prepared]
META, CUDA, CPU = torch.device("meta"), torch.device("cuda"), torch.device("cpu")
LATE = "train.sync_every_step=false"


@pytest.mark.parametrize("objective", ["sft", "dft"])
def test_asked_late_a_run_is_the_same(build: Build, objective: str) -> None:
    synced, late = (build(objective, *UNEVEN, *more, run=f"run{len(more)}") for more in ((), (LATE,)))
    assert (synced.trainer.late, late.trainer.late) == (False, True)
    assert trained(late).values == trained(synced).values
    for name, parameter in synced.trainer.parameters.items():
        assert torch.equal(parameter, late.trainer.parameters[name])


@pytest.mark.parametrize("objective", ["sft", "dft"])
def test_a_step_that_came_to_no_numbers_is_undone_with_the_one_that_was_begun_after_it(
    build: Build,
    poisoned_model: Path,  # noqa: F811
    poisoned_rows: dict[str, Path],  # noqa: F811
    objective: str,
) -> None:
    """The same error, and the same checkpoint to the bit, as where every step is waited for."""
    settings = ["train.batch_size=5", f"model.path={poisoned_model}", "train.steps=20"]
    found = []
    for more in ((), (LATE,)):
        trainer = build(objective, *settings, *more, sources=poisoned_rows, run=f"run{len(more)}").trainer
        error, _ = fit_until_it_fails(trainer)
        ((_, folder),) = trainer.run.checkpoints()
        found.append((str(error).replace(str(trainer.run.path), ""), *checkpoint.load(folder)))
    (said, tensors, state), (said_late, tensors_late, state_late) = found
    assert said_late == said
    assert "preference:5" in said
    assert state_late["progress"].pop("seconds") > 0
    state["progress"].pop("seconds")
    assert state_late == state
    assert tensors_late.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensors_late[name].nan_to_num(), tensor.nan_to_num()), name


def test_nothing_is_shown_or_kept_of_it(build: Build, poisoned_model: Path, poisoned_rows: dict[str, Path]) -> None:  # noqa: F811
    """Hooks that look ask first: no line, no battery and no checkpoint is of a step that did not happen."""
    settings = ["train.batch_size=5", f"model.path={poisoned_model}", "train.steps=20"]
    trainer = build("sft", *settings, LATE, sources=poisoned_rows).trainer
    looked: list[int] = []

    class Looks:
        def after_step(self, trainer: Trainer, step: Any) -> None:
            trainer.confirm()
            looked.append(trainer.progress.step)
            assert torch.isfinite(step.loss)

    trainer.hooks = (Looks(),)
    with pytest.raises(Exception, match="preference:5"):
        trainer.fit()
    assert looked == list(range(1, trainer.progress.step + 1))


def test_a_step_without_rows_asks_for_the_one_before_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FiniteCheck, "__bool__", lambda self: False)  # the first step came to no numbers
    trainer = build("sft", LATE, "train.steps=4").trainer
    update = trainer._update
    monkeypatch.setattr(trainer, "_update", lambda laid: update(laid) if trainer.taken is None else idle_step(CPU))
    with pytest.raises(UftError, match=r"step 1 .*not finite"):
        trainer.fit()


def test_what_is_waited_for_the_device_is_time_of_training(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whoever waits: the next step, or a hook."""

    def slowly(self: FiniteCheck) -> bool:
        time.sleep(0.3)
        return True

    class Line:
        def after_step(self, trainer: Trainer, step: Any) -> None:
            if trainer.progress.step % 2:
                trainer.confirm()

    monkeypatch.setattr(FiniteCheck, "__bool__", slowly)
    trainer = build("sft", LATE, "train.steps=4").trainer
    trainer.hooks = (Line(),)
    began = time.perf_counter()
    trainer.fit()
    assert 4 * 0.3 <= trainer.progress.seconds <= time.perf_counter() - began


def test_who_is_asked_late(build: Build) -> None:
    adamw, rmsprop = (build("sft", f"optim.name={name}", run=name).trainer.optimiser for name in ("adamw", "rmsprop"))
    assert asks_late(None, CUDA, adamw)
    assert not asks_late(None, CPU, adamw)
    assert not asks_late(True, CUDA, adamw)
    assert not asks_late(False, CUDA, rmsprop)  # it cannot pass over an update


ASKS_NOTHING = ("sft", "uft", "una", "dpo", "kto", "orpo")
WAITS = ("ift", "dft", "per_kind")  # for the width of a grid, for who is visited twice, for which rows are of a kind


@pytest.mark.parametrize("objective", [*ASKS_NOTHING, *WAITS])
def test_what_a_step_asks_its_device_for(build: Build, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """On a device that has shapes and no numbers, whoever wants one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    trainer = build(objective, "optim.name=rmsprop", "reference.mode=cached", "train.packing=packed").trainer
    items = trainer.sampler.take(trainer.config.train.batch_size)
    laid = trainer.lay_out(items, trainer.sampler.mismatched(items) if trainer.objective.needs.mismatched else ())
    trainer.policy.module.to(META)
    for name, tensor in trainer.objective.state.items():
        trainer.objective.state[name] = tensor.to(META)

    def step() -> Step:
        whole = (trainer.objective, trainer.policy, trainer.reference, trainer.optimiser, trainer.policy.trainable())
        return optimiser_step(laid, *whole, trainer.step_context(0), lr=0.1, max_grad_norm=1.0, device=META, late=True)

    if objective in WAITS:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"[mM]eta"):
            step()
        return
    taken = step()
    assert taken.loss.device == taken.good.value.device == META
    with pytest.raises(RuntimeError, match="meta"):
        bool(taken.good)
