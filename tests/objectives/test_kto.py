"""KTO against its worked example, and its reference point, which belongs to the whole step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import toys as kit
from toys import of_length, preset, told

from uft.data.rows import Kind
from uft.objectives.base import StepContext


def at(z):
    return StepContext(kl_baseline={"z": torch.tensor(z, dtype=torch.float64)})


def run(ratios, good, z=0.05, **changes):
    """One-token answers with these log-ratios: (mean loss, slopes, means of the terms)."""
    seqs = [of_length(1, row=i, role=int(g)) for i, g in enumerate(good)]
    return told(preset("kto", **changes), seqs, [a - 2.0 for a in ratios], [-2.0] * len(ratios), at(z))


def test_worked_example_of_both_sides_and_what_is_shown():
    for ratio, good, loss in ((0.2, True, 0.496250), (-0.6, False, 0.483756)):
        value, [slope], _ = run([ratio], [good])
        assert value == pytest.approx(loss, abs=1e-6)
        assert slope == pytest.approx((-1 if good else 1) * 0.1 * loss * (1 - loss), abs=1e-7)
    value, slopes, means = run([0.2, -0.6], [True, False])
    assert value == pytest.approx((0.496250 + 0.483756) / 2, abs=1e-6)
    assert (means["reference_point"], means["implicit_reward"]) == pytest.approx((0.05, (0.02 - 0.06) / 2))
    assert "margin" not in means, "answers of different rows are no pair"
    weighted, pulled, _ = run([0.2, -0.6], [True, False], desirable_weight=1.3, undesirable_weight=0.5)
    assert weighted == pytest.approx((1.3 * 0.496250 + 0.5 * 0.483756) / 2, abs=1e-6), "the sum, never the count"
    assert pulled == pytest.approx([1.3 * slopes[0], 0.5 * slopes[1]], rel=1e-6)


def test_digits_are_kept_where_answers_are_far_ahead():
    value, [slope], _ = run([700.0], [True], z=0.0)
    assert value == pytest.approx(math.exp(-70), rel=1e-9)
    assert slope == pytest.approx(-0.1 * math.exp(-70), rel=1e-9)


# --- the reference point


def test_it_is_never_below_zero_and_a_higher_one_makes_good_answers_worse_and_bad_ones_better():
    for z in (-3.0, -0.01):
        assert run([0.2, -0.6], [True, False], z=z) == run([0.2, -0.6], [True, False], z=0.0)
    good, bad = ([run([0.3], [side], z=z)[0] for z in (0.0, 0.5, 2.0)] for side in (True, False))
    assert good == sorted(good)
    assert bad == sorted(bad, reverse=True)


def test_it_is_the_mean_over_all_mismatched_completions_whatever_their_batches(policy, reference):
    """A column may stand for the reference."""
    objective, rows = preset("kto"), kit.one_of_each()
    [whole] = kit.mismatched_for(objective, rows)
    by_hand = whole.sum(policy(whole).log_probs - reference(whole).log_probs)
    assert by_hand.numel() == len(kit.batch_for(objective, rows).role) == 14
    for size in (1, 3, 100):
        batches = kit.mismatched_for(objective, rows, size)
        found = kit.step_context(objective, batches, policy, reference).kl_baseline["z"]
        assert float(found) == pytest.approx(float(by_hand.mean().detach()))
        assert not found.requires_grad
    cached = replace(whole, columns={"reference": reference(whole).log_probs.detach()})
    z = objective.baseline_terms(cached, policy, None)["z"]
    assert float(z.total.detach()) == pytest.approx(float(by_hand.sum().detach()))
    assert float(z.count) == 14


def test_no_gradient_flows_into_it(policy, reference):
    objective, rows = preset("kto"), [row for row in kit.one_of_each() if row.kind is Kind.BINARY]
    batch = kit.batch_for(objective, rows)
    z = policy.head.sum() * 0 + 0.7  # a function of the weights, as it would be without a stop

    def gradients(context):
        loss = objective(batch, policy, reference, context)["kto"]
        return torch.autograd.grad(loss.total / loss.count, policy.parameters)

    for a, b in zip(gradients(StepContext(kl_baseline={"z": z})), gradients(at(0.7)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_of_a_single_row_has_none(policy, reference):
    objective, rows = preset("kto"), kit.one_of_each()[1:2]
    assert kit.mismatched_for(objective, rows) == []
    batch = kit.batch_for(objective, rows)
    loss = objective(batch, policy, reference, kit.step_context(objective, [], policy, reference))
    ratio = batch.sum(policy(batch).log_probs - reference(batch).log_probs)
    by_hand = torch.sigmoid(-0.1 * ratio[0]) + torch.sigmoid(0.1 * ratio[1])
    assert float(loss["kto"].total.detach()) == pytest.approx(float(by_hand.detach()))
    assert float(loss["reference_point"].total) == 0
