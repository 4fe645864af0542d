"""When lines, evaluations and checkpoints are due, which step counts as the best, and lines of a later stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from uft.config.schema import Optim
from uft.evaluation.evaluate import Evaluation, Sample
from uft.objectives.base import Term
from uft.sampling.generate import Interrupted
from uft.training.session import CheckpointHook, EvaluationHook, MetricsHook, StageLog
from uft.training.step import Step
from uft.training.trainer import Meter, Progress

SAMPLE = Sample("s", "s:0", "prompt", "reply", None, {})


@dataclass
class Notes:
    """A tracker and a console that remember."""

    lines: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, dict(metrics)))

    def samples(self, step: int, samples: list[Sample], stage: str | None) -> None:
        self.told.append(step)

    def secure(self) -> None:
        """Nothing is written."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.shown.append(step)

    def message(self, text: str) -> None:
        self.said.append(text)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.shown.append(step)


class FakeTrainer:
    """Progress without a model; saves are noted as (step, evaluated, best step)."""

    def __init__(self, steps: int) -> None:
        self.steps, self.epoch_rows, self.device = steps, 40, torch.device("cpu")
        self.progress, self.meter = Progress(), Meter()
        self.config = SimpleNamespace(optim=Optim(lr=0.5, schedule="constant", warmup=0))
        self.saves: list[tuple[int, int, int | None]] = []

    def publish_pending_checkpoint(self, wait: bool = True) -> None:
        """Nothing is written in the background here."""

    def await_finite_check(self) -> None:
        """Every step happened."""

    def save_checkpoint(self) -> None:
        self.saves.append((self.progress.step, self.progress.evaluated, self.progress.best_step))

    def run(self, *hooks: Any, until: int | None = None) -> None:
        """Steps of 4 rows and 10 tokens with loss = step number."""
        while self.progress.step < (until or self.steps):
            self.progress.step += 1
            self.progress.rows += 4
            self.progress.tokens += 10
            number = torch.tensor(float(self.progress.step))
            self.meter.add("loss", number)
            self.meter.add("grad_norm", 2 * number)
            self.meter.add_loss({"nll": Term(number * 6, torch.tensor(3.0)), "sft": Term(number, torch.tensor(1.0))})
            step = Step(number, {}, 2 * number, tokens=10, supervised_tokens=5)
            for hook in hooks:
                hook.after_step(self, step)


def log_of(notes: Notes, *stage: Any) -> StageLog:
    return StageLog(notes, notes, *stage)  # type: ignore[arg-type]


def evaluations(notes: Notes, measure: Callable[[], Evaluation], every: int = 3, **changes: Any) -> EvaluationHook:
    keys = {"at_start": True, "best": "eval/nll", "best_mode": "min"} | changes
    return EvaluationHook(measure, log_of(notes), every, **keys)


def values(*numbers: float | None) -> Callable[[], Evaluation]:
    """Evaluations with these values of eval/nll in turn; None: interrupted."""
    left = list(numbers)

    def measure() -> Evaluation:
        value = left.pop(0)
        if value is None:
            raise Interrupted
        return Evaluation({"eval/nll": value}, [SAMPLE])

    return measure


# --- lines


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(4, 10, [1, 4, 8, 10]), (1, 3, [1, 2, 3]), (10, 4, [1, 4]), (10, 1, [1]), (5, 10, [1, 5, 10])],
)
def test_a_line_at_the_first_step_every_few_and_at_the_last(every: int, steps: int, expected: list[int]) -> None:
    notes, trainer = Notes(), FakeTrainer(steps)
    trainer.run(MetricsHook(log_of(notes), every))
    assert [step for step, _ in notes.lines] == expected
    assert notes.shown == expected


def test_a_line_says_what_happened_since_the_last_one() -> None:
    notes, trainer = Notes(), FakeTrainer(4)
    trainer.run(MetricsHook(log_of(notes), 3))
    _, middle, last = (line for _, line in notes.lines)
    assert list(middle) == [
        *("rows", "tokens", "supervised_tokens", "seconds", "epoch", "loss", "nll", "lr", "grad_norm"),
        *("tokens_per_second", "objective/sft"),
    ]
    assert (middle["rows"], middle["tokens"], middle["epoch"], middle["lr"]) == (12, 30, 0.3, 0.5)
    assert (middle["loss"], middle["grad_norm"], middle["nll"]) == (2.5, 5.0, 5.0)  # of steps 2 and 3
    assert (last["loss"], last["objective/sft"]) == (4.0, 4.0)


def test_a_line_about_nothing_has_no_loss() -> None:
    notes, trainer = Notes(), FakeTrainer(1)
    trainer.progress.step = 1
    nothing = torch.zeros(())
    MetricsHook(log_of(notes), 1).after_step(trainer, Step(nothing, {}, nothing, 0, 0))  # type: ignore[arg-type]
    assert {"loss", "nll", "grad_norm"}.isdisjoint(notes.lines[0][1])


def test_speed_is_of_training_alone() -> None:
    """Of a session that begins after 100 seconds; the time of evaluations and checkpoints between steps is in no number
    here, whatever the clock says meanwhile."""
    notes, trainer = Notes(), FakeTrainer(3)
    trainer.progress.seconds = 100.0
    hook = MetricsHook(log_of(notes), 2, since=100.0)
    for step, seconds in enumerate((102.0, 105.0, 115.0), 1):
        trainer.progress.seconds = seconds
        trainer.run(hook, until=step)
    assert [line["tokens_per_second"] for _, line in notes.lines] == [10 / 2, 10 / 3, 10 / 10]


# --- evaluations


def measured(steps: int, every: int, before: bool) -> list[int]:
    notes, trainer = Notes(), FakeTrainer(steps)
    hook = evaluations(notes, values(*[1.0] * 20), every, at_start=before)
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook)
    assert notes.told == notes.shown == [step for step, _ in notes.lines]
    return notes.told


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
def test_an_evaluation_before_every_few_and_after(steps: int, every: int, before: bool, expected: list[int]) -> None:
    assert measured(steps, every, before) == expected


def test_an_interrupted_evaluation_is_owed_and_paid_first() -> None:
    notes, trainer = Notes(), FakeTrainer(6)
    hook = evaluations(notes, values(1.0, None, 0.5, 0.4))
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook, until=3)
    assert trainer.progress.evaluated == 0
    assert notes.told == [0]
    hook.start(trainer)  # type: ignore[arg-type]
    assert notes.told == [0, 3]
    assert (trainer.progress.best_step, trainer.progress.best_value) == (3, 0.5)
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook)
    assert notes.told == [0, 3, 6]


def test_a_resumed_run_does_not_measure_twice() -> None:
    notes, trainer = Notes(), FakeTrainer(6)
    trainer.progress = Progress(step=3, evaluated=3)
    evaluations(notes, values()).start(trainer)  # type: ignore[arg-type]
    assert notes.told == []


@pytest.mark.parametrize(
    ("mode", "series", "best"),
    [
        ("min", (0.1, 3.0, 2.0, 2.0, 5.0), (6, 2.0)),  # the first of equals; before the first step does not count
        ("max", (9.0, 3.0, 4.0, 1.0, 4.0), (6, 4.0)),
        ("min", (1.0, math.nan, 7.0, 8.0, 9.0), (6, 7.0)),
        ("max", (1.0, math.inf, 7.0, 8.0, math.nan), (9, 8.0)),
    ],
)
def test_the_best_step(mode: str, series: tuple[float, ...], best: tuple[int, float]) -> None:
    notes, trainer = Notes(), FakeTrainer(12)
    hook = evaluations(notes, values(*series), best_mode=mode)
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook)
    assert (trainer.progress.best_step, trainer.progress.best_value) == best


def test_no_best_where_the_metric_is_not_measured() -> None:
    notes, trainer = Notes(), FakeTrainer(3)
    hook = evaluations(notes, values(1.0, 1.0), best="eval/exact_match")
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook)
    assert trainer.progress.best_step is None
    assert notes.said == ["eval.best=eval/exact_match is not measured here: no best checkpoint is kept"]


def test_an_evaluation_without_metrics_writes_no_line() -> None:
    notes, trainer = Notes(), FakeTrainer(2)
    hook = evaluations(notes, lambda: Evaluation())
    hook.start(trainer)  # type: ignore[arg-type]
    trainer.run(hook)
    assert notes.lines == notes.told == []
    assert trainer.progress.evaluated == 2


# --- checkpoints


@pytest.mark.parametrize(
    ("every", "steps", "expected"), [(3, 7, [3, 6, 7]), (3, 6, [3, 6]), (0, 5, [5]), (100, 5, [5]), (1, 2, [1, 2])]
)
def test_a_checkpoint_every_few_steps_and_at_the_end(every: int, steps: int, expected: list[int]) -> None:
    trainer, hook = FakeTrainer(steps), CheckpointHook(Notes(), every)
    trainer.run(hook)
    assert [step for step, *_ in trainer.saves] == expected
    assert hook.saved == steps


def test_a_new_best_is_saved_once_with_what_is_known_of_it() -> None:
    notes, trainer = Notes(), FakeTrainer(8)
    measure = evaluations(notes, values(9.0, 3.0, 2.0, 5.0, 5.0), every=2)
    measure.start(trainer)  # type: ignore[arg-type]
    trainer.run(measure, CheckpointHook(notes, 7))
    assert trainer.saves == [(2, 2, 2), (4, 4, 4), (7, 6, 4), (8, 8, 4)]


# --- a later stage


def test_lines_of_a_later_stage_continue_those_before_it() -> None:
    """Steps and counters run on, and every line has the stage's name; epochs, rates and the schedule are its own."""
    notes, trainer = Notes(), FakeTrainer(2)
    before = Progress(step=10, rows=400, tokens=1000, supervised_tokens=500, seconds=60.0)
    log = log_of(notes, "dpo", before)
    hook = EvaluationHook(values(1.0, 0.5), log, 0, at_start=False, best="eval/nll", best_mode="min")
    trainer.run(MetricsHook(log, 1), hook)
    (first, line), (second, _), (third, measured_line) = notes.lines
    assert (first, second, third) == (11, 12, 12)
    assert notes.shown == [11, 12, 12]
    assert list(line)[:3] == ["stage", "rows", "tokens"]
    assert (line["stage"], line["rows"], line["tokens"], line["epoch"]) == ("dpo", 404, 1010, 0.1)
    assert measured_line == {"stage": "dpo", "rows": 408, "tokens": 1020, "eval/nll": 1.0}
    assert trainer.progress.best_step == 2
