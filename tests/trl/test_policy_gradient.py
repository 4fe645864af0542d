"""TRL's own loss code on the same log-probs, advantages and old log-probs: the same loss and the same gradient."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install uft-lm[trl]")
sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))  # for toys.py

from toys import batch_of, of_length, preset, told

from uft.data.rows import Role

LENGTHS, LONGEST = (3, 2, 4, 1, 5, 2, 2, 3), 8
REWARDS = (1.0, 0.1, 0.0, 0.1, 0.0, 1.0, 1.0, 0.25)


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return (-2 * torch.rand(sum(LENGTHS), generator=generator) - 0.05).tolist()


LP = drawn(0)
OLD = [
    a + b / 3
    for a, b in zip(LP, torch.randn(len(LP), generator=torch.Generator().manual_seed(1)).tolist(), strict=True)
]
REF = drawn(2)


def rows(values):
    """(completions, longest): padded on the right, as TRL has it."""
    table = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    for line, part in zip(table, torch.tensor(values, dtype=torch.float64).split(LENGTHS), strict=True):
        line[: len(part)] = part
    return table


class Alone:
    """One process of accelerate's."""

    num_processes, sync_gradients = 1, True
    gather = gather_for_metrics = staticmethod(lambda value: value)
    reduce = staticmethod(lambda value, reduction: value)


def theirs(advantages, *, trainer="grpo", old=OLD, **options):
    """(loss, gradient by every log-prob) of TRL's `_compute_loss`."""
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    kind = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[trainer]
    leaf = rows(LP).requires_grad_()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    values = {
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "accelerator": Alone,
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "_entropy_bonus_enabled": False,
        **options,
    }
    self = SimpleNamespace(**values)
    self._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, torch.zeros_like(leaf), None)
    whole = rows(old)
    inputs = {
        "prompt_ids": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "old_per_token_logps": whole,
        "old_logps": (whole * mask).sum(1),
        "ref_per_token_logps": rows(REF),
        "num_items_in_batch": mask.sum(),
    }
    loss = kind._compute_loss(self, None, inputs)
    loss.backward()
    return float(loss.detach()), leaf.grad[mask].tolist()


def ours(name, old=OLD, **changes):
    objective = preset(name, **changes)
    groups = [(LENGTHS[i], REWARDS[i], i // 4) for i in range(8)]
    seqs = [of_length(n, row=row, role=Role.OWN, target=score, good=False) for n, score, row in groups]
    batch = batch_of(seqs, columns={"old": torch.tensor(old, dtype=torch.float64)})
    loss, gradient, _ = told(objective, batch, LP, REF)
    return loss, gradient, objective.groups(batch).advantage.tolist()


CASES = {
    "grpo": ({}, {"loss_type": "grpo"}),
    "grpo with a divergence": ({"kl": 0.04}, {"loss_type": "grpo", "beta": 0.04}),
    "dr_grpo": ({}, {"loss_type": "dr_grpo"}),
    "dapo": ({}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    # TRL's epsilon_high is the bound of the ratio itself
    "cispo": ({}, {"loss_type": "cispo", "epsilon_high": 1.2}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case):
    changes, options = CASES[case]
    loss, gradient, advantages = ours(case.split()[0], **changes)
    theirs_loss, theirs_gradient = theirs(advantages, **options)
    assert loss == pytest.approx(theirs_loss, abs=1e-6)
    assert gradient == pytest.approx(theirs_gradient, abs=1e-6)
    assert any(abs(value) > 1e-3 for value in gradient)


def test_rloo_has_the_same_gradient_at_the_first_update():
    """TRL's ratio is that of whole completions, a product over tokens; ours is divided by a constant."""
    _, gradient, advantages = ours("rloo", old=LP, kl=0.0)
    _, theirs_gradient = theirs(advantages, trainer="rloo", old=LP)
    assert [LONGEST * value for value in gradient] == pytest.approx(theirs_gradient, abs=1e-6)


def test_advantages_differ_by_what_stands_beside_the_spread():
    scores = torch.tensor(REWARDS).view(2, 4)
    trl = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    assert ours("grpo")[2] == pytest.approx(trl.flatten().tolist(), abs=5e-4)
