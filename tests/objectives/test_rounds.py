"""Rounds of SPIN and IRFT on one prompt with four replies, in expectation: the figures of docs/pipelines.md."""

from __future__ import annotations

import pytest
import torch
from toys import preset

from uft.objectives.pairwise import LINKS, Pairs

DEMO = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)  # what demonstrations say
START = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()  # logits of the policy


def gradient(link, logits, reference, sampler):
    """(4,) by the logits, of the mean loss over pairs of a demonstration and a sample."""
    objective, leaf = preset("spin", link=link), logits.detach().requires_grad_()
    ratios = leaf.log_softmax(0) - reference.log_softmax(0)
    chosen, rejected = (side.reshape(-1) for side in torch.broadcast_tensors(ratios[:, None], ratios[None]))
    even = torch.zeros_like(chosen)
    losses = LINKS[link](Pairs(chosen, rejected, even, even + 1), objective)
    return torch.autograd.grad((torch.outer(DEMO, sampler).reshape(-1) * losses).sum(), leaf)[0]


def rounds(link, count, steps, keep=False):
    """The policy's probabilities after `count` rounds of gradient descent at rate 1; `keep`: with the pairs before."""
    logits, before = START, None
    for _ in range(count):
        reference, now = logits, logits.softmax(0)
        sampler = (now + before) / 2 if keep and before is not None else now
        for _ in range(steps):
            logits = logits - gradient(link, logits, reference, sampler)
        before = now
    return logits.softmax(0)


def divergence(policy):
    shown = DEMO > 0
    return float((DEMO[shown] * (DEMO[shown] / policy[shown]).log()).sum())


@pytest.mark.parametrize(("link", "factor"), [("sigmoid", 0.5), ("linear", 1.0), ("hinge", 1.0)])
def test_the_first_gradient_of_a_round_is_that_of_sft(link, factor):
    sft = START.softmax(0) - DEMO
    found = gradient(link, START, START, START.softmax(0))
    assert found.tolist() == pytest.approx((factor * 0.1 * sft).tolist(), abs=1e-12)
    assert link != "sigmoid" or found.tolist() == pytest.approx([-0.025, -0.005, 0.01, 0.02])


def test_rounds_of_one_step_are_sft():
    logits = START
    for _ in range(60):
        logits = logits - 0.05 * (logits.softmax(0) - DEMO)
    assert rounds("sigmoid", 60, 1).tolist() == pytest.approx(logits.softmax(0).tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("link", "count", "keep", "expected"),
    [
        ("sigmoid", 3, False, 1.329341),
        ("sigmoid", 12, False, 0.021849),
        ("sigmoid", 6, True, 0.074655),
        ("linear", 12, False, 0.025224),
    ],
)
def test_long_rounds_overshoot(link, count, keep, expected):
    assert divergence(START.softmax(0)) == pytest.approx(1.086834, abs=1e-6)
    assert divergence(rounds(link, count, 600 // count, keep)) == pytest.approx(expected, abs=1e-6)
