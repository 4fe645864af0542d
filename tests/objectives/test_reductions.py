"""Rule 6: what every method becomes where its own part is switched off, in value and gradient, through a model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from toys import PRESETS, settings

from uft.data.rows import Kind
from uft.objectives.base import StepContext


@pytest.fixture
def outcome(kit, policy, reference):
    """outcome("dpo", rows, beta=0.3) -> one step of `rows`, all annotations in them overwritten by `noted`."""

    def run(name, rows=None, noted=None, **changes):
        objective = kit.preset(name, **changes)
        batch = kit.batch_for(objective, rows or kit.one_of_each())
        notes = {n: torch.full_like(batch.target, value) for n, value in (noted or {}).items()}
        batch = replace(batch, annotations={**batch.annotations, **notes})
        return kit.step(objective, [batch], policy, policy.parameters, reference)

    return run


def assert_same(one, another, factor=1.0):
    assert one.loss == pytest.approx(factor * another.loss, rel=1e-9)
    assert any(gradient.any() for gradient in one.gradients)
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-9, atol=1e-12)


def pairs_of(kit):
    return [row for row in kit.one_of_each() if row.kind in (Kind.PREFERENCE, Kind.NEGATIVES)]


# --- pairs -----------------------------------------------------------------------------------------------------------

CERTAIN = {"soft_label": 1.0}


@pytest.mark.parametrize(
    ("name", "changes", "noted"),
    [
        ("dpop", {"lam": 0.0}, {}),
        ("rpo", {"eta": 0.0}, {}),
        ("rpo", {"eta": 0.0, "nll_norm": "mean"}, {}),
        ("cdpo", {"label_smoothing": 0.0}, {}),
        ("robust_dpo", {"label_smoothing": 0.0}, {}),
        ("rdpo_length", {"alpha": 0.0}, {}),
        ("ld_dpo", {"alpha": 1.0}, {}),
        ("gdpo_soft", {}, CERTAIN),
        ("irft", {}, {}),
    ],
)
def test_these_are_dpo(outcome, name, changes, noted):
    assert_same(outcome(name, noted=noted, beta=0.37, **changes), outcome("dpo", beta=0.37))


@pytest.mark.parametrize("form", ["scaled", "substitute"])
def test_gipo_of_certain_labels_is_ipo(outcome, form):
    assert_same(outcome("gipo_soft", noted=CERTAIN, beta=0.37, form=form), outcome("ipo", tau=0.37))


def test_gropo_without_its_bounded_part_is_nothing_and_of_certain_labels_ropo(kit, policy, reference):
    """ROPO's weight 4A/(1 + A)^2 vanishes with A; at A = 1 it is 1 and both parts count alike."""
    objective = kit.preset("gropo_soft", alpha=1.0, beta=0.37)
    batch = kit.batch_for(objective, pairs_of(kit))
    batch = replace(batch, annotations={"soft_label": torch.ones_like(batch.target)})
    h = batch.sum(policy(batch).log_probs - reference(batch).log_probs)[batch.pairs]
    m = 0.37 * (h[:, 0] - h[:, 1])
    by_hand = (torch.nn.functional.softplus(-m) + torch.sigmoid(-m)).mean()
    found = kit.step(objective, [batch], policy, policy.parameters, reference)
    assert found.loss == pytest.approx(float(by_hand.detach()))
    for a, b in zip(found.gradients, torch.autograd.grad(by_hand, policy.parameters), strict=True):
        torch.testing.assert_close(a, b)
    none = kit.step(kit.preset("gropo_soft", alpha=0.0), [batch], policy, policy.parameters, reference)
    assert (none.loss, any(g.any() for g in none.gradients)) == (0, False)


def test_hinge_of_own_samples_is_hinge(outcome):
    assert_same(outcome("irft", link="hinge", beta=0.37), outcome("hinge", beta=0.37))


@pytest.mark.parametrize("name", ["asft", "orpo"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_without_their_comparison_these_are_sft_of_the_chosen(kit, outcome, name, alpha):
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    sft = outcome("sft", rows, reduction="sequence")
    assert_same(outcome(name, rows, lam=0.0, alpha=alpha), sft, factor=alpha)


def test_simpo_without_a_margin_is_cpo_alone_on_equal_lengths(kit, outcome):
    c, row = kit.completion, kit.row_of
    rows = [
        row(0, c("1 2 3", preferred=True), c("2 2 5", preferred=False)),
        row(1, c("4 4 6", preferred=True), c("6 0 1", preferred=False)),
    ]
    assert_same(outcome("simpo", rows, gamma=0.0, beta=2.1), outcome("cpo", rows, alpha=0.0, beta=2.1 / 3))


@pytest.mark.parametrize("name", [name for name in PRESETS if "sft_weight" in settings(name)])
def test_sft_weight_adds_the_likelihood_of_the_chosen(kit, outcome, name):
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    alone, both = outcome(name, rows), outcome(name, rows, sft_weight=0.7)
    sft = outcome("sft", rows, reduction="sequence")
    assert both.loss == pytest.approx(alone.loss + 0.7 * sft.loss)
    for whole, a, b in zip(both.gradients, alone.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(whole, a + 0.7 * b)


def test_methods_without_a_reference_do_not_ask_for_it(kit, policy):
    for name in ("simpo", "cpo", "orpo", "asft", "sft", "dynamic_ft", "poft", "ift", "dft2"):
        objective = kit.preset(name)
        assert not objective.needs.reference, name
        loss = objective(kit.batch_for(objective, kit.one_of_each()), policy, None, StepContext())
        assert all(torch.isfinite(term.total) for term in loss.values())


# --- likelihood ------------------------------------------------------------------------------------------------------


def test_ift_without_lam_and_gamma_is_sft(outcome):
    sft = outcome("sft", reduction="sequence")
    assert_same(outcome("ift", lam=0.0, gamma=0.0, embed_grad=True), sft)
    ift = outcome("ift", lam=0.0, gamma=0.0)
    torch.testing.assert_close(ift.gradients[1], sft.gradients[1])
    assert not ift.gradients[0].any(), "input embeddings are the one exception"


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_dynamic_ft_with_weight_one_is_sft(outcome, reduction):
    assert_same(outcome("dynamic_ft", weight="one", reduction=reduction), outcome("sft", reduction=reduction))


def test_anchored_sft_without_its_anchor_is_dynamic_ft(outcome):
    assert_same(outcome("anchored_sft", alpha=0.0), outcome("dynamic_ft"))


def test_f_sft_under_total_variation_has_the_gradient_of_sft_times_beta(outcome):
    f_sft = outcome("f_sft", f="total_variation", ratio="mean", beta=0.3)
    sft = outcome("sft", reduction="sequence")
    for a, b in zip(f_sft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, 0.3 * b)


@pytest.mark.parametrize("f", ["pearson", "hellinger", "reverse_kl", "forward_kl", "jensen_shannon"])
def test_f_sft_begins_as_sft_times_beta(kit, policy, outcome, f):
    objective = kit.preset("f_sft", f=f, ratio="mean", beta=0.3)
    batch = kit.batch_for(objective, kit.one_of_each())
    start = kit.step(objective, [batch], policy, policy.parameters, policy)
    assert start.loss == pytest.approx(0, abs=1e-12)
    for a, b in zip(start.gradients, outcome("sft", reduction="sequence").gradients, strict=True):
        torch.testing.assert_close(a, 0.3 * b)


def test_poft_against_models_that_cannot_be_beaten_is_sft(outcome):
    poft, sft = outcome("poft", noted={"baseline_logp": 80.0}), outcome("sft", reduction="sequence")
    for a, b in zip(poft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, b)
    hopeless = outcome("poft", noted={"baseline_logp": -80.0})
    assert max(float(gradient.abs().max()) for gradient in hopeless.gradients) < 1e-12


def test_dft_without_negatives_is_sft(kit, policy, reference, outcome):
    assert_same(outcome("dft2", negatives=0), outcome("sft", reduction="sequence"))
    rows, summed = kit.one_of_each(), kit.preset("dft", negatives=0)
    batch = kit.batch_for(summed, rows)
    dft = kit.step(summed, [batch], policy, policy.parameters, reference)
    sequences, tokens = float(summed.counts(batch)["surrogate"]), batch.target_ids.numel()
    assert_same(dft, outcome("sft", rows), factor=tokens / sequences)


# --- the implicit reward ---------------------------------------------------------------------------------------------


def test_una_is_uft(outcome):
    assert_same(outcome("una", beta=0.3), outcome("uft", beta=0.3))


def test_uft_on_preferences_alone_is_dpo(kit, outcome):
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    assert_same(outcome("uft", rows, beta=0.3), outcome("dpo", rows, beta=0.3))


@pytest.mark.parametrize("index", [0, 7])
def test_uft_on_instructions_is_parallel_to_sft_row_by_row(kit, policy, reference, outcome, index):
    beta, row = 0.3, kit.one_of_each()[index]
    uft, sft = outcome("uft", [row], beta=beta), outcome("sft", [row])
    objective = kit.preset("uft", beta=beta)
    batch = kit.batch_for(objective, [row])
    s = 1 / (1 + math.exp(-float(objective(batch, policy, reference, StepContext())["implicit_reward"].total)))
    scale = 2 * (1 - s) ** 2 * s * beta * batch.target_ids.numel()
    for a, b in zip(uft.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, scale * b)


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "per_kind"])
def test_the_gradient_of_a_mixture_is_the_weighted_sum_of_its_parts(kit, policy, reference, name):
    rows = kit.used(kit.preset(name), kit.one_of_each())
    others = kit.mismatched_for(kit.preset(name), rows)

    def measured(rows):
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
