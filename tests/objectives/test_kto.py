"""KTO against its worked example, and its reference point, which belongs to the whole step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from uft.data.rows import Kind
from uft.objectives.base import StepContext


def at(z):
    return StepContext(kl_baseline={"z": torch.tensor(z, dtype=torch.float64)})


def run(kit, ratios, good, z=0.05, **changes):
    """One-token answers with these log-ratios: (mean loss, slopes, terms)."""
    batch = kit.batch_of([kit.of_length(1, row=i, role=int(g)) for i, g in enumerate(good)])
    told = kit.Told([a - 2.0 for a in ratios])
    terms = kit.preset("kto", **changes)(batch, told, kit.Told([-2.0] * len(ratios)), at(z))
    value = terms["kto"].total / terms["kto"].count
    value.backward()
    return float(value.detach()), told.log_probs.grad.tolist(), terms


@pytest.mark.parametrize(("ratio", "good", "loss"), [(0.2, True, 0.496250), (-0.6, False, 0.483756)])
def test_worked_example(kit, ratio, good, loss):
    value, [slope], _ = run(kit, [ratio], [good])
    assert value == pytest.approx(loss, abs=1e-6)
    assert slope == pytest.approx((-1 if good else 1) * 0.1 * loss * (1 - loss), abs=1e-7)


def test_both_sides_of_the_toy_pair_and_what_is_shown(kit):
    value, _, terms = run(kit, [0.2, -0.6], [True, False])
    assert value == pytest.approx((0.496250 + 0.483756) / 2, abs=1e-6)
    assert float(terms["reference_point"].total / terms["reference_point"].count) == pytest.approx(0.05)
    assert float(terms["implicit_reward"].total) == pytest.approx(0.02 - 0.06)
    assert float(terms["margin"].count) == 0, "answers of different rows are no pair"


def test_weights_multiply_the_sum_and_never_the_count(kit):
    plain, slopes, _ = run(kit, [0.2, -0.6], [True, False])
    weighted, pulled, terms = run(kit, [0.2, -0.6], [True, False], desirable_weight=1.3, undesirable_weight=0.5)
    assert weighted == pytest.approx((1.3 * 0.496250 + 0.5 * 0.483756) / 2, abs=1e-6)
    assert pulled == pytest.approx([1.3 * slopes[0], 0.5 * slopes[1]], rel=1e-6)
    assert float(terms["kto"].count) == 2
    assert plain != pytest.approx(weighted)


def test_digits_are_kept_where_answers_are_far_ahead(kit):
    value, [slope], _ = run(kit, [700.0], [True], z=0.0)
    assert value == pytest.approx(math.exp(-70), rel=1e-9)
    assert slope == pytest.approx(-0.1 * math.exp(-70), rel=1e-9)


# --- the reference point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [-3.0, -0.01])
def test_it_is_never_below_zero(kit, z):
    assert run(kit, [0.2, -0.6], [True, False], z=z)[:2] == run(kit, [0.2, -0.6], [True, False], z=0.0)[:2]


def test_a_higher_one_makes_good_answers_worse_and_bad_ones_better(kit):
    good, bad = ([run(kit, [0.3], [side], z=z)[0] for z in (0.0, 0.5, 2.0)] for side in (True, False))
    assert good == sorted(good)
    assert bad == sorted(bad, reverse=True)


def test_it_is_the_mean_over_all_mismatched_completions_whatever_their_batches(kit, policy, reference):
    objective, rows = kit.preset("kto"), kit.one_of_each()
    [whole] = kit.mismatched_for(objective, rows)
    by_hand = whole.sum(policy(whole).log_probs - reference(whole).log_probs)
    assert by_hand.numel() == len(kit.batch_for(objective, rows).role) == 14
    for size in (1, 3, 100):
        batches = kit.mismatched_for(objective, rows, size)
        found = kit.step_context(objective, batches, policy, reference).kl_baseline["z"]
        assert float(found) == pytest.approx(float(by_hand.mean().detach()))
        assert not found.requires_grad


def test_micro_batches_change_neither_value_nor_gradient_which_a_z_of_their_own_would(kit, policy, reference):
    """The policy and the reference changed places where that makes z positive: below zero it would not matter."""
    rows = kit.one_of_each()
    [whole] = kit.mismatched_for(kit.preset("kto"), rows)
    if float(whole.sum(policy(whole).log_probs - reference(whole).log_probs).mean().detach()) < 0:
        policy, reference = reference, policy

    def outcome(batches, unrelated):
        return kit.step(objective, batches, policy, policy.parameters, reference, unrelated)

    objective = kit.preset("kto", beta=0.5)
    used = kit.used(objective, rows)
    one = outcome([kit.batch_for(objective, used)], kit.mismatched_for(objective, used))
    assert one.terms["reference_point"] > 0
    many = outcome([kit.batch_for(objective, [row]) for row in used], kit.mismatched_for(objective, used, 1))
    assert many.terms == pytest.approx(one.terms)
    for a, b in zip(one.gradients, many.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    own = [kit.mismatched_for(objective, part) for part in (used[:4], used[4:])]
    points = [float(kit.step_context(objective, batches, policy, reference).kl_baseline["z"]) for batches in own]
    assert points[0] != pytest.approx(points[1])


def test_no_gradient_flows_into_it(kit, policy, reference):
    objective, rows = kit.preset("kto"), [row for row in kit.one_of_each() if row.kind is Kind.BINARY]
    batch = kit.batch_for(objective, rows)
    z = policy.head.sum() * 0 + 0.7  # a function of the weights, as it would be without a stop

    def gradients(context):
        loss = objective(batch, policy, reference, context)["kto"]
        return torch.autograd.grad(loss.total / loss.count, policy.parameters)

    for a, b in zip(gradients(StepContext(kl_baseline={"z": z})), gradients(at(0.7)), strict=True):
        torch.testing.assert_close(a, b)
    leaf = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    objective(batch, policy, reference, StepContext(kl_baseline={"z": leaf}))["kto"].total.backward()
    assert leaf.grad is None


def test_a_step_of_a_single_row_has_none(kit, policy, reference):
    objective, rows = kit.preset("kto"), kit.one_of_each()[1:2]
    assert kit.mismatched_for(objective, rows) == []
    batch = kit.batch_for(objective, rows)
    loss = objective(batch, policy, reference, kit.step_context(objective, [], policy, reference))
    ratio = batch.sum(policy(batch).log_probs - reference(batch).log_probs)
    by_hand = torch.sigmoid(-0.1 * ratio[0]) + torch.sigmoid(0.1 * ratio[1])
    assert float(loss["kto"].total.detach()) == pytest.approx(float(by_hand.detach()))
    assert float(loss["reference_point"].total) == 0


def test_at_the_reference_it_is_zero_and_every_answer_a_half(kit, policy):
    objective, rows = kit.preset("kto"), kit.one_of_each()
    context = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, policy)
    assert float(context.kl_baseline["z"]) == 0
    loss = objective(kit.batch_for(objective, rows), policy, policy, context)["kto"]
    assert float(loss.total.detach() / loss.count) == pytest.approx(0.5)


def test_mismatched_completions_may_bring_the_reference_as_a_column(kit, policy, reference):
    objective = kit.preset("kto")
    [batch] = kit.mismatched_for(objective, kit.one_of_each())
    cached = replace(batch, columns={"reference": reference(batch).log_probs.detach()})
    direct, found = (objective.baseline_terms(b, policy, r)["z"] for b, r in ((batch, reference), (cached, None)))
    assert float(found.total.detach()) == pytest.approx(float(direct.total.detach()))
    assert float(found.count) == 14


def test_it_needs_what_it_needs(kit):
    objective = kit.preset("kto")
    assert (objective.needs.reference, objective.needs.mismatched) == (True, True)
    assert [key for key, _ in kit.preset("kto", reduction="token").problems()] == ["reduction"]


def test_a_completion_without_targets_is_not_counted(kit):
    batch = kit.batch_of([kit.of_length(0, row=0), kit.of_length(1, row=1)])
    terms = kit.preset("kto")(batch, kit.Told([-1.8]), kit.Told([-2.0]), at(0.05))
    assert float(terms["kto"].count) == 1
    assert float(terms["kto"].total.detach()) == pytest.approx(0.496250, abs=1e-6)
    assert float(terms["reference_point"].total) == pytest.approx(0.05)
