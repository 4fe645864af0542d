"""What is said before the first step, and what the order of preparing may not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dying import StopAt

from uft.config.schema import Config, Hardware
from uft.errors import FAILED, UftError
from uft.runs import create_run
from uft.training.device import CPU_PASS, PASS, choose_device, tokens_per_pass
from uft.training.setup import ONE_ROW, Prepared, Stopped, cautions, check_start, prepare, resume, saved_progress
from uft.training.trainer import Progress


@pytest.mark.parametrize("mode", ["copy", "cached"])
def test_the_generator_starts_the_same_whatever_was_done_before(build: Callable[..., Prepared], mode: str) -> None:
    draws = []
    for number in range(2):  # the second time everything is found in caches
        torch.rand(number)
        build("dpo", f"reference.mode={mode}", run=f"run-{number}")
        draws.append(torch.rand(3).tolist())
    build("dpo", "reference.mode=adapter_off", "model.adapter=lora", run="lora")
    draws.append(torch.rand(3).tolist())
    assert draws == [draws[0]] * 3
    build("dpo", "seeds.sampling=1", run="other")
    assert torch.rand(3).tolist() != draws[0]


def test_a_stop_is_seen_between_the_stages(configure: Callable[..., Config], tmp_path: Path) -> None:
    config = configure("dpo", "reference.mode=cached")
    run = create_run(tmp_path / "run", "{}\n", [])
    looks = 0
    while True:
        stop = StopAt(looks)
        try:
            prepare(run, config, torch.device("cpu"), stop)
        except Stopped:
            looks += 1
            continue
        break
    assert looks > 3  # after the data, the model, within the reference, before the end
    assert saved_progress(run) == Progress()


# --- step 0


def test_a_step_of_one_row_has_no_baseline_and_that_is_said(build: Callable[..., Prepared]) -> None:
    said = {size: cautions(build("kto", f"train.batch_size={size}", run=f"run-{size}")) for size in (1, 4)}
    assert (ONE_ROW in said[1], ONE_ROW in said[4]) == (True, False)


@pytest.mark.parametrize("mode", ["copy", "cached"])
@pytest.mark.parametrize("objective", ["uft", "una", "dft", "dpo"])
def test_policy_and_reference_are_equal_before_the_first_step(
    build: Callable[..., Prepared], objective: str, mode: str
) -> None:
    prepared = build(objective, f"reference.mode={mode}")
    before = torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in prepared.trainer.objective.state.items()}
    check_start(prepared.trainer, prepared.reference)
    assert torch.equal(torch.get_rng_state(), before)
    assert prepared.trainer.policy.module.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in prepared.trainer.objective.state.items())


def test_a_policy_that_is_not_the_reference_is_noticed(build: Callable[..., Prepared]) -> None:
    prepared = build("dpo", "reference.mode=copy")
    with torch.no_grad():
        next(iter(prepared.trainer.parameters.values())).add_(0.1)
    with pytest.raises(UftError) as error:
        check_start(prepared.trainer, prepared.reference)
    assert error.value.code == FAILED
    assert error.value.problems[0].what == "step 0"


def test_another_model_as_reference_may_differ(build: Callable[..., Prepared], model_folder: Path) -> None:
    prepared = build("dpo", f"reference.path={model_folder}", "reference.mode=copy")
    with torch.no_grad():
        next(iter(prepared.trainer.parameters.values())).add_(0.1)
    check_start(prepared.trainer, prepared.reference)


def test_rows_longer_than_the_models_positions_are_refused(build: Callable[..., Prepared], tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "w3", "completion": "' + "w4 " * 80 + '"}\n')
    with pytest.raises(UftError, match="64 positions") as error:
        build("sft", sources={"mine": long})
    assert error.value.problems[0].what == "data.sources.mine"


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        assert choose_device(Hardware(device="cuda")).type == "cuda"
    else:
        with pytest.raises(UftError, match="there is: cpu"):
            choose_device(Hardware(device="cuda"))
    assert choose_device(Hardware(device="cpu")).type == "cpu"


@pytest.mark.parametrize(
    ("device", "there", "asked", "expected"),
    [("cpu", True, None, CPU_PASS), ("auto", True, None, PASS), ("auto", False, None, CPU_PASS), ("auto", True, 5, 5)],
)
def test_passes_suit_the_device_unless_asked_otherwise(
    configure: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    there: bool,
    asked: int,
    expected: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    words = (f"hardware.device={device}", f"train.micro_batch_tokens={'null' if asked is None else asked}")
    assert tokens_per_pass(configure("sft", *words)) == expected


# --- standing and resuming


def test_a_run_without_checkpoints_begins_at_the_beginning(build: Callable[..., Prepared]) -> None:
    assert resume(build("sft").trainer) == -1


def test_a_run_stands_where_its_newest_checkpoint_does(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", "train.keep_last=1").trainer
    for step in (2, 3):
        trainer.progress.step = step
        trainer.save_checkpoint()
    assert saved_progress(trainer.run) == trainer.progress
    again = build("sft").trainer
    assert resume(again) == 3
    assert again.progress == trainer.progress


def test_without_held_out_rows_and_reference_there_is_nothing_to_compare_with(build: Callable[..., Prepared]) -> None:
    assert build("sft").eval_reference is None
    assert build("sft", "data.holdout=0.2", run="held").eval_reference is not None
    assert build("dpo", run="pair").eval_reference is not None
