"""DPO against the toy pair of the specification: h = 0.8."""

from __future__ import annotations

import math

import pytest
import torch

from uft.objectives import make
from uft.objectives.base import Clock

POLICY, REFERENCE = [-0.2, -0.5, -0.1, -1.0, -0.7], [-0.3, -0.4, -0.3, -0.6, -0.5]


def pairwise(**settings):
    return make({"method": "pairwise", **settings})


@pytest.fixture
def pair(kit):
    return kit.batch_of([kit.of_length(3), kit.of_length(2, role=0)])


def value(terms):
    return float(sum(t.weight * t.total.detach() / t.count for t in terms.values() if t.weight))


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 0.653947),
        ({"label_smoothing": 0.1}, 0.661947),
        ({"sft_weight": 0.3}, 0.653947 + 0.3 * 0.266667),
        ({"sft_weight": 0.3, "reduction": "token"}, 0.653947 + 0.3 * 0.266667),
    ],
)
def test_toy_pair(kit, pair, settings, loss):
    terms = pairwise(**settings)(pair, kit.Told(POLICY), kit.Told(REFERENCE), Clock())
    assert value(terms) == pytest.approx(loss, abs=1e-6)


def test_shown_terms(kit, pair):
    terms = pairwise()(pair, kit.Told(POLICY), kit.Told(REFERENCE), Clock())
    shown = {name: float(term.total.detach() / term.count) for name, term in terms.items()}
    assert shown["chosen_reward"] == pytest.approx(0.02)
    assert shown["rejected_reward"] == pytest.approx(-0.06)
    assert shown["margin"] == pytest.approx(0.08)
    assert shown["accuracy"] == 1
    assert shown["nll"] == pytest.approx(0.266667, abs=1e-6)


def test_gradient_on_every_token(kit, pair):
    policy = kit.Told(POLICY)
    pairwise()(pair, policy, kit.Told(REFERENCE), Clock())["pair"].total.backward()
    slope = 0.1 / (1 + math.exp(0.08))
    assert policy.log_probs.grad.tolist() == pytest.approx([-slope] * 3 + [slope] * 2)


def test_half_smoothing_is_symmetric(kit, pair):
    there = pairwise(label_smoothing=0.5)(pair, kit.Told(POLICY), kit.Told(REFERENCE), Clock())
    back = pairwise(label_smoothing=0.5)(pair, kit.Told(REFERENCE), kit.Told(POLICY), Clock())
    assert float(there["pair"].total.detach()) == pytest.approx(float(back["pair"].total.detach()))


def test_one_positive_against_two_negatives_is_two_pairs_but_one_likelihood(kit):
    batch = kit.batch_of([kit.of_length(2), kit.of_length(1, role=0), kit.of_length(1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = pairwise(sft_weight=1.0)(batch, policy, policy, Clock())
    assert float(terms["pair"].count) == 2
    assert float(terms["pair"].total.detach()) == pytest.approx(2 * math.log(2))
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (1.5, 1)


def test_demonstrations_join_the_likelihood_only(kit):
    batch = kit.batch_of([kit.of_length(2, row=0), kit.of_length(1, row=1), kit.of_length(1, row=1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = pairwise(sft_weight=1.0, reduction="token")(batch, policy, policy, Clock())
    assert float(terms["pair"].count) == 1
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (6.0, 3)


def test_a_batch_of_demonstrations_alone_has_no_pairs(kit):
    batch = kit.batch_of([kit.of_length(2)])
    policy = kit.Told([-1.0, -2.0])
    terms = pairwise(sft_weight=1.0)(batch, policy, policy, Clock())
    assert (float(terms["pair"].total.detach()), float(terms["pair"].count)) == (0, 0)


def test_the_cached_column_replaces_the_forward(kit, pair):
    cached = kit.batch_of(
        [kit.of_length(3), kit.of_length(2, role=0)], columns={"reference": torch.tensor(REFERENCE).double()}
    )
    terms = pairwise()(cached, kit.Told(POLICY), None, Clock())
    assert float(terms["pair"].total.detach()) == pytest.approx(0.653947, abs=1e-6)
