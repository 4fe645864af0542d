"""Where TRL has the loss: the same rows give the same loss and the same gradient in every weight."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install uft-lm[trl]")

# objective, rows, keys that differ from its preset, TRL's trainer, TRL's options
CASES = [
    ("sft", "demonstrations", {}, "sft", {}),
    ("dynamic_ft", "demonstrations", {}, "sft", {"loss_type": "dft"}),
    ("dpo", "pairs", {}, "dpo", {"loss_type": ["sigmoid"], "beta": 0.1}),
    (
        "dpo",
        "pairs",
        {"sft_weight": 0.3, "reduction": "token"},
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ),
    # TRL's own cDPO is this one, which sorts the pairs of a batch against each other: no more than one at a time
    ("cdpo", "pairs", {}, "dpo", {"loss_type": ["aot"], "label_smoothing": 0.1, "batch": 1}),
    ("aot", "pairs", {"label_smoothing": 0.1}, "dpo", {"loss_type": ["aot"], "label_smoothing": 0.1}),
    ("aot_unpaired", "pairs", {}, "dpo", {"loss_type": ["aot_unpaired"]}),
    ("robust_dpo", "pairs", {}, "dpo", {"loss_type": ["robust"], "label_smoothing": 0.1}),
    ("hinge", "pairs", {}, "dpo", {"loss_type": ["hinge"]}),
    ("ipo", "pairs", {"length": "mean"}, "dpo", {"loss_type": ["ipo"], "beta": 0.1}),
    ("nca", "pairs", {}, "dpo", {"loss_type": ["nca_pair"], "beta": 0.01}),
    ("ld_dpo", "pairs", {}, "dpo", {"ld_alpha": 0.5}),
    ("apo_zero", "pairs", {}, "dpo", {"loss_type": ["apo_zero"]}),
    ("apo_down", "pairs", {}, "dpo", {"loss_type": ["apo_down"]}),
    ("sppo_hard", "pairs", {"beta": 0.1}, "dpo", {"loss_type": ["sppo_hard"], "beta": 0.1}),
    ("exo_pair", "pairs", {}, "dpo", {"loss_type": ["exo_pair"], "label_smoothing": 0.001}),
    ("bco_pair", "pairs", {}, "dpo", {"loss_type": ["bco_pair"], "beta": 0.01}),
    ("discopop", "pairs", {}, "dpo", {"loss_type": ["discopop"], "beta": 0.05}),
    ("wpo", "pairs", {}, "dpo", {"use_weighting": True, "beta": 0.01}),
    ("cpo", "pairs", {"alpha": 0.0, "sft_weight": 1.0, "reduction": "token"}, "cpo", {}),
    ("simpo", "pairs", {}, "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
]


VARIANTS = [  # in the slow part
    ("sft", "demonstrations", {"reduction": "sequence"}, "sft", {"batch": 1}),
    ("dynamic_ft", "demonstrations", {"reduction": "sequence"}, "sft", {"loss_type": "dft", "batch": 1}),
    ("hinge", "pairs", {"beta": 1.0}, "dpo", {"loss_type": ["hinge"], "beta": 1.0}),  # some pairs beyond the hinge
    ("cpo", "pairs", {"alpha": 0.0, "label_smoothing": 0.1}, "cpo", {"cpo_alpha": 0.0, "label_smoothing": 0.1}),
]
EVERY = [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in VARIANTS)]


@pytest.mark.parametrize(("objective", "rows", "keys", "trainer", "options"), EVERY, ids=str)
def test_loss_and_gradient(ours, theirs, kit, objective, rows, keys, trainer, options):
    uft = ours(objective, kit.ROWS[rows], **keys)
    trl = theirs(trainer, kit.ROWS[rows], **options)
    assert uft.sequences == trl.sequences
    kit.assert_equal(uft, trl)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_distillation(ours, gkd, kit, beta):
    uft = ours("distill", kit.ROWS["demonstrations"], beta=beta)
    kit.assert_equal(uft, gkd(uft.sequences, beta))


@pytest.mark.parametrize(
    ("rows", "first", "weight", "ahead"),
    [("labels", 0, 1.0, True), ("labels", 1, 1.33, False), ("pairs", 0, 1.33, True)],
)
def test_kto(ours, theirs, kit, rows, first, weight, ahead):
    """The reference point too: of the same completions under the same other prompts, on either side of its bound."""
    uft = ours("kto", kit.ROWS[rows][first:], undesirable_weight=weight)
    trl = theirs("kto", uft.records, undesirable_weight=weight)
    assert uft.sequences == trl.sequences
    assert uft.mismatched == trl.mismatched
    assert (uft.terms["reference_point"] > 0.1) == ahead
    kit.assert_equal(uft, trl)
