"""A different objective for each kind of row: the weighted sum of its parts, each as if it were run alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import settings

from uft.data.rows import Kind
from uft.objectives.base import StepContext

SHIPPED = {"demonstration": "sft", "preference": "dpo", "binary": "kto", "scored": "uft", "negatives": "dft"}
OTHERS = {
    "shipped": SHIPPED,
    "passes of their own": {
        "demonstration": "ift",
        "preference": "simpo",
        "binary": "anchored_sft",
        "scored": "gdpo_soft",
        "negatives": "dft2",
    },
    "several that survey": {
        "demonstration": "f_sft",
        "preference": "kto",
        "binary": "kto",
        "scored": "kto",
        "negatives": "irft",
    },
    "annotated": {
        "demonstration": "poft",
        "preference": "gropo_soft",
        "binary": "poft",
        "scored": "asft",
        "negatives": "dpop",
    },
}
WEIGHTS = {"demonstration": 0.7, "preference": 1.5, "binary": 2.0, "scored": 0.25}
every = pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)


@pytest.fixture
def together(kit):
    """together({kind: name}, weights=...) -> per_kind with these objectives as their files have them."""
    return lambda names, **changes: kit.preset("per_kind", **{k: settings(n) for k, n in names.items()}, **changes)


class Counting:
    """A forward that remembers how often it was asked."""

    def __init__(self, forward):
        self.forward, self.asked = forward, []

    def __call__(self, batch, *request):
        self.asked.append((batch, *request))
        return self.forward(batch, *request)


def of_kind(batch, kind):
    return batch.only(batch.kind == list(Kind).index(kind))


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_shipped_objective_of_every_kind_is_its_own_file(kit):
    found = kit.settings("per_kind")
    assert {kind: found[kind]["name"] for kind in SHIPPED} == SHIPPED
    assert all(found[kind] == settings(name) for kind, name in SHIPPED.items())
    assert {kind.value for kind in Kind} == SHIPPED.keys()
    assert found["weights"] == {}


def test_views_are_those_of_the_parts(kit, together):
    rows = kit.one_of_each()
    for names in OTHERS.values():
        objective = together(names)
        assert set(objective.views) == set(Kind)
        for row in rows:
            assert objective.views[row.kind](row, 1) == kit.preset(names[row.kind.value]).views[row.kind](row, 1)


# --- the sum of its parts --------------------------------------------------------------------------------------------


@every
def test_it_is_the_weighted_sum_of_the_parts_run_alone(kit, together, policy, reference, names):
    rows, whole = kit.one_of_each(), together(names, weights=WEIGHTS)
    batch, unrelated = kit.batch_for(whole, rows), kit.mismatched_for(whole, rows)
    outcome = kit.step(whole, [batch], policy, policy.parameters, reference, unrelated)
    expected, gradients = 0.0, [torch.zeros_like(p) for p in policy.parameters]
    for kind in Kind:
        alone, weight = kit.preset(names[kind.value]), WEIGHTS.get(kind.value, 1.0)
        own = kit.batch_for(alone, [row for row in rows if row.kind is kind])
        part = kit.step(alone, [own], policy, policy.parameters, reference, [of_kind(b, kind) for b in unrelated])
        expected += weight * part.loss
        gradients = [total + weight * found for total, found in zip(gradients, part.gradients, strict=True)]
        for name, value in part.terms.items():
            if name != "nll":
                assert outcome.terms[f"{kind.value}.{name}"] == pytest.approx(value), (kind, name)
        for name, state in alone.state.items():
            assert torch.equal(whole.state[f"{kind.value}.{name}"], state)
    assert outcome.loss == pytest.approx(expected, rel=1e-9)
    for a, b in zip(outcome.gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every
def test_micro_batches_change_nothing_also_where_a_kind_is_missing(kit, together, policy, reference, names):
    rows = kit.used(together(names), kit.one_of_each())

    def outcome(parts, size, **how):
        objective = together(names, weights=WEIGHTS)
        batches = [kit.batch_for(objective, part, **how) for part in parts]
        unrelated = kit.mismatched_for(objective, rows, size, **how)
        return objective, kit.step(objective, batches, policy, policy.parameters, reference, unrelated)

    first, one = outcome([rows], 100)
    for parts, size, how in (([[row] for row in rows], 1, {}), ([rows[:5], rows[5:]], 3, {"layout": "packed"})):
        objective, many = outcome(parts, size, **how)
        assert many.terms == pytest.approx(one.terms, rel=1e-9, abs=1e-12)
        for a, b in zip(one.gradients, many.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(objective.state[name], state) for name, state in first.state.items())


def test_a_weight_of_zero_leaves_the_others(kit, together, policy, reference):
    rows = [row for row in kit.one_of_each() if row.kind in (Kind.DEMONSTRATION, Kind.PREFERENCE)]
    demonstrations = [row for row in rows if row.kind is Kind.DEMONSTRATION]
    objective, alone = together(SHIPPED, weights={"preference": 0.0}), kit.preset("sft")
    both = kit.step(objective, [kit.batch_for(objective, rows)], policy, policy.parameters, reference)
    sft = kit.step(alone, [kit.batch_for(alone, demonstrations)], policy, policy.parameters)
    assert both.loss == pytest.approx(sft.loss)
    for a, b in zip(both.gradients, sft.gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert both.terms["preference.pair"] > 0, "measured all the same"


def test_each_kind_is_divided_by_its_own_count(kit, together, policy, reference):
    """Five pairs more change what the pairs say, not how much they weigh against the demonstrations."""
    rows = kit.one_of_each()
    pair, shown = rows[1], rows[0]
    few, many = ([shown, *[pair] * n] for n in (1, 6))
    losses = []
    for part in (few, many):
        objective = together(SHIPPED)
        losses.append(kit.step(objective, [kit.batch_for(objective, part)], policy, policy.parameters, reference).loss)
    assert losses[0] == pytest.approx(losses[1])


# --- forwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "more"), [(SHIPPED, 0), (OTHERS["annotated"], 0), (OTHERS["passes of their own"], 3)]
)
def test_the_policy_runs_once_for_all_parts_that_ask_for_no_more(kit, together, policy, reference, names, more):
    """IFT guesses and mixes, anchored SFT compares whole distributions."""
    objective = together(names)
    counted, frozen = Counting(policy), Counting(reference)
    frozen.logits = reference.logits
    objective(kit.batch_for(objective, kit.one_of_each()), counted, frozen, StepContext())
    assert len(counted.asked) == 1 + more
    assert len(frozen.asked) == 1
    assert objective.needs.distributions == (names["binary"] == "anchored_sft")


def test_a_cached_column_stands_for_the_reference(kit, together, policy, reference):
    objective, cached = together(SHIPPED), together(SHIPPED)
    batch = kit.batch_for(objective, kit.one_of_each())
    column = replace(batch, columns={"reference": reference(batch).log_probs.detach()})
    direct, found = objective(batch, policy, reference, StepContext()), cached(column, policy, None, StepContext())
    assert {n: float(t.total.detach()) for n, t in found.items()} == {
        n: float(t.total.detach()) for n, t in direct.items()
    }


# --- state -----------------------------------------------------------------------------------------------------------


def test_the_state_of_a_part_goes_on_from_step_to_step_and_is_left_alone_in_evaluation(
    kit, together, policy, reference
):
    whole, alone = together(SHIPPED), kit.preset("dft")
    rows = [row for row in kit.one_of_each() if row.kind is Kind.NEGATIVES]
    batch = kit.batch_for(whole, rows)
    seen = []
    for context in (StepContext(), StepContext(learning=False), StepContext(step=1)):
        for objective in (whole, alone):
            objective(batch, policy, reference, context)
        seen.append(whole.state["negatives.log_u"].clone())
        assert torch.equal(seen[-1], alone.state["log_u"])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert whole.state.keys() == {"negatives.log_u"}


def test_two_parts_with_a_state_keep_them_apart(kit, together, policy, reference):
    objective = together({**SHIPPED, "preference": "dft2"})
    objective(kit.batch_for(objective, kit.one_of_each()), policy, reference, StepContext())
    assert objective.state.keys() == {"preference.log_u", "negatives.log_u"}
    assert objective.state["preference.log_u"].nonzero().flatten().tolist() == [1, 6]
    assert objective.state["negatives.log_u"].nonzero().flatten().tolist() == [5]


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_needs_are_those_of_all_parts_and_annotations_those_of_the_kind(together):
    shipped, annotated = together(SHIPPED), together(OTHERS["annotated"])
    assert (shipped.needs.reference, shipped.needs.mismatched, shipped.needs.distributions) == (True, True, False)
    assert shipped.needs.annotations == frozenset()
    assert annotated.needs.annotations >= {"baseline_logp"}
    assert not annotated.needs.mismatched
    assert "baseline_logp" in annotated.annotations(Kind.BINARY)
    assert "baseline_logp" not in annotated.annotations(Kind.NEGATIVES)


def test_problems_and_cautions_name_the_kind(kit, together):
    wrong = together({**SHIPPED, "demonstration": "dpo"}, weights={"demos": 1.0, "scored": -1.0})
    assert [key for key, _ in wrong.problems()] == ["weights", "weights.scored", "demonstration"]
    assert together(SHIPPED).problems() == []
    inner = kit.preset("per_kind", scored={**settings("uft"), "reduction": "token"})
    assert [key for key, _ in inner.problems()] == ["scored.reduction"]
    [caution] = kit.preset("per_kind", negatives={**settings("irft"), "link": "linear"}).cautions()
    assert caution.startswith("negatives: ")
    assert together(SHIPPED).length_convention.count(";") >= 4


def test_a_kind_without_an_objective_is_a_kind_it_cannot_use(kit):
    objective = kit.preset("per_kind", binary=None)
    assert set(objective.views) == set(Kind) - {Kind.BINARY}
    assert objective.annotations(Kind.BINARY) == frozenset()
