"""IFT against IFT-1, IFT-2, IFT-3 and the invariants 1.10 of the specification."""

from __future__ import annotations

import pytest
import torch
import toys as kit
from toys import of_length, told

from uft.objectives import make
from uft.objectives.base import ForwardRequest, StepContext
from uft.objectives.ift import discounted

LOSSES = [0.7, 0.2, 1.1, 0.4]


def ift(**settings):
    return make({"method": "ift", **settings})


def run(losses, seqs=None, **settings):
    """(loss, gradient of it with respect to each l, means of the terms)."""
    value, slopes, means = told(ift(**settings), seqs or [of_length(len(losses))], [-x for x in losses])
    return value, [-slope for slope in slopes], means


# --- IFT-1 -----------------------------------------------------------------------------------------------------------

TABLE = [
    (0.0, 0.600000, [0.25] * 4, [0.25] * 4),
    (0.5, 0.693197, [0.307974, 0.098015, 0.397797, 0.051090], [0.306122, 0.231293, 0.353741, 0.108844]),
    (0.95, 0.642049, [0.399820, 0.213422, 0.274928, 0.042674], [0.389674, 0.281177, 0.259117, 0.070032]),
    (1.0, 0.638333, [0.410278, 0.220556, 0.264167, 0.041111], [0.4, 0.283333, 0.25, 0.066667]),
]


def test_ift_1():
    for gamma, loss, through, detached in TABLE:
        assert run(LOSSES, gamma=gamma)[:2] == (pytest.approx(loss, abs=1e-6), pytest.approx(through, abs=1e-6))
        value, gradient, _ = run(LOSSES, gamma=gamma, detach_weights=True)
        assert (value, gradient) == (pytest.approx(loss, abs=1e-6), pytest.approx(detached, abs=1e-6))
    assert run(LOSSES, gamma=1e-6)[0] == pytest.approx(0.791666, abs=1e-6), "not the value at gamma = 0"


def test_ift_1_the_other_two_formulas():
    value, gradient, _ = run(LOSSES, propagation="eq21")
    assert value == pytest.approx(6.0, abs=1e-6)
    assert gradient == pytest.approx([1, 2, 3, 4], abs=1e-6)
    value, _, _ = run(LOSSES, propagation="alg1")
    assert value == pytest.approx(3.474740, abs=1e-6)
    _, gradient, _ = run(LOSSES, propagation="alg1", detach_weights=True)
    assert gradient == pytest.approx([2.0577, 1.53425, 1.425, 0.4], abs=1e-6)
    assert run(LOSSES, propagation="none")[0] == pytest.approx(0.6, abs=1e-6)


def test_token_reduction_averages_over_all_tokens():
    value = run([*LOSSES, 0.8], [of_length(4, row=0), of_length(1, row=1)], reduction="token")[0]
    assert value == pytest.approx((4 * 0.642049 + 0.8) / 5, abs=1e-6)


def test_gradient_can_be_negative_and_is_counted():
    value, gradient, means = run([3, 2, 0.01, 0.02])
    assert value == pytest.approx(2.689569, abs=1e-6)
    assert gradient == pytest.approx([0.747795, 0.233179, -0.432046, -0.792740], abs=1e-6)
    assert means["negative_share"] == 0.5
    assert run([3, 2, 0.01, 0.02], detach_weights=True)[2]["negative_share"] == 0
    gaps = kit.Seq([0] * 12, [i in (2, 3, 4, 8, 9, 11) for i in range(12)])
    _, gradient, means = run([3.0, 2.0, 0.01, 0.02, 1.5, 0.001], [gaps])
    assert means["negative_share"] == pytest.approx(sum(g < 0 for g in gradient) / 6), "in closed form, as by autograd"


# --- IFT-2: a masked gap, padding, two sequences ---------------------------------------------------------------------


def test_ift_2():
    # shifted grid 0,1,1,0,1,0: targets at offsets 2, 3 and 5
    gap = kit.Seq([0] * 7, [False, False, True, True, False, True, False], 0)
    losses, seqs = [0.5, 1.5, 0.25, 0.8], [gap, of_length(1, row=1)]
    assert run(losses, seqs)[0] == pytest.approx(0.852082, abs=1e-6)
    assert run(losses, seqs, gamma=0, lam=0)[0] == pytest.approx(0.775, abs=1e-6)
    _, gradient, _ = run(losses, seqs, detach_weights=True)
    weights = [gradient[0] * 6, gradient[1] * 6, gradient[2] * 6, gradient[3] * 2]
    assert weights == pytest.approx([1.559679, 1.258059, 0.182261, 1.0], abs=1e-6)
    assert run(losses[:3], [gap])[0] == pytest.approx(0.904165, abs=1e-6)


# --- IFT-3: the whole pipeline ---------------------------------------------------------------------------------------

E = [[1, 0], [0, 1], [-1, 0.5], [0.5, -1], [0.25, 0.75]]
W = [[0.3, -0.2], [1, 0.4], [-0.6, 0.9], [0.8, -1.1], [0.1, 0.2]]


def pipeline():
    return kit.batch_of([kit.Seq([0, 1, 2, 3, 4, 0], [False, False, True, True, True, False])]), kit.Toy(E, W)


def test_ift_3_passes_loss_and_gradient():
    batch, toy = pipeline()
    plain = toy(batch, ForwardRequest(argmax=True))
    assert plain.argmax.tolist() == [1, 2, 1]  # for places 2, 3, 4
    assert (-plain.log_probs).tolist() == pytest.approx([1.682486, 2.232070, 1.619478], abs=1e-6)
    mixed = toy(batch, ForwardRequest(replace=plain.argmax, mix=0.2))
    assert (-mixed.log_probs).tolist() == pytest.approx([1.682486, 2.237985, 1.603196], abs=1e-6)
    outcome = kit.step(ift(), [batch], toy, toy.parameters)
    assert outcome.loss == pytest.approx(1.867249, abs=1e-6)
    assert outcome.terms["nll"] == pytest.approx(1.844678, abs=1e-6)
    assert outcome.terms["lam"] == pytest.approx(0.2)
    assert outcome.terms["guess_accuracy"] == 0
    expected = [
        [0.046996, 0.079351],
        [0.086212, 0.132173],
        [-0.184190, -0.131164],
        [0.013007, -0.139407],
        [0.037975, 0.059048],
    ]
    assert outcome.gradients[1].flatten().tolist() == pytest.approx([x for row in expected for x in row], abs=1e-6)
    assert not outcome.gradients[0].any(), "no gradient may reach the input embeddings"
    assert kit.step(ift(embed_grad=True), [batch], toy, toy.parameters).gradients[0].any()


def test_ift_3_other_settings():
    batch, toy = pipeline()
    for lam, gamma, loss in ((0, 0, 1.844678), (0.2, 0, 1.841222), (0, 0.95, 1.867402), (1, 0, 1.848632)):
        found = kit.step(ift(lam=lam, gamma=gamma), [batch], toy, [toy.head]).loss
        assert found == pytest.approx(loss, abs=1e-6), (lam, gamma)
    assert kit.step(ift(lam=1), [batch], toy, [toy.head]).loss == pytest.approx(1.878573, abs=1e-6)


# --- passes and schedule ---------------------------------------------------------------------------------------------


def test_the_guessing_pass_has_no_gradient_and_is_skipped_without_lam():
    batch = kit.batch_of([of_length(2)])
    policy = kit.Told([-1, -2])
    ift()(batch, policy, None, StepContext())
    assert policy.calls == [
        {"guess": True, "mix": 0.0, "embed_grad": True, "grad": False},
        {"guess": False, "mix": 0.2, "embed_grad": False, "grad": True},
    ]
    policy = kit.Told([-1, -2])
    ift(lam=0)(batch, policy, None, StepContext())
    assert policy.calls == [{"guess": True, "mix": 0.0, "embed_grad": False, "grad": True}]


def test_lam_ramps_over_the_warm_up_then_stays():
    objective = ift(lam=0.2, lam_start=0.0)
    seen = [objective.mix(StepContext(step=s, steps=300, warmup=150)) for s in (0, 75, 150, 299)]
    assert seen == pytest.approx([0, 0.1, 0.2, 0.2])
    assert objective.mix(StepContext(step=0, warmup=0)) == 0.2
    assert ift(lam=0.2).mix(StepContext(step=0, warmup=150)) == 0.2


def test_noise_scales_lam_and_is_clamped():
    objective = ift(lam=0.2, lam_noise=0.5)
    assert [objective.mix(StepContext(noise=x)) for x in (0, 1, -3, 100)] == pytest.approx([0.2, 0.3, 0, 1])


# --- invariants 1.10


def test_weights_sum_to_the_length_and_the_loss_lies_between_its_tokens_and_scales_with_them():
    losses = [0.3, 2.0, 0.9, 1.4, 0.1]
    for gamma in (1e-3, 0.3, 0.95, 1.0):
        value, gradient, _ = run(losses, gamma=gamma, detach_weights=True)
        assert sum(gradient) == pytest.approx(1.0)
        assert min(losses) <= value <= max(losses)
        assert run([3 * x for x in losses], gamma=gamma)[0] == pytest.approx(3 * value)
        assert run([0.7] * 5, gamma=gamma)[0] == pytest.approx(0.7)
    for gamma in (0.0, 1e-3, 0.3, 0.95, 1.0):
        assert run([1.3], gamma=gamma)[:2] == (pytest.approx(1.3), pytest.approx([1.0])), "one token is SFT"
    assert run([0.0] * 3)[:2] == (0, pytest.approx([1 / 3] * 3)), "losses that are all zero weigh one"


def test_first_token_is_undisturbed():
    toy = kit.Toy.random(3)
    batch = kit.batch_of([kit.Seq([0, 3, 1, 5, 2], [False, False, True, True, True])])
    plain = toy(batch, ForwardRequest(argmax=True))
    mixed = toy(batch, ForwardRequest(replace=plain.argmax, mix=0.7))
    assert plain.log_probs[0] == mixed.log_probs[0]
    assert plain.log_probs[2] != mixed.log_probs[2]


def test_discounted_sums_equal_the_matrix_product_and_keep_their_digits():
    for length in (1, 2, 7, 1000):
        values = torch.rand(2, length, generator=torch.Generator().manual_seed(0))
        steps = torch.arange(length)
        powers = (steps[:, None] - steps[None, :]).clamp(min=0).double()  # row i, column t: i - t
        toeplitz = torch.where(steps[:, None] >= steps[None, :], 0.95**powers, 0.0)
        torch.testing.assert_close(discounted(values, 0.95).double(), values.double() @ toeplitz, rtol=2e-6, atol=0)
