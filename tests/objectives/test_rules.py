"""Rules 1 to 6, which hold for every objective, on a policy small enough to differentiate exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from uft.data.rows import Kind
from uft.objectives import make
from uft.objectives.base import Clock

EVERY = {
    "sft": {"method": "nll"},
    "sft per sequence": {"method": "nll", "reduction": "sequence"},
    "ift": {"method": "ift"},
    "ift per token": {"method": "ift", "reduction": "token"},
    "ift eq21": {"method": "ift", "propagation": "eq21"},
    "ift alg1": {"method": "ift", "propagation": "alg1"},
    "ift none": {"method": "ift", "propagation": "none"},
    "ift without lam": {"method": "ift", "lam": 0.0, "embed_grad": True},
    "ift live embeddings": {"method": "ift", "embed_grad": True, "detach_weights": True},
    "uft": {"method": "uft", "beta": 0.3},
    "uft bce": {"method": "uft", "beta": 0.3, "loss": "bce", "pairs": "scores", "kind_weights": {"scored": 0.5}},
    "uft per token": {"method": "uft", "beta": 0.3, "length_normalize": True},
    "dft": {"method": "dft"},
    "dft2": {"method": "dft", "tau": 0.3, "gamma": 0.9, "length_normalize": True},
    "dpo": {"method": "pairwise"},
    "dpo + sft": {"method": "pairwise", "sft_weight": 0.5, "label_smoothing": 0.1},
    "dpo + sft per token": {"method": "pairwise", "sft_weight": 0.5, "reduction": "token"},
}
every = pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)


def fresh(settings, examples=16):
    objective = make(settings)
    objective.start(examples)
    return objective


@pytest.fixture
def policy(kit):
    return kit.Toy.random(0)


@pytest.fixture
def reference(kit):
    return kit.Toy.random(1)


def assert_same(one, another):
    assert one.terms == pytest.approx(another.terms, rel=1e-9, abs=1e-12)
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# --- 1: sums and counts ----------------------------------------------------------------------------------------------


@every
def test_counts_are_known_from_the_batch_alone(kit, policy, reference, settings):
    objective = fresh(settings)
    batch = kit.batch_for(objective, kit.one_of_each())
    counts = objective.counts(batch)
    loss = objective(batch, policy, reference, Clock())
    assert counts.keys() == loss.keys()
    for name, term in loss.items():
        assert torch.equal(counts[name], term.count), name
        assert term.count.shape == term.total.shape == ()
        assert term.count.dtype is torch.float32
        assert term.total.requires_grad == (term.weight != 0), name
    assert "nll" in loss
    assert objective.headline == "" or objective.headline in loss


# --- 2: micro-batches, padding, packing, order -----------------------------------------------------------------------


@every
def test_layout_changes_nothing(kit, policy, reference, settings):
    rows = kit.one_of_each()

    def outcome(batches, objective):
        return kit.step(objective, batches, policy, policy.parameters, reference)

    def all_at_once(rows=rows, **how):
        objective = fresh(settings)
        return outcome([kit.batch_for(objective, rows, **how)], objective)

    def in_parts(size):
        objective = fresh(settings)
        used = [r for r in rows if (v := objective.views.get(r.kind)) and v(r, 0)]
        return outcome([kit.batch_for(objective, used[i : i + size]) for i in range(0, len(used), size)], objective)

    whole = all_at_once()
    assert any(gradient.any() for gradient in whole.gradients)
    assert_same(whole, in_parts(1))
    assert_same(whole, in_parts(3))
    assert_same(whole, all_at_once(extra=5))
    assert_same(whole, all_at_once(layout="packed"))
    assert_same(whole, all_at_once(layout="packed", extra=3))
    assert_same(whole, all_at_once(rows[::-1]))


def test_an_example_drawn_twice_in_a_step_does_not_mind_micro_batches(kit, policy, reference):
    rows = [r for r in kit.one_of_each() if r.kind in (Kind.NEGATIVES, Kind.PREFERENCE)]
    one, apart = fresh({"method": "dft"}), fresh({"method": "dft"})
    twice = [*rows, *rows]
    together = kit.step(one, [kit.batch_for(one, twice)], policy, policy.parameters, reference)
    parts = [kit.batch_for(apart, [row]) for row in twice]
    assert_same(together, kit.step(apart, parts, policy, policy.parameters, reference))
    assert torch.equal(one.state["log_u"], apart.state["log_u"])


# --- 3: float32 and extremes -----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_prob", [-1e4, -1e-7, 0.0])
@pytest.mark.parametrize("other", [-1e4, -1e-7])
def test_finite_at_the_extremes_and_float32(kit, settings, dtype, log_prob, other):
    objective = fresh(settings)
    batch = kit.batch_for(objective, kit.one_of_each())
    policy = kit.Told(torch.full((batch.target_ids.numel(),), log_prob), dtype=dtype)
    reference = kit.Told(torch.full((batch.target_ids.numel(),), other), dtype=dtype)
    loss = objective(batch, policy, reference, Clock())
    for name, term in loss.items():
        assert torch.isfinite(term.total), name
        assert term.total.dtype is torch.float32, name
    sum(term.total for term in loss.values() if term.weight).backward()
    assert torch.isfinite(policy.log_probs.grad).all()


# --- 4: where no gradient belongs ------------------------------------------------------------------------------------


@every
def test_no_gradient_into_the_reference(kit, policy, reference, settings):
    objective = fresh(settings)
    batch = kit.batch_for(objective, kit.one_of_each())
    loss = objective(batch, policy, reference, Clock())
    sum(term.total for term in loss.values() if term.weight).backward()
    assert reference.embedding.grad is None
    assert reference.head.grad is None
    assert policy.head.grad is not None


@every
def test_no_gradient_into_a_column_and_the_column_equals_the_forward(kit, policy, reference, settings):
    objective, cached = fresh(settings), fresh(settings)
    batch = kit.batch_for(objective, kit.one_of_each())
    column = reference(batch).log_probs.detach().requires_grad_()
    direct = objective(batch, policy, reference, Clock())
    loss = cached(replace(batch, columns={"reference": column}), policy, None, Clock())
    assert {n: float(t.total.detach()) for n, t in loss.items()} == {
        n: float(t.total.detach()) for n, t in direct.items()
    }
    sum(term.total for term in loss.values() if term.weight).backward()
    assert column.grad is None


def test_ift_gradient_flows_through_its_weights_unless_detached(kit, policy):
    batch = kit.batch_of([kit.Seq([0, 3, 1, 5, 2], [False, True, True, True, True])])
    through = kit.step(fresh({"method": "ift"}), [batch], policy, [policy.head])
    detached = kit.step(fresh({"method": "ift", "detach_weights": True}), [batch], policy, [policy.head])
    assert through.loss == pytest.approx(detached.loss)
    assert not torch.allclose(through.gradients[0], detached.gradients[0])


@pytest.mark.parametrize("length_normalize", [False, True])
def test_dft_weights_are_constants(kit, length_normalize):
    """The slope on a negative is w_j / B exactly: the gradient of w itself would add to it."""
    objective = fresh({"method": "dft", "length_normalize": length_normalize})
    batch = kit.batch_of([kit.of_length(1), kit.of_length(1, role=0), kit.of_length(1, role=0)])
    policy = kit.Told([-2.0, -3.0, -1.5])
    loss = objective(batch, policy, kit.Told([-2.5, -2.0, -2.0]), Clock())
    loss["surrogate"].total.backward()
    slopes = policy.log_probs.grad
    assert float(slopes[1:].sum()) == pytest.approx(float(loss["weight"].total) / 2)
    value = 2.0 + float(slopes[1]) * -3.0 + float(slopes[2]) * -1.5
    assert float(loss["surrogate"].total.detach()) == pytest.approx(value)


# --- 5: policy = reference -------------------------------------------------------------------------------------------


@every
def test_values_at_policy_equals_reference_are_foretold(kit, policy, settings):
    objective = fresh(settings)
    batch = kit.batch_for(objective, kit.one_of_each())
    loss = objective(batch, policy, policy, Clock())
    for name, total in objective.at_reference(batch).items():
        assert float(loss[name].total.detach()) == pytest.approx(float(total), abs=1e-5), name


@pytest.mark.parametrize(
    ("settings", "kind", "term", "mean"),
    [
        ({"method": "pairwise"}, Kind.PREFERENCE, "pair", math.log(2)),
        ({"method": "pairwise", "beta": 3.0, "label_smoothing": 0.2}, Kind.PREFERENCE, "pair", math.log(2)),
        ({"method": "uft"}, Kind.PREFERENCE, "uft", math.log(2)),
        ({"method": "uft", "loss": "bce"}, Kind.SCORED, "uft", math.log(2)),
        ({"method": "uft"}, Kind.DEMONSTRATION, "uft", 0.25),
        ({"method": "uft"}, Kind.SCORED, "uft", (0.0625 + 0.0625 + 0) / 3),
        ({"method": "uft", "pairs": "scores"}, Kind.PREFERENCE, "uft", 0.25),
        ({"method": "dft"}, Kind.NEGATIVES, "weight", 1.0),
    ],
)
def test_values_at_policy_equals_reference(kit, policy, settings, kind, term, mean):
    objective = fresh(settings)
    batch = kit.batch_for(objective, [row for row in kit.one_of_each() if row.kind is kind])
    found = objective(batch, policy, policy, Clock())[term]
    assert float(found.total.detach() / found.count) == pytest.approx(mean)
    foretold = objective.at_reference(batch)[term]
    assert float(foretold / found.count) == pytest.approx(mean)


def test_a_policy_that_is_not_the_reference_is_noticed(kit, policy, reference):
    for settings in ({"method": "pairwise"}, {"method": "uft"}, {"method": "dft"}):
        objective = fresh(settings)
        batch = kit.batch_for(objective, kit.one_of_each())
        loss = objective(batch, policy, reference, Clock())
        foretold = objective.at_reference(batch)
        assert foretold
        assert any(abs(float(loss[name].total.detach()) - float(total)) > 1e-3 for name, total in foretold.items())


# --- 6: reductions ---------------------------------------------------------------------------------------------------


def both(kit, policy, reference, one, another, rows):
    outcomes = []
    for settings in (one, another):
        objective = fresh(settings)
        outcomes.append(kit.step(objective, [kit.batch_for(objective, rows)], policy, policy.parameters, reference))
    return outcomes


def assert_same_loss(one, another):
    assert one.loss == pytest.approx(another.loss, rel=1e-9)
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


SFT = {"method": "nll", "reduction": "sequence"}


def test_ift_without_lam_and_gamma_is_sft(kit, policy, reference):
    plain = {"method": "ift", "lam": 0.0, "gamma": 0.0}
    rows = kit.one_of_each()
    assert_same_loss(*both(kit, policy, reference, {**plain, "embed_grad": True}, SFT, rows))
    ift, sft = both(kit, policy, reference, plain, SFT, rows)
    torch.testing.assert_close(ift.gradients[1], sft.gradients[1])
    assert not ift.gradients[0].any(), "input embeddings are the one exception"


def test_dft_without_negatives_is_sft(kit, policy, reference):
    rows = kit.one_of_each()
    assert_same_loss(
        *both(kit, policy, reference, {"method": "dft", "negatives": 0, "length_normalize": True}, SFT, rows)
    )
    summed = fresh({"method": "dft", "negatives": 0})
    batch = kit.batch_for(summed, rows)
    dft = kit.step(summed, [batch], policy, policy.parameters, reference)
    sequences = float(summed.counts(batch)["surrogate"])
    sft = kit.step(fresh({"method": "nll"}), [batch], policy, policy.parameters)
    tokens = float(make({"method": "nll"}).counts(batch)["sft"])
    assert dft.loss == pytest.approx(sft.loss * tokens / sequences)
    for a, b in zip(dft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, b * tokens / sequences)


def test_uft_on_preferences_alone_is_dpo(kit, policy, reference):
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    one, another = {"method": "uft", "beta": 0.3}, {"method": "pairwise", "beta": 0.3}
    assert_same_loss(*both(kit, policy, reference, one, another, rows))


@pytest.mark.parametrize("index", [0, 7])
def test_uft_on_instructions_is_parallel_to_sft_row_by_row(kit, policy, reference, index):
    beta, row = 0.3, kit.one_of_each()[index]
    uft, sft = both(kit, policy, reference, {"method": "uft", "beta": beta}, {"method": "nll"}, [row])
    objective = fresh({"method": "uft", "beta": beta})
    batch = kit.batch_for(objective, [row])
    s = 1 / (1 + math.exp(-float(objective(batch, policy, reference, Clock())["implicit_reward"].total)))
    scale = 2 * (1 - s) ** 2 * s * beta * batch.target_ids.numel()
    for a, b in zip(uft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, scale * b)


@pytest.mark.parametrize("name", ["sft per sequence", "ift", "uft", "dft", "dpo"])
def test_the_gradient_of_a_mixture_is_the_weighted_sum_of_its_parts(kit, policy, reference, name):
    objective = fresh(EVERY[name])
    used = [row for row in kit.one_of_each() if (view := objective.views.get(row.kind)) and view(row, 0)]
    main = next(n for n, t in objective(kit.batch_for(objective, used), policy, reference, Clock()).items() if t.weight)

    def outcome(rows):
        objective = fresh(EVERY[name])
        batch = kit.batch_for(objective, rows)
        result = kit.step(objective, [batch], policy, policy.parameters, reference)
        return result.gradients, float(objective.counts(batch)[main])

    whole, units = outcome(used)
    parts = [outcome([row]) for row in used]
    assert sum(n for _, n in parts) == units
    for k, gradient in enumerate(whole):
        torch.testing.assert_close(gradient, sum(g[k] * n for g, n in parts) / units)


def test_nll_is_the_same_measure_under_every_objective(kit, policy, reference):
    """On rows of which every objective takes the good completion, and in plain log-probs whatever it trains on."""
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    found = set()
    for settings in EVERY.values():
        objective = fresh(settings)
        batch = kit.batch_for(objective, rows)
        found.add(round(kit.step(objective, [batch], policy, [policy.head], reference).terms["nll"], 9))
    assert len(found) == 1
