"""A different objective for each kind of row: the weighted sum of its parts, each as if it were run alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys as kit
from toys import settings

from uft.data.rows import ANSWERED, Kind
from uft.objectives.base import StepContext

SHIPPED = {"demonstration": "sft", "preference": "dpo", "binary": "kto", "scored": "uft", "negatives": "dft"}
PARTS = ("demonstration", "preference", "binary", "scored", "negatives")
OTHERS = {
    name: dict(zip(PARTS, names.split(), strict=True))
    for name, names in {
        "shipped": "sft dpo kto uft dft",
        "passes of their own": "ift simpo anchored_sft gdpo_soft dft2",
        "several with a baseline": "f_sft kto kto kto irft",
        "annotated": "poft gropo_soft poft asft dpop",
    }.items()
}
WEIGHTS = {"demonstration": 0.7, "preference": 1.5, "binary": 2.0, "scored": 0.25}


def together(names, **changes):
    """per_kind with these objectives, by kind, as their files have them."""
    return kit.preset("per_kind", **{kind: settings(name) for kind, name in names.items()}, **changes)


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


def test_the_shipped_objective_of_every_kind_is_its_own_file():
    found = kit.settings("per_kind")
    assert {kind: found[kind]["name"] for kind in SHIPPED} == SHIPPED
    assert all(found[kind] == settings(name) for kind, name in SHIPPED.items())
    assert {kind.value for kind in ANSWERED} == {*SHIPPED, "rollout"}
    assert found["rollout"] is None
    assert found["weights"] == {}


# --- the sum of its parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_it_is_the_weighted_sum_of_the_parts_run_alone(policy, reference, names):
    rows, whole = kit.one_of_each(), together(names, weights=WEIGHTS)
    batch, unrelated = kit.batch_for(whole, rows), kit.mismatched_for(whole, rows)
    outcome = kit.step(whole, [batch], policy, policy.parameters, reference, unrelated)
    expected, gradients = 0.0, [torch.zeros_like(p) for p in policy.parameters]
    for kind in map(Kind, PARTS):
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


def test_each_kind_is_divided_by_its_own_count(policy, reference):
    """Five pairs more change what the pairs say, not how much they weigh against the demonstrations."""
    shown, pair, *_ = kit.one_of_each()
    losses = []
    for rows in ([shown, pair], [shown, *[pair] * 6]):
        objective = together(SHIPPED)
        losses.append(kit.step(objective, [kit.batch_for(objective, rows)], policy, policy.parameters, reference).loss)
    assert losses[0] == pytest.approx(losses[1])


# --- forwards --------------------------------------------------------------------------------------------------------


def test_the_policy_runs_once_for_all_parts_that_ask_for_no_more(policy, reference):
    """IFT guesses and mixes, anchored SFT compares whole distributions."""
    for name, more in (("shipped", 0), ("annotated", 0), ("passes of their own", 3)):
        objective = together(OTHERS[name])
        counted, frozen = Counting(policy), Counting(reference)
        frozen.logits = reference.logits
        objective(kit.batch_for(objective, kit.one_of_each()), counted, frozen, StepContext())
        assert (len(counted.asked), len(frozen.asked)) == (1 + more, 1), name
        assert objective.needs.distributions == (name == "passes of their own")


def test_a_cached_column_stands_for_the_reference(policy, reference):
    objective, cached = together(SHIPPED), together(SHIPPED)
    batch = kit.batch_for(objective, kit.one_of_each())
    column = replace(batch, columns={"reference": reference(batch).log_probs.detach()})
    direct, found = objective(batch, policy, reference, StepContext()), cached(column, policy, None, StepContext())
    assert {n: float(t.total.detach()) for n, t in found.items()} == {
        n: float(t.total.detach()) for n, t in direct.items()
    }


# --- state -----------------------------------------------------------------------------------------------------------


def test_the_state_of_a_part_goes_on_from_step_to_step_and_is_left_alone_in_evaluation(policy, reference):
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


def test_two_parts_with_a_state_keep_them_apart(policy, reference):
    objective = together({**SHIPPED, "preference": "dft2"})
    objective(kit.batch_for(objective, kit.one_of_each()), policy, reference, StepContext())
    assert objective.state.keys() == {"preference.log_u", "negatives.log_u"}
    assert objective.state["preference.log_u"].nonzero().flatten().tolist() == [1, 6]
    assert objective.state["negatives.log_u"].nonzero().flatten().tolist() == [5]


# --- what it says of itself ------------------------------------------------------------------------------------------


def test_needs_are_those_of_all_parts_and_annotations_those_of_the_kind():
    shipped, annotated = together(SHIPPED), together(OTHERS["annotated"])
    assert (shipped.needs.reference, shipped.needs.mismatched, shipped.needs.distributions) == (True, True, False)
    assert shipped.needs.annotations == frozenset()
    assert annotated.needs.annotations >= {"baseline_logp"}
    assert not annotated.needs.mismatched
    assert "baseline_logp" in annotated.annotations(Kind.BINARY)
    assert "baseline_logp" not in annotated.annotations(Kind.NEGATIVES)


def test_problems_and_cautions_name_the_kind():
    wrong = together({**SHIPPED, "demonstration": "dpo"}, weights={"demos": 1.0, "scored": -1.0})
    assert [key for key, _ in wrong.problems()] == ["weights", "weights.scored", "demonstration"]
    assert together(SHIPPED).problems() == []
    taught = together({**SHIPPED, "demonstration": "distill"})
    assert [key for key, _ in taught.problems()] == ["demonstration"], "a teacher beside DPO's reference"
    assert taught.needs.teacher
    assert [key for key, _ in together({**SHIPPED, "preference": "aot"}).problems()] == ["preference"], "sorts the step"
    assert together({**dict.fromkeys(SHIPPED, "sft"), "demonstration": "distill"}).problems() == []
    inner = kit.preset("per_kind", scored={**settings("uft"), "reduction": "token"})
    assert [key for key, _ in inner.problems()] == ["scored.reduction"]
    [caution] = kit.preset("per_kind", negatives={**settings("irft"), "link": "linear"}).cautions()
    assert caution.startswith("negatives: ")
    assert together(SHIPPED).length_convention.count(";") >= 4


def test_a_kind_without_an_objective_is_a_kind_it_cannot_use():
    objective = kit.preset("per_kind", binary=None)
    assert set(objective.views) == set(ANSWERED) - {Kind.BINARY, Kind.ROLLOUT}
    assert objective.annotations(Kind.BINARY) == frozenset()
