"""Rule 6: what every method becomes where its own part is switched off, in value and gradient, through a model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import toys as kit
from toys import PRESETS, settings

from uft.data.rows import Kind
from uft.objectives.base import StepContext


def outcome(name, rows=None, noted=None, **changes):
    """One step of `rows` between two toy models, all annotations in them overwritten by `noted`."""
    objective, policy = kit.preset(name, **changes), kit.Toy.random(0)
    batch = kit.batch_for(objective, rows or kit.one_of_each())
    notes = {n: torch.full_like(batch.target, value) for n, value in (noted or {}).items()}
    batch = replace(batch, annotations={**batch.annotations, **notes})
    return kit.step(objective, [batch], policy, policy.parameters, kit.Toy.random(1))


def assert_same(one, another, factor=1.0, case=None):
    assert one.loss == pytest.approx(factor * another.loss, rel=1e-9), case
    assert any(gradient.any() for gradient in one.gradients)
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-9, atol=1e-12)


PREFERENCES = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]


# --- pairs -----------------------------------------------------------------------------------------------------------

CERTAIN = {"soft_label": 1.0}
DPO = [
    ("dpop", {"lam": 0.0}, {}),
    ("rpo", {"eta": 0.0}, {}),
    ("rpo", {"eta": 0.0, "nll_norm": "mean"}, {}),
    ("cdpo", {"label_smoothing": 0.0}, {}),
    ("robust_dpo", {"label_smoothing": 0.0}, {}),
    ("rdpo_length", {"alpha": 0.0}, {}),
    ("ld_dpo", {"alpha": 1.0}, {}),
    ("gdpo_soft", {}, CERTAIN),
    ("irft", {}, {}),
]


def test_these_are_dpo_ipo_and_hinge():
    dpo = outcome("dpo", beta=0.37)
    for name, changes, noted in DPO:
        assert_same(outcome(name, noted=noted, beta=0.37, **changes), dpo, case=name)
    for form in ("scaled", "substitute"):
        assert_same(outcome("gipo_soft", noted=CERTAIN, beta=0.37, form=form), outcome("ipo", tau=0.37))
    assert_same(outcome("irft", link="hinge", beta=0.37), outcome("hinge", beta=0.37))


def test_gropo_without_its_bounded_part_is_nothing():
    """ROPO's weight 4A/(1 + A)^2 vanishes with A."""
    none = outcome("gropo_soft", alpha=0.0)
    assert (none.loss, any(gradient.any() for gradient in none.gradients)) == (0, False)


def test_without_their_comparison_these_are_sft_of_the_chosen():
    sft = outcome("sft", PREFERENCES, reduction="sequence")
    for name, alpha in product(("asft", "orpo"), (1.0, 0.4)):
        assert_same(outcome(name, PREFERENCES, lam=0.0, alpha=alpha), sft, factor=alpha, case=name)


def test_simpo_without_a_margin_is_cpo_alone_on_equal_lengths():
    c, row = kit.completion, kit.row_of
    rows = [
        row(0, c("1 2 3", preferred=True), c("2 2 5", preferred=False)),
        row(1, c("4 4 6", preferred=True), c("6 0 1", preferred=False)),
    ]
    assert_same(outcome("simpo", rows, gamma=0.0, beta=2.1), outcome("cpo", rows, alpha=0.0, beta=2.1 / 3))


def test_sft_weight_adds_the_likelihood_of_the_chosen():
    sft = outcome("sft", PREFERENCES, reduction="sequence")
    for name in (name for name in PRESETS if "sft_weight" in settings(name)):
        alone, both = outcome(name, PREFERENCES), outcome(name, PREFERENCES, sft_weight=0.7)
        assert both.loss == pytest.approx(alone.loss + 0.7 * sft.loss), name
        for whole, a, b in zip(both.gradients, alone.gradients, sft.gradients, strict=True):
            torch.testing.assert_close(whole, a + 0.7 * b)


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_ift_without_lam_and_gamma_is_sft():
    sft = outcome("sft", reduction="sequence")
    assert_same(outcome("ift", lam=0.0, gamma=0.0, embed_grad=True), sft)
    ift = outcome("ift", lam=0.0, gamma=0.0)
    torch.testing.assert_close(ift.gradients[1], sft.gradients[1])
    assert not ift.gradients[0].any(), "input embeddings are the one exception"


def test_dynamic_ft_with_weight_one_is_sft_and_anchored_sft_without_its_anchor_dynamic_ft():
    for reduction in ("token", "sequence"):
        assert_same(outcome("dynamic_ft", weight="one", reduction=reduction), outcome("sft", reduction=reduction))
    assert_same(outcome("anchored_sft", alpha=0.0), outcome("dynamic_ft"))


def test_f_sft_begins_as_sft_times_beta(policy):
    sft = outcome("sft", reduction="sequence")
    for f in ("pearson", "hellinger", "reverse_kl", "forward_kl", "jensen_shannon"):
        objective = kit.preset("f_sft", f=f, ratio="mean", beta=0.3)
        batch = kit.batch_for(objective, kit.one_of_each())
        start = kit.step(objective, [batch], policy, policy.parameters, policy)
        assert start.loss == pytest.approx(0, abs=1e-12), f
        for a, b in zip(start.gradients, sft.gradients, strict=True):
            torch.testing.assert_close(a, 0.3 * b)


def test_poft_against_models_that_cannot_be_beaten_is_sft():
    poft, sft = outcome("poft", noted={"baseline_logp": 80.0}), outcome("sft", reduction="sequence")
    for a, b in zip(poft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, b)
    hopeless = outcome("poft", noted={"baseline_logp": -80.0})
    assert max(float(gradient.abs().max()) for gradient in hopeless.gradients) < 1e-12


def test_dft_without_negatives_is_sft(policy, reference):
    assert_same(outcome("dft2", negatives=0), outcome("sft", reduction="sequence"))
    rows, summed = kit.one_of_each(), kit.preset("dft", negatives=0)
    batch = kit.batch_for(summed, rows)
    dft = kit.step(summed, [batch], policy, policy.parameters, reference)
    sequences, tokens = float(summed.counts(batch)["surrogate"]), batch.target_ids.numel()
    assert_same(dft, outcome("sft", rows), factor=tokens / sequences)


# --- the implicit reward ---------------------------------------------------------------------------------------------


def test_una_is_uft_and_uft_on_preferences_alone_is_dpo():
    assert_same(outcome("una", beta=0.3), outcome("uft", beta=0.3))
    assert_same(outcome("uft", PREFERENCES, beta=0.3), outcome("dpo", PREFERENCES, beta=0.3))


def test_uft_on_instructions_is_parallel_to_sft_row_by_row(policy, reference):
    for row in (kit.one_of_each()[0], kit.one_of_each()[7]):
        beta = 0.3
        uft, sft = outcome("uft", [row], beta=beta), outcome("sft", [row])
        objective = kit.preset("uft", beta=beta)
        batch = kit.batch_for(objective, [row])
        reward = objective(batch, policy, reference, StepContext())["implicit_reward"].total
        s = 1 / (1 + math.exp(-float(reward.detach())))
        scale = 2 * (1 - s) ** 2 * s * beta * batch.target_ids.numel()
        for a, b in zip(uft.gradients, sft.gradients, strict=True):
            torch.testing.assert_close(a, scale * b)


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_mixture_is_the_weighted_sum_of_its_parts(policy, reference):
    several = ("per_kind", "uft_rl", "luffy", "chord_mu", "chord_phi", "hpt", "srft")  # terms that are counted apart
    for name in (name for name in PRESETS if name not in several):
        rows = kit.used(kit.preset(name), kit.rows_for(kit.preset(name)))
        others = kit.mismatched_for(kit.preset(name), rows)

        def measured(rows, name=name, others=others):
            objective = kit.preset(name, reduction="sequence")
            batch = kit.batch_for(objective, rows)
            result = kit.step(objective, [batch], policy, policy.parameters, reference, others)
            context = kit.step_context(objective, others, policy, reference)
            main = next(n for n, t in objective(batch, policy, reference, context).items() if t.weight)
            return result.gradients, float(objective.counts(batch)[main])

        whole, units = measured(rows)
        parts = [measured([row]) for row in rows]
        assert sum(n for _, n in parts) == units
        for k, gradient in enumerate(whole):
            torch.testing.assert_close(gradient, sum(g[k] * n for g, n in parts) / units)
