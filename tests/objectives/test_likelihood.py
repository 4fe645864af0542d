"""SFT, Dynamic Fine-Tuning, Anchored SFT, f-divergence SFT and PoFT against worked numbers and their invariants."""

from __future__ import annotations

import math

import pytest
import torch
import toys as kit
from toys import of_length, preset, told

from uft.objectives.base import StepContext
from uft.objectives.likelihood import DIVERGENCES, MARGIN

LOGITS = [
    [[0.5, -0.5, 1, 0], [1.5, 0.2, -0.3, 0.7], [-1, 2, 0.4, 0.1], [0.3, 0.3, 0.3, 0.3]],
    [[2, 1, 0, -1], [0, 0, 3, 0.5], [1, 1, 1, 1], [9, 9, 9, 9]],
]
POLICY, LENGTHS = [-0.4, -1.1, -0.2, -2.0, -0.7, -0.1], [3, 1, 2]


def mean(terms):
    return sum(t.weight * t.total / t.count for t in terms.values() if t.weight)


def rows_of(lengths, baselines=None):
    notes = [{}] * len(lengths) if baselines is None else [{"baseline_logp": b} for b in baselines]
    return [of_length(n, row=row, annotations=note) for row, (n, note) in enumerate(zip(lengths, notes, strict=True))]


def shared():
    """labels [[-100, -100, 1, 3], [-100, 2, -100, -100]]: each sequence a row."""
    on = [[False, False, True, True], [False, True, False, False]]
    batch = kit.batch_of([kit.Seq([0, 0, 1, 3], on[0], 0), kit.Seq([0, 2, 0, 0], on[1], 1)])
    return batch, kit.Logits(LOGITS)


def test_shared_1_log_probs_reductions_and_counts():
    batch, policy = shared()
    log_probs = policy(batch).log_probs
    assert log_probs.tolist() == pytest.approx([-1.935073, -2.237366, -2.440190], abs=1e-6)
    assert batch.lengths.tolist() == [2, 1]
    assert batch.sum(log_probs).tolist() == pytest.approx([-4.172439, -2.440190], abs=1e-6)
    assert batch.mean(log_probs).tolist() == pytest.approx([-2.086220, -2.440190], abs=1e-6)
    for reduction, total, count in (("token", 4.172439 + 2.440190, 3), ("sequence", 2.086220 + 2.440190, 2)):
        loss = preset("sft", reduction=reduction)(batch, policy, None, StepContext())
        assert float(loss["sft"].total.detach()) == pytest.approx(total, abs=2e-6)
        assert float(loss["nll"].total) == pytest.approx(6.612629, abs=2e-6)
        assert (float(loss["sft"].count), float(loss["nll"].count)) == (count, 3)
        assert (loss["sft"].weight, loss["nll"].weight) == (1.0, 0.0)


# --- Dynamic Fine-Tuning


def test_dynamic_ft_worked_example():
    """The specification's example: a token predicted by each of two rows of logits; the last token is no input."""
    batch = kit.batch_of([kit.Seq([9, 0, 2], [False, True, True])])
    policy = kit.Logits([[[1, 0, -1], [0.5, 0.5, 0], [7, 7, 7]]])
    p = policy(batch).log_probs.exp()
    assert p.tolist() == pytest.approx([0.665241, 0.232697], abs=1e-6)
    sft = mean(preset("sft")(batch, policy, None, StepContext()))
    assert float(sft.detach()) == pytest.approx(0.932813, abs=1e-6)
    loss = preset("dynamic_ft")(batch, policy, None, StepContext())
    assert float(mean(loss).detach()) == pytest.approx(0.305216, abs=1e-6)
    assert float(loss["nll"].total / loss["nll"].count) == pytest.approx(0.932813, abs=1e-6)
    slopes = [torch.autograd.grad(value, policy.given)[0] for value in (mean(loss), sft, -p.mean())]
    assert slopes[0][0, 0].tolist() == pytest.approx([-0.111348, 0.081402, 0.029946], abs=1e-6)
    assert not slopes[0][0, 2].any()
    torch.testing.assert_close(slopes[0], slopes[2], msg="as hard as p itself")
    torch.testing.assert_close(slopes[0][0, :2], p.detach()[:, None] * slopes[1][0, :2], msg="p times as hard as SFT")


def test_dynamic_ft_is_at_most_one_over_e_and_rises_before_it_falls():
    curve = [told(preset("dynamic_ft"), [of_length(1)], [math.log(p)])[0] for p in (1e-6, 0.05, 0.2, 1 / math.e)]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(1 / math.e)
    fall = [told(preset("dynamic_ft"), [of_length(1)], [math.log(p)])[0] for p in (0.5, 0.8, 1.0)]
    assert fall == sorted(fall, reverse=True)


def test_anchored_sft_by_hand():
    """Dynamic FT + alpha KL(reference || policy) over all four tokens of the vocabulary; its slope on the logits is
    alpha (policy - reference), which the target has no part in."""
    places, targets = ([0, 0, 1], [1, 2, 0]), [1, 3, 2]
    theirs = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for reduction, share in (("token", [1 / 3] * 3), ("sequence", [1 / 4, 1 / 4, 1 / 2])):
        batch, policy = shared()
        reference, share = kit.Logits(theirs), torch.tensor(share, dtype=torch.float64)
        terms = preset("anchored_sft", alpha=0.3, reduction=reduction)(batch, policy, reference, StepContext())
        p, q = (side.given.detach()[places].softmax(-1) for side in (policy, reference))
        kl, own = (q * (q / p).log()).sum(-1), p[range(3), targets]
        assert float(mean(terms).detach()) == pytest.approx(float((share * (0.3 * kl - own * own.log())).sum()))
        assert float(terms["kl"].total.detach() / terms["kl"].count) == pytest.approx(float((share * kl).sum()))
        mean(terms).backward()
        slope = own[:, None] * (p - torch.eye(4)[targets]) + 0.3 * (p - q)
        torch.testing.assert_close(policy.given.grad[places], share[:, None] * slope)
        assert reference.given.grad is None


# --- distillation


def test_distillation_by_hand():
    """Its ends are KL(teacher || policy), slope policy - teacher, and KL(policy || teacher); between them is JSD."""
    theirs = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places = ([0, 0, 1], [1, 2, 0])

    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

    for beta, reduction, share in ((0.0, "token", [1 / 3] * 3), (1.0, "sequence", [1 / 4, 1 / 4, 1 / 2])):
        batch, policy = shared()
        terms = preset("distill", beta=beta, reduction=reduction)(batch, policy, kit.Logits(theirs), StepContext())
        share = torch.tensor(share, dtype=torch.float64)
        p, q = policy.given.detach()[places].softmax(-1), theirs[places].softmax(-1)
        expected = kl(p, q) if beta else kl(q, p)
        assert float(mean(terms).detach()) == pytest.approx(float((share * expected).sum()))
        mean(terms).backward()
        slope = p * ((p / q).log() - expected[:, None]) if beta else p - q
        torch.testing.assert_close(policy.given.grad[places], share[:, None] * slope)
    batch, policy = shared()
    found = mean(preset("distill", beta=0.25)(batch, policy, kit.Logits(theirs), StepContext()))
    m = 0.25 * q + 0.75 * p
    assert float(found.detach()) == pytest.approx(float((0.25 * kl(q, m) + 0.75 * kl(p, m)).mean()))


def test_distillation_worked_example():
    """Teacher (.5, .25, .25), policy (.25, .25, .5): both divergences are .25 log 2."""
    batch = kit.batch_of([kit.Seq([9, 0], [False, True])])
    sides = [torch.tensor([[p, [1.0, 1.0, 1.0]]]).log() for p in ([0.25, 0.25, 0.5], [0.5, 0.25, 0.25])]
    for beta, value in ((0.0, 0.173287), (1.0, 0.173287), (0.5, 0.042475), (0.1, 0.015483)):
        terms = preset("distill", beta=beta)(batch, *map(kit.Logits, sides), StepContext())
        assert float(mean(terms).detach()) == pytest.approx(value, abs=1e-6), beta


# --- f-divergence SFT


def f_sft(f, policy, reference, lengths=None, **changes):
    return told(preset("f_sft", f=f, **changes), rows_of(lengths or [len(policy)]), policy, reference)


WORKED = {
    "total_variation": (-0.1, -0.5),
    "pearson": (-0.0975, -0.475),
    "hellinger": (-0.090909, -0.413223),
    "reverse_kl": (-0.095163, -0.452419),
    "forward_kl": (-0.095310, -0.454545),
    "jensen_shannon": (-0.090903, -0.413106),
}


def test_f_sft_worked_example():
    """The toy pair's chosen side: a = 0.2; sums of log-probs, so every token has the slope of the sum."""
    assert WORKED.keys() == DIVERGENCES.keys()
    for f, (loss, slope) in WORKED.items():
        found, slopes, means = f_sft(f, [-0.2, -0.5, -0.1], [-0.3, -0.4, -0.3], beta=0.5)
        assert (found, slopes) == (pytest.approx(loss, abs=1e-6), pytest.approx([slope] * 3, abs=1e-6)), f
        assert means["implicit_reward"] == pytest.approx(0.1)
        assert (means["nll"], means["clamped"]) == (pytest.approx(0.8 / 3), 0)


def test_total_variation_is_beta_times_sft_whatever_the_reference():
    sft = torch.tensor(told(preset("sft", reduction="sequence"), rows_of(LENGTHS), POLICY)[1])
    for reference in (None, [-9.0] * 6, [-0.5, -0.1, -3.0, -1.0, -0.2, -0.3]):
        _, slopes, _ = f_sft("total_variation", POLICY, reference, LENGTHS, beta=0.3)
        assert slopes == pytest.approx([-0.3 / 3] * 6), "sums over completions, mean over three of them"
        averaged = f_sft("total_variation", POLICY, reference, LENGTHS, beta=0.3, ratio="mean")[1]
        assert averaged == pytest.approx((0.3 * sft).tolist())


def test_what_became_likely_pulls_less_for_all_but_total_variation():
    for f in DIVERGENCES:
        pulls = [-f_sft(f, [a - 9], [-9.0], beta=0.5)[1][0] for a in (-1.0, -0.3, 0.0, 0.3, 1.0, 1.9)]
        assert len(set(pulls)) == (1 if f == "total_variation" else 6)
        assert pulls == sorted(pulls, reverse=True)
    assert f_sft("pearson", [-5.0], [-9.0], beta=0.5)[1] == pytest.approx([0.0]), "it stops at two over beta"
    assert f_sft("pearson", [-4.0], [-9.0], beta=0.5)[1][0] > 0, "and turns"


def test_rewards_are_clamped_to_the_domain_and_counted():
    for f, edge in (("hellinger", -1.0), ("forward_kl", -1.0), ("jensen_shannon", -math.log(2))):
        assert f_sft(f, [2 * (edge + 2 * MARGIN) - 9], [-9.0], beta=0.5)[2]["clamped"] == 0
        value, slope, means = f_sft(f, [-90.0, -9.0], [-9.0, -9.0], [1, 1], beta=0.5)
        assert means["clamped"] == 0.5
        assert math.isfinite(value)
        assert slope == pytest.approx([0, -0.25])


def test_a_squared_gradient_is_a_float32_everywhere_inside_the_clamp():
    """With room for a million weights of which each has a thousandfold of it."""
    for f, divergence in DIVERGENCES.items():
        lowest = max(divergence.edge + 2 * MARGIN, -100.0)
        _, [slope], means = f_sft(f, [10 * lowest], [0.0], beta=0.1)
        assert means["clamped"] == 0
        assert abs(slope) ** 2 * 1e12 < torch.finfo(torch.float32).max, f
    assert f_sft("reverse_kl", [-310.0], [0.0], beta=0.1)[2]["clamped"] == 1


def test_total_variation_alone_needs_no_reference():
    without = [f for f in DIVERGENCES if not preset("f_sft", f=f).needs.reference]
    blind = [f for f in DIVERGENCES if not preset("f_sft", f=f).at_reference(kit.batch_of([of_length(1)]))]
    assert without == blind == ["total_variation"]


# --- PoFT


def poft(policy, baselines, lengths=None, **changes):
    return told(preset("poft", **changes), rows_of(lengths or [len(policy)], baselines), policy)


def test_poft_worked_example():
    """mu = -1.1 over three tokens against the mean of -1.2, -0.7 and -0.8."""
    loss, slopes, means = poft([-1.5, -0.8, -1.0], [(-1.2 - 0.7 - 0.8) / 3])
    assert (loss, means["tau"]) == (pytest.approx(0.798139, abs=1e-6), pytest.approx(0.549834, abs=1e-6))
    assert slopes == pytest.approx([-0.549834 / 3] * 3, abs=1e-6)
    assert means["nll"] == pytest.approx(1.1)
    loss, _, means = poft([-1.0, -2.0], [-1.5])
    assert (loss, means["tau"]) == (pytest.approx(math.log(2)), pytest.approx(0.5)), "as likely as the others"
    loss, slopes, _ = poft([-1.0, -2.0], [-1.0], beta=2.0, gamma=0.3)
    assert loss == pytest.approx(math.log(1 + math.exp(0.7))), "scale and offset enter before the sigmoid"
    assert slopes == pytest.approx([-1 / (1 + math.exp(-0.7))] * 2)


def test_poft_pulls_tau_times_as_hard_as_sft_and_tau_is_a_ratio_of_geometric_means():
    """tau = M / (M + P): P the policy's geometric mean of its token probabilities, M that of the other models."""
    _, slopes, means = poft(POLICY, [-0.8] * 3, LENGTHS)
    ours = [math.exp(sum(part) / len(part)) for part in (POLICY[:3], POLICY[3:4], POLICY[4:])]
    tau = [math.exp(-0.8) / (math.exp(-0.8) + p) for p in ours]
    assert means["tau"] == pytest.approx(sum(tau) / 3)
    _, plain, _ = told(preset("sft", reduction="sequence"), rows_of(LENGTHS), POLICY)
    each = [tau[0]] * 3 + [tau[1]] + [tau[2]] * 2
    assert slopes == pytest.approx([t * slope for t, slope in zip(each, plain, strict=True)])


def test_poft_refuses_a_completion_with_targets_and_no_baseline():
    with pytest.raises(AssertionError, match="without baseline_logp"):
        poft([-1.0, -2.0], [math.nan, -1.5], [1, 1])
