"""When lines, evaluations and checkpoints are due, which step counts as the best, and lines of a later stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from uft.config.schema import Eval, Optim, Train
from uft.evaluation.evaluate import Evaluation, Item, Sample
from uft.model.memory import Shape, Utilisation, peak_rate
from uft.objectives.base import Term
from uft.sampling.generate import Interrupted
from uft.training.session import Recorder
from uft.training.step import Step
from uft.training.trainer import Meter, Progress

SAMPLE = Sample("s", "s:0", "prompt", "reply", None, {})
NEVER = 10**6


class Notes:
    """A tracker and a console that remember."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.shown, self.measured, self.told = list[int](), list[int](), list[int]()
        self.said: list[str] = []
        self.by_row: list[tuple[int, bool]] = []  # (step, with the answers)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, dict(metrics)))

    def samples(self, step: int, samples: list[Sample], stage: str | None) -> None:
        self.told.append(step)

    def items(self, step: int, items: list[Item], stage: str | None, answers: bool) -> None:
        self.by_row.append((step, answers))

    def secure(self) -> None:
        """Nothing is written."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.shown.append(step)

    def message(self, text: str) -> None:
        self.said.append(text)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.measured.append(step)


class FakeTrainer:
    """Progress without a model under a recorder; saves are noted as (step, evaluated, best step)."""

    def __init__(
        self,
        steps: int,
        measure: Callable[[], Evaluation] = Evaluation,
        *,
        log: int = NEVER,
        evaluate: int = 0,
        save: int = 0,
        best: str = "eval/nll",
        mode: str = "min",
        patience: int | None = None,
        **recorder: Any,
    ) -> None:
        self.steps, self.epoch_rows, self.device = steps, 40, torch.device("cpu")
        self.progress, self.meter = Progress(), Meter()
        self.optim, self.eval = Optim(lr=0.5, schedule="constant", warmup=0), Eval(best=best, best_mode=mode)
        self.train = Train(log_every=log, eval_every=evaluate, checkpoint_every=save, early_stop=patience)
        self.config, self.saves = self, list[tuple[int, int, int | None]]()
        self.notes, self.rollouts = Notes(), None
        self.recorder = Recorder(self.notes, self.notes, measure, **recorder)

    def publish_pending_checkpoint(self, wait: bool = True) -> None:
        """Nothing is written in the background here."""

    @property
    def complete(self) -> bool:
        return self.progress.step >= self.steps or bool(self.progress.ended)

    def await_finite_check(self) -> None:
        """Every step happened."""

    def save_checkpoint(self) -> None:
        self.saves.append((self.progress.step, self.progress.evaluated, self.progress.best_step))

    def owed(self) -> None:
        """The evaluation before the first step, or the one that the last session owed."""
        self.recorder.evaluate_if_due(self)

    def run(self, until: int | None = None) -> FakeTrainer:
        """Steps of 4 rows and 10 tokens with loss = step number."""
        while self.progress.step < (until or self.steps) and not self.progress.ended:
            self.progress.step += 1
            self.progress.rows += 4
            self.progress.tokens += 10
            number = torch.tensor(float(self.progress.step))
            self.meter.add("loss", number)
            self.meter.add("grad_norm", 2 * number)
            self.meter.add_loss({"nll": Term(number * 6, torch.tensor(3.0)), "sft": Term(number, torch.tensor(1.0))})
            self.recorder(self, Step(number, {}, 2 * number, 10, 5))
        return self


def values(*numbers: float | None) -> Callable[[], Evaluation]:
    """Evaluations with these values of eval/nll in turn; None: interrupted."""
    left = list(numbers)

    def measure() -> Evaluation:
        value = left.pop(0)
        if value is None:
            raise Interrupted
        return Evaluation({"eval/nll": value}, [SAMPLE])

    return measure


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        (2, (9.0, 4.0, 3.0, 3.5, 3.0, 1.0), 8),  # equal is no better; what came before the first step does not count
        (2, (0.0, 4.0, 4.5, 3.0, 3.5, 3.2), 10),
        (1, (9.0, 5.0, 4.0, 3.0, 2.0, 1.0), 10),
        (None, (9.0, 4.0, 5.0, 6.0, 7.0, 8.0), 10),
    ],
)
def test_training_ends_after_evaluations_that_are_no_better(patience, losses, ends):
    trainer = FakeTrainer(10, values(*losses), evaluate=2, patience=patience)
    trainer.owed()
    trainer.run()
    assert trainer.progress.step == trainer.saves[-1][0] == ends
    early = f"train.early_stop=2: eval/nll={min(losses[1:4]):g} at step 4 is still the best"
    assert trainer.progress.ended == (early if ends < 10 else "")


# --- lines


@pytest.mark.parametrize(("rows", "kept"), [(1, [0, 2, 4, 5]), (25_001, [0, 5])])
def test_items_of_every_evaluation_or_of_the_first_and_last_where_they_are_many(rows, kept):
    items = [Item("pairs", f"pairs:{number}", "hello?") for number in range(rows)]
    trainer = FakeTrainer(5, lambda: Evaluation({"eval/nll": 1.0}, [], items), evaluate=2)
    trainer.owed()
    assert trainer.run().notes.by_row == [(step, step == 5) for step in kept]


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(4, 10, [1, 4, 8, 10]), (1, 3, [1, 2, 3]), (10, 4, [1, 4]), (10, 1, [1]), (5, 10, [1, 5, 10])],
)
def test_a_line_at_the_first_step_every_few_and_at_the_last(every, steps, expected):
    notes = FakeTrainer(steps, log=every).run().notes
    assert [step for step, _ in notes.lines] == expected
    assert notes.shown == expected


def test_a_line_says_what_happened_since_the_last_one():
    """Of a session that begins after 100 seconds: the time between steps is in no number here."""
    trainer = FakeTrainer(4, log=3, seconds=100.0)
    for step, seconds in enumerate((102.0, 105.0, 112.0, 122.0), 1):
        trainer.progress.seconds = seconds
        trainer.run(until=step)
    first, middle, last = (line for _, line in trainer.notes.lines)
    assert list(middle) == [
        *("rows", "tokens", "supervised_tokens", "seconds", "epoch", "loss", "nll", "lr", "grad_norm"),
        *("tokens_per_second", "objective/sft"),
    ]
    assert (middle["rows"], middle["tokens"], middle["epoch"], middle["lr"]) == (12, 30, 0.3, 0.5)
    assert (middle["loss"], middle["grad_norm"], middle["nll"]) == (2.5, 5.0, 5.0)  # of steps 2 and 3
    assert (last["loss"], last["objective/sft"]) == (4.0, 4.0)
    assert [line["tokens_per_second"] for line in (first, middle, last)] == [10 / 2, 20 / 10, 10 / 10]


def test_utilisation_is_the_models_work_over_the_peak():
    """600 weights in blocks and a head of 400: 6 operations a weight, on 20 tokens and 10 supervised ones in 10 s."""
    shape = Shape(4000, 4000, 1000, 4, 8, 16, vocabulary=50, activation_bytes=4, shared_bytes=1600, block_bytes=600)
    trainer = FakeTrainer(3, log=2, utilisation=Utilisation(shape, trained_share=1.0, peak=48_000.0))
    for step, seconds in enumerate((2.0, 7.0, 12.0), 1):
        trainer.progress.seconds = seconds
        trainer.run(until=step)
    work = [6 * (600 * tokens + 400 * supervised) for tokens, supervised in ((10, 5), (10, 5), (10, 5))]
    spent = [2, 5, 5]
    assert [line["mfu"] for _, line in trainer.notes.lines] == [
        w / (48_000 * s) for w, s in zip(work, spent, strict=True)
    ]
    assert trainer.notes.lines[0][1]["mfu"] == 0.5
    assert 0 < peak_rate(torch.device("cpu"), torch.float32) < 1e14


def test_a_line_about_nothing_has_no_loss():
    trainer, nothing = FakeTrainer(1, log=1), torch.zeros(())
    trainer.progress.step = 1
    trainer.recorder(trainer, Step(nothing, {}, nothing, 0, 0))
    assert {"loss", "nll", "grad_norm"}.isdisjoint(trainer.notes.lines[0][1])


# --- evaluations


@pytest.mark.parametrize(
    ("steps", "every", "before", "expected"),
    [
        (7, 3, True, [0, 3, 6, 7]),
        (7, 3, False, [3, 6, 7]),
        (6, 3, True, [0, 3, 6]),
        (5, 0, True, [0, 5]),
        (5, 0, False, [5]),
        (1, 100, True, [0, 1]),
    ],
)
def test_an_evaluation_before_every_few_and_after(steps, every, before, expected):
    trainer = FakeTrainer(steps, values(*[1.0] * 20), evaluate=every, at_start=before)
    trainer.owed()
    notes = trainer.run().notes
    assert notes.told == notes.measured == expected
    assert [step for step, line in notes.lines if "eval/nll" in line] == expected


def test_an_interrupted_evaluation_is_owed_and_paid_first_and_none_is_made_twice():
    trainer = FakeTrainer(6, values(1.0, None, 0.5, 0.4), evaluate=3)
    trainer.owed()
    trainer.run(until=3)
    assert trainer.progress.evaluated == 0
    assert trainer.notes.told == [0]
    trainer.owed()
    assert trainer.notes.told == [0, 3]
    assert (trainer.progress.best_step, trainer.progress.best_value) == (3, 0.5)
    trainer.owed()
    assert trainer.run().notes.told == [0, 3, 6]


@pytest.mark.parametrize(
    ("mode", "series", "best"),
    [
        ("min", (0.1, 3.0, 2.0, 2.0, 5.0), (6, 2.0)),  # the first of equals; before the first step does not count
        ("max", (9.0, 3.0, 4.0, 1.0, 4.0), (6, 4.0)),
        ("min", (1.0, math.nan, 7.0, 8.0, 9.0), (6, 7.0)),
        ("max", (1.0, math.inf, 7.0, 8.0, math.nan), (9, 8.0)),
    ],
)
def test_the_best_step(mode, series, best):
    trainer = FakeTrainer(12, values(*series), evaluate=3, mode=mode)
    trainer.owed()
    trainer.run()
    assert (trainer.progress.best_step, trainer.progress.best_value) == best


def test_no_best_where_the_metric_is_not_measured_and_no_line_without_metrics():
    trainer = FakeTrainer(3, values(1.0, 1.0), best="eval/exact_match")
    trainer.owed()
    assert trainer.run().progress.best_step is None
    assert trainer.notes.said == ["eval.best=eval/exact_match is not measured here: no best checkpoint is kept"]
    empty = FakeTrainer(2, log=NEVER).run()
    assert [step for step, _ in empty.notes.lines] == [1, 2]  # of training
    assert empty.notes.told == []
    assert empty.progress.evaluated == 2


# --- checkpoints


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(3, 7, [3, 6, 7]), (3, 6, [3, 6]), (0, 5, [5]), (100, 5, [5]), (1, 2, [1, 2])]
)
def test_a_checkpoint_every_few_steps_and_at_the_end(every, steps, expected):
    trainer = FakeTrainer(steps, save=every).run()
    assert [step for step, *_ in trainer.saves] == expected
    assert trainer.recorder.saved == steps


def test_a_new_best_is_saved_once_with_what_is_known_of_it():
    trainer = FakeTrainer(8, values(9.0, 3.0, 2.0, 5.0, 5.0), evaluate=2, save=7)
    trainer.owed()
    assert trainer.run().saves == [(2, 2, 2), (4, 4, 4), (7, 6, 4), (8, 8, 4)]


# --- a later stage


def test_lines_of_a_later_stage_continue_those_before_it():
    """Steps and counters run on, and every line has the stage's name; epochs, rates and the schedule are its own."""
    before = Progress(step=10, rows=400, tokens=1000, supervised_tokens=500, seconds=60.0)
    trainer = FakeTrainer(2, values(1.0), log=1, at_start=False, stage="dpo", before=before).run()
    (first, line), (second, _), (third, measured_line) = trainer.notes.lines
    assert (first, second, third) == (11, 12, 12)
    assert (trainer.notes.shown, trainer.notes.measured) == ([11, 12], [12])
    assert list(line)[:3] == ["stage", "rows", "tokens"]
    assert (line["stage"], line["rows"], line["tokens"], line["epoch"]) == ("dpo", 404, 1010, 0.1)
    assert measured_line == {"stage": "dpo", "rows": 408, "tokens": 1020, "eval/nll": 1.0}
    assert trainer.progress.best_step == 2
