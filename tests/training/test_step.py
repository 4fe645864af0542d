"""Micro-batches change nothing, mixtures are weighted sums of their parts, and a NaN changes no weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from uft.data.batch import Example, micro_batches
from uft.data.loader import Collator
from uft.model.policy import Policy
from uft.objectives import make
from uft.objectives.base import PLAIN, ForwardRequest, Loss, Objective, StepContext
from uft.training.setup import Prepared
from uft.training.step import culprits, forward_backward, kl_baseline, optimiser_step, reported_loss

Gradients = dict[str, torch.Tensor]
OBJECTIVES = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo", "kto", "anchored_sft", "orpo", "per_kind")
ONE_TERM = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo", "kto")
CLOCK = StepContext(step=3, steps=10, warmup=1, noise=0.7)
CPU = torch.device("cpu")


class Bench:
    """A trainer's parts, with a fresh objective for every measurement: its state must not pass from one to the next."""

    def __init__(self, prepared: Prepared) -> None:
        self.trainer = prepared.trainer
        self.trainer.policy.train()

    def objective(self) -> Objective:
        made = make(self.trainer.config.objective)
        made.start(self.trainer.sampler.examples)
        if "log_u" in made.state:  # as if every example had been visited before
            made.state["log_u"].copy_(torch.linspace(-3, 3, self.trainer.sampler.examples))
        return made

    def items(self, count: int) -> list[Example]:
        """`count` rows of which the objective takes something."""
        state = self.trainer.sampler.state_dict()
        found: list[Example] = []
        while len(found) < count:
            found += self.trainer.sampler.take(1)
        self.trainer.sampler.load_state_dict(state)
        return found

    def step_context(self, items: Sequence[Example], budget: int) -> StepContext:
        """The clock of a step of these rows, which knows what their mismatched completions say."""
        trainer, objective = self.trainer, self.objective()
        unrelated = trainer.sampler.mismatched(items) if objective.needs.mismatched else ()
        batches = micro_batches(unrelated, budget, trainer.pad_id)
        return replace(CLOCK, kl_baseline=kl_baseline(objective, batches, trainer.policy, trainer.reference))

    def measure(
        self, items: Sequence[Example], budget: int, step: Sequence[Example] | None = None
    ) -> tuple[float, Loss, Gradients, int]:
        """Loss, terms, gradients and the number of micro-batches; `items` may be a part of a `step`."""
        trainer, objective = self.trainer, self.objective()
        batches = micro_batches(items, budget, trainer.pad_id)
        context = self.step_context(items if step is None else step, budget)
        trainer.optimiser.zero_grad(set_to_none=True)
        terms = forward_backward(objective, batches, trainer.policy, trainer.reference, context)
        gradients = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
        return float(reported_loss(objective, terms)), terms, gradients, len(batches)


@pytest.fixture
def bench(build: Callable[..., Prepared]) -> Callable[..., Bench]:
    """bench("ift"): on float64 weights away from the reference, so that sums agree to the last digits that matter."""

    def make_bench(objective: str, *settings: str, **options: Any) -> Bench:
        prepared = build(objective, "reference.mode=copy", *settings, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in prepared.trainer.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        prepared.trainer.policy.module.double()
        return Bench(prepared)

    return make_bench


def close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(gradient.abs().max()) or 1.0
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5 * scale), name


# --- micro-batches


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_batch_of_eight_is_eight_of_one(bench: Callable[..., Bench], objective: str) -> None:
    rig = bench(objective)
    items = rig.items(8)
    assert len({item.length for item in items}) > 3
    whole = rig.measure(items, 10_000)
    assert whole[3] == 1
    for budget, batches in ((1, 8), (60, None)):
        parts = rig.measure(items, budget)
        assert batches is None or parts[3] == batches
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        assert parts[1].keys() == whole[1].keys()
        for name, term in parts[1].items():
            assert float(term.count) == float(whole[1][name].count), name
            assert float(term.total) == pytest.approx(float(whole[1][name].total), rel=1e-4, abs=1e-5), name
        close(parts[2], whole[2])


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["sft", "ift"])
def test_also_under_either_reduction(bench: Callable[..., Bench], objective: str, reduction: str) -> None:
    rig = bench(objective, f"objective.reduction={reduction}")
    items = rig.items(8)
    whole, parts = rig.measure(items, 10_000), rig.measure(items, 1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    close(parts[2], whole[2])


def test_also_with_several_weighted_terms(bench: Callable[..., Bench]) -> None:
    rig = bench("dpo", "objective.sft_weight=0.7", "objective.reduction=token")
    items = rig.items(8)
    whole, parts = rig.measure(items, 10_000), rig.measure(items, 1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    close(parts[2], whole[2])


# --- the survey before a step


def test_a_survey_is_a_mean_over_all_mismatched_completions_of_the_step(bench: Callable[..., Bench]) -> None:
    rig = bench("kto")
    items, policy, reference = rig.items(8), rig.trainer.policy, rig.trainer.reference
    unrelated = rig.trainer.sampler.mismatched(items)
    assert len(unrelated) == sum(len(item.parts) for item in items)
    found = [rig.step_context(items, budget).kl_baseline["z"] for budget in (10_000, 60, 1)]
    alone = (micro_batches([item], 1, rig.trainer.pad_id)[0] for item in unrelated)
    ratios = [float((policy(batch).log_probs - reference(batch).log_probs).sum().detach()) for batch in alone]
    assert [float(z) for z in found] == pytest.approx([sum(ratios) / len(ratios)] * 3, rel=1e-5)
    assert not any(z.requires_grad for z in found)
    assert kl_baseline(rig.objective(), [], policy, reference) == {}


@pytest.mark.parametrize("objective", ["kto", "per_kind"])
def test_a_step_takes_its_survey_from_all_rows_whatever_the_micro_batches(
    bench: Callable[..., Bench], objective: str
) -> None:
    """A reference below the policy makes z positive; the update of one pass and of many is the same."""
    rig = bench(objective, "optim.name=sgd")
    items, start = rig.items(8), weights(rig)
    reference, moved = rig.trainer.reference, []

    def lowered(batch: Any, request: ForwardRequest = PLAIN) -> Any:
        scores = reference(batch, request)
        return replace(scores, log_probs=scores.log_probs - 0.3)

    rig.trainer.reference = lowered
    for budget in (10_000, 40):
        done = step(rig, items, mismatched=rig.trainer.sampler.mismatched(items), micro_batch_tokens=budget, lr=1.0)
        points = [float(t.total / t.count) for name, t in done.terms.items() if name.endswith("reference_point")]
        assert points
        assert min(points) > 0.1
        moved.append((float(done.loss), weights(rig)))
        with torch.no_grad():
            for name, parameter in rig.trainer.parameters.items():
                parameter.copy_(start[name])
    assert moved[0][0] == pytest.approx(moved[1][0], abs=1e-5)
    close(moved[0][1], moved[1][1])
    assert distance(rig, moved[0][1]) > 0


# --- mixtures


@pytest.mark.parametrize("objective", ONE_TERM)
def test_a_mixture_is_the_weighted_sum_of_its_parts(bench: Callable[..., Bench], objective: str) -> None:
    """Gradient of the union = (n_a g_a + n_b g_b) / (n_a + n_b), n the units of the one term with a weight."""
    rig = bench(objective)
    items = rig.items(10)
    kinds = sorted({item.row.kind.value for item in items})
    ours = [item for item in items if item.row.kind.value == kinds[0]]
    theirs = [item for item in items if item.row.kind.value != kinds[0]]
    assert ours
    assert theirs
    both, one, other = (rig.measure(part, 10_000, step=items) for part in (items, ours, theirs))
    (name,) = [name for name, term in both[1].items() if term.weight]
    n_one, n_other = float(one[1][name].count), float(other[1][name].count)
    expected = {
        key: (n_one * one[2].get(key, 0.0) + n_other * other[2].get(key, 0.0)) / (n_one + n_other) for key in both[2]
    }
    close(both[2], expected)


# --- the step itself


def step(rig: Bench, items: Sequence[Example], **changes: Any) -> Any:
    trainer = rig.trainer
    lay_out = Collator(changes.pop("micro_batch_tokens", 64), trainer.pad_id)
    keywords = {"lr": 0.1, "max_grad_norm": 1.0, "device": CPU}
    return optimiser_step(
        lay_out(items, changes.pop("mismatched", ())),
        changes.pop("objective", None) or rig.objective(),
        trainer.policy,
        trainer.reference,
        trainer.optimiser,
        trainer.parameters,
        CLOCK,
        **{**keywords, **changes},
    )


def weights(rig: Bench) -> Gradients:
    return {name: p.detach().clone() for name, p in rig.trainer.parameters.items()}


def distance(rig: Bench, before: Gradients) -> float:
    moves = (p.detach() - before[name] for name, p in rig.trainer.parameters.items())
    return math.sqrt(sum(float(move.square().sum()) for move in moves))


def test_clipping_bounds_the_update_and_the_norm_shown_is_from_before(bench: Callable[..., Bench]) -> None:
    rig = bench("sft", "optim.name=sgd")
    items, before = rig.items(4), weights(rig)
    done = step(rig, items, max_grad_norm=0.01, lr=1.0)
    moved = distance(rig, before)
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert float(done.grad_norm) > 0.1


def test_zero_means_never_clip(bench: Callable[..., Bench]) -> None:
    rig = bench("sft", "optim.name=sgd")
    items, before = rig.items(4), weights(rig)
    done = step(rig, items, max_grad_norm=0.0, lr=1.0)
    moved = distance(rig, before)
    assert moved == pytest.approx(float(done.grad_norm), rel=1e-4)


def test_tokens_are_counted_without_padding(bench: Callable[..., Bench]) -> None:
    rig = bench("sft")
    items = rig.items(5)
    done = step(rig, items)
    assert done.tokens == sum(encoded.length for item in items for encoded in item.encoded)
    assert done.supervised_tokens == sum(int(encoded.supervised.sum()) for item in items for encoded in item.encoded)


# --- numbers that are not


class Poisoned:
    """The policy, but for the rows with this prompt: their log-probs are `value`."""

    def __init__(self, policy: Policy, token: int, value: float) -> None:
        self.policy, self.token, self.value = policy, token, value

    def __call__(self, batch: Any, request: ForwardRequest = PLAIN) -> Any:
        scores = self.policy(batch, request)
        hit = (batch.input_ids == self.token).any(1)[batch.sequence]
        return replace(scores, log_probs=scores.log_probs * torch.where(hit, self.value, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_that_is_not_finite_changes_no_weight_and_is_named(
    bench: Callable[..., Bench], objective: str, value: float
) -> None:
    rig = bench(objective)
    items = rig.items(6)
    token = next(
        token
        for token in range(3, 61)
        if sum(any(token in encoded.ids for encoded in item.encoded) for item in items) == 1
    )
    bad = next(item.row.id for item in items if any(token in encoded.ids for encoded in item.encoded))
    rig.trainer.policy = Poisoned(rig.trainer.policy, token, value)  # type: ignore[assignment]
    before = weights(rig)
    assert not step(rig, items).good
    assert all(torch.equal(p, before[name]) for name, p in rig.trainer.parameters.items())
    assert all(p.grad is None for p in rig.trainer.parameters.values())
    assert not rig.trainer.optimiser.state
    trainer = rig.trainer
    parts = rig.objective(), trainer.policy, trainer.reference, trainer.parameters
    found = culprits(items, *parts, CLOCK, lay_out=Collator(1, 0), device=CPU)
    assert found == [bad]
    assert all(p.grad is None for p in rig.trainer.parameters.values())
