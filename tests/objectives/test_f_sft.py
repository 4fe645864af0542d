"""f-divergence SFT against the worked example and the invariants of section 2 of the specification."""

from __future__ import annotations

import math

import pytest
import torch

from uft.objectives.base import StepContext
from uft.objectives.f_sft import DIVERGENCES, MARGIN

ALL = sorted(DIVERGENCES)
every = pytest.mark.parametrize("f", ALL)


def run(kit, objective, policy, reference, lengths=None):
    """(terms, slope of the loss by each log-prob); one sequence of `lengths` tokens after the other."""
    seqs = [kit.of_length(n, row=row) for row, n in enumerate(lengths or [len(policy)])]
    told = kit.Told(policy)
    terms = objective(kit.batch_of(seqs), told, reference and kit.Told(reference), StepContext())
    (terms["f_sft"].total / terms["f_sft"].count).backward()
    return terms, told.log_probs.grad.tolist()


@pytest.mark.parametrize(
    ("f", "loss", "slope"),
    [
        ("total_variation", -0.1, -0.5),
        ("pearson", -0.0975, -0.475),
        ("hellinger", -0.090909, -0.413223),
        ("reverse_kl", -0.095163, -0.452419),
        ("forward_kl", -0.095310, -0.454545),
        ("jensen_shannon", -0.090903, -0.413106),
    ],
)
def test_worked_example(kit, f, loss, slope):
    """The toy pair's chosen side: a = 0.2; sums of log-probs, so every token has the slope of the sum."""
    objective = kit.preset("f_sft", beta=0.5, f=f)
    terms, slopes = run(kit, objective, [-0.2, -0.5, -0.1], [-0.3, -0.4, -0.3])
    assert float(terms["f_sft"].total.detach()) == pytest.approx(loss, abs=1e-6)
    assert slopes == pytest.approx([slope] * 3, abs=1e-6)
    assert float(terms["implicit_reward"].total) == pytest.approx(0.1)
    assert float(terms["nll"].total) == pytest.approx(0.8)
    assert float(terms["clamped"].total) == 0


# --- invariants ------------------------------------------------------------------------------------------------------

POLICY, LENGTHS = [-0.4, -1.1, -0.2, -2.0, -0.7, -0.1], [3, 1, 2]


@pytest.mark.parametrize("reference", [None, [-9.0] * 6, [-0.5, -0.1, -3.0, -1.0, -0.2, -0.3]])
def test_total_variation_is_beta_times_sft_whatever_the_reference(kit, reference):
    _, slopes = run(kit, kit.preset("f_sft", f="total_variation", beta=0.3), POLICY, reference, LENGTHS)
    assert slopes == pytest.approx([-0.3 / 3] * 6), "sums over completions, mean over three of them"
    averaged = kit.preset("f_sft", f="total_variation", beta=0.3, ratio="mean")
    sft = kit.Told(POLICY)
    batch = kit.batch_of([kit.of_length(n, row=row) for row, n in enumerate(LENGTHS)])
    loss = kit.preset("sft", reduction="sequence")(batch, sft, None, StepContext())["sft"]
    (loss.total / loss.count).backward()
    assert run(kit, averaged, POLICY, reference, LENGTHS)[1] == pytest.approx((0.3 * sft.log_probs.grad).tolist())


@every
def test_at_the_reference_the_loss_is_zero_and_the_gradient_beta_times_sft(kit, f):
    terms, slopes = run(kit, kit.preset("f_sft", f=f, beta=0.3), POLICY, POLICY, LENGTHS)
    assert float(terms["f_sft"].total.detach()) == pytest.approx(0, abs=1e-12)
    assert slopes == pytest.approx([-0.3 / 3] * 6)


@every
def test_what_became_likely_pulls_less_for_all_but_total_variation(kit, f):
    objective = kit.preset("f_sft", f=f, beta=0.5)
    pulls = [-run(kit, objective, [a - 9], [-9.0])[1][0] for a in (-1.0, -0.3, 0.0, 0.3, 1.0, 1.9)]
    if f == "total_variation":
        assert pulls == pytest.approx([0.5] * 6)
    else:
        assert pulls == sorted(pulls, reverse=True)
        assert len(set(pulls)) == 6


def test_pearson_stops_pulling_at_two_over_beta_and_turns(kit):
    objective = kit.preset("f_sft", f="pearson", beta=0.5)
    assert run(kit, objective, [-5.0], [-9.0])[1] == pytest.approx([0.0])
    assert run(kit, objective, [-4.0], [-9.0])[1][0] > 0


@pytest.mark.parametrize(("f", "edge"), [("hellinger", -1.0), ("forward_kl", -1.0), ("jensen_shannon", -math.log(2))])
def test_rewards_are_clamped_to_the_domain_and_counted(kit, f, edge):
    objective = kit.preset("f_sft", f=f, beta=0.5)
    inside, _ = run(kit, objective, [2 * (edge + 2 * MARGIN) - 9], [-9.0])
    outside, slope = run(kit, objective, [-90.0, -9.0], [-9.0, -9.0], [1, 1])
    assert float(inside["clamped"].total) == 0
    assert (float(outside["clamped"].total), float(outside["clamped"].count)) == (1, 2)
    assert torch.isfinite(outside["f_sft"].total)
    assert slope == pytest.approx([0, -0.25])


def test_total_variation_alone_needs_no_reference(kit):
    assert {f for f in ALL if not kit.preset("f_sft", f=f).needs.reference} == {"total_variation"}
    assert {f for f in ALL if not kit.preset("f_sft", f=f).at_reference(kit.batch_of([kit.of_length(1)]))} == {
        "total_variation"
    }


def test_a_sequence_without_targets_is_not_counted(kit):
    terms, slopes = run(kit, kit.preset("f_sft", beta=0.5), [-0.2], [-0.4], [0, 1])
    assert float(terms["f_sft"].count) == 1
    assert float(terms["f_sft"].total.detach()) == pytest.approx(-0.0975)
    assert slopes == pytest.approx([-0.475])


def test_problems_name_keys(kit):
    assert [key for key, _ in kit.preset("f_sft", reduction="token").problems()] == ["reduction"]
    assert kit.preset("f_sft").problems() == []
