"""SFT against SHARED-1 of the specification."""

from __future__ import annotations

import pytest
import torch

from uft.objectives import make
from uft.objectives.base import Clock

LOGITS = [
    [[0.5, -0.5, 1, 0], [1.5, 0.2, -0.3, 0.7], [-1, 2, 0.4, 0.1], [0.3, 0.3, 0.3, 0.3]],
    [[2, 1, 0, -1], [0, 0, 3, 0.5], [1, 1, 1, 1], [9, 9, 9, 9]],
]


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
def test_reduction(shared, reduction, total, count):
    batch, policy = shared
    loss = make({"method": "nll", "reduction": reduction})(batch, policy, None, Clock())
    assert float(loss["sft"].total.detach()) == pytest.approx(total, abs=2e-6)
    assert float(loss["sft"].count) == count
    assert float(loss["nll"].total) == pytest.approx(6.612629, abs=2e-6)
    assert float(loss["nll"].count) == 3
    assert (loss["sft"].weight, loss["nll"].weight) == (1.0, 0.0)


def test_toy_pair_of_the_baselines(kit):
    batch = kit.batch_of([kit.of_length(3)])
    loss = make({"method": "nll"})(batch, kit.Told([-0.2, -0.5, -0.1]), None, Clock())
    assert float(loss["sft"].total.detach() / loss["sft"].count) == pytest.approx(0.266667, abs=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_sequence_without_targets_is_an_exact_zero_and_not_counted(kit, reduction):
    batch = kit.batch_of([kit.of_length(0, row=0), kit.of_length(2, row=1)])
    policy = kit.Told([-1.0, -3.0])
    loss = make({"method": "nll", "reduction": reduction})(batch, policy, None, Clock())
    assert float(loss["sft"].total.detach() / loss["sft"].count) == 2.0
    loss["sft"].total.backward()
    assert torch.isfinite(policy.log_probs.grad).all()
