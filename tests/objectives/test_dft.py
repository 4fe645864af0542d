"""DFT and DFT2 against DFT-1..5 and the invariants 3.7 of the specification."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import toys as kit

from uft.objectives import make
from uft.objectives.base import StepContext
from uft.objectives.dft import SAMPLING


def dft(examples=3, **settings):
    objective = make({"method": "dft", **settings})
    objective.start(examples)
    return objective


def lay(rows):
    """Rows of (example, positive, negatives), each sequence (log-prob, length) or a log-prob of one token."""
    seqs, log_probs = [], []
    for number, (_, positive, negatives) in enumerate(rows):
        for role, item in [(1, positive), *((0, n) for n in negatives)]:
            total, length = item if isinstance(item, tuple) else (item, 1)
            seqs.append(kit.of_length(length, row=number, role=role))
            log_probs += [total / length] * length
    return kit.batch_of(seqs, examples=[example for example, _, _ in rows]), log_probs


def run(objective, rows, reference=None, context=None):
    """(terms as means, gradient of the surrogate per sequence's summed log-prob).

    `reference`: log-probs of each row's negatives, of one token each; None: the policy's own.
    """
    batch, log_probs = lay(rows)
    policy = kit.Told(log_probs)
    told = kit.Told(log_probs)
    if reference is not None:  # what it says of positives has no part
        told = kit.Told([x for negatives in reference for x in (-99.0, *negatives)])
    terms = objective(batch, policy, told, context or StepContext())
    (terms["surrogate"].total / terms["surrogate"].count).backward()
    gradient = batch.mean(policy.log_probs.grad).tolist()
    return {name: float(t.total.detach() / t.count) for name, t in terms.items() if t.count > 0}, gradient


def log_u(objective):
    return objective.state["log_u"].tolist()


# --- worked examples -------------------------------------------------------------------------------------------------


def test_dft_1():
    objective = dft(3, tau=1.0, gamma=0.85)
    rows = [(0, -20.0, [-22.0, -30.0]), (2, -15.0, [-18.0, -25.0])]
    terms, gradient = run(objective, rows, [[-21.0, -28.0], [-18.5, -24.0]])
    assert log_u(objective) == pytest.approx([-1.010969, 0, 0.007031], abs=1e-6)
    assert terms["surrogate"] == pytest.approx(-0.500593, abs=1e-6)
    assert terms["estimate"] == pytest.approx((18.989031 + 15.007031) / 2, abs=1e-6)
    assert terms["weight"] == pytest.approx((1.011029 + 0.371937 + 1.637171 + 0.365302) / 4, abs=1e-6)
    assert terms["log_u"] == pytest.approx((-1.010969 + 0.007031) / 2, abs=1e-6)
    assert gradient == pytest.approx([-0.5, 0.252757, 0.092984, -0.5, 0.409293, 0.091326], abs=1e-6)
    terms, gradient = run(objective, [(0, -18.0, [-24.0, -27.0])], [[-22.0, -27.5]])
    assert log_u(objective) == pytest.approx([-0.207265, 0, 0.007031], abs=1e-6)
    assert terms["surrogate"] == pytest.approx(-11.381944, abs=1e-6)
    assert terms["estimate"] == pytest.approx(17.792735, abs=1e-6)
    assert gradient == pytest.approx([-1, 0.083252, 1.014218], abs=1e-6)
    assert [2 * g for g in gradient[1:]] == pytest.approx([0.166504, 2.028437], abs=1e-6)


def test_dft_2_length_normalised():
    objective = dft(2, tau=0.3, gamma=0.9, length_normalize=True)
    assert not objective.needs.reference
    terms, gradient = run(objective, [(1, (-12.0, 8), [(-9.0, 6), (-20.0, 10)])])
    assert log_u(objective) == pytest.approx([0, -2.267172], abs=1e-6)
    assert terms["surrogate"] == pytest.approx(1.438940, abs=1e-6)
    assert terms["weight"] == pytest.approx((0.065035 + 0.012284) / 2, abs=1e-6)
    assert gradient == pytest.approx([-0.125, 0.005420, 0.000614], abs=1e-6)
    terms, gradient = run(objective, [(1, (-10.0, 8), [(-6.0, 4), (-14.0, 7)])])
    assert log_u(objective) == pytest.approx([0, -4.271184], abs=1e-6)
    assert terms["surrogate"] == pytest.approx(0.797011, abs=1e-6)
    assert terms["weight"] == pytest.approx((0.482480 + 0.091129) / 2, abs=1e-6)
    assert gradient == pytest.approx([-0.125, 0.060310, 0.006509], abs=1e-6)


def test_dft_3_no_memory():
    objective = dft(1, gamma=1.0)
    terms, _ = run(objective, [(0, -10.0, [-11.0])], [[-7.0]])
    assert log_u(objective) == pytest.approx([-4])
    assert (terms["surrogate"], terms["weight"]) == (pytest.approx(-1), pytest.approx(1))


def test_dft_4_policy_equals_reference():
    objective = dft(1)
    batch, log_probs = lay([(0, -10.0, [-11.0, -3.0])])
    policy = kit.Told(log_probs)
    terms = objective(batch, policy, policy, StepContext())
    assert float(terms["surrogate"].total.detach()) == pytest.approx(3)
    assert log_u(objective) == [0]
    assert float(terms["weight"].total) == 2
    for name, total in objective.at_reference(batch).items():
        assert float(terms[name].total.detach()) == pytest.approx(float(total), abs=1e-12)


def test_dft_5_exact_enumeration():
    """All four answers as the pool, each as likely: mean_j exp(s/tau) / (1/4) is the exact g."""
    for tau, value, gradient in (
        (1.0, 0.798079, [-0.549807, 0.202285, 0.100452, 0.247071]),
        (0.5, 0.220055, [-0.356034, 0.130014, 0.032061, 0.193959]),
    ):
        phi = torch.tensor([1, 0.2, -0.5, 0.4], dtype=torch.float64, requires_grad=True)
        log_probs = torch.log_softmax(phi, 0)
        batch, _ = lay([(0, log_probs[0].item(), log_probs.tolist())])
        policy = kit.Told([0.0] * 5)
        policy.log_probs = torch.cat([log_probs[:1], log_probs])
        terms = dft(1, tau=tau, gamma=1.0)(batch, policy, kit.Told([math.log(0.25)] * 5), StepContext())
        assert float(terms["estimate"].total) == pytest.approx(value, abs=1e-6)
        terms["surrogate"].total.backward()
        assert phi.grad.tolist() == pytest.approx(gradient, abs=1e-6)


# --- invariants 3.7 --------------------------------------------------------------------------------------------------

NEGATIVES, REFERENCES = [-22.0, -30.0, -19.0], [-21.0, -28.0, -20.0]


def test_mean_weight_is_bounded_and_without_memory_blind_to_a_constant_on_every_ratio():
    for gamma in (0.01, 0.5, 1.0):
        terms, _ = run(dft(gamma=gamma, u_init=-50.0), [(0, -20.0, NEGATIVES)], [REFERENCES])
        assert terms["weight"] <= 1 / gamma + 1e-9
    assert terms["weight"] == pytest.approx(1)
    one, another = dft(gamma=1.0), dft(gamma=1.0)
    before = run(one, [(0, -20.0, NEGATIVES)], [REFERENCES])[1]
    assert before == pytest.approx(run(another, [(0, -20.0, NEGATIVES)], [[r - 3 for r in REFERENCES]])[1])
    assert log_u(another)[0] == pytest.approx(log_u(one)[0] + 3, abs=1e-5)


def test_permuting_permutes_and_duplicating_changes_nothing():
    terms, gradient = run(dft(), [(0, -20.0, NEGATIVES)], [REFERENCES])
    swapped, mirrored = run(dft(), [(0, -20.0, NEGATIVES[::-1])], [REFERENCES[::-1]])
    assert mirrored[1:] == pytest.approx(gradient[:0:-1])
    doubled, halves = run(dft(), [(0, -20.0, NEGATIVES * 2)], [REFERENCES * 2])
    assert terms["surrogate"] == pytest.approx(swapped["surrogate"]) == pytest.approx(doubled["surrogate"])
    assert halves[1:4] == pytest.approx([g / 2 for g in gradient[1:]])


def test_small_tau_looks_at_the_best_negative_alone():
    _, gradient = run(dft(tau=1e-3, gamma=1.0), [(0, -20.0, NEGATIVES)], [REFERENCES])
    assert gradient == pytest.approx([-1, 0, 0, 1], abs=1e-9)


def test_length_normalised_is_blind_to_repetition():
    settings = {"tau": 0.3, "gamma": 0.9, "length_normalize": True}
    short, _ = run(dft(**settings), [(0, (-6.0, 4), [(-9.0, 6), (-2.0, 1)])])
    long, _ = run(dft(**settings), [(0, (-12.0, 8), [(-27.0, 18), (-8.0, 4)])])
    assert short["surrogate"] == pytest.approx(long["surrogate"], abs=1e-7)
    assert short["estimate"] == pytest.approx(long["estimate"], abs=1e-7)


def test_rows_may_have_different_numbers_of_negatives():
    together = dft()
    rows = [(0, -20.0, NEGATIVES), (1, -4.0, []), (2, -15.0, [-18.0])]
    terms, _ = run(together, rows, [REFERENCES, [], [-18.5]])
    alone = [run(dft(), [row], [ref])[0] for row, ref in zip(rows, [REFERENCES, [], [-18.5]], strict=True)]
    assert terms["surrogate"] == pytest.approx(sum(t["surrogate"] for t in alone) / 3)
    assert terms["estimate"] == pytest.approx(sum(t["estimate"] for t in alone) / 3)
    assert log_u(together)[1] == 0


def test_an_empty_negative_is_left_out():
    batch = kit.batch_of([kit.of_length(1), kit.of_length(1, role=0), kit.of_length(0, role=0)], examples=[0])
    objective, alone = dft(), dft()
    objective(batch, kit.Told([-20.0, -22.0]), kit.Told([-99.0, -21.0]), StepContext())
    run(alone, [(0, -20.0, [-22.0])], [[-21.0]])
    assert log_u(objective) == log_u(alone)


# --- state -----------------------------------------------------------------------------------------------------------


def test_evaluation_reads_but_never_writes():
    objective = dft(u_init=0.5)
    row, reference = [(0, -20.0, NEGATIVES)], [REFERENCES]
    watching, _ = run(objective, row, reference, StepContext(learning=False))
    assert log_u(objective) == [0.5, 0.5, 0.5]
    learning, _ = run(objective, row, reference)
    assert watching == learning
    assert log_u(objective)[0] != 0.5
    assert log_u(objective)[1:] == [0.5, 0.5]


def test_an_example_twice_in_a_batch_is_updated_in_order():
    rows = [(0, -20.0, [-22.0, -30.0]), (1, -15.0, [-18.0]), (0, -18.0, [-24.0, -27.0])]
    references = [[-21.0, -28.0], [-18.5], [-22.0, -27.5]]
    together, apart = dft(), dft()
    terms, gradient = run(together, rows, references)
    single = [run(apart, [row], [ref]) for row, ref in zip(rows, references, strict=True)]
    assert log_u(together) == log_u(apart)
    assert log_u(together)[0] == pytest.approx(-0.207265, abs=1e-6)
    assert terms["surrogate"] == pytest.approx(sum(t["surrogate"] for t, _ in single) / 3)
    assert gradient == pytest.approx([g / 3 for _, gradients in single for g in gradients])


# --- modes -----------------------------------------------------------------------------------------------------------


def test_the_sampling_denominator_comes_from_a_column():
    objective, plain = dft(denominator="sampling"), dft()
    assert objective.needs.columns == {SAMPLING}
    assert not objective.needs.reference
    batch, log_probs = lay([(0, -20.0, [-22.0, -30.0])])
    column = torch.tensor([math.nan, -21.0, -28.0])  # nothing is known of the positive, nor asked
    terms = objective(replace(batch, columns={SAMPLING: column}), kit.Told(log_probs), None, StepContext())
    expected, _ = run(plain, [(0, -20.0, [-22.0, -30.0])], [[-21.0, -28.0]])
    assert float(terms["surrogate"].total.detach()) == pytest.approx(expected["surrogate"])
    assert log_u(objective) == log_u(plain)


def test_a_micro_batch_without_negatives_brings_no_such_column():
    batch, log_probs = lay([(0, -20.0, []), (1, -3.0, [])])
    terms = dft(denominator="sampling")(batch, kit.Told(log_probs), None, StepContext())
    assert float(terms["surrogate"].total.detach()) == pytest.approx(23.0)
