"""Geometric-averaged losses for soft labels, against section 9 of the specification: h = 0.8, p = 0.75."""

from __future__ import annotations

import math

import pytest
import torch

from uft.objectives.base import StepContext

POLICY, REFERENCE = [-0.2, -0.5, -0.1, -1.0, -0.7], [-0.3, -0.4, -0.3, -0.6, -0.5]
NAMES = ("gdpo_soft", "gipo_soft", "gropo_soft")


@pytest.fixture
def run(kit):
    """run("gdpo_soft", p) -> (loss, slope by h)."""

    def measured(name, p=None, policy=POLICY, reference=REFERENCE, scores=(None, None), **changes):
        noted = [{} if p is None else {"soft_label": p}, {}]
        noted = [{**note, **({} if s is None else {"score": s})} for note, s in zip(noted, scores, strict=True)]
        seqs = [kit.of_length(3, annotations=noted[0]), kit.of_length(2, role=0, annotations=noted[1])]
        told = kit.Told(policy)
        terms = kit.preset(name, **changes)(kit.batch_of(seqs), told, kit.Told(reference), StepContext())
        terms["pair"].total.backward()
        chosen, rejected = float(told.log_probs.grad[0]), float(told.log_probs.grad[-1])
        assert chosen == pytest.approx(-rejected)
        return float(terms["pair"].total.detach()), chosen

    return measured


@pytest.mark.parametrize(
    ("name", "changes", "p", "loss"),
    [
        ("gdpo_soft", {}, 0.75, 0.673347),
        ("gipo_soft", {"form": "substitute"}, 0.75, 21.16),
        ("gipo_soft", {}, 0.75, 4.41),
        ("gropo_soft", {}, 1.0, 1.434638),
        ("gropo_soft", {}, 0.75, 1.469644),
    ],
)
def test_worked_example(run, name, changes, p, loss):
    assert run(name, p, **changes)[0] == pytest.approx(loss, abs=1e-6)


def test_worked_slope(run):
    assert run("gdpo_soft", 0.75)[1] == pytest.approx(-0.024500, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_label_of_a_half_says_nothing(run, name):
    loss, slope = run(name, 0.5)
    at_half = {"gdpo_soft": math.log(2), "gipo_soft": 0.0, "gropo_soft": 8 / 9 * (math.log(2) + 1)}
    assert loss == pytest.approx(at_half[name])
    assert slope == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("name", ["gdpo_soft", "gropo_soft"])
def test_the_other_way_round_with_the_other_label_is_the_same(run, name, p):
    there, back = run(name, p), run(name, 1 - p, policy=REFERENCE, reference=POLICY)
    assert there[0] == pytest.approx(back[0])
    assert there[1] == pytest.approx(-back[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_surer_the_label_the_harder_the_pull(run, name):
    slopes = [-run(name, p)[1] for p in (0.5, 0.6, 0.7, 0.9, 1.0)]
    assert slopes == sorted(slopes)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_gdpo_is_dpo_with_a_beta_of_its_own_for_every_pair(run, p):
    assert run("gdpo_soft", p, beta=0.3) == pytest.approx(run("gdpo_soft", 1.0, beta=0.3 * (2 * p - 1)), rel=1e-6)


def test_ropo_never_pulls_harder_than_beta(run):
    """The weight 4A/(1 + A)^2 makes the steepest slope in m exactly 1, at whichever margin."""
    for alpha in (1.0, 2.0, 7.0):
        policies = [[-3.0, -3.0, -3.0 + h, -3.0, -3.0] for h in torch.linspace(-8, 8, 1601).tolist()]
        slopes = [abs(run("gropo_soft", 1.0, p, [-3.0] * 5, alpha=alpha, beta=1.0)[1]) for p in policies[::8]]
        assert max(slopes) <= 1 + 1e-9
        assert max(slopes) == pytest.approx(1, abs=1e-3)


def test_pairs_of_several_labels_each_have_their_own(kit):
    """One positive of each row is labelled; its pairs share the label."""
    seqs = [
        kit.of_length(1, row=0, annotations={"soft_label": 0.75}),
        kit.of_length(1, row=0, role=0, annotations={"soft_label": 0.1}),
        kit.of_length(1, row=0, role=0),
        kit.of_length(1, row=1, annotations={"soft_label": 0.6}),
        kit.of_length(1, row=1, role=0),
    ]
    terms = kit.preset("gdpo_soft", beta=1.0)(
        kit.batch_of(seqs), kit.Told([-1.0, -2.0, -4.0, -1.0, -3.0]), kit.Told(-1.0), StepContext()
    )
    margins = [0.5 * 1, 0.5 * 3, 0.2 * 2]
    assert float(terms["pair"].total.detach()) == pytest.approx(
        sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-6
    )


def test_scores_are_labels_where_there_is_no_column(run):
    """p = sigmoid((s_w - s_l) / temperature)."""
    for temperature in (1.0, 0.25):
        p = 1 / (1 + math.exp(-0.6 / temperature))
        from_scores = run("gdpo_soft", scores=(0.9, 0.3), temperature=temperature)
        assert from_scores == pytest.approx(run("gdpo_soft", p), rel=1e-6)
    assert run("gdpo_soft", 0.75, scores=(0.9, 0.3)) == run("gdpo_soft", 0.75), "the column is asked first"


def test_neither_label_nor_score_is_a_hard_label(run):
    assert run("gdpo_soft") == run("gdpo_soft", 1.0)
