"""The loop's own promises: what a step that fails leaves behind, and what a step is a function of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from uft.errors import FAILED, UftError
from uft.training import checkpoint
from uft.training.setup import Prepared
from uft.training.step import Step
from uft.training.trainer import Trainer

POISON = "w60"


@pytest.fixture
def poisoned_model(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model, but the input embedding of one word is NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = math.nan
    folder = tmp_path / "poisoned"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def poisoned_rows(files: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Rows of two kinds in which one preference alone has the poisoned word."""
    sources = {}
    for kind in ("demonstration", "preference"):
        text = files[kind].read_text().replace(POISON, "w7")
        sources[kind] = tmp_path / f"{kind}.jsonl"
        sources[kind].write_text(text)
    rows = sources["preference"].read_text().splitlines()
    rows[5] = f'{{"prompt": "w3 w4", "chosen": "w5 w6 {POISON} w7", "rejected": "w8"}}'
    sources["preference"].write_text("\n".join(rows) + "\n")
    return sources


class Watch:
    """A hook that keeps a copy of everything a step may change, as it was after the last good one."""

    def __init__(self, trainer: Trainer) -> None:
        self.state = self.of(trainer)

    def of(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "weights": {name: p.detach().clone() for name, p in trainer.parameters.items()},
            "objective": {name: t.clone() for name, t in trainer.objective.state.items()},
            "feed": trainer.sampler.state_dict(),
            "random": torch.get_rng_state(),
            "step": trainer.progress.step,
        }

    def after_step(self, trainer: Trainer, step: Step) -> None:
        self.state = self.of(trainer)


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, torch.Tensor):
        return torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))
    return bool(ours == theirs)


def fit_until_it_fails(trainer: Trainer) -> tuple[UftError, Watch]:
    watch = Watch(trainer)
    trainer.hooks = (watch,)
    with pytest.raises(UftError) as error:
        trainer.fit()
    return error.value, watch


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("objective", ["sft", "ift", "uft", "dft", "dft2"])
def test_a_row_that_is_not_a_number_is_named_and_the_last_good_state_kept(
    build: Callable[..., Prepared],
    poisoned_model: Path,
    poisoned_rows: dict[str, Path],
    tmp_path: Path,
    objective: str,
    lora: bool,
) -> None:
    settings = ["train.batch_size=5", f"model.path={poisoned_model}", "train.steps=20"]
    settings += ["model.adapter=lora", "model.lora.rank=2", "model.lora.dropout=0.3"] if lora else []
    trainer = build(objective, *settings, sources=poisoned_rows).trainer
    error, watch = fit_until_it_fails(trainer)
    assert error.code == FAILED
    problem = error.problems[0]
    assert problem.what == f"step {watch.state['step'] + 1}"
    assert problem.advice[0] == "rows: preference:5"
    ((step, folder),) = trainer.run.checkpoints()
    assert str(folder) in problem.advice[1]
    assert step == watch.state["step"]
    assert step > 0, "the row comes first of all: another seed, please"
    assert equal(Watch(trainer).state, watch.state)

    again = build(objective, *settings, sources=poisoned_rows).trainer
    again.load_checkpoint(folder)
    assert equal(Watch(again).state, watch.state)
    after, _ = fit_until_it_fails(again)
    assert str(after) == str(error)


def test_weights_that_overflow_are_no_checkpoint(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", "optim.name=sgd", "optim.lr=1e39", "train.max_grad_norm=0", "train.steps=5").trainer
    trainer.progress.step = 3
    good = trainer.save_checkpoint()
    trainer.progress.step = 4
    name, parameter = next(iter(trainer.parameters.items()))
    with torch.no_grad():
        parameter[0] = math.inf
    with pytest.raises(UftError, match="not finite any more") as error:
        trainer.save_checkpoint()
    assert error.value.code == FAILED
    assert name in error.value.problems[0].why
    assert error.value.problems[0].advice == (f"the last good state is {good}",)
    assert [folder for _, folder in trainer.run.checkpoints()] == [good]


def test_a_sum_that_overflows_without_any_one_row_is_said_so(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("sft").trainer
    monkeypatch.setattr("uft.training.trainer.culprits", lambda *arguments, **keywords: [])
    real = trainer.policy.__call__
    monkeypatch.setattr(type(trainer.policy), "__call__", lambda self, *a, **k: _times(real(*a, **k), math.inf))
    with pytest.raises(UftError, match="no single row"):
        trainer.fit()


def _times(scores: Any, factor: float) -> Any:
    return type(scores)(scores.log_probs * factor, scores.argmax)


# --- what a step is a function of


def test_the_clock_is_a_function_of_seed_and_step_alone(build: Callable[..., Prepared]) -> None:
    one = build("ift", "train.steps=40").trainer
    torch.rand(17)
    other = build("ift", "train.steps=40", "seeds.data=9", "seeds.init=8").trainer
    another = build("ift", "train.steps=40", "seeds.sampling=1").trainer
    noise = [one.step_context(step).noise for step in range(40)]
    assert noise == [other.step_context(step).noise for step in range(40)]
    assert len(set(noise) | {another.step_context(step).noise for step in range(40)}) == 80
    assert abs(sum(noise) / 40) < 0.6
    assert (one.step_context(7).step, one.step_context(7).steps, one.step_context(7).warmup) == (7, 40, 4)


def test_the_clock_is_the_same_in_every_process_and_version(build: Callable[..., Prepared]) -> None:
    """Worked number: a change here makes resumed runs of noisy IFT differ from uninterrupted ones."""
    assert build("ift").trainer.step_context(5).noise == pytest.approx(CLOCK_AT_FIVE, abs=1e-6)


CLOCK_AT_FIVE = -0.4867807626724243


def test_counters_and_a_short_last_batch(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", "train.steps=null", "train.epochs=1", "train.batch_size=25").trainer
    trainer.fit()
    progress = trainer.progress
    assert (progress.step, progress.rows) == (3, 60)
    assert progress.tokens > progress.supervised_tokens > 0
    assert progress.seconds > 0


def test_the_horizon_of_a_checkpoint_wins(build: Callable[..., Prepared]) -> None:
    trainer = build("sft", "train.steps=6").trainer
    folder = trainer.save_checkpoint()
    longer = build("sft", "train.steps=60").trainer
    longer.load_checkpoint(folder)
    assert longer.steps == 6


def test_a_checkpoint_of_another_model_is_refused(build: Callable[..., Prepared]) -> None:
    folder = build("sft").trainer.save_checkpoint()
    other = build("sft", "model.adapter=lora").trainer
    with pytest.raises(UftError, match="another model or adapter"):
        other.load_checkpoint(folder)


def test_the_same_seed_repeats_every_bit_and_another_seed_does_not(build: Callable[..., Prepared]) -> None:
    settings = ("model.adapter=lora", "model.lora.dropout=0.3")

    def trained(run: str, *more: str) -> dict[str, torch.Tensor]:
        trainer = build("sft", *settings, *more, run=run).trainer
        trainer.fit()
        return {name: p.detach() for name, p in trainer.parameters.items()}

    one = trained("one")
    torch.rand(3)
    assert equal(trained("two"), one)
    assert not equal(trained("three", "seeds.sampling=1"), one)  # dropout
    assert not equal(trained("four", "seeds.data=1"), one)
    assert not equal(trained("five", "seeds.init=1"), one)


def test_what_a_checkpoint_holds(build: Callable[..., Prepared]) -> None:
    trainer = build("dft", "train.steps=2").trainer
    trainer.fit()
    tensors, state = checkpoint.load(trainer.save_checkpoint())
    assert {name.split("/")[0] for name in tensors} == {"model", "optimiser", "objective", "meter", "random"}
    assert tensors["objective/log_u"].shape == (trainer.sampler.examples,)
    assert state["progress"]["step"] == 2
    assert state["steps"] == 2
    assert sum(state["feed"]["counts"].values()) == 16
