"""PoFT against the worked example and the invariants of section 5 of the specification."""

from __future__ import annotations

import math

import pytest
import torch

from uft.objectives.base import StepContext


def run(kit, policy, baselines, lengths=None, **changes):
    """(terms, slope of the loss by each log-prob)."""
    lengths = lengths or [len(policy)]
    seqs = [
        kit.of_length(n, row=row, annotations={} if b is None else {"baseline_logp": b})
        for row, (n, b) in enumerate(zip(lengths, baselines, strict=True))
    ]
    told = kit.Told(policy)
    terms = kit.preset("poft", **changes)(kit.batch_of(seqs), told, None, StepContext())
    (terms["poft"].total / terms["poft"].count).backward()
    return terms, told.log_probs.grad.tolist()


def sft(kit, policy, lengths):
    told = kit.Told(policy)
    batch = kit.batch_of([kit.of_length(n, row=row) for row, n in enumerate(lengths)])
    loss = kit.preset("sft", reduction="sequence")(batch, told, None, StepContext())["sft"]
    (loss.total / loss.count).backward()
    return told.log_probs.grad.tolist()


def test_worked_example(kit):
    """mu = -1.1 over three tokens against the mean of -1.2, -0.7 and -0.8."""
    terms, slopes = run(kit, [-1.5, -0.8, -1.0], [(-1.2 - 0.7 - 0.8) / 3])
    assert float(terms["poft"].total.detach()) == pytest.approx(0.798139, abs=1e-6)
    assert float(terms["tau"].total) == pytest.approx(0.549834, abs=1e-6)
    assert slopes == pytest.approx([-0.549834 / 3] * 3, abs=1e-6)
    assert float(terms["nll"].total / terms["nll"].count) == pytest.approx(1.1)


POLICY, LENGTHS = [-0.4, -1.1, -0.2, -2.0, -0.7, -0.1], [3, 1, 2]


def test_an_unbeatable_baseline_is_sft_and_a_hopeless_one_nothing(kit):
    _, slopes = run(kit, POLICY, [80.0] * 3, LENGTHS)
    assert slopes == pytest.approx(sft(kit, POLICY, LENGTHS))
    _, slopes = run(kit, POLICY, [-80.0] * 3, LENGTHS)
    assert slopes == pytest.approx([0.0] * 6, abs=1e-12)


def test_the_pull_is_tau_times_that_of_sft_and_tau_a_ratio_of_geometric_means(kit):
    """tau = M / (M + P): P the policy's geometric mean of its token probabilities, M that of the other models."""
    models = [-1.2, -0.3, -0.9]
    terms, slopes = run(kit, POLICY, [sum(models) / 3] * 3, LENGTHS)
    other = math.prod(math.exp(b) for b in models) ** (1 / 3)
    tokens = [POLICY[:3], POLICY[3:4], POLICY[4:]]
    ours = [math.prod(math.exp(x) for x in part) ** (1 / len(part)) for part in tokens]
    tau = [other / (other + p) for p in ours]
    assert float(terms["tau"].total) == pytest.approx(sum(tau))
    plain = sft(kit, POLICY, LENGTHS)
    assert slopes == pytest.approx([t * g for t, g in zip([tau[0]] * 3 + [tau[1]] + [tau[2]] * 2, plain, strict=True)])


def test_as_likely_as_the_others_is_log_two(kit):
    terms, _ = run(kit, [-1.0, -2.0], [-1.5])
    assert float(terms["poft"].total.detach()) == pytest.approx(math.log(2))
    assert float(terms["tau"].total) == pytest.approx(0.5)


def test_scale_and_offset_enter_before_the_sigmoid(kit):
    terms, slopes = run(kit, [-1.0, -2.0], [-1.0], beta=2.0, gamma=0.3)
    assert float(terms["poft"].total.detach()) == pytest.approx(math.log(1 + math.exp(0.7)))
    assert slopes == pytest.approx([-1 / (1 + math.exp(-0.7))] * 2)


def test_a_completion_without_targets_needs_no_baseline_and_is_not_counted(kit):
    terms, _ = run(kit, [-1.0, -2.0], [None, -1.5], [0, 2])
    assert float(terms["poft"].count) == 1
    assert float(terms["poft"].total.detach()) == pytest.approx(math.log(2))


def test_a_completion_with_targets_and_no_baseline_never_gets_here(kit):
    with pytest.raises(AssertionError, match="without baseline_logp"):
        run(kit, [-1.0, -2.0], [None, -1.5], [1, 1])


def test_it_needs_the_column_and_no_reference(kit):
    objective = kit.preset("poft")
    assert objective.needs.annotations == {"baseline_logp"}
    assert not objective.needs.reference
    assert [key for key, _ in kit.preset("poft", reduction="token").problems()] == ["reduction"]


def test_the_order_of_rows_changes_nothing(kit):
    baselines = [-0.3, -1.0, -2.0]
    terms, _ = run(kit, POLICY, baselines, LENGTHS)
    turned, _ = run(kit, [*POLICY[4:], POLICY[3], *POLICY[:3]], baselines[::-1], LENGTHS[::-1])
    torch.testing.assert_close(terms["poft"].total, turned["poft"].total)
