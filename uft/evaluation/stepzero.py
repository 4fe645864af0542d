"""Before the first step the policy is the reference.

What follows if it is not would be no fine-tuning from that reference, and losses would start from the wrong number.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

CAUSES = (
    "dropout is on in one of the two",
    "reference.path or a cached reference belongs to another model, template or precision",
    "the adapter does not start from zero",
)


def check_step_zero(policy_log_probs: Tensor, reference_log_probs: Tensor, tolerance: float) -> list[str]:
    """What is wrong with the log-probs of the same targets, (N,) each; [] if they agree to `tolerance` per token."""
    problems = [
        f"{int(bad.sum())} of {bad.numel()} log-probs of the {name} are not finite"
        for name, values in (("policy", policy_log_probs), ("reference", reference_log_probs))
        if (bad := ~values.isfinite()).any()
    ]
    if problems or not policy_log_probs.numel():
        return problems
    difference = (policy_log_probs.detach().float() - reference_log_probs.detach().float()).abs()
    if float(difference.max()) <= tolerance:
        return []
    count, total = int((difference > tolerance).sum()), difference.numel()
    what = (
        f"policy and reference should be equal before the first step, but {count} of {total} log-probs differ by more "
        f"than {tolerance:g}, at most by {float(difference.max()):.3g}"
    )
    return [what, *(f"likely: {cause}" for cause in CAUSES)]
