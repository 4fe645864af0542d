"""Losses without a reference, against the toy pair of the specification: mu_w = -0.266667, mu_l = -0.85."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uft.objectives.base import StepContext
from uft.objectives.contrastive import odds

CHOSEN, REJECTED = [-0.2, -0.5, -0.1], [-1.0, -0.7]
MU_W, MU_L = -0.8 / 3, -0.85
P_W, P_L = math.exp(MU_W), math.exp(MU_L)


def total(terms):
    return sum(t.weight * t.total / t.count for t in terms.values() if t.weight)


@pytest.fixture
def run(kit):
    """run("simpo", chosen, rejected, beta=2.5) -> (loss, slope by each log-prob, terms)."""

    def measured(name, chosen=CHOSEN, rejected=REJECTED, **changes):
        batch = kit.batch_of([kit.of_length(len(chosen)), kit.of_length(len(rejected), role=0)])
        policy = kit.Told([*chosen, *rejected])
        terms = kit.preset(name, **changes)(batch, policy, None, StepContext())
        total(terms).backward()
        return float(total(terms).detach()), policy.log_probs.grad.tolist(), terms

    return measured


@pytest.mark.parametrize(
    ("name", "loss"), [("asft", 1.090927), ("orpo", 0.287215), ("simpo", 0.613282), ("cpo", 0.915826)]
)
def test_toy_pair(run, name, loss):
    assert pytest.approx(0.765928, abs=1e-6) == P_W
    assert pytest.approx(0.427415, abs=1e-6) == P_L
    assert run(name)[0] == pytest.approx(loss, abs=1e-6)


def test_shown_terms(run):
    shown = {name: float(t.total.detach() / t.count) for name, t in run("simpo")[2].items()}
    assert (shown["chosen_reward"], shown["rejected_reward"]) == (pytest.approx(2 * MU_W), pytest.approx(2 * MU_L))
    assert shown["margin"] == pytest.approx(2 * (MU_W - MU_L))
    assert shown["accuracy"] == 1
    assert shown["nll"] == pytest.approx(-MU_W)


# --- odds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [-1e4, -50.0, -3.0, -0.7, -0.69, -0.1, -1e-3, -1e-5])
def test_odds_keep_their_digits_in_float32(mu):
    exact = mu - math.log(-math.expm1(mu))
    point = torch.tensor(mu, dtype=torch.float32, requires_grad=True)
    assert float(odds(point).detach()) == pytest.approx(exact, rel=1e-5)
    odds(point).backward()
    assert float(point.grad) == pytest.approx(1 / -math.expm1(mu), rel=1e-4)


@pytest.mark.parametrize("mu", [0.0, -1e-7])
def test_odds_of_the_certain_are_cut_off_and_push_no_further(mu):
    point = torch.tensor(mu, requires_grad=True)
    assert float(odds(point).detach()) == pytest.approx(-math.log(1e-6), rel=1e-3)
    odds(point).backward()
    assert float(point.grad) == 0


# --- ASFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("mu_w", "mu_l"), [(MU_W, MU_L), (-2.0, -0.01), (-0.05, -30.0)])
def test_asft_at_beta_one_is_likelihood_of_the_chosen_and_unlikelihood_of_the_rejected(run, lam, mu_w, mu_l):
    loss, slopes, _ = run("asft", [mu_w] * 3, [mu_l] * 2, lam=lam)
    assert loss == pytest.approx(-(1 + lam) * mu_w - lam * math.log(-math.expm1(mu_l)))
    p = math.exp(mu_l)
    assert slopes == pytest.approx([-(1 + lam) / 3] * 3 + [lam * p / (1 - p) / 2] * 2)


@pytest.mark.parametrize("lam", [0.1, 0.7, 1.0])
@pytest.mark.parametrize(("mu_w", "mu_l"), [(MU_W, MU_L), (-2.0, -0.01), (-0.05, -30.0), (-1.0, -1.0)])
def test_orpo_is_at_most_asft(run, lam, mu_w, mu_l):
    asft, orpo = (run(name, [mu_w] * 3, [mu_l] * 2, lam=lam)[0] for name in ("asft", "orpo"))
    w, v = math.exp(mu_w), math.exp(mu_l)
    assert orpo == pytest.approx(asft + lam * math.log(w * (1 - v) + v * (1 - w)))
    assert orpo <= asft


def test_asft_does_not_mind_which_rejected_stands_with_which_chosen(kit):
    chosen, rejected = [[-0.3, -1.0], [-2.0], [-0.1, -0.2, -0.9]], [[-0.5], [-1.5, -0.4], [-3.0]]

    def loss(order, name):
        rows = [(row, w, rejected[k]) for row, (w, k) in enumerate(zip(chosen, order, strict=True))]
        seqs = [
            s for row, w, v in rows for s in (kit.of_length(len(w), row=row), kit.of_length(len(v), row=row, role=0))
        ]
        log_probs = np.concatenate([side for _, w, v in rows for side in (w, v)])
        return float(total(kit.preset(name)(kit.batch_of(seqs), kit.Told(log_probs), None, StepContext())).detach())

    assert loss((2, 0, 1), "asft") == pytest.approx(loss((0, 1, 2), "asft"))
    assert loss((2, 0, 1), "orpo") != pytest.approx(loss((0, 1, 2), "orpo"))


# --- SimPO and CPO ---------------------------------------------------------------------------------------------------


def test_simpo_slope(run):
    loss, slopes, _ = run("simpo")
    slope = 2 * (1 - math.exp(-loss))
    assert slopes == pytest.approx([-slope / 3] * 3 + [slope / 2] * 2)


def test_simpo_wants_its_margin(run):
    losses = [run("simpo", gamma=gamma)[0] for gamma in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses)
    assert run("simpo", [-1.0], [-1.5], beta=2.0, gamma=1.0)[0] == pytest.approx(math.log(2))


def test_repetition_is_nothing_to_means_and_odds_but_doubles_sums(run):
    for name in ("simpo", "orpo", "asft"):
        assert run(name, CHOSEN * 2, REJECTED * 2)[0] == pytest.approx(run(name)[0])
    once, twice = run("cpo", alpha=0.0)[0], run("cpo", CHOSEN * 2, REJECTED * 2, alpha=0.0)[0]
    assert twice == pytest.approx(math.log1p(math.exp(2 * math.log(math.expm1(once)))))


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_half_smoothing_is_symmetric(run, name):
    changes = {"label_smoothing": 0.5} | ({"gamma": 0.0} if name == "simpo" else {"alpha": 0.0})
    there, back = (run(name, *sides, **changes)[0] for sides in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)))
    assert there == pytest.approx(back)


def test_the_chosen_likelihood_counts_once_a_pair(kit):
    """Two negatives are two pairs, and each brings the chosen one's likelihood, as each is a row in the papers."""
    batch = kit.batch_of([kit.of_length(2), kit.of_length(1, role=0), kit.of_length(1, role=0)])
    terms = kit.preset("orpo")(batch, kit.Told([-1.0, -2.0, -3.0, -4.0]), None, StepContext())
    assert (float(terms["chosen_nll"].total.detach()), float(terms["chosen_nll"].count)) == (3.0, 2)
    assert terms["chosen_nll"].weight == 1.0
    assert terms["pair"].weight == pytest.approx(0.1)
