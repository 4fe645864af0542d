"""Rules 1 to 5 and 7, which hold for every objective on disk, on a policy small enough to differentiate exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import toys as kit
from toys import PRESETS

from uft.data.rows import Kind

VARIANTS = {
    "sft per sequence": ("sft", {"reduction": "sequence"}),
    "dynamic_ft per sequence": ("dynamic_ft", {"reduction": "sequence"}),
    "anchored_sft per sequence": ("anchored_sft", {"reduction": "sequence", "alpha": 2.0}),
    "distill forward": ("distill", {"beta": 0.0, "reduction": "sequence"}),
    "distill reverse": ("distill", {"beta": 1.0}),
    "ift per token": ("ift", {"reduction": "token"}),
    "ift eq21": ("ift", {"propagation": "eq21"}),
    "ift alg1": ("ift", {"propagation": "alg1"}),
    "ift none": ("ift", {"propagation": "none"}),
    "ift without lam": ("ift", {"lam": 0.0, "embed_grad": True}),
    "ift live embeddings": ("ift", {"embed_grad": True, "detach_weights": True}),
    "uft beta": ("uft", {"beta": 0.3}),
    "uft bce": ("uft", {"beta": 0.3, "loss": "bce", "pairs": "scores", "kind_weights": {"scored": 0.5}}),
    "uft per token": ("uft", {"beta": 0.3, "length_normalize": True}),
    "dpo + sft": ("cdpo", {"sft_weight": 0.5}),
    "dpo + sft per token": ("cdpo", {"sft_weight": 0.5, "reduction": "token"}),
    "asft + sft": ("asft", {"sft_weight": 0.5}),
    "ipo per token": ("ipo", {"length": "mean"}),
    "rpo averaged": ("rpo", {"nll_norm": "mean", "beta": 0.5, "eta": 0.2}),
    "gipo substitute": ("gipo_soft", {"form": "substitute"}),
    "irft hinge": ("irft", {"link": "hinge"}),
    "irft linear": ("irft", {"link": "linear"}),
    "ld_dpo as a whole": ("ld_dpo", {"alpha": 0.0, "sft_weight": 0.3}),
    "kto uneven": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7}),
    "f_sft per token": ("f_sft", {"ratio": "mean"}),
    **{f"f_sft {f}": ("f_sft", {"f": f}) for f in ("total_variation", "hellinger", "reverse_kl", "forward_kl")},
    "f_sft jensen_shannon": ("f_sft", {"f": "jensen_shannon"}),
    "per_kind weighted": ("per_kind", {"weights": {"preference": 0.5, "binary": 2.0, "negatives": 0.0}}),
}
EVERY = {**{name: (name, {}) for name in PRESETS}, **VARIANTS}
"""Every preset, and variants of it: a test goes through them all, and an assertion names the one that it is about."""


def fresh(case):
    """The objective, its state as at the start of a run."""
    return kit.preset(case[0], **case[1])


def scene(case):
    """(objective, batch of all kinds, policy, reference, context with its KL baseline)."""
    objective = fresh(case)
    rows = kit.rows_for(objective)
    policy, reference = kit.Toy.random(0), kit.Toy.random(1)
    known = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, reference)
    return objective, kit.batch_for(objective, rows), policy, reference, known


def assert_same(one, another, case=None):
    assert one.terms == pytest.approx(another.terms, rel=1e-9, abs=1e-12), case
    for a, b in zip(one.gradients, another.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text: f"{case}: {text}")


def weighted(loss):
    return sum(term.weight * term.total for term in loss.values() if term.weight)


def values(loss):
    return {name: float(term.total.detach()) for name, term in loss.items()}


# --- 1: sums and counts


def test_counts_are_known_from_the_batch_alone():
    for case in EVERY.values():
        objective, batch, policy, reference, context = scene(case)
        counts, loss = objective.counts(batch), objective(batch, policy, reference, context)
        assert counts.keys() == loss.keys()
        for name, term in loss.items():
            assert torch.equal(counts[name], term.count), (case, name)
            assert term.count.shape == term.total.shape == ()
            assert term.count.dtype is torch.float32
            if "." not in name:  # a part of per_kind that weighs nothing keeps its graph
                assert term.total.requires_grad == (term.weight != 0), (case, name)
        assert "nll" in loss
        assert objective.headline == "" or objective.headline in loss


# --- 2: micro-batches, padding, packing, order, completions without targets


def test_layout_changes_nothing(policy, reference):
    for case in EVERY.values():
        used = kit.used(fresh(case), kit.rows_for(fresh(case)))

        def outcome(parts, size=100, empty=False, case=case, used=used, **how):
            """One step of `used`, cut into parts; its mismatched completions are `size` in a batch."""
            objective = fresh(case)
            batches = [kit.batch_for(objective, part, empty, **how) for part in parts]
            others = kit.mismatched_for(objective, used, size, **how)
            return kit.step(objective, batches, policy, policy.parameters, reference, others)

        whole = outcome([used])
        assert any(gradient.any() for gradient in whole.gradients)
        assert_same(whole, outcome([[row] for row in used], size=1, extra=5), case)
        thirds = [used[i : i + 3] for i in range(0, len(used), 3)]
        assert_same(whole, outcome(thirds, size=2, layout="packed"), case)
        assert_same(whole, outcome([used[::-1]], layout="packed", extra=3), case)
        assert_same(whole, outcome([used], empty=True), case)


def test_an_example_drawn_twice_in_a_step_does_not_mind_micro_batches(policy, reference):
    rows = [r for r in kit.one_of_each() if r.kind in (Kind.NEGATIVES, Kind.PREFERENCE)]
    one, apart = kit.preset("dft"), kit.preset("dft")
    twice = [*rows, *rows]
    together = kit.step(one, [kit.batch_for(one, twice)], policy, policy.parameters, reference)
    parts = [kit.batch_for(apart, [row]) for row in twice]
    assert_same(together, kit.step(apart, parts, policy, policy.parameters, reference))
    assert torch.equal(one.state["log_u"], apart.state["log_u"])


# --- 3: float32 and extremes


EXTREMES = [*product([torch.float32], (-1e4, -1e-7, 0.0), (-1e4, -1e-7))]
EXTREMES += [(torch.bfloat16, -1e4, -1e-7), (torch.bfloat16, 0.0, -1e4)]


def test_finite_at_the_extremes_and_float32():
    for case in EVERY.values():
        rows = kit.rows_for(fresh(case))
        batch, unrelated = kit.batch_for(fresh(case), rows), kit.mismatched_for(fresh(case), rows)
        for dtype, log_prob, other in EXTREMES:
            objective, policy, reference = fresh(case), kit.Told(log_prob, dtype), kit.Told(other, dtype)
            loss = objective(batch, policy, reference, kit.step_context(objective, unrelated, policy, reference))
            for name, term in loss.items():
                assert torch.isfinite(term.total), (case, name, log_prob, other)
                assert term.total.dtype is torch.float32, (case, name)
            weighted(loss).backward()
            assert torch.isfinite(policy.log_probs.grad).all(), (case, log_prob, other)


# --- 4: where no gradient belongs


def test_no_gradient_into_the_reference_a_column_an_annotation_or_a_baseline():
    """And a column of the reference's log-probs stands for its forward pass."""
    for case in EVERY.values():
        objective, batch, policy, reference, context = scene(case)
        notes = {name: noted.clone().requires_grad_() for name, noted in batch.annotations.items()}
        kl_baseline = {name: value.clone().requires_grad_() for name, value in context.kl_baseline.items()}
        batch, context = replace(batch, annotations=notes), replace(context, kl_baseline=kl_baseline)
        direct = objective(batch, policy, reference if objective.needs.reference else None, context)
        weighted(direct).backward()
        column = reference(batch).log_probs.detach().requires_grad_()
        whole = reference if objective.needs.distributions else None  # no column can stand for those
        loss = fresh(case)(replace(batch, columns={"reference": column}), policy, whole, context)
        assert values(loss) == values(direct), case
        weighted(loss).backward()
        untouched = [*reference.parameters, column, *notes.values(), *kl_baseline.values()]
        assert [leaf.grad for leaf in untouched] == [None] * len(untouched), case
        assert policy.head.grad is not None


# --- 5: policy = reference


def test_values_at_policy_equals_reference_are_foretold_and_another_policy_is_noticed():
    for case in EVERY.values():
        objective, batch, policy, reference, other = scene(case)
        context = kit.step_context(objective, kit.mismatched_for(objective, kit.rows_for(objective)), policy, policy)
        loss, foretold = values(objective(batch, policy, policy, context)), objective.at_reference(batch)
        for name, total in foretold.items():
            assert loss[name] == pytest.approx(float(total), abs=1e-5), (case, name)
        if case[0] in EVERY and not case[1]:
            moved = values(fresh(case)(batch, policy, reference, other))
            noticed = any(abs(moved[name] - float(total)) > 1e-3 for name, total in foretold.items())
            assert noticed == bool(foretold) == objective.needs.reference, case


AT_REFERENCE = [
    *((name, {}, Kind.PREFERENCE, "pair", math.log(2)) for name in ("dpo", "cdpo", "robust_dpo", "dpop", "rpo")),
    *((name, {}, Kind.PREFERENCE, "pair", math.log(2)) for name in ("gdpo_soft", "ld_dpo", "irft", "aot")),
    ("cdpo", {"beta": 3.0, "label_smoothing": 0.2}, Kind.PREFERENCE, "pair", math.log(2)),
    ("hinge", {}, Kind.PREFERENCE, "pair", 1.0),
    ("irft", {"link": "linear"}, Kind.PREFERENCE, "pair", 0.0),
    ("ipo", {}, Kind.PREFERENCE, "pair", 25.0),
    ("ipo", {"tau": 0.5, "length": "mean"}, Kind.PREFERENCE, "pair", 1.0),
    ("nca", {}, Kind.PREFERENCE, "pair", 2 * math.log(2)),
    ("gropo_soft", {}, Kind.PREFERENCE, "pair", 8 / 9 * (math.log(2) + 2 * 0.5)),
    ("apo_zero", {}, Kind.PREFERENCE, "pair", 1.0),
    ("apo_down", {}, Kind.PREFERENCE, "pair", 1.0),
    ("sppo_hard", {"beta": 0.5}, Kind.PREFERENCE, "pair", 2.0),
    ("exo_pair", {"label_smoothing": 0.1}, Kind.PREFERENCE, "pair", -math.log(2) - math.log(0.09) / 2),
    ("bco_pair", {}, Kind.PREFERENCE, "pair", 2 * math.log(2)),
    ("discopop", {}, Kind.PREFERENCE, "pair", (math.log(2) + 1) / 2),
    ("wpo", {}, Kind.PREFERENCE, "margin", 0.0),
    ("kto", {}, Kind.BINARY, "kto", 0.5),
    ("kto", {"desirable_weight": 1.2, "undesirable_weight": 0.8}, Kind.PREFERENCE, "kto", 0.5),
    ("f_sft", {}, Kind.DEMONSTRATION, "f_sft", 0.0),
    ("anchored_sft", {}, Kind.DEMONSTRATION, "kl", 0.0),
    ("distill", {}, Kind.PREFERENCE, "distill", 0.0),
    ("uft", {}, Kind.PREFERENCE, "uft", math.log(2)),
    ("uft", {"loss": "bce"}, Kind.SCORED, "uft", math.log(2)),
    ("uft", {}, Kind.DEMONSTRATION, "uft", 0.25),
    ("uft", {}, Kind.SCORED, "uft", (0.0625 + 0.0625 + 0) / 3),
    ("uft", {"pairs": "scores"}, Kind.PREFERENCE, "uft", 0.25),
    ("dft", {}, Kind.NEGATIVES, "weight", 1.0),
    ("per_kind", {}, Kind.PREFERENCE, "preference.pair", math.log(2)),
    ("per_kind", {"weights": {"binary": 3.0}}, Kind.BINARY, "binary.kto", 0.5),
]


def test_values_at_policy_equals_reference(policy):
    for name, changes, kind, term, mean in AT_REFERENCE:
        objective, rows = kit.preset(name, **changes), [row for row in kit.one_of_each() if row.kind is kind]
        batch = kit.batch_for(objective, rows)
        context = kit.step_context(objective, kit.mismatched_for(objective, rows), policy, policy)
        found = objective(batch, policy, policy, context)[term]
        assert float(found.total.detach() / found.count) == pytest.approx(mean, abs=1e-7), (name, changes)
        foretold = objective.at_reference(batch)[term]
        assert float(foretold / found.count) == pytest.approx(mean, abs=1e-6), (name, changes)


# --- 7: one measure for all


def test_nll_is_the_same_measure_under_every_objective(policy, reference):
    """On rows of which every objective takes the good completion, and in plain log-probs whatever it trains on."""
    rows = [row for row in kit.one_of_each() if row.kind is Kind.PREFERENCE]
    found = {}
    for name, case in EVERY.items():
        objective = fresh(case)
        if Kind.PREFERENCE not in objective.views:  # it learns from own completions alone
            continue
        batch, others = kit.batch_for(objective, rows), kit.mismatched_for(objective, rows)
        terms = kit.step(objective, [batch], policy, [policy.head], reference, others).terms
        found.setdefault(round(terms["nll"], 9), []).append(name)
    assert len(found) == 1, found
