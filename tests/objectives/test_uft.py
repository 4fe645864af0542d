"""UFT and UNA against UFT-1, UFT-2, UFT-4 and the invariants 2.8 of the specification."""

from __future__ import annotations

import math

import pytest
import torch

from uft.data.rows import Kind
from uft.objectives import make
from uft.objectives.base import StepContext


def uft(**settings):
    return make({"method": "uft", **settings})


def run(kit, policy, reference, targets, **settings):
    """One-token rows: (loss, gradient with respect to each sequence's log-prob, terms)."""
    seqs = [kit.of_length(1, row=i, target=t) for i, t in enumerate(targets)]
    told = kit.Told(policy)
    terms = uft(**settings)(kit.batch_of(seqs), told, kit.Told(reference), StepContext())
    value = terms["uft"].total / terms["uft"].count
    value.backward()
    return float(value.detach()), told.log_probs.grad.tolist(), terms


@pytest.mark.parametrize(
    ("beta", "loss", "mean", "gradient"),
    [
        (0.01, "mse", 0.106355, [-0.002436, 0.000687, -0.001250]),
        (0.01, "bce", 0.682522, [-0.004875, 0.001375, -0.002500]),
        (0.1, "mse", 0.068598, [-0.017745, 0.001294, -0.012500]),
        (0.1, "bce", 0.605434, [-0.037754, 0.002754, -0.025000]),
    ],
)
def test_uft_1(kit, beta, loss, mean, gradient):
    value, found, terms = run(kit, [-40, -55, -30], [-45, -50, -30], [1, 0.35, 0.75], beta=beta, loss=loss)
    assert value == pytest.approx(mean, abs=1e-6)
    assert [3 * g for g in found] == pytest.approx(gradient, abs=1e-6)  # the table's is of each row's own loss
    assert float(terms["implicit_reward"].total) == pytest.approx(0.0)  # beta (5 - 5 + 0)


@pytest.mark.parametrize(
    ("row", "beta", "loss", "value"),
    [
        (0, 0.01, "mse", 0.237659),
        (1, 0.01, "mse", 0.018907),
        (2, 0.01, "mse", 0.0625),
        (0, 0.01, "bce", 0.668460),
        (1, 0.01, "bce", 0.685960),
        (2, 0.01, "bce", 0.693147),
        (0, 0.1, "mse", 0.142537),
        (1, 0.1, "mse", 0.000758),
        (2, 0.1, "mse", 0.0625),
        (0, 0.1, "bce", 0.474077),
        (1, 0.1, "bce", 0.649077),
        (2, 0.1, "bce", 0.693147),
    ],
)
def test_uft_1_row_by_row(kit, row, beta, loss, value):
    policy, reference, target = [-40, -55, -30][row], [-45, -50, -30][row], [1, 0.35, 0.75][row]
    assert run(kit, [policy], [reference], [target], beta=beta, loss=loss)[0] == pytest.approx(value, abs=1e-6)


def test_uft_2_pairwise(kit):
    batch = kit.batch_of([kit.of_length(1), kit.of_length(1, role=0)], kinds=[Kind.PREFERENCE])
    policy = kit.Told([-40, -35])
    terms = uft(beta=0.1)(batch, policy, kit.Told([-42, -36.5]), StepContext())
    assert float(terms["uft"].total.detach()) == pytest.approx(0.668460, abs=1e-6)
    assert float(terms["uft"].count) == 1
    terms["uft"].total.backward()
    assert policy.log_probs.grad.tolist() == pytest.approx([-0.048750, 0.048750], abs=1e-6)
    assert float(terms["margin"].total) == pytest.approx(0.05)
    assert float(terms["chosen_reward"].total) == pytest.approx(0.2)
    assert float(terms["rejected_reward"].total) == pytest.approx(0.15)
    assert float(terms["accuracy"].total) == 1


@pytest.mark.parametrize(
    ("target", "loss", "value", "gradient"),
    [
        (1.0, "mse", 0.25, -0.0025),
        (0.5, "mse", 0.0, 0.0),
        (0.0, "mse", 0.25, 0.0025),
        (1.0, "bce", 0.693147, -0.005),
        (0.3, "bce", 0.693147, 0.002),
        (0.5, "bce", 0.693147, 0.0),
    ],
)
def test_uft_4_policy_equals_reference(kit, target, loss, value, gradient):
    found, slope, _ = run(kit, [-7.5], [-7.5], [target], beta=0.01, loss=loss)
    assert found == pytest.approx(value, abs=1e-6)
    assert slope == pytest.approx([gradient], abs=1e-6)


def test_a_mixed_batch_counts_rows_and_pairs_once(kit):
    seqs = [
        kit.of_length(1, row=0, target=1.0),
        kit.of_length(1, row=1),
        kit.of_length(1, row=1, role=0),
        kit.of_length(1, row=2, target=0.9),
        kit.of_length(1, row=2, target=0.2, role=0),
    ]
    kinds = [Kind.DEMONSTRATION, Kind.PREFERENCE, Kind.SCORED]
    batch = kit.batch_of(seqs, kinds=kinds)
    policy = kit.Told([-3.0] * 5)
    terms = uft()(batch, policy, policy, StepContext())
    # .25 for r = 1, log 2 for the pair, .16 and .09 for the scores: their pair is shown but not trained
    assert float(terms["uft"].total.detach()) == pytest.approx(0.25 + math.log(2) + 0.16 + 0.09)
    assert float(terms["uft"].count) == 4
    assert float(terms["margin"].count) == 2
    weighted = uft(kind_weights={"scored": 2.0, "preference": 0.0})(batch, policy, policy, StepContext())
    assert float(weighted["uft"].total.detach()) == pytest.approx(0.25 + 0.5)
    assert float(weighted["uft"].count) == 4, "weights multiply the sum, never the count"


def test_length_normalize_averages_the_log_ratio(kit):
    batch = kit.batch_of([kit.of_length(4, target=1.0)])
    long = uft(beta=0.1, length_normalize=True)(batch, kit.Told([-1.0] * 4), kit.Told([-3.0] * 4), StepContext())
    assert float(long["implicit_reward"].total) == pytest.approx(0.2)
    summed = uft(beta=0.1)(batch, kit.Told([-1.0] * 4), kit.Told([-3.0] * 4), StepContext())
    assert float(summed["implicit_reward"].total) == pytest.approx(0.8)


# --- invariants 2.8 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_without_beta_nothing_moves(kit, loss):
    value, gradient, _ = run(kit, [-40, -55], [-45, -50], [1, 0.35], beta=0.0, loss=loss)
    assert gradient == [0, 0]
    assert value == pytest.approx({"mse": (0.25 + 0.0225) / 2, "bce": math.log(2)}[loss])


def test_bounds_of_values_and_gradients(kit):
    beta, ratios = 0.5, torch.linspace(-200, 200, 401).tolist()
    for target in (0.0, 0.4, 1.0):
        for ratio in ratios[::20]:
            value, [gradient], _ = run(kit, [ratio - 300], [-300], [target], beta=beta)
            assert 0 <= value <= 1
            assert abs(gradient) <= 8 * beta / 27 + 1e-12
            assert abs(run(kit, [ratio - 300], [-300], [target], beta=beta, loss="bce")[1][0]) <= beta
    # the bound is reached where s = 1/3 and r = 1
    steepest = run(kit, [math.log(0.5) / beta], [0.0], [1.0], beta=beta)[1][0]
    assert abs(steepest) == pytest.approx(8 * beta / 27)


def test_a_prompt_constant_moves_scores_but_not_pairs(kit):
    pair = kit.batch_of([kit.of_length(1), kit.of_length(1, role=0)])
    before = uft()(pair, kit.Told([-4, -5]), kit.Told([-4.5, -5]), StepContext())["uft"].total.detach()
    after = uft()(pair, kit.Told([-1, -2]), kit.Told([-4.5, -5]), StepContext())["uft"].total.detach()
    assert float(before) == pytest.approx(float(after))
    assert run(kit, [-4], [-4.5], [1])[0] != pytest.approx(run(kit, [-1], [-4.5], [1])[0])


def test_hard_bce_is_the_binary_form(kit):
    z = 0.1 * (-40 + 45)
    assert run(kit, [-40], [-45], [1], beta=0.1, loss="bce")[0] == pytest.approx(-math.log(1 / (1 + math.exp(-z))))
    assert run(kit, [-40], [-45], [0], beta=0.1, loss="bce")[0] == pytest.approx(-math.log(1 / (1 + math.exp(z))))


def test_a_sequence_without_targets_is_not_counted(kit):
    batch = kit.batch_of([kit.of_length(0, row=0, target=1.0), kit.of_length(1, row=1, target=1.0)])
    terms = uft()(batch, kit.Told([-2.0]), kit.Told([-2.0]), StepContext())
    assert float(terms["uft"].total.detach()) == pytest.approx(0.25)
    assert float(terms["uft"].count) == 1


def test_problems_name_keys():
    wrong = uft(reduction="token", kind_weights={"demos": 1.0, "scored": -1.0})
    assert [key for key, _ in wrong.problems()] == ["reduction", "kind_weights", "kind_weights"]
    assert uft(kind_weights={"scored": 0.5}).problems() == []
