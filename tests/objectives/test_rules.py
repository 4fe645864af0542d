"""Rules 1 to 5 and 7, which hold for every objective on disk, on a policy small enough to differentiate exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from toys import PRESETS

from uft.data.rows import Kind
from uft.objectives.base import StepContext

VARIANTS = {
    "sft per sequence": ("sft", {"reduction": "sequence"}),
    "dynamic_ft per sequence": ("dynamic_ft", {"reduction": "sequence"}),
    "anchored_sft per sequence": ("anchored_sft", {"reduction": "sequence", "alpha": 2.0}),
    "ift per token": ("ift", {"reduction": "token"}),
    "ift eq21": ("ift", {"propagation": "eq21"}),
    "ift alg1": ("ift", {"propagation": "alg1"}),
    "ift none": ("ift", {"propagation": "none"}),
    "ift without lam": ("ift", {"lam": 0.0, "embed_grad": True}),
    "ift live embeddings": ("ift", {"embed_grad": True, "detach_weights": True}),
    "uft beta": ("uft", {"beta": 0.3}),
    "uft bce": ("uft", {"beta": 0.3, "loss": "bce", "pairs": "scores", "kind_weights": {"scored": 0.5}}),
    "uft per token": ("uft", {"beta": 0.3, "length_normalize": True}),
    "dpo + sft": ("cdpo", {"sft_weight": 0.5}),
    "dpo + sft per token": ("cdpo", {"sft_weight": 0.5, "reduction": "token"}),
    "asft + sft": ("asft", {"sft_weight": 0.5}),
    "ipo per token": ("ipo", {"length": "mean"}),
    "rpo averaged": ("rpo", {"nll_norm": "mean", "beta": 0.5, "eta": 0.2}),
    "gipo substitute": ("gipo_soft", {"form": "substitute"}),
    "irft hinge": ("irft", {"link": "hinge"}),
    "irft linear": ("irft", {"link": "linear"}),
    "ld_dpo as a whole": ("ld_dpo", {"alpha": 0.0, "sft_weight": 0.3}),
    "kto uneven": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    "f_sft per token": ("f_sft", {"ratio": "mean"}),
    **{f"f_sft {f}": ("f_sft", {"f": f}) for f in ("total_variation", "hellinger", "reverse_kl", "forward_kl")},
    "f_sft jensen_shannon": ("f_sft", {"f": "jensen_shannon"}),
    "per_kind weighted": ("per_kind", {"weights": {"preference": 0.5, "binary": 2.0, "negatives": 0.0}}),
}
EVERY = {**{name: (name, {}) for name in PRESETS}, **VARIANTS}
every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)


@pytest.fixture
def fresh(kit):
    """fresh(case) -> the objective, its state as at the start of a run."""
    return lambda case: kit.preset(case[0], **case[1])


@pytest.fixture
def scene(kit, fresh, policy, reference):
    """scene(case) -> (objective, batch of all kinds, clock that knows its mismatched completions)."""

    def make(case):
        objective, rows = fresh(case), kit.one_of_each()
        known = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, reference)
        return objective, kit.batch_for(objective, rows), known

    return make


def assert_same(one, another):
    assert one.terms == pytest.approx(another.terms, rel=1e-9, abs=1e-12)
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def weighted(loss):
    return sum(term.weight * term.total for term in loss.values() if term.weight)


# --- 1: sums and counts ----------------------------------------------------------------------------------------------


@every
def test_counts_are_known_from_the_batch_alone(scene, policy, reference, case):
    objective, batch, context = scene(case)
    counts = objective.counts(batch)
    loss = objective(batch, policy, reference, context)
    assert counts.keys() == loss.keys()
    for name, term in loss.items():
        assert torch.equal(counts[name], term.count), name
        assert term.count.shape == term.total.shape == ()
        assert term.count.dtype is torch.float32
        if "." not in name:  # a part of per_kind that weighs nothing keeps its graph
            assert term.total.requires_grad == (term.weight != 0), name
    assert "nll" in loss
    assert objective.headline == "" or objective.headline in loss


# --- 2: micro-batches, padding, packing, order -----------------------------------------------------------------------


@every
def test_layout_changes_nothing(kit, fresh, policy, reference, case):
    rows = kit.one_of_each()
    used = kit.used(fresh(case), rows)

    def outcome(parts, size=100, **how):
        """One step of `used`, cut into parts; its mismatched completions are `size` in a batch."""
        objective = fresh(case)
        batches = [kit.batch_for(objective, part, **how) for part in parts]
        others = kit.mismatched_for(objective, used, size, **how)
        return kit.step(objective, batches, policy, policy.parameters, reference, others)

    def cut(size):
        return [used[i : i + size] for i in range(0, len(used), size)]

    whole = outcome([used])
    assert any(gradient.any() for gradient in whole.gradients)
    assert_same(whole, outcome(cut(1), size=1))
    assert_same(whole, outcome(cut(3), size=2))
    assert_same(whole, outcome([used], extra=5))
    assert_same(whole, outcome([used], layout="packed"))
    assert_same(whole, outcome([used], layout="packed", extra=3))
    assert_same(whole, outcome([used[::-1]]))


def test_an_example_drawn_twice_in_a_step_does_not_mind_micro_batches(kit, policy, reference):
    rows = [r for r in kit.one_of_each() if r.kind in (Kind.NEGATIVES, Kind.PREFERENCE)]
    one, apart = kit.preset("dft"), kit.preset("dft")
    twice = [*rows, *rows]
    together = kit.step(one, [kit.batch_for(one, twice)], policy, policy.parameters, reference)
    parts = [kit.batch_for(apart, [row]) for row in twice]
    assert_same(together, kit.step(apart, parts, policy, policy.parameters, reference))
    assert torch.equal(one.state["log_u"], apart.state["log_u"])


# --- 3: float32 and extremes -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_the_extremes_and_float32(kit, fresh, case, dtype):
    rows = kit.one_of_each()
    batch, unrelated = kit.batch_for(fresh(case), rows), kit.mismatched_for(fresh(case), rows)
    for log_prob, other in product((-1e4, -1e-7, 0.0), (-1e4, -1e-7)):
        objective, policy, reference = fresh(case), kit.Told(log_prob, dtype), kit.Told(other, dtype)
        loss = objective(batch, policy, reference, kit.step_context(objective, unrelated, policy, reference))
        for name, term in loss.items():
            assert torch.isfinite(term.total), (name, log_prob, other)
            assert term.total.dtype is torch.float32, name
        weighted(loss).backward()
        assert torch.isfinite(policy.log_probs.grad).all(), (log_prob, other)


# --- 4: where no gradient belongs ------------------------------------------------------------------------------------


@every
def test_no_gradient_into_the_reference(scene, policy, reference, case):
    objective, batch, context = scene(case)
    weighted(objective(batch, policy, reference, context)).backward()
    assert reference.embedding.grad is None
    assert reference.head.grad is None
    assert policy.head.grad is not None


@every
def test_no_gradient_into_a_column_and_the_column_equals_the_forward(scene, fresh, policy, reference, case):
    objective, batch, context = scene(case)
    direct = objective(batch, policy, reference if objective.needs.reference else None, context)
    column = reference(batch).log_probs.detach().requires_grad_()
    whole = reference if objective.needs.distributions else None  # no column can stand for those
    loss = fresh(case)(replace(batch, columns={"reference": column}), policy, whole, context)
    assert {n: float(t.total.detach()) for n, t in loss.items()} == {
        n: float(t.total.detach()) for n, t in direct.items()
    }
    weighted(loss).backward()
    assert column.grad is None


@every
def test_no_gradient_into_an_annotation_or_a_survey(scene, policy, reference, case):
    objective, batch, context = scene(case)
    notes = {name: values.clone().requires_grad_() for name, values in batch.annotations.items()}
    kl_baseline = {name: value.clone().requires_grad_() for name, value in context.kl_baseline.items()}
    loss = objective(replace(batch, annotations=notes), policy, reference, replace(context, kl_baseline=kl_baseline))
    weighted(loss).backward()
    assert notes.keys() >= {"baseline_logp", "soft_label"}
    assert [name for name, values in {**notes, **kl_baseline}.items() if values.grad is not None] == []


def test_ift_gradient_flows_through_its_weights_unless_detached(kit, policy):
    batch = kit.batch_of([kit.Seq([0, 3, 1, 5, 2], [False, True, True, True, True])])
    through = kit.step(kit.preset("ift"), [batch], policy, [policy.head])
    detached = kit.step(kit.preset("ift", detach_weights=True), [batch], policy, [policy.head])
    assert through.loss == pytest.approx(detached.loss)
    assert not torch.allclose(through.gradients[0], detached.gradients[0])


@pytest.mark.parametrize("name", ["dft", "dft2"])
def test_dft_weights_are_constants(kit, name):
    """The slope on a negative is w_j / B exactly: the gradient of w itself would add to it."""
    objective = kit.preset(name)
    batch = kit.batch_of([kit.of_length(1), kit.of_length(1, role=0), kit.of_length(1, role=0)])
    policy = kit.Told([-2.0, -3.0, -1.5])
    loss = objective(batch, policy, kit.Told([-2.5, -2.0, -2.0]), StepContext())
    loss["surrogate"].total.backward()
    slopes = policy.log_probs.grad
    assert float(slopes[1:].sum()) == pytest.approx(float(loss["weight"].total) / 2)
    value = 2.0 + float(slopes[1]) * -3.0 + float(slopes[2]) * -1.5
    assert float(loss["surrogate"].total.detach()) == pytest.approx(value)


# --- 5: policy = reference -------------------------------------------------------------------------------------------


@every
def test_values_at_policy_equals_reference_are_foretold(kit, fresh, policy, case):
    objective, rows = fresh(case), kit.one_of_each()
    batch = kit.batch_for(objective, rows)
    context = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, policy)
    loss = objective(batch, policy, policy, context)
    for name, total in objective.at_reference(batch).items():
        assert float(loss[name].total.detach()) == pytest.approx(float(total), abs=1e-5), name


AT_REFERENCE = [
    *((name, {}, Kind.PREFERENCE, "pair", math.log(2)) for name in ("dpo", "cdpo", "robust_dpo", "dpop", "rpo")),
    *((name, {}, Kind.PREFERENCE, "pair", math.log(2)) for name in ("gdpo_soft", "ld_dpo", "irft")),
    ("cdpo", {"beta": 3.0, "label_smoothing": 0.2}, Kind.PREFERENCE, "pair", math.log(2)),
    ("hinge", {}, Kind.PREFERENCE, "pair", 1.0),
    ("irft", {"link": "linear"}, Kind.PREFERENCE, "pair", 0.0),
    ("ipo", {}, Kind.PREFERENCE, "pair", 25.0),
    ("ipo", {"tau": 0.5, "length": "mean"}, Kind.PREFERENCE, "pair", 1.0),
    ("nca", {}, Kind.PREFERENCE, "pair", 2 * math.log(2)),
    ("gropo_soft", {}, Kind.PREFERENCE, "pair", 8 / 9 * (math.log(2) + 2 * 0.5)),
    ("kto", {}, Kind.BINARY, "kto", 0.5),
    ("kto", {"desirable_weight": 1.2, "undesirable_weight": 0.8}, Kind.PREFERENCE, "kto", 0.5),
    ("f_sft", {}, Kind.DEMONSTRATION, "f_sft", 0.0),
    ("anchored_sft", {}, Kind.DEMONSTRATION, "kl", 0.0),
    ("uft", {}, Kind.PREFERENCE, "uft", math.log(2)),
    ("uft", {"loss": "bce"}, Kind.SCORED, "uft", math.log(2)),
    ("uft", {}, Kind.DEMONSTRATION, "uft", 0.25),
    ("uft", {}, Kind.SCORED, "uft", (0.0625 + 0.0625 + 0) / 3),
    ("uft", {"pairs": "scores"}, Kind.PREFERENCE, "uft", 0.25),
    ("dft", {}, Kind.NEGATIVES, "weight", 1.0),
    ("per_kind", {}, Kind.PREFERENCE, "preference.pair", math.log(2)),
    ("per_kind", {"weights": {"binary": 3.0}}, Kind.BINARY, "binary.kto", 0.5),
]


@pytest.mark.parametrize(("name", "changes", "kind", "term", "mean"), AT_REFERENCE)
def test_values_at_policy_equals_reference(kit, policy, name, changes, kind, term, mean):
    objective, rows = kit.preset(name, **changes), [row for row in kit.one_of_each() if row.kind is kind]
    batch = kit.batch_for(objective, rows)
    context = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, policy)
    found = objective(batch, policy, policy, context)[term]
    assert float(found.total.detach() / found.count) == pytest.approx(mean, abs=1e-7)
    foretold = objective.at_reference(batch)[term]
    assert float(foretold / found.count) == pytest.approx(mean, abs=1e-6)


def test_every_objective_with_a_reference_foretells_something(kit):
    for name in PRESETS:
        objective = kit.preset(name)
        foretold = objective.at_reference(kit.batch_for(objective, kit.one_of_each()))
        assert bool(foretold) == objective.needs.reference, name


@pytest.mark.parametrize("name", PRESETS)
def test_a_policy_that_is_not_the_reference_is_noticed(scene, policy, reference, name):
    objective, batch, context = scene((name, {}))
    loss, foretold = objective(batch, policy, reference, context), objective.at_reference(batch)
    moved = [n for n, total in foretold.items() if abs(float(loss[n].total.detach()) - float(total)) > 1e-3]
    assert bool(moved) == objective.needs.reference


# --- 7: one measure for all ------------------------------------------------------------------------------------------


def test_nll_is_the_same_measure_under_every_objective(kit, fresh, policy, reference):
    """On rows of which every objective takes the good completion, and in plain log-probs whatever it trains on."""
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    found = {}
    for name, case in EVERY.items():
        objective = fresh(case)
        batch, others = kit.batch_for(objective, rows), kit.mismatched_for(objective, rows)
        terms = kit.step(objective, [batch], policy, [policy.head], reference, others).terms
        found.setdefault(round(terms["nll"], 9), []).append(name)
    assert len(found) == 1, found
