"""The loop: rollback of a step that is not finite, at once or a step later; prefetching, packing and checkpoints that
change no bit; what a step is a function of; means between two metric lines."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from dying import UNEVEN
from watched import trained

from uft.data.batch import Layout
from uft.data.loader import StepBatches
from uft.errors import FAILED, UftError
from uft.model import checkpoint, layout
from uft.objectives.base import Term
from uft.training import trainer as trainer_module
from uft.training.card import stage_card
from uft.training.setup import Prepared, check_start, longest_row, resume
from uft.training.step import FiniteCheck, Step, defers_finite_check, optimiser_step
from uft.training.trainer import Meter, Trainer

Build = Callable[..., Prepared]
POISON = "w60"
LATE = "train.sync_every_step=false"
PACKED = ("train.packing=packed", "train.micro_batch_tokens=64")
META, CUDA, CPU = torch.device("meta"), torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def poisoned_model(model_folder, tmp_path):
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
def poisoned_rows(files, tmp_path):
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

    def __call__(self, trainer: Trainer, step: Step) -> None:
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
@pytest.mark.parametrize(
    "objective", ["dft2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "uft"))]
)
def test_a_step_that_is_not_finite_is_rolled_back_and_its_row_named(
    build, poisoned_model, poisoned_rows, objective, lora
):
    """At once, and a step later: the same error, the same checkpoint to the bit. A resumed run fails likewise."""
    settings = ["train.batch_size=5", f"model.path={poisoned_model}", "train.steps=20"]
    settings += ["model.adapter=lora", "model.lora.rank=2", "model.lora.dropout=0.3"] if lora else []
    found = []
    for more in ((), (LATE,)):
        trainer = build(objective, *settings, *more, sources=poisoned_rows, run=f"run{len(more)}").trainer
        error, watch = fit_until_it_fails(trainer)
        ((step, folder),) = trainer.run.checkpoints()
        assert step == trainer.progress.step > 0, "the row comes first of all: another seed, please"
        found.append((str(error).replace(str(trainer.run.path), ""), *checkpoint.load(folder)))
        if not more:
            assert error.code == FAILED
            problem = error.problems[0]
            assert (problem.what, problem.advice[0]) == (f"step {step + 1}", "rows: preference:5")
            assert str(folder) in problem.advice[1]
            assert equal(Watch(trainer).state, watch.state)
            again = build(objective, *settings, sources=poisoned_rows, run="run0").trainer
            again.load_checkpoint(folder)
            assert equal(Watch(again).state, watch.state)
            assert str(fit_until_it_fails(again)[0]) == str(error)
    (said, tensors, state), (said_late, tensors_late, state_late) = found
    assert said_late == said
    assert state_late["progress"].pop("seconds") > 0
    state["progress"].pop("seconds")
    assert state_late == state
    assert equal(tensors_late, tensors)


def test_hooks_await_the_finite_check(build, poisoned_model, poisoned_rows):
    """No line, no evaluation and no checkpoint is of a step that was rolled back."""
    settings = ["train.batch_size=5", f"model.path={poisoned_model}", "train.steps=20"]
    trainer = build("sft", *settings, LATE, sources=poisoned_rows).trainer
    looked: list[int] = []

    class Looks:
        def __call__(self, trainer: Trainer, step: Any) -> None:
            trainer.await_finite_check()
            looked.append(trainer.progress.step)
            assert torch.isfinite(step.loss)

    trainer.hooks = (Looks(),)
    with pytest.raises(UftError, match="preference:5"):
        trainer.fit()
    assert looked == list(range(1, trainer.progress.step + 1))


@pytest.mark.parametrize("objective", ["sft", "dft"])
def test_a_deferred_check_changes_no_bit(build, objective):
    synced, late = (build(objective, *UNEVEN, *more, run=f"run{len(more)}") for more in ((), (LATE,)))
    assert (synced.trainer.defer_check, late.trainer.defer_check) == (False, True)
    assert trained(late).values == trained(synced).values
    assert equal(late.trainer.parameters, synced.trainer.parameters)


def test_a_step_without_rows_awaits_the_check_of_the_one_before(build, monkeypatch):
    monkeypatch.setattr(FiniteCheck, "__bool__", lambda self: False)  # the first step was not finite
    trainer = build("sft", LATE, "train.steps=4").trainer
    update, steps = trainer.update, iter(range(4))
    monkeypatch.setattr(trainer, "update", lambda rows: update(StepBatches([], []) if next(steps) else rows))
    with pytest.raises(UftError, match=r"step 1 .*not finite"):
        trainer.fit()


def test_waiting_for_the_device_is_time_of_training(build, monkeypatch):
    """Counted once, whether the next step waits or a hook."""

    def slowly(self: FiniteCheck) -> bool:
        time.sleep(0.3)
        return True

    class Line:
        def __call__(self, trainer: Trainer, step: Any) -> None:
            if trainer.progress.step % 2:
                trainer.await_finite_check()

    monkeypatch.setattr(FiniteCheck, "__bool__", slowly)
    trainer = build("sft", LATE, "train.steps=4").trainer
    trainer.hooks = (Line(),)
    began = time.perf_counter()
    trainer.fit()
    assert 4 * 0.3 <= trainer.progress.seconds <= time.perf_counter() - began


def test_whose_check_is_deferred(build):
    adamw, rmsprop = (build("sft", f"optim.name={name}", run=name).trainer.optimiser for name in ("adamw", "rmsprop"))
    assert defers_finite_check(None, CUDA, adamw)
    assert not defers_finite_check(None, CPU, adamw)
    assert not defers_finite_check(True, CUDA, adamw)
    assert not defers_finite_check(False, CUDA, rmsprop)  # it cannot skip an update


ASKS_NOTHING = ("sft", "uft", "una", "dpo", "kto", "orpo")
WAITS = (
    "ift",
    "dft",
    "per_kind",
)  # for the width of a grid, for examples that come twice, for which rows are of a kind


FAST = ("sft", "dpo", "kto", "dft")


@pytest.mark.parametrize(
    "objective", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in (*ASKS_NOTHING, *WAITS)]
)
def test_what_a_step_asks_its_device_for(build, monkeypatch, objective):
    """On a device that has shapes and no numbers, reading one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    trainer = build(objective, "optim.name=rmsprop", "reference.mode=cached", "train.packing=packed").trainer
    items = trainer.sampler.take(trainer.config.train.batch_size)
    rows = trainer.collator(items, trainer.sampler.mismatched(items) if trainer.objective.needs.mismatched else ())
    trainer.policy.module.to(META)
    trainer.parameters, trainer.device = trainer.policy.trainable(), META
    for name, tensor in trainer.objective.state.items():
        trainer.objective.state[name] = tensor.to(META)

    def step() -> Step:
        trainer.defer_check = True
        return optimiser_step(trainer, rows, trainer.step_context(0))

    if objective in WAITS:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"[mM]eta"):
            step()
        return
    taken = step()
    assert taken.loss.device == taken.finite.value.device == META
    with pytest.raises(RuntimeError, match="meta"):
        bool(taken.finite)


def test_weights_that_overflow_are_no_checkpoint(build):
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


def test_a_sum_that_overflows_without_any_one_row_is_said_so(build, monkeypatch):
    trainer = build("sft").trainer
    monkeypatch.setattr("uft.training.trainer.nonfinite_rows", lambda *arguments, **keywords: [])
    real = trainer.policy.__call__
    monkeypatch.setattr(type(trainer.policy), "__call__", lambda self, *a, **k: _times(real(*a, **k), math.inf))
    with pytest.raises(UftError, match="no single row"):
        trainer.fit()


def _times(scores: Any, factor: float) -> Any:
    return type(scores)(scores.log_probs * factor, scores.argmax)


# --- prefetching and packing


@pytest.mark.parametrize("objective", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "dft"))])
def test_prefetching_changes_no_bit(build, objective):
    """Nor what checkpoints keep of the data: they stand after the last step, whatever was drawn ahead."""

    class Saves:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, trainer: Trainer, step: Step) -> None:
            state = checkpoint.read_state(trainer.save_checkpoint())
            self.seen.append((float(step.loss), state["feed"]))

    found = []
    for asked in ("false", "true"):
        trainer = build(objective, *PACKED, "train.steps=4", f"train.prefetch={asked}", run=asked).trainer
        trainer.hooks = (saves := Saves(),)
        trainer.fit()
        found.append((saves.seen, trainer.sampler.state_dict(), trainer.parameters))
    assert found[0][:2] == found[1][:2]
    assert equal(found[0][2], found[1][2])


@pytest.mark.parametrize("prefetch", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_resumed_packed_run_repeats_every_bit(build, prefetch):
    settings = (*PACKED, "train.steps=4", f"train.prefetch={prefetch}")
    whole, first = (build("dpo", *settings, run=run) for run in ("whole", "parts"))
    expected, before = trained(whole), trained(first, until=2)
    first.trainer.save_checkpoint()
    second = build("dpo", *settings, run="parts")
    assert resume(second.trainer) == 2
    assert before.values + trained(second).values == expected.values
    assert equal(second.trainer.parameters, whole.trainer.parameters)


def test_an_error_in_the_thread_is_raised_by_the_step(build):
    trainer = build("sft", *PACKED, "train.steps=5", "train.prefetch=true").trainer
    before = threading.active_count()

    def unknown(encoded: Any) -> Any:
        if trainer.progress.step == 0:
            return torch.zeros(encoded.targets).numpy()
        raise KeyError("the sequence has no entry")

    trainer.sampler.reference = unknown
    with pytest.raises(KeyError, match="has no entry"):
        trainer.fit()
    assert threading.active_count() <= before


def test_the_collector_looks_at_nothing_old_while_it_trains(build, monkeypatch):
    monkeypatch.setattr(trainer_module, "gc", gc)
    trainer, frozen = build("sft").trainer, []

    class Looks:
        def __call__(self, trainer: Any, step: Any) -> None:
            frozen.append(gc.get_freeze_count())
            if len(frozen) == 2:
                raise KeyError("in a hook")

    trainer.hooks = (Looks(),)
    with pytest.raises(KeyError, match="in a hook"):
        trainer.fit()
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(
    "objective", ["ift", "dft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uft", "dpo"))]
)
def test_a_packed_run_is_the_padded_one(build, objective):
    padded, ours = (
        build(objective, f"train.packing={packing}", "train.micro_batch_tokens=64", run=packing)
        for packing in ("padded", "packed")
    )
    assert ours.trainer.policy.layout is Layout.SHARED
    checks = [check_start(one.trainer, one.reference) for one in (padded, ours)]
    assert checks[0].keys() == checks[1].keys()
    assert checks[1].get("largest_difference", 0.0) < 1e-5
    expected, found = trained(padded), trained(ours)
    assert found.values == pytest.approx(expected.values, rel=1e-4, abs=1e-5)
    assert found.tokens == expected.tokens


def test_the_card_says_how_rows_lie(build, monkeypatch):
    texts = {}
    for packing in ("packed", "padded", "auto"):
        prepared = build("sft", f"train.packing={packing}", run=packing)
        texts[packing] = "\n".join(value for _, value in stage_card(prepared))
    assert "rows packed" in texts["packed"]
    assert "padding counted" not in texts["packed"]
    assert "rows pa" not in texts["padded"]
    assert "padding counted" in texts["padded"]
    assert "rows padded: faster for so small a model" in texts["auto"]


def test_the_longest_row_decides_about_windows(build, monkeypatch):
    prepared = build("sft")
    dataset, config = prepared.data.dataset, prepared.trainer.config
    lengths = [one.length for source in dataset.train for row in source.encoded for one in row]
    assert longest_row(dataset, config, prepared.trainer.objective) == max(lengths)
    seen: list[int] = []
    monkeypatch.setattr(layout, "packing_obstacle", lambda policy, longest: seen.append(longest))
    build("sft", "train.packing=packed", run="other")
    assert seen == [max(lengths)]


# --- what a step is a function of


def test_the_clock_is_a_function_of_seed_and_step_alone(build):
    one = build("ift", "train.steps=40").trainer
    torch.rand(17)
    other = build("ift", "train.steps=40", "seeds.data=9", "seeds.init=8").trainer
    another = build("ift", "train.steps=40", "seeds.sampling=1").trainer
    noise = [one.step_context(step).noise for step in range(40)]
    assert noise == [other.step_context(step).noise for step in range(40)]
    assert len(set(noise) | {another.step_context(step).noise for step in range(40)}) == 80
    assert abs(sum(noise) / 40) < 0.6
    assert (one.step_context(7).step, one.step_context(7).steps, one.step_context(7).warmup) == (7, 40, 4)
    # a worked number: a change here makes resumed runs of noisy IFT differ from uninterrupted ones
    assert noise[5] == pytest.approx(-0.4867807626724243, abs=1e-6)


def test_counters_and_a_short_last_batch(build):
    trainer = build("sft", "train.steps=null", "train.epochs=1", "train.batch_size=25").trainer
    trainer.fit()
    progress = trainer.progress
    assert (progress.step, progress.rows) == (3, 60)
    assert progress.tokens > progress.supervised_tokens > 0
    assert progress.seconds > 0


def test_the_same_seed_repeats_every_bit_and_another_seed_does_not(build):
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


def test_what_a_checkpoint_holds_and_that_its_horizon_wins(build):
    trainer = build("dft", "train.steps=2").trainer
    trainer.fit()
    folder = trainer.save_checkpoint()
    tensors, state = checkpoint.load(folder)
    assert {name.split("/")[0] for name in tensors} == {"model", "optimiser", "objective", "meter", "random"}
    assert tensors["objective/log_u"].shape == (trainer.sampler.row_count,)
    assert state["progress"]["step"] == 2
    assert state["steps"] == 2
    assert sum(state["feed"]["counts"].values()) == 16
    longer = build("dft", "train.steps=60").trainer
    longer.load_checkpoint(folder)
    assert longer.steps == 2
    with pytest.raises(UftError, match="another model or adapter"):
        build("dft", "model.adapter=lora").trainer.load_checkpoint(folder)


# --- the meter: means between two metric lines


def term(total: float, count: float) -> Term:
    return Term(torch.tensor(total), torch.tensor(count))


def test_a_mean_is_over_the_steps_that_had_units_and_nll_over_their_tokens():
    meter = Meter()
    for total, count in ((6.0, 1), (8.0, 4), (0.0, 0)):
        meter.add_loss({"sft": term(total, count), "nll": term(total, count), "pair": term(0.0, 0)})
    meter.add("loss", torch.ones((), requires_grad=True) * 2)
    assert not meter.sums["loss"][0].requires_grad
    assert meter.means() == {"sft": 4.0, "nll": 14 / 5, "loss": 2.0}
    assert meter.means() == {}, "reading resets it"


def test_many_small_numbers_keep_their_digits():
    meter = Meter()
    for _ in range(20_000):
        meter.add("loss", torch.tensor(0.1))
    assert abs(meter.means()["loss"] - float(torch.tensor(0.1))) < 1e-12


def test_a_half_filled_meter_goes_on_after_a_checkpoint_in_the_same_order():
    straight, resumed = Meter(), Meter()
    losses = [{"uft": term(0.1, 3), "a/b": term(0.7, 1), "accuracy": term(1.0, 2)}, {"uft": term(0.3, 1)}]
    straight.add("loss", 0.1)
    straight.add_loss(losses[0])
    resumed.load_state_dict(dict(sorted(straight.state_dict().items())), CPU)  # a file keeps an order of its own
    for meter in (straight, resumed):
        meter.add("loss", 0.2)
        meter.add_loss({**losses[0], **losses[1]})
    assert list(straight.means().items()) == list(resumed.means().items())
