from __future__ import annotations

import torch

from uft.evaluation.evaluate import check_step_zero


def test_equal_log_probs_are_right():
    log_probs = torch.tensor([-1.0, -2.0, -1e4])
    assert check_step_zero(log_probs, log_probs.clone(), 0.0) == []
    assert check_step_zero(log_probs, log_probs + 1e-5, 1e-3) == []
    assert check_step_zero(torch.zeros(0), torch.zeros(0), 1e-3) == []


def test_a_difference_is_measured_and_explained():
    first, *causes = check_step_zero(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -3.0]), 1e-3)
    assert "1 of 3" in first
    assert "0.5" in first
    assert any("dropout" in cause for cause in causes)
    assert any("reference.path" in cause for cause in causes)


def test_what_is_not_finite_is_never_within_tolerance():
    broken = torch.tensor([-1.0, float("nan")])
    assert check_step_zero(broken, broken, 1.0) == [
        "1 of 2 log-probs of the policy are not finite",
        "1 of 2 log-probs of the reference are not finite",
    ]
