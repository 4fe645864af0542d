"""Checkpoints appear whole or not at all, whenever the process dies, and hold no pickle."""

from __future__ import annotations

import os
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.model import checkpoint
from uft.runs import Run, create_run


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", "{}\n", [])


def save(run: Run, step: int, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    tensors = {"model/w": torch.full((2, 3), value), "random/cpu": torch.get_rng_state()}
    return checkpoint.publish(run, checkpoint.begin(run, step, tensors, {"progress": {"step": step, "value": value}}))


def value_of(folder: Path) -> float:
    """What `save` put there; both of its files must agree."""
    tensors, state = checkpoint.load(folder)
    assert tensors["model/w"].unique().tolist() == [state["progress"]["value"]]
    return state["progress"]["value"]


def steps(run: Run) -> list[int]:
    return [step for step, _ in run.checkpoints()]


def test_tensors_come_back_bit_for_bit(run):
    shared = torch.randn(4, 4)
    tensors = {
        "tied/a": shared,
        "tied/b": shared,
        "strided": torch.randn(3, 5).T,
        "half": torch.randn(7).bfloat16(),
        "double": torch.randn((), dtype=torch.float64),
        "step": torch.tensor(3.0),
        "bytes": torch.get_rng_state(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    written = {"feed": {"counts": {"ä": 3}}, "x": 0.1}
    found, state = checkpoint.load(checkpoint.publish(run, checkpoint.begin(run, 7, tensors, written)))
    assert state == written
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        whole, back = tensor.detach().contiguous().view(-1), found[name].view(-1)
        assert torch.equal(whole.view(torch.uint8), back.view(torch.uint8)), name


def test_nothing_is_pickled(run):
    folder = save(run, 1)
    assert {path.name for path in folder.iterdir()} == {checkpoint.TENSORS, checkpoint.STATE, checkpoint.SUMS}
    for path in folder.iterdir():
        with pytest.raises(ValueError):  # noqa: PT011  pickletools has no error of its own
            list(pickletools.genops(path.read_bytes()))


# --- dying in the middle

CALLS: list[tuple[Any, str]] = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "save_file")]


def moments(patch: pytest.MonkeyPatch, at: int | None) -> list[str]:
    """From here on the process dies at the `at`-th moment before or after anything that touches the disk."""
    seen: list[str] = []

    def mortal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def moment(when: str) -> None:
            seen.append(f"{when} {name}")
            if at is not None and len(seen) > at:
                raise Killed(seen[-1])

        def call(*arguments: Any, **keywords: Any) -> Any:
            moment("before")
            value = real(*arguments, **keywords)
            moment("after")
            return value

        return call

    for owner, name in CALLS:
        patch.setattr(owner, name, mortal(name, getattr(owner, name)))
    return seen


def half_deleted(folder: Path, **keywords: Any) -> None:
    """rmtree that dies after its first file: the larger one is gone, the smaller one still there."""
    for path in sorted(Path(folder).iterdir(), reverse=True) if Path(folder).is_dir() else ():
        path.unlink()
        raise Killed(str(path))


def deaths(run: Run, action: Callable[[], Any]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        seen = moments(patch, None)
        action()
    return len(seen)


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("alone", [False, True], ids=["after others", "alone"])
def test_death_while_saving_leaves_a_whole_newest_checkpoint(tmp_path, again, alone):
    def prepare(number: int) -> Run:
        run = create_run(tmp_path / str(number), "{}\n", [])
        if not alone:
            save(run, 10)
        save(run, 20)
        return run

    def act(run: Run) -> None:
        save(run, 20, -20.0) if again else save(run, 30)
        checkpoint.prune(run, 1, None)

    count = deaths(run := prepare(0), lambda: act(run))
    assert count > 12
    for moment in range(count):
        run = prepare(moment + 1)
        with pytest.MonkeyPatch.context() as patch:
            moments(patch, moment)
            with pytest.raises(Killed):
                act(run)
        checkpoint.recover(run)
        assert steps(run), moment
        for _, folder in run.checkpoints():
            value_of(folder)  # whatever bears the name of a checkpoint is whole
        newest = run.checkpoints()[-1][1]
        assert value_of(newest) in ((20.0, -20.0) if again else (20.0, 30.0)), moment
        save(run, 40)
        checkpoint.prune(run, 1, None)
        assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-000040"], moment


def test_a_half_deleted_checkpoint_never_comes_back(run, monkeypatch):
    for step in (10, 20):
        save(run, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", half_deleted)
        with pytest.raises(Killed):
            checkpoint.prune(run, 1, None)
    checkpoint.recover(run)
    assert steps(run) == [20]
    checkpoint.prune(run, 1, None)
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-000020"]


# --- what is kept


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(1, None, [5]), (2, None, [4, 5]), (2, 1, [1, 4, 5]), (1, 5, [5]), (9, 2, [1, 2, 3, 4, 5]), (1, 77, [5])],
)
def test_the_newest_and_the_best_are_kept(run, keep, best, expected):
    for step in range(1, 6):
        save(run, step)
    checkpoint.prune(run, keep, best)
    assert steps(run) == expected
    assert [value_of(folder) for _, folder in run.checkpoints()] == expected


def test_order_is_by_number_also_beyond_six_digits(run):
    for step in (999_999, 1_000_000, 20):
        save(run, step)
    assert steps(run) == [20, 999_999, 1_000_000]
