"""Losses on log-ratios to a reference, against the toy pair of the specification: a_w = 0.2, a_l = -0.6, h = 0.8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uft.objectives.base import StepContext

POLICY, REFERENCE = [-0.2, -0.5, -0.1, -1.0, -0.7], [-0.3, -0.4, -0.3, -0.6, -0.5]
FALLEN = [-0.2, -0.3, -0.2, -0.6, -0.5]  # a reference under which the chosen side fell: a_w = -0.1, h = 0.5


@pytest.fixture
def pair(kit):
    return kit.batch_of([kit.of_length(3), kit.of_length(2, role=0)])


@pytest.fixture
def run(kit, pair):
    """run("dpo", beta=0.3) -> (loss, slope by the sum of the chosen side, by that of the rejected one, terms)."""

    def measured(name, reference=REFERENCE, policy=POLICY, **changes):
        told = kit.Told(policy)
        terms = kit.preset(name, **changes)(pair, told, kit.Told(reference), StepContext())
        loss = sum(t.weight * t.total / t.count for t in terms.values() if t.weight)
        loss.backward()
        slopes = told.log_probs.grad.tolist()
        return float(loss.detach()), slopes[0], slopes[-1], terms

    return measured


# --- worked numbers --------------------------------------------------------------------------------------------------

WORKED = [
    ("dpo", {}, 0.653947),
    ("cdpo", {}, 0.661947),
    ("robust_dpo", {}, 0.643947),
    ("hinge", {}, 0.92),
    ("ipo", {}, 17.64),
    ("ipo", {"length": "mean"}, 21.467778),
    ("nca", {"beta": 0.1}, 1.366594),
    ("rdpo_length", {}, 0.630258),
    ("ld_dpo", {}, 0.658760),
    ("rpo", {"beta": 0.1}, 0.654347),
    ("rpo", {"beta": 0.5, "eta": 0.2, "nll_norm": "mean"}, 0.566349),
    ("irft", {}, 0.653947),
    ("irft", {"link": "linear"}, -0.08),
    ("irft", {"link": "hinge"}, 0.92),
    ("dpo", {"sft_weight": 0.3}, 0.653947 + 0.3 * 0.266667),
    ("dpo", {"sft_weight": 0.3, "reduction": "token"}, 0.653947 + 0.3 * 0.266667),
]


@pytest.mark.parametrize(("name", "changes", "loss"), WORKED)
def test_toy_pair(run, name, changes, loss):
    assert run(name, **changes)[0] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("lam", "loss"), [(0.0, 0.620957), (5.0, 0.693147), (50.0, 1.580509)])
def test_dpop_where_the_chosen_side_fell(run, lam, loss):
    assert run("dpop", FALLEN, lam=lam)[0] == pytest.approx(loss, abs=1e-6)


def test_shown_terms(run):
    terms = run("dpo")[3]
    shown = {name: float(term.total.detach() / term.count) for name, term in terms.items()}
    assert shown["chosen_reward"] == pytest.approx(0.02)
    assert shown["rejected_reward"] == pytest.approx(-0.06)
    assert shown["margin"] == pytest.approx(0.08)
    assert shown["accuracy"] == 1
    assert shown["nll"] == pytest.approx(0.266667, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "nca", "uft", "kto", "cpo", "orpo"])
@pytest.mark.parametrize("rounding", [1e-6, 0.0, -1e-6])
def test_equal_sides_are_a_tie_whatever_the_rounding(kit, name, rounding):
    """Which way two equal completions differ by rounding depends on how they were laid out."""
    equal = kit.batch_of([kit.of_length(2), kit.of_length(2, role=0)])
    policy, reference = [-0.2, -0.5, -0.2 + rounding, -0.5], [-0.3, -0.4, -0.3, -0.4]
    term = kit.preset(name)(equal, kit.Told(policy), kit.Told(reference), StepContext())["accuracy"]
    assert float(term.total / term.count) == 0.5


def test_gradient_on_every_token(kit, pair):
    policy = kit.Told(POLICY)
    kit.preset("dpo")(pair, policy, kit.Told(REFERENCE), StepContext())["pair"].total.backward()
    slope = 0.1 / (1 + math.exp(0.08))
    assert policy.log_probs.grad.tolist() == pytest.approx([-slope] * 3 + [slope] * 2)


def test_the_cached_column_replaces_the_forward(kit):
    column = {"reference": torch.tensor(REFERENCE).double()}
    cached = kit.batch_of([kit.of_length(3), kit.of_length(2, role=0)], columns=column)
    terms = kit.preset("dpo")(cached, kit.Told(POLICY), None, StepContext())
    assert float(terms["pair"].total.detach()) == pytest.approx(0.653947, abs=1e-6)


# --- which pairs and which likelihood --------------------------------------------------------------------------------


def test_one_positive_against_two_negatives_is_two_pairs_but_one_likelihood(kit):
    batch = kit.batch_of([kit.of_length(2), kit.of_length(1, role=0), kit.of_length(1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = kit.preset("dpo", sft_weight=1.0)(batch, policy, policy, StepContext())
    assert float(terms["pair"].count) == 2
    assert float(terms["pair"].total.detach()) == pytest.approx(2 * math.log(2))
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (1.5, 1)


def test_demonstrations_join_the_likelihood_only(kit):
    batch = kit.batch_of([kit.of_length(2, row=0), kit.of_length(1, row=1), kit.of_length(1, row=1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = kit.preset("dpo", sft_weight=1.0, reduction="token")(batch, policy, policy, StepContext())
    assert float(terms["pair"].count) == 1
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (6.0, 3)


def test_a_batch_of_demonstrations_alone_has_no_pairs(kit):
    batch = kit.batch_of([kit.of_length(2)])
    policy = kit.Told([-1.0, -2.0])
    terms = kit.preset("dpo", sft_weight=1.0)(batch, policy, policy, StepContext())
    assert (float(terms["pair"].total.detach()), float(terms["pair"].count)) == (0, 0)


# --- labels that may be wrong ----------------------------------------------------------------------------------------


def test_half_smoothing_is_symmetric(run):
    there, back = run("cdpo", label_smoothing=0.5), run("cdpo", REFERENCE[:], POLICY, label_smoothing=0.5)
    turned = run("cdpo", POLICY, REFERENCE, label_smoothing=0.5)
    assert there[0] == pytest.approx(back[0]) == pytest.approx(turned[0])
    assert there[1] == pytest.approx(-turned[1])


@pytest.mark.parametrize("flipped", [0.05, 0.1, 0.4])
def test_robust_dpo_is_unbiased_and_may_be_negative(run, flipped):
    """(1 - e) L(h) + e L(-h) is clean DPO, in value and slope; -h is the policy and the reference exchanged."""
    right, wrong = (run("robust_dpo", *sides, label_smoothing=flipped) for sides in ((), (POLICY, REFERENCE)))
    clean = run("dpo")
    assert (1 - flipped) * right[0] + flipped * wrong[0] == pytest.approx(clean[0])
    assert (1 - flipped) * right[1] - flipped * wrong[1] == pytest.approx(clean[1])
    assert run("robust_dpo", policy=[0, 0, 0, -50, -50], label_smoothing=flipped, beta=1.0)[0] < 0


def test_robust_dpo_of_coin_flips_is_a_problem(kit):
    assert [key for key, _ in kit.preset("robust_dpo", label_smoothing=0.5).problems()] == ["label_smoothing"]
    assert kit.preset("cdpo", label_smoothing=0.5).problems() == []


# --- DPOP and RPO ----------------------------------------------------------------------------------------------------


def test_dpop_is_dpo_where_the_chosen_side_has_not_fallen(run):
    assert run("dpop")[:3] == pytest.approx(run("dpo", beta=0.3)[:3])
    level = [-0.2, -0.5, -0.1, -0.6, -0.5]
    assert run("dpop", level)[0] == pytest.approx(run("dpo", level, beta=0.3)[0])


@pytest.mark.parametrize("lam", [5.0, 50.0])
def test_dpop_pulls_a_fallen_chosen_side_up_one_plus_lam_times_as_hard(run, lam):
    loss, chosen, rejected, _ = run("dpop", FALLEN, lam=lam)
    weight = 0.3 * (1 - math.exp(-loss))  # beta sigmoid(-m), m the margin with the penalty
    assert chosen == pytest.approx(-(1 + lam) * weight)
    assert rejected == pytest.approx(weight)


def test_dpop_rises_with_lam(run):
    losses = [run("dpop", FALLEN, lam=lam)[0] for lam in (0.0, 1.0, 5.0, 50.0, 500.0)]
    assert losses == sorted(losses)


def test_rpo_leaves_the_rejected_side_to_dpo(run):
    for form in ("sum", "mean"):
        slopes = [run("rpo", beta=0.1, eta=eta, nll_norm=form)[2] for eta in (0.0, 0.005, 3.0)]
        assert slopes == pytest.approx([run("dpo")[2]] * 3)


def test_averaged_rpo_tends_to_sft_as_beta_vanishes(run):
    _, chosen, rejected, _ = run("rpo", beta=1e-9, eta=0.2, nll_norm="mean")
    assert chosen == pytest.approx(-0.2 / 3)
    assert rejected == pytest.approx(0, abs=1e-8)


def test_rpo_in_both_forms_is_alike_where_completions_are_one_over_beta_long(kit):
    batch, values = kit.batch_of([kit.of_length(4), kit.of_length(4, role=0)]), np.linspace(-2, -0.1, 8)
    losses = []
    for form in ("sum", "mean"):
        terms = kit.preset("rpo", beta=0.25, eta=0.7, nll_norm=form)(
            batch, kit.Told(values), kit.Told(-1.0), StepContext()
        )
        losses.append(float(sum(t.weight * t.total / t.count for t in terms.values() if t.weight).detach()))
    assert losses[0] == pytest.approx(losses[1])


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_rdpo_pulls_less_where_the_chosen_side_is_longer(run):
    """The sign of alpha: a longer chosen side counts as ahead, so length alone earns nothing more."""
    assert abs(run("rdpo_length")[1]) < abs(run("dpo")[1])
    assert abs(run("rdpo_length", alpha=1.0)[1]) < abs(run("rdpo_length")[1])


def test_ld_dpo_counts_what_is_beyond_the_shorter_side_alpha_times(kit, pair):
    policy = kit.Told(POLICY)
    loss = kit.preset("ld_dpo")(pair, policy, kit.Told(REFERENCE), StepContext())["pair"].total
    loss.backward()
    slopes = policy.log_probs.grad.tolist()
    assert slopes[2] == pytest.approx(0.5 * slopes[0])
    assert slopes == pytest.approx([slopes[0], slopes[0], slopes[0] / 2, -slopes[0], -slopes[0]])


def test_ld_dpo_discounts_a_positive_against_each_negative_of_its_row_anew(kit):
    seqs = [kit.of_length(4), kit.of_length(2, role=0), kit.of_length(3, role=0), kit.of_length(6, role=0)]
    policy = kit.Told(np.linspace(-2, -0.1, 15))
    terms = kit.preset("ld_dpo", alpha=0.0, beta=1.0)(kit.batch_of(seqs), policy, kit.Told(-1.0), StepContext())
    a = np.linspace(-2, -0.1, 15) + 1
    margins = [a[:2].sum() - a[4:6].sum(), a[:3].sum() - a[6:9].sum(), a[:4].sum() - a[9:13].sum()]
    assert float(terms["pair"].total.detach()) == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins))


# --- IPO, NCA, IRFT --------------------------------------------------------------------------------------------------


def test_ipo_wants_a_margin_of_one_over_two_tau_and_no_more(run):
    for reached in (True, False):
        slope = run("ipo", tau=0.625 if reached else 0.5)[1]
        assert slope == (pytest.approx(0, abs=1e-12) if reached else pytest.approx(-0.4))
    assert run("ipo", tau=1.0)[1] > 0, "past its margin, it is pushed back"


def test_nca_takes_each_side_by_itself(run):
    _, chosen, _, _ = run("nca")
    other = run("nca", [*REFERENCE[:3], -3.0, -4.0])
    assert chosen == pytest.approx(other[1]), "what the rejected side does is nothing to the chosen one"


def test_linear_irft_has_one_gradient_everywhere_and_a_warning(run, kit):
    for reference in (REFERENCE, FALLEN, POLICY):
        assert run("irft", reference, link="linear")[1:3] == pytest.approx((-0.1, 0.1))
    [caution] = kit.preset("irft", link="linear").cautions()
    assert "no lower bound" in caution
    assert kit.preset("irft").cautions() == []


def test_a_demonstration_against_itself_teaches_nothing(kit):
    """Through a model: the same tokens under the same prompt on both sides."""
    rows = [kit.row_of(0, kit.completion("1 2 3"), kit.completion("1 2 3", sampled_by="m"))]
    policy, reference = kit.Toy.random(0), kit.Toy.random(1)
    for link, value in (("sigmoid", math.log(2)), ("hinge", 1.0), ("linear", 0.0)):
        objective = kit.preset("irft", link=link)
        outcome = kit.step(objective, [kit.batch_for(objective, rows)], policy, policy.parameters, reference)
        assert outcome.loss == pytest.approx(value)
        assert max(float(gradient.abs().max()) for gradient in outcome.gradients) < 1e-15
