"""Every shipped objective against formulas.py on random rows of unequal lengths: value and slope, in float64.

Slopes are finite differences of the formula, with what the method holds constant held constant.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formulas import FORMULAS, LIKELIHOOD, PHI, Answer
from toys import PRESETS

from uft.objectives.base import StepContext

ELSEWHERE = {"anchored_sft": "test_nll.py", "per_kind": "test_per_kind.py"}
CHANGES = [
    ("sft", {"reduction": "sequence"}),
    ("dynamic_ft", {"reduction": "sequence"}),
    *(("f_sft", {"f": f, "ratio": ratio}) for f in PHI for ratio in ("sum", "mean")),
    ("poft", {"beta": 1.7, "gamma": -0.3}),
    ("ift", {"gamma": 0.6}),
    ("cdpo", {"label_smoothing": 0.3, "sft_weight": 0.4}),
    ("robust_dpo", {"label_smoothing": 0.3, "beta": 0.5}),
    ("ipo", {"length": "mean", "tau": 0.4}),
    ("irft", {"link": "hinge"}),
    ("irft", {"link": "linear"}),
    ("rpo", {"nll_norm": "mean", "eta": 0.2, "beta": 0.5}),
    ("dpop", {"lam": 5.0}),
    ("gipo_soft", {"form": "substitute"}),
    ("asft", {"beta": 0.3, "lam": 0.6, "sft_weight": 0.2}),
    ("simpo", {"gamma": 0.0, "label_smoothing": 0.2}),
    ("cpo", {"alpha": 0.5, "label_smoothing": 0.1}),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.9, "beta": 0.6}),
    ("uft", {"beta": 0.3, "loss": "bce", "length_normalize": True}),
    ("dft", {"tau": 0.8, "gamma": 0.4, "u_init": 0.5}),
]


def some_answers(seed, name):
    """Four rows; two of them have explicit rewards, which only uft looks at. Numbers of a batch are float32."""
    draw, answers = np.random.default_rng(seed), []
    for row in range(4):
        for good in (True, *[False] * draw.integers(1, 4)):
            x = -draw.gamma(1.0, 0.7, size=draw.integers(1, 7)) - 0.01
            r = x + draw.normal(0, 0.5, size=x.shape)
            noted = [float(np.float32(draw.uniform(low, high))) for low, high in ((0, 1), (0.5, 1), (-2, -0.2))]
            reward = noted[0] if row < 2 else np.nan
            answers.append(Answer(row, good, x, x.copy(), r, reward, soft=noted[1], baseline=noted[2]))
    return [a for a in answers if a.good] if name in LIKELIHOOD else answers


def as_batch(kit, answers):
    seqs = [
        kit.of_length(len(a.x), row=a.row, role=int(a.good), target=a.target, annotations=noted)
        for a, noted in ((a, {"baseline_logp": a.baseline, "soft_label": a.soft}) for a in answers)
    ]
    return kit.batch_of(seqs)


def slopes(formula, answers, k, step=1e-6):
    """(N,) central differences."""
    found = []
    for number, answer in enumerate(answers):
        for place in range(len(answer.x)):
            values = []
            for sign in (1, -1):
                x = answer.x.copy()
                x[place] += sign * step
                values.append(formula([*answers[:number], answer._replace(x=x), *answers[number + 1 :]], k))
            found.append((values[0] - values[1]) / (2 * step))
    return found


def test_every_shipped_objective_has_a_formula_here_or_elsewhere():
    assert FORMULAS.keys() | ELSEWHERE.keys() == set(PRESETS)


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in FORMULAS), *CHANGES])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_slopes(kit, name, changes, seed):
    objective, z = kit.preset(name, **changes), [0.2, -0.2, 0.0][seed]
    answers = some_answers(seed, name)
    k = SimpleNamespace(**kit.settings(name, **changes), z=z)
    batch = as_batch(kit, answers)
    policy, reference = (kit.Told(np.concatenate([getattr(a, side) for a in answers])) for side in ("x", "r"))
    loss = objective(batch, policy, reference, StepContext(kl_baseline={"z": torch.tensor(z, dtype=torch.float64)}))
    value = sum(t.weight * t.total / t.count for t in loss.values() if t.weight)
    value.backward()
    assert float(value.detach()) == pytest.approx(FORMULAS[name](answers, k), rel=1e-7)
    assert policy.log_probs.grad.tolist() == pytest.approx(slopes(FORMULAS[name], answers, k), rel=1e-5, abs=1e-7)
