"""Every objective on every kind of row: what a run logs equals an independent computation (oracle.py) to 1e-5.

At lr 0 every step sees the initial weights. One batch holds a whole file, in several micro-batches of unequal lengths.
The reference is another model unless a test says otherwise: against itself every log-ratio would be 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import pytest
from oracle import DFT, Expected
from plain_model import Model, Row, read

ALIKE = 1e-5
EVERY = ("demonstrations", "conversations", "pairs", "labels", "scores", "negatives")
COMPARED = ("pairs", "scores", "negatives")
IN_PIECES = "train.micro_batch_tokens=150"  # a handful of micro-batches


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Model:
    return Model(tiny_model)


@pytest.fixture(scope="module")
def reference(other_model: Path) -> Model:
    return Model(other_model)


def agree(line: Mapping[str, Any], expected: Expected, tolerance: float = ALIKE) -> None:
    wanted = {"loss": expected.loss, **expected.terms}
    assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=tolerance, abs=tolerance)


Step = Callable[[Model, list[Row], Model, int], Expected]
"""(policy, rows, reference, 0-based step) -> what that step logs."""


@dataclass(frozen=True)
class Case:
    objective: str
    sources: tuple[str, ...]
    expected: Callable[[], Step]  # made anew for every run: DFT remembers
    overrides: tuple[str, ...] = ()
    steps: int = 1

    def request(self, request_of: Callable[..., list[str]], other_model: Path, *more: str) -> list[str]:
        overrides = (f"reference.path={other_model}", f"train.steps={self.steps}", IN_PIECES, *self.overrides, *more)
        return request_of(self.objective, self.sources, *overrides)


def alone(formula: Callable[..., Expected], **settings: Any) -> Callable[[], Step]:
    return lambda: lambda model, rows, reference, step: formula(model, rows, **settings)


def against(formula: Callable[..., Expected], **settings: Any) -> Callable[[], Step]:
    return lambda: lambda model, rows, reference, step: formula(model, rows, reference, **settings)


KIND_WEIGHTS = {"demonstrations": 0.5, "conversations": 0.5, "pairs": 2.0, "scores": 3.0}
CASES = {
    "sft": Case("sft", EVERY, alone(oracle.sft)),
    "sft sequence": Case("sft", EVERY, alone(oracle.sft, reduction="sequence"), ("objective.reduction=sequence",)),
    "sft min_score": Case("sft", EVERY, alone(oracle.sft, min_score=0.3), ("objective.min_score=0.3",)),
    "ift": Case("ift", EVERY, alone(oracle.ift)),
    "ift by token": Case("ift", EVERY, alone(oracle.ift, reduction="token"), ("objective.reduction=token",)),
    "ift ramp": Case(
        "ift",
        ("demonstrations",),
        lambda: lambda model, rows, reference, step: oracle.ift(model, rows, lam=min(0.1 + 0.15 * step, 0.4)),
        ("objective.lam_start=0.1", "objective.lam=0.4", "optim.warmup=2"),
        steps=4,
    ),
    "ift eq21": Case("ift", EVERY, alone(oracle.ift, propagation="eq21"), ("objective.propagation=eq21",)),
    "ift alg1": Case(
        "ift",
        EVERY,
        alone(oracle.ift, propagation="alg1", gamma=0.8),
        ("objective.propagation=alg1", "objective.gamma=0.8"),
    ),
    "ift none": Case(
        "ift",
        EVERY,
        alone(oracle.ift, propagation="none", lam=0.5),
        ("objective.propagation=none", "objective.lam=0.5"),
    ),
    "uft": Case("uft", EVERY, against(oracle.uft)),
    "uft bce": Case("uft", EVERY, against(oracle.uft, loss="bce"), ("objective.loss=bce",)),
    "uft scores": Case("uft", EVERY, against(oracle.uft, pairs="scores"), ("objective.pairs=scores",)),
    "uft weights": Case(
        "uft",
        EVERY,
        against(oracle.uft, weights=KIND_WEIGHTS, demonstration_score=0.9),
        (
            "+objective.kind_weights.demonstration=0.5",
            "+objective.kind_weights.preference=2",
            "+objective.kind_weights.scored=3",
            "objective.demonstration_score=0.9",
        ),
    ),
    "uft averaged": Case(
        "uft",
        EVERY,
        against(oracle.uft, average=True, beta=0.5),
        ("objective.length_normalize=true", "objective.beta=0.5"),
    ),
    "una": Case("una", EVERY[2:], against(oracle.uft, beta=0.03), ("objective.beta=0.03",)),
    "dft": Case("dft", EVERY, DFT, steps=3),
    "dft tau": Case(
        "dft",
        ("negatives", "pairs"),
        partial(DFT, tau=0.7, gamma=0.5, negatives=3, log_u_init=-4.0),
        ("objective.tau=0.7", "objective.gamma=0.5", "objective.negatives=3", "objective.u_init=-4"),
        steps=2,
    ),
    "dft sampling": Case(
        "dft",
        ("demonstrations", "negatives"),
        partial(DFT, sampling=True),
        ("objective.denominator=sampling",),
        steps=2,
    ),
    "dft2": Case("dft2", EVERY, partial(DFT, tau=0.3, gamma=0.9, average=True), steps=3),
    "dpo": Case("dpo", COMPARED, against(oracle.dpo)),
    "dpo smoothed": Case(
        "dpo",
        COMPARED,
        against(oracle.dpo, beta=0.05, label_smoothing=0.2),
        ("objective.beta=0.05", "objective.label_smoothing=0.2"),
    ),
    "dpo sft": Case(
        "dpo",
        ("demonstrations", "conversations", *COMPARED),
        against(oracle.dpo, sft_weight=0.7),
        ("objective.sft_weight=0.7",),
    ),
    "dpo sft by token": Case(
        "dpo",
        ("demonstrations", *COMPARED),
        against(oracle.dpo, sft_weight=2.0, reduction="token"),
        ("objective.sft_weight=2", "objective.reduction=token"),
    ),
}


def rows_of(case: Case, rows: Callable[[str], Path]) -> list[Row]:
    return [row for name in case.sources for row in read(rows(name))]


def check(case: Case, lines: Mapping[int, Mapping[str, Any]], policy: Model, reference: Model, seen: list[Row]) -> None:
    assert sorted(lines) == list(range(1, case.steps + 1))
    step = case.expected()
    for number, line in lines.items():
        expected = step(policy, seen, reference, number - 1)
        agree(line, expected)
        assert line["grad_norm"] == pytest.approx(policy.grad_norm(expected.objective), rel=1e-4)
        assert line["rows"] == number * len(seen)


ALIKE = ("una", "dft2")  # as uft and dft
AS_THEY_COME = [pytest.param(n, marks=pytest.mark.slow if " " in n or n in ALIKE else ()) for n in CASES]


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_every_objective_equals_its_formula(name, here, request_of, rows, curve, policy, reference, other_model):
    case = CASES[name]
    run = here(case.request(request_of, other_model))
    check(case, curve(run), policy, reference, rows_of(case, rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["dft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "ift", "uft", "una", "dft2", "dpo"))]
)
def test_the_program_itself_logs_the_same(
    name, uft, tmp_path, request_of, rows, curve, policy, reference, other_model, result
):
    case = CASES[name]
    uft("train", *case.request(request_of, other_model), f"run.dir={tmp_path / 'run'}")
    check(case, curve(tmp_path / "run"), policy, reference, rows_of(case, rows))
    assert result(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize("name", ["sft", "ift"])
def test_tied_embeddings(name, here, request_of, rows, curve, reference, other_model, make_model):
    """The gradient's norm tells: sft trains the shared table from both ends, ift from the output alone."""
    case, folder = CASES[name], make_model(seed=2, tied=True)
    run = here(case.request(request_of, other_model, f"model.path={folder}"))
    check(case, curve(run), Model(folder), reference, rows_of(case, rows))


@pytest.mark.parametrize("mode", ["copy", "cached"])
@pytest.mark.parametrize("name", ["uft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dft", "dpo sft"))])
def test_the_reference_is_the_same_however_it_is_made(
    name, mode, here, request_of, rows, curve, policy, reference, other_model
):
    case = CASES[name]
    run = here(case.request(request_of, other_model, f"reference.mode={mode}"))
    check(case, curve(run), policy, reference, rows_of(case, rows))


@pytest.mark.parametrize("mode", ["copy", "cached"])
def test_at_the_reference_losses_have_their_known_values(mode, here, request_of, rows, curve, policy):
    run = here(request_of("dpo", COMPARED, f"reference.mode={mode}", IN_PIECES))
    seen = [row for name in COMPARED for row in read(rows(name))]
    expected = oracle.dpo(policy, seen, policy)
    assert expected.loss == pytest.approx(0.693147, abs=1e-6)
    agree(curve(run)[1], Expected(expected.objective, expected.loss, {"nll": expected.terms["nll"]}))


@pytest.mark.parametrize(
    "name", ["dft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "ift", "uft", "dpo"))]
)
def test_an_adapter_starts_as_the_model_itself(name, here, request_of, rows, curve, policy, reference, other_model):
    case = CASES[name]
    run = here(case.request(request_of, other_model, "model.adapter=lora", "train.steps=1"))
    agree(curve(run)[1], case.expected()(policy, rows_of(case, rows), reference, 0))


def test_an_adapter_switched_off_is_the_reference(here, request_of, rows, curve, policy):
    case = CASES["uft"]
    overrides = ("model.adapter=lora", "reference.mode=adapter_off", IN_PIECES)
    run = here(request_of("uft", case.sources, *overrides))
    agree(curve(run)[1], oracle.uft(policy, rows_of(case, rows), policy))
