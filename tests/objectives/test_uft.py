"""UFT and UNA against UFT-1, UFT-2, UFT-4 and the invariants 2.8 of the specification."""

from __future__ import annotations

import math

import pytest
from toys import of_length, told

from uft.data.rows import Kind
from uft.objectives import make

PAIR = [of_length(1), of_length(1, role=0)]


def uft(**settings):
    return make({"method": "uft", **settings})


def run(policy, reference, targets, **settings):
    """One-token rows: (loss, slope by each sequence's log-prob, means of the terms)."""
    seqs = [of_length(1, row=i, target=t) for i, t in enumerate(targets)]
    return told(uft(**settings), seqs, policy, reference)


UFT_1 = [
    (0.01, "mse", 0.106355, [-0.002436, 0.000687, -0.001250]),
    (0.01, "bce", 0.682522, [-0.004875, 0.001375, -0.002500]),
    (0.1, "mse", 0.068598, [-0.017745, 0.001294, -0.012500]),
    (0.1, "bce", 0.605434, [-0.037754, 0.002754, -0.025000]),
]
UFT_4 = [  # policy = reference
    (1.0, "mse", 0.25, -0.0025),
    (0.5, "mse", 0.0, 0.0),
    (0.0, "mse", 0.25, 0.0025),
    (1.0, "bce", 0.693147, -0.005),
    (0.3, "bce", 0.693147, 0.002),
    (0.5, "bce", 0.693147, 0.0),
]


def test_uft_1_and_4_regression():
    for beta, loss, mean, gradient in UFT_1:
        value, slopes, means = run([-40, -55, -30], [-45, -50, -30], [1, 0.35, 0.75], beta=beta, loss=loss)
        assert value == pytest.approx(mean, abs=1e-6), (beta, loss)
        assert [3 * g for g in slopes] == pytest.approx(gradient, abs=1e-6)  # the table's is of each row's own loss
        assert means["implicit_reward"] == pytest.approx(0.0)  # beta (5 - 5 + 0)
    for target, loss, value, gradient in UFT_4:
        found, slopes, _ = run([-7.5], [-7.5], [target], beta=0.01, loss=loss)
        assert (found, slopes) == (pytest.approx(value, abs=1e-6), pytest.approx([gradient], abs=1e-6)), (target, loss)


def test_uft_2_pairwise():
    loss, slopes, means = told(uft(beta=0.1), PAIR, [-40, -35], [-42, -36.5], kinds=[Kind.PREFERENCE])
    assert loss == pytest.approx(0.668460, abs=1e-6)
    assert slopes == pytest.approx([-0.048750, 0.048750], abs=1e-6)
    shown = {"margin": 0.05, "chosen_reward": 0.2, "rejected_reward": 0.15, "accuracy": 1}
    assert {name: means[name] for name in shown} == pytest.approx(shown)


def test_a_mixed_batch_counts_rows_and_pairs_once():
    parts = [(0, 1.0, 1), (1, math.nan, 1), (1, math.nan, 0), (2, 0.9, 1), (2, 0.2, 0)]  # row, target, role
    seqs = [of_length(1, row=row, target=target, role=role) for row, target, role in parts]
    kinds = [Kind.DEMONSTRATION, Kind.PREFERENCE, Kind.SCORED]
    # .25 for r = 1, log 2 for the pair, .16 and .09 for the scores: their pair is shown but not trained
    loss, _, means = told(uft(), seqs, [-3.0] * 5, [-3.0] * 5, kinds=kinds)
    assert loss == pytest.approx((0.25 + math.log(2) + 0.16 + 0.09) / 4)
    assert "margin" in means
    weighted = uft(kind_weights={"scored": 2.0, "preference": 0.0})
    loss = told(weighted, seqs, [-3.0] * 5, [-3.0] * 5, kinds=kinds)[0]
    assert loss == pytest.approx((0.25 + 0.5) / 4), "weights multiply the sum, never the count"


def test_length_normalize_averages_the_log_ratio():
    for normalize, reward in ((True, 0.2), (False, 0.8)):
        objective = uft(beta=0.1, length_normalize=normalize)
        means = told(objective, [of_length(4, target=1.0)], [-1.0] * 4, [-3.0] * 4)[2]
        assert means["implicit_reward"] == pytest.approx(reward)


def test_a_prompt_constant_moves_scores_but_not_pairs():
    before, after = (told(uft(), PAIR, policy, [-4.5, -5])[0] for policy in ([-4, -5], [-1, -2]))
    assert before == pytest.approx(after)
    assert run([-4], [-4.5], [1])[0] != pytest.approx(run([-1], [-4.5], [1])[0])
