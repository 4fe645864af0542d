"""Losses over pairs, with a reference and without, against the toy pair of the specification and their invariants.

The pair: a_w = 0.2, a_l = -0.6, h = 0.8; mu_w = -0.266667, mu_l = -0.85.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toys as kit
from toys import of_length, preset, told

from uft.data.loader import StepBatches
from uft.objectives import make
from uft.objectives.base import StepContext
from uft.objectives.pairwise import odds
from uft.training.step import matched_pairs

POLICY, REFERENCE = [-0.2, -0.5, -0.1, -1.0, -0.7], [-0.3, -0.4, -0.3, -0.6, -0.5]
FALLEN = [-0.2, -0.3, -0.2, -0.6, -0.5]  # a reference under which the chosen side fell: a_w = -0.1, h = 0.5
CHOSEN, REJECTED = POLICY[:3], POLICY[3:]
MU_W, MU_L = -0.8 / 3, -0.85
PAIR = [of_length(3), of_length(2, role=0)]


def run(name, reference=REFERENCE, policy=POLICY, **changes):
    """(loss, slope by the sum of the chosen side, by that of the rejected one, means of the terms)."""
    loss, slopes, means = told(preset(name, **changes), PAIR, policy, reference)
    return loss, slopes[0], slopes[-1], means


def alone(name, chosen=CHOSEN, rejected=REJECTED, **changes):
    """(loss, slopes, means of the terms) of a loss without a reference, on sides of any length."""
    sides = [of_length(len(chosen)), of_length(len(rejected), role=0)]
    return told(preset(name, **changes), sides, [*chosen, *rejected])


# --- worked numbers

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
    ("apo_zero", {}, 0.980005),
    ("apo_down", {}, 0.985010),
    ("sppo_hard", {}, 499200.4),
    ("sppo_hard", {"beta": 0.1}, 42.4),
    ("exo_pair", {}, 2.623969),
    ("bco_pair", {}, 1.382299),
    ("discopop", {}, 0.871675),
    ("wpo", {}, 0.648595),
    ("asft", {}, 1.090927),
    ("orpo", {}, 0.287215),
    ("simpo", {}, 0.613282),
    ("cpo", {}, 0.915826),
]


def test_toy_pair():
    for name, changes, loss in WORKED:
        assert run(name, **changes)[0] == pytest.approx(loss, abs=1e-6), (name, changes)
    for lam, loss in ((0.0, 0.620957), (5.0, 0.693147), (50.0, 1.580509)):
        assert run("dpop", FALLEN, lam=lam)[0] == pytest.approx(loss, abs=1e-6), lam


def test_shown_terms_and_the_gradient_on_every_token():
    slope = 0.1 / (1 + math.exp(0.08))
    _, slopes, means = told(preset("dpo"), PAIR, POLICY, REFERENCE)
    assert slopes == pytest.approx([-slope] * 3 + [slope] * 2)
    shown = {"chosen_reward": 0.02, "rejected_reward": -0.06, "margin": 0.08, "accuracy": 1, "nll": -MU_W}
    assert {name: means[name] for name in shown} == pytest.approx(shown)
    _, slopes, means = told(preset("simpo"), PAIR, POLICY)
    slope = 2 * (1 - math.exp(-0.613282))
    assert slopes == pytest.approx([-slope / 3] * 3 + [slope / 2] * 2, abs=1e-6)
    shown = {"chosen_reward": 2 * MU_W, "rejected_reward": 2 * MU_L, "margin": 2 * (MU_W - MU_L), "accuracy": 1}
    assert {name: means[name] for name in shown} == pytest.approx(shown)


def test_equal_sides_are_a_tie_whatever_the_rounding():
    """Which way two equal completions differ by rounding depends on how they were laid out."""
    equal = [of_length(2), of_length(2, role=0)]
    for name in ("dpo", "nca", "uft", "kto", "cpo", "orpo"):
        for rounding in (1e-6, 0.0, -1e-6):
            policy, reference = [-0.2, -0.5, -0.2 + rounding, -0.5], [-0.3, -0.4, -0.3, -0.4]
            assert told(preset(name), equal, policy, reference)[2]["accuracy"] == 0.5, (name, rounding)


def test_optimal_transport_compares_what_has_the_same_rank_in_the_step():
    """Two pairs, each in a micro-batch of its own. Margins are 2 and -1, the reference's .5 and 1: -1 - .5, 2 - 1.
    Log-ratios are .5 and -1 of chosen, -1 and 1 of rejected completions: -1 + 1, .5 - 1."""
    policy, reference = [[-1.0, -3.0], [-2.0, -1.0]], [[-1.5, -2.0], [-1.0, -2.0]]
    batches = [
        kit.batch_of([of_length(1), of_length(1, role=0)], columns={"reference": torch.tensor(one)})
        for one in reference
    ]
    near, far = (1 / (1 + math.exp(m)) for m in (0.1, -0.05))
    for name, loss, slopes in (
        ("aot", 0.707677, [-near, near, -1 / (1 + math.exp(-0.15)), 1 / (1 + math.exp(-0.15))]),
        ("aot_unpaired", 0.705803, [-far, 0.5, -0.5, far]),
    ):
        objective, said = preset(name), iter(policy)
        trainer = SimpleNamespace(
            objective=objective,
            policy=lambda batch, said=said: kit.Told(next(said))(batch),
            reference=None,
            device="cpu",
        )
        matched = matched_pairs(trainer, StepBatches((), batches))
        found = [told(objective, batch, own) for batch, own in zip(matched, policy, strict=True)]
        assert sum(one[0] for one in found) / 2 == pytest.approx(loss, abs=1e-6), name
        assert [slope for one in found for slope in one[1]] == pytest.approx(
            [0.1 * slope for slope in slopes], abs=1e-6
        ), name
        assert told(objective, batches[0], policy[0])[0] == pytest.approx(math.log1p(math.exp(-0.15)), abs=1e-6), name


def test_what_cannot_be_matched_is_refused():
    for matching, key in (("margins", "matching"), ("sides", "wpo")):
        both = make(kit.settings("aot") | {"link": "nca", "wpo": True, "matching": matching})
        assert [key for key, _ in both.problems()] == [key], matching


# --- which pairs and which likelihood


def test_one_positive_against_two_negatives_is_two_pairs_but_one_likelihood():
    """And two of ORPO's likelihoods: each pair brings the chosen one's, as each is a row in the papers."""
    batch = kit.batch_of([of_length(2), of_length(1, role=0), of_length(1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = preset("dpo", sft_weight=1.0)(batch, policy, policy, StepContext())
    assert float(terms["pair"].count) == 2
    assert float(terms["pair"].total.detach()) == pytest.approx(2 * math.log(2))
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (1.5, 1)
    terms = preset("orpo")(batch, policy, None, StepContext())
    assert (float(terms["chosen_nll"].total.detach()), float(terms["chosen_nll"].count)) == (3.0, 2)
    assert (terms["chosen_nll"].weight, terms["pair"].weight) == (1.0, pytest.approx(0.1))


def test_demonstrations_join_the_likelihood_only():
    batch = kit.batch_of([of_length(2, row=0), of_length(1, row=1), of_length(1, row=1, role=0)])
    policy = kit.Told([-1.0, -2.0, -3.0, -4.0])
    terms = preset("dpo", sft_weight=1.0, reduction="token")(batch, policy, policy, StepContext())
    assert float(terms["pair"].count) == 1
    assert (float(terms["sft"].total.detach()), float(terms["sft"].count)) == (6.0, 3)


# --- labels that may be wrong


def test_half_smoothing_is_symmetric():
    there, turned = run("cdpo", label_smoothing=0.5), run("cdpo", POLICY, REFERENCE, label_smoothing=0.5)
    assert there[0] == pytest.approx(turned[0])
    assert there[1] == pytest.approx(-turned[1])
    for name, changes in (("simpo", {"gamma": 0.0}), ("cpo", {"alpha": 0.0})):
        there, back = (alone(name, *sides, label_smoothing=0.5, **changes)[0] for sides in ((), (REJECTED, CHOSEN)))
        assert there == pytest.approx(back)


def test_robust_dpo_is_unbiased_and_may_be_negative():
    """(1 - e) L(h) + e L(-h) is clean DPO, in value and slope; -h is the policy and the reference exchanged."""
    clean = run("dpo")
    for flipped in (0.05, 0.1, 0.4):
        right, wrong = (run("robust_dpo", *sides, label_smoothing=flipped) for sides in ((), (POLICY, REFERENCE)))
        assert (1 - flipped) * right[0] + flipped * wrong[0] == pytest.approx(clean[0])
        assert (1 - flipped) * right[1] - flipped * wrong[1] == pytest.approx(clean[1])
        assert run("robust_dpo", policy=[0, 0, 0, -50, -50], label_smoothing=flipped, beta=1.0)[0] < 0


# --- DPOP and RPO


def test_dpop_is_dpo_unless_the_chosen_side_fell_and_then_pulls_it_up_one_plus_lam_times_as_hard():
    assert run("dpop")[:3] == pytest.approx(run("dpo", beta=0.3)[:3])
    level = [-0.2, -0.5, -0.1, -0.6, -0.5]
    assert run("dpop", level)[0] == pytest.approx(run("dpo", level, beta=0.3)[0])
    for lam in (5.0, 50.0):
        loss, chosen, rejected, _ = run("dpop", FALLEN, lam=lam)
        weight = 0.3 * (1 - math.exp(-loss))  # beta sigmoid(-m), m the margin with the penalty
        assert (chosen, rejected) == (pytest.approx(-(1 + lam) * weight), pytest.approx(weight))


def test_rpo_leaves_the_rejected_side_to_dpo():
    for form in ("sum", "mean"):
        slopes = [run("rpo", beta=0.1, eta=eta, nll_norm=form)[2] for eta in (0.0, 0.005, 3.0)]
        assert slopes == pytest.approx([run("dpo")[2]] * 3)


# --- lengths


def test_rdpo_pulls_less_where_the_chosen_side_is_longer():
    """The sign of alpha: a longer chosen side counts as ahead, so length alone earns nothing more."""
    pulls = [abs(run(name, **changes)[1]) for name, changes in (("dpo", {}), ("rdpo_length", {}))]
    pulls.append(abs(run("rdpo_length", alpha=1.0)[1]))
    assert pulls == sorted(pulls, reverse=True)
    assert len(set(pulls)) == 3


def test_ld_dpo_counts_what_is_beyond_the_shorter_side_alpha_times_for_every_pair_anew():
    slopes = told(preset("ld_dpo"), PAIR, POLICY, REFERENCE)[1]
    assert slopes == pytest.approx([slopes[0], slopes[0], slopes[0] / 2, -slopes[0], -slopes[0]])
    seqs = [of_length(4), of_length(2, role=0), of_length(3, role=0), of_length(6, role=0)]
    loss, _, _ = told(preset("ld_dpo", alpha=0.0, beta=1.0), seqs, np.linspace(-2, -0.1, 15), -1.0)
    a = np.linspace(-2, -0.1, 15) + 1
    margins = [a[:2].sum() - a[4:6].sum(), a[:3].sum() - a[6:9].sum(), a[:4].sum() - a[9:13].sum()]
    assert 3 * loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins))


def test_repetition_is_nothing_to_means_and_odds_but_doubles_sums():
    for name in ("simpo", "orpo", "asft"):
        assert alone(name, CHOSEN * 2, REJECTED * 2)[0] == pytest.approx(alone(name)[0])
    once, twice = alone("cpo", alpha=0.0)[0], alone("cpo", CHOSEN * 2, REJECTED * 2, alpha=0.0)[0]
    assert twice == pytest.approx(math.log1p(math.exp(2 * math.log(math.expm1(once)))))


# --- IPO, NCA, IRFT, SimPO


def test_ipo_and_simpo_want_a_margin_and_ipo_no_more():
    assert run("ipo", tau=0.625)[1] == pytest.approx(0, abs=1e-12)
    assert run("ipo", tau=0.5)[1] == pytest.approx(-0.4)
    assert run("ipo", tau=1.0)[1] > 0, "past its margin, it is pushed back"
    for tau in (0.1, 1.0):
        shown = run("ipo", tau=tau)[3]
        assert (shown["chosen_reward"], shown["margin"]) == pytest.approx((0.2 * tau, 0.8 * tau)), "in units of tau"
    losses = [alone("simpo", gamma=gamma)[0] for gamma in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses)
    assert alone("simpo", [-1.0], [-1.5], beta=2.0, gamma=1.0)[0] == pytest.approx(math.log(2))


def test_nca_takes_each_side_by_itself():
    other = run("nca", [*REFERENCE[:3], -3.0, -4.0])
    assert run("nca")[1] == pytest.approx(other[1]), "what the rejected side does is nothing to the chosen one"


def test_linear_irft_has_one_gradient_everywhere_and_a_warning():
    for reference in (REFERENCE, FALLEN, POLICY):
        assert run("irft", reference, link="linear")[1:3] == pytest.approx((-0.1, 0.1))
    [caution] = preset("irft", link="linear").cautions()
    assert "no lower bound" in caution
    assert preset("irft").cautions() == []


def test_a_demonstration_against_itself_teaches_nothing(policy, reference):
    """Through a model: the same tokens under the same prompt on both sides."""
    rows = [kit.row_of(0, kit.completion("1 2 3"), kit.completion("1 2 3", sampled_by="m"))]
    for link, value in (("sigmoid", math.log(2)), ("hinge", 1.0), ("linear", 0.0)):
        objective = preset("irft", link=link)
        outcome = kit.step(objective, [kit.batch_for(objective, rows)], policy, policy.parameters, reference)
        assert outcome.loss == pytest.approx(value)
        assert max(float(gradient.abs().max()) for gradient in outcome.gradients) < 1e-15


# --- APO, SPPO, EXO, BCO, DiscoPOP, WPO


def pulls(name, **changes):
    """(slope by the chosen side, by the rejected one): what is negative becomes likelier."""
    return run(name, **changes)[1:3]


def test_apo_zero_draws_the_sides_apart_and_apo_down_draws_both_down():
    (up, down), (chosen, rejected) = pulls("apo_zero"), pulls("apo_down")
    assert up < 0 < down
    assert 0 < chosen < rejected
    assert "less likely too" in preset("apo_down").cautions()[0]


def test_sppo_and_bco_take_each_side_by_itself():
    for name in ("sppo_hard", "bco_pair", "apo_zero"):
        assert pulls(name)[0] == pytest.approx(run(name, [*REFERENCE[:3], -3.0, -4.0])[1]), name
    there = run("sppo_hard", [-5.0, 0, 0, 0, 0], [0, 0, 0, -5.0, 0], beta=0.1)  # a_w = 1/(2 beta), a_l = -1/(2 beta)
    assert there[:3] == pytest.approx((0, 0, 0))


def test_exo_is_least_where_the_policy_s_share_is_that_of_the_label():
    """beta h = log((1 - e) / e); below, the chosen side is drawn up, beyond it down."""
    wanted = math.log(0.9 / 0.1) / 0.1
    found = [run("exo_pair", [0.0] * 5, [h, 0, 0, 0, 0], label_smoothing=0.1)[:2] for h in (0, wanted, 2 * wanted)]
    assert found[1] == pytest.approx((0, 0))
    assert found[0][1] < 0 < found[2][1]
    assert [key for key, _ in preset("exo_pair", label_smoothing=0.0).problems()] == ["label_smoothing"]


def test_discopop_is_exponential_ahead_and_logistic_behind_and_rises_in_between():
    ahead, level, behind = (run("discopop", [0.0] * 5, [h, 0, 0, 0, 0]) for h in (40.0, 0.0, -40.0))
    assert ahead[0] == pytest.approx(math.exp(-2))
    assert behind[0] == pytest.approx(math.log1p(math.exp(2)))
    assert level[1] == pytest.approx(0.05 * ((1 - math.log(2)) / (4 * 0.05) - 3 / 4)), "the wrong way"
    assert "wrong way round" in preset("discopop").cautions()[0]
    assert run("discopop", [0.0] * 5, [-1e5, 0, 0, 0, 0])[0] == pytest.approx(5000)


def test_wpo_weighs_pairs_by_both_likelihoods_and_sends_no_gradient_there():
    """A vocabulary of two tokens: sum p^2 is p^2 + (1 - p)^2."""
    weight = 1.0
    for side in (CHOSEN, REJECTED):
        aligned = [math.exp(x) / (math.exp(2 * x) + (1 - math.exp(x)) ** 2) for x in side]
        weight *= math.prod(aligned) ** (1 / len(aligned))
    plain, weighed = run("dpo", beta=0.01), run("wpo")
    assert weighed[:3] == pytest.approx([weight * value for value in plain[:3]])
    assert weighed[3]["weight"] == pytest.approx(weight)


# --- odds: ASFT and ORPO


def test_odds_keep_their_digits_in_float32_and_push_the_certain_no_further():
    for mu in (-1e4, -50.0, -3.0, -0.7, -0.69, -0.1, -1e-3, -1e-5, -1e-7, 0.0):
        certain = mu > -1e-6
        exact = -math.log(1e-6) if certain else mu - math.log(-math.expm1(mu))
        point = torch.tensor(mu, dtype=torch.float32, requires_grad=True)
        assert float(odds(point).detach()) == pytest.approx(exact, rel=1e-3 if certain else 1e-5)
        odds(point).backward()
        assert float(point.grad) == pytest.approx(0 if certain else 1 / -math.expm1(mu), rel=1e-4)


def test_asft_at_beta_one_is_likelihood_and_unlikelihood_and_orpo_is_at_most_that():
    for mu_w, mu_l in ((MU_W, MU_L), (-2.0, -0.01), (-0.05, -30.0), (-1.0, -1.0)):
        for lam in (0.0, 0.2, 1.0):
            loss, slopes, _ = alone("asft", [mu_w] * 3, [mu_l] * 2, lam=lam)
            assert loss == pytest.approx(-(1 + lam) * mu_w - lam * math.log(-math.expm1(mu_l)))
            w, v = math.exp(mu_w), math.exp(mu_l)
            assert slopes == pytest.approx([-(1 + lam) / 3] * 3 + [lam * v / (1 - v) / 2] * 2)
            orpo = alone("orpo", [mu_w] * 3, [mu_l] * 2, lam=lam)[0]
            assert orpo == pytest.approx(loss + lam * math.log(w * (1 - v) + v * (1 - w)))
            assert orpo <= loss


# --- soft labels: h = 0.8, p = 0.75


def soft(name, p=None, policy=POLICY, reference=REFERENCE, scores=(None, None), **changes):
    """(loss, slope by h)."""
    noted = [{} if p is None else {"soft_label": p}, {}]
    noted = [{**note, **({} if s is None else {"score": s})} for note, s in zip(noted, scores, strict=True)]
    seqs = [of_length(3, annotations=noted[0]), of_length(2, role=0, annotations=noted[1])]
    loss, slopes, _ = told(preset(name, **changes), seqs, policy, reference)
    assert slopes[0] == pytest.approx(-slopes[-1])
    return loss, slopes[0]


def test_soft_labels_worked_examples():
    for name, changes, p, loss in (
        ("gdpo_soft", {}, 0.75, 0.673347),
        ("gipo_soft", {"form": "substitute"}, 0.75, 21.16),
        ("gipo_soft", {}, 0.75, 4.41),
        ("gropo_soft", {}, 1.0, 1.434638),
        ("gropo_soft", {}, 0.75, 1.469644),
    ):
        assert soft(name, p, **changes)[0] == pytest.approx(loss, abs=1e-6), name
    assert soft("gdpo_soft", 0.75)[1] == pytest.approx(-0.024500, abs=1e-6)


def test_a_coin_flip_pulls_nowhere_and_the_surer_the_label_the_harder_the_pull():
    for name, at_half in (
        ("gdpo_soft", math.log(2)),
        ("gipo_soft", 0.0),
        ("gropo_soft", 8 / 9 * (math.log(2) + 1)),
    ):
        assert soft(name, 0.5) == (pytest.approx(at_half), pytest.approx(0, abs=1e-12)), name
        slopes = [-soft(name, p)[1] for p in (0.5, 0.6, 0.7, 0.9, 1.0)]
        assert slopes == sorted(slopes), name
    for p in (0.6, 0.9):  # DPO with a beta of its own for every pair
        assert soft("gdpo_soft", p, beta=0.3) == pytest.approx(soft("gdpo_soft", 1.0, beta=0.3 * (2 * p - 1)), rel=1e-6)


def test_ropo_never_pulls_harder_than_beta():
    """The weight 4A/(1 + A)^2 makes the steepest slope in m exactly 1, at whichever margin."""
    for alpha in (1.0, 2.0, 7.0):
        policies = [[-3.0, -3.0, -3.0 + h, -3.0, -3.0] for h in torch.linspace(-8, 8, 101).tolist()]
        slopes = [abs(soft("gropo_soft", 1.0, p, [-3.0] * 5, alpha=alpha, beta=1.0)[1]) for p in policies]
        assert max(slopes) <= 1 + 1e-9
        assert max(slopes) == pytest.approx(1, abs=2e-3)


def test_labels_are_those_of_the_column_else_of_scores_else_hard():
    """p = sigmoid((s_w - s_l) / temperature). One positive of each row is labelled; its pairs share the label."""
    for temperature in (1.0, 0.25):
        p = 1 / (1 + math.exp(-0.6 / temperature))
        from_scores = soft("gdpo_soft", scores=(0.9, 0.3), temperature=temperature)
        assert from_scores == pytest.approx(soft("gdpo_soft", p), rel=1e-6)
    assert soft("gdpo_soft", 0.75, scores=(0.9, 0.3)) == soft("gdpo_soft", 0.75)
    assert soft("gdpo_soft") == soft("gdpo_soft", 1.0)
    labels = [(0, 1, 0.75), (0, 0, 0.1), (0, 0, None), (1, 1, 0.6), (1, 0, None)]  # row, role, label
    seqs = [of_length(1, row=r, role=o, annotations={} if p is None else {"soft_label": p}) for r, o, p in labels]
    loss, _, _ = told(preset("gdpo_soft", beta=1.0), seqs, [-1.0, -2.0, -4.0, -1.0, -3.0], -1.0)
    assert 3 * loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (0.5 * 1, 0.5 * 3, 0.2 * 2)), rel=1e-6)
