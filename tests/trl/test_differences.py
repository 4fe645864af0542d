"""Where uft departs from TRL on purpose: by exactly what the objective's docstring names, in value and gradient."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install uft-lm[trl]")


@pytest.fixture
def pairs(kit):
    return kit.ROWS["pairs"]


@pytest.fixture
def counted_by_token(ours, pairs):
    """What the likelihood of the chosen ones gains when tokens of the batch are averaged instead of completions."""
    return ours("sft", pairs, reduction="token") - ours("sft", pairs, reduction="sequence")


def test_orpo_counts_completions_where_trl_counts_the_tokens_of_prompts_and_completions(
    ours, theirs, kit, pairs, whole_nll
):
    own = ours("sft", pairs, reduction="sequence")
    everything = whole_nll(own.sequences)
    trl = theirs("orpo", pairs, beta=0.1)
    kit.assert_equal(ours("orpo", pairs) - own + everything, trl)


def test_cpo_counts_completions_where_trl_counts_tokens(ours, theirs, kit, pairs, counted_by_token):
    kit.assert_equal(ours("cpo", pairs) + counted_by_token, theirs("cpo", pairs))


@pytest.mark.slow
def test_rpo_counts_completions_where_trl_counts_tokens(ours, theirs, kit, pairs, counted_by_token):
    uft = ours("rpo", pairs, nll_norm="mean", beta=0.5, eta=0.2)
    trl = theirs("dpo", pairs, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.5)
    kit.assert_equal(uft + 0.2 * counted_by_token, trl)


@pytest.mark.slow
def test_simpo_has_no_likelihood_where_trl_adds_one_unless_told(ours, theirs, kit, pairs):
    trl = theirs("cpo", pairs, loss_type="simpo", beta=2.0, simpo_gamma=1.0)
    kit.assert_equal(ours("simpo", pairs) + ours("sft", pairs), trl)


def test_ipo_sums_where_trl_averages(ours, theirs, kit):
    """With n tokens in every completion (h/n - 1/(2 tau))^2 is (h - 1/(2 tau/n))^2 / n^2."""
    rows, n = kit.ROWS["alike"], 5
    uft = ours("ipo", rows, tau=0.1 / n)
    assert {sum(learned) for _, learned in uft.sequences} == {n}
    kit.assert_equal(1 / n**2 * uft, theirs("dpo", rows, loss_type=["ipo"], beta=0.1))


@pytest.mark.slow
def test_cdpo_smooths_where_trl_ignores_it(ours, theirs, kit, pairs):
    trl = theirs("dpo", pairs, loss_type=["sigmoid"], label_smoothing=0.1)
    kit.assert_equal(ours("dpo", pairs), trl)
    assert ours("cdpo", pairs).loss != pytest.approx(trl.loss, abs=1e-4)


@pytest.mark.slow
def test_kto_has_a_reference_point_per_step_where_trl_has_one_per_batch(ours, theirs, kit):
    rows = kit.ROWS["labels"][:4]
    trl = theirs("kto", rows, batch=2)
    halves = 0.5 * (ours("kto", rows[:2]) + ours("kto", rows[2:]))
    kit.assert_equal(halves, trl)
    assert ours("kto", rows).loss != pytest.approx(trl.loss, abs=1e-4)
