"""Weighted likelihood: SFT against SHARED-1, Dynamic Fine-Tuning against its worked example, Anchored SFT by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uft.objectives.base import StepContext

LOGITS = [
    [[0.5, -0.5, 1, 0], [1.5, 0.2, -0.3, 0.7], [-1, 2, 0.4, 0.1], [0.3, 0.3, 0.3, 0.3]],
    [[2, 1, 0, -1], [0, 0, 3, 0.5], [1, 1, 1, 1], [9, 9, 9, 9]],
]


def mean(terms):
    return sum(t.weight * t.total / t.count for t in terms.values() if t.weight)


@pytest.fixture
def shared(kit):
    """labels [[-100, -100, 1, 3], [-100, 2, -100, -100]]: each sequence a row."""
    seqs = [kit.Seq([0, 0, 1, 3], [False, False, True, True], 0), kit.Seq([0, 2, 0, 0], [False, True, False, False], 1)]
    return kit.batch_of(seqs), kit.Logits(LOGITS)


def test_shared_1_log_probs_sums_and_means(shared):
    batch, policy = shared
    log_probs = policy(batch).log_probs
    assert log_probs.tolist() == pytest.approx([-1.935073, -2.237366, -2.440190], abs=1e-6)
    assert batch.lengths.tolist() == [2, 1]
    assert batch.sum(log_probs).tolist() == pytest.approx([-4.172439, -2.440190], abs=1e-6)
    assert batch.mean(log_probs).tolist() == pytest.approx([-2.086220, -2.440190], abs=1e-6)


@pytest.mark.parametrize(
    ("reduction", "total", "count"), [("token", 4.172439 + 2.440190, 3), ("sequence", 2.086220 + 2.440190, 2)]
)
def test_reduction(kit, shared, reduction, total, count):
    batch, policy = shared
    loss = kit.preset("sft", reduction=reduction)(batch, policy, None, StepContext())
    assert float(loss["sft"].total.detach()) == pytest.approx(total, abs=2e-6)
    assert float(loss["sft"].count) == count
    assert float(loss["nll"].total) == pytest.approx(6.612629, abs=2e-6)
    assert float(loss["nll"].count) == 3
    assert (loss["sft"].weight, loss["nll"].weight) == (1.0, 0.0)


def test_toy_pair_of_the_baselines(kit):
    batch = kit.batch_of([kit.of_length(3)])
    loss = kit.preset("sft")(batch, kit.Told([-0.2, -0.5, -0.1]), None, StepContext())
    assert float(mean(loss).detach()) == pytest.approx(0.266667, abs=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("name", "value"), [("sft", 2.0), ("dynamic_ft", (math.exp(-1) + 3 * math.exp(-3)) / 2)])
def test_a_sequence_without_targets_is_an_exact_zero_and_not_counted(kit, reduction, name, value):
    batch = kit.batch_of([kit.of_length(0, row=0), kit.of_length(2, row=1)])
    policy = kit.Told([-1.0, -3.0])
    loss = kit.preset(name, reduction=reduction)(batch, policy, None, StepContext())
    assert float(mean(loss).detach()) == pytest.approx(value)
    mean(loss).backward()
    assert torch.isfinite(policy.log_probs.grad).all()


# --- Dynamic Fine-Tuning ---------------------------------------------------------------------------------------------


@pytest.fixture
def example(kit):
    """The specification's: a token predicted by each of two rows of logits, then read by nobody."""
    batch = kit.batch_of([kit.Seq([9, 0, 2], [False, True, True])])
    return batch, kit.Logits([[[1, 0, -1], [0.5, 0.5, 0], [7, 7, 7]]])


def test_dynamic_ft_worked_example(kit, example):
    batch, policy = example
    assert policy(batch).log_probs.exp().tolist() == pytest.approx([0.665241, 0.232697], abs=1e-6)
    assert (-policy(batch).log_probs).tolist() == pytest.approx([0.407606, 1.458020], abs=1e-6)
    assert float(mean(kit.preset("sft")(batch, policy, None, StepContext())).detach()) == pytest.approx(
        0.932813, abs=1e-6
    )
    loss = kit.preset("dynamic_ft")(batch, policy, None, StepContext())
    assert float(mean(loss).detach()) == pytest.approx(0.305216, abs=1e-6)
    assert float(loss["nll"].total / loss["nll"].count) == pytest.approx(0.932813, abs=1e-6)
    mean(loss).backward()
    assert policy.given.grad[0, 0].tolist() == pytest.approx([-0.111348, 0.081402, 0.029946], abs=1e-6)
    assert not policy.given.grad[0, 2].any()


def test_dynamic_ft_pulls_p_times_as_hard_as_sft_and_as_hard_as_p_itself(kit, example):
    batch, policy = example
    slopes = {}
    for name in ("sft", "dynamic_ft"):
        (slopes[name],) = torch.autograd.grad(mean(kit.preset(name)(batch, policy, None, StepContext())), policy.given)
    p = policy(batch).log_probs.exp()
    (of_p,) = torch.autograd.grad(-p.mean(), policy.given)
    torch.testing.assert_close(slopes["dynamic_ft"], of_p)
    torch.testing.assert_close(slopes["dynamic_ft"][0, :2], p.detach()[:, None] * slopes["sft"][0, :2])


def test_dynamic_ft_without_its_weight_is_sft_to_the_bit(kit, shared):
    batch, policy = shared
    values = [
        mean(kit.preset(n, **w)(batch, policy, None, StepContext())) for n, w in (("sft", {}), ("dynamic_ft", ONE))
    ]
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value, policy.given)[0] for value in values))


ONE = {"weight": "one"}


def test_dynamic_ft_is_at_most_one_over_e_and_rises_before_it_falls(kit):
    objective, batch = kit.preset("dynamic_ft"), kit.batch_of([kit.of_length(1)])

    def loss(p):
        return float(mean(objective(batch, kit.Told([math.log(p)]), None, StepContext())).detach())

    curve = [loss(p) for p in (1e-6, 0.05, 0.2, 1 / math.e)]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(1 / math.e)
    assert [loss(p) for p in (0.5, 0.8, 1.0)] == sorted([loss(p) for p in (0.5, 0.8, 1.0)], reverse=True)


# --- Anchored SFT ----------------------------------------------------------------------------------------------------


def softmax(logits):
    exponents = np.exp(np.asarray(logits, float))
    return exponents / exponents.sum(-1, keepdims=True)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_anchored_sft_by_hand(kit, shared, reduction):
    """Dynamic FT + alpha KL(reference || policy) over all four tokens of the vocabulary; its slope on the logits is
    alpha (policy - reference), which the target has no part in."""
    batch, policy = shared
    reference = kit.Logits(np.random.default_rng(0).normal(size=(2, 4, 4)))
    terms = kit.preset("anchored_sft", alpha=0.3, reduction=reduction)(batch, policy, reference, StepContext())
    ours, theirs = (softmax(side.given.detach().numpy())[[0, 0, 1], [1, 2, 0]] for side in (policy, reference))
    kl = (theirs * np.log(theirs / ours)).sum(-1)
    p = ours[range(3), [1, 3, 2]]
    share = np.array([1 / 3] * 3 if reduction == "token" else [1 / 4, 1 / 4, 1 / 2])
    assert float(mean(terms).detach()) == pytest.approx(float(share @ (-p * np.log(p) + 0.3 * kl)))
    assert float(terms["kl"].total.detach() / terms["kl"].count) == pytest.approx(float(share @ kl))
    mean(terms).backward()
    target = np.eye(4)[[1, 3, 2]]
    slope = share[:, None] * (p[:, None] * (ours - target) + 0.3 * (ours - theirs))
    assert policy.given.grad[[0, 0, 1], [1, 2, 0]].flatten().tolist() == pytest.approx(slope.flatten().tolist())
    assert reference.given.grad is None


def test_anchored_sft_without_its_anchor_is_dynamic_ft(kit, shared):
    batch, policy = shared
    objective = kit.preset("anchored_sft", alpha=0.0)
    assert not objective.needs.reference
    assert not objective.needs.distributions
    free, dynamic = (mean(o(batch, policy, None, StepContext())) for o in (objective, kit.preset("dynamic_ft")))
    assert torch.equal(free, dynamic)
    assert torch.equal(*(torch.autograd.grad(value, policy.given)[0] for value in (free, dynamic)))


def test_the_anchor_needs_the_reference_itself(kit):
    needs = kit.preset("anchored_sft").needs
    assert (needs.reference, needs.distributions) == (True, True)
