"""Micro-batches and chunks change nothing, mixtures are weighted sums of their parts, a NaN changes no weight, and a
step costs what its tokens cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from uft.data.batch import Example, Layout
from uft.data.chat import Tokens
from uft.data.loader import Collator, StepBatches
from uft.model import head
from uft.model.head import Head
from uft.model.policy import Policy
from uft.objectives import make
from uft.objectives.base import PLAIN, ForwardRequest, Loss, Objective, StepContext
from uft.training.setup import Prepared
from uft.training.step import Step, kl_baseline, nonfinite_rows, optimiser_step

Gradients = dict[str, torch.Tensor]
OBJECTIVES = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo", "kto", "anchored_sft", "orpo", "per_kind")
ONE_TERM = ("sft", "ift", "uft", "una", "dft", "dft2", "dpo", "kto")
CONTEXT = StepContext(step=3, steps=10, warmup=1, noise=0.7)
ONE_BATCH = 100_000
CHUNK = 20  # rows of the head's logits, where a test sets them


class Bench:
    """A trainer's parts, with a fresh objective for every step: its state must not pass from one to the next."""

    def __init__(self, prepared: Prepared) -> None:
        self.trainer = prepared.trainer
        self.trainer.policy.train()

    def objective(self) -> Objective:
        made = make(self.trainer.config.objective)
        made.start(self.trainer.sampler.row_count)
        if "log_u" in made.state:  # as if every example had been visited before
            made.state["log_u"].copy_(torch.linspace(-3, 3, self.trainer.sampler.row_count))
        return made

    def items(self, count: int) -> list[Example]:
        """`count` rows of which the objective takes something."""
        state = self.trainer.sampler.state_dict()
        found: list[Example] = []
        while len(found) < count:
            found += self.trainer.sampler.take(1)
        self.trainer.sampler.load_state_dict(state)
        return found

    def batches(
        self,
        items: Sequence[Example],
        budget: int = 64,
        layout: Layout = Layout.PADDED,
        whole: Sequence[Example] | None = None,
    ) -> StepBatches:
        """`items` may be a part of the `whole` step, from whose completions the KL baseline is taken."""
        sampler, needs = self.trainer.sampler, self.trainer.objective.needs
        others = sampler.mismatched(items if whole is None else whole) if needs.mismatched else ()
        return Collator(budget, self.trainer.collator.pad_id, layout)(items, others)

    def step(self, batches: StepBatches, objective=None, lr=0.1, max_grad_norm=1.0, update=True) -> Step:
        self.trainer.objective = objective or self.objective()
        config = self.trainer.config
        config.optim = replace(config.optim, lr=lr, schedule="constant", warmup=0.0)
        config.train = replace(config.train, max_grad_norm=max_grad_norm)
        return optimiser_step(self.trainer, batches, CONTEXT, update)

    def measure(self, items: Sequence[Example], budget: int, **how: Any) -> tuple[float, Loss, Gradients, int]:
        """Loss, terms, gradients and the number of micro-batches; no update."""
        batches = self.batches(items, budget, **how)
        step = self.step(batches, update=False)
        gradients = {name: p.grad.clone() for name, p in self.trainer.parameters.items() if p.grad is not None}
        return float(step.loss), step.terms, gradients, len(batches.micro_batches)

    def weights(self) -> Gradients:
        return {name: p.detach().clone() for name, p in self.trainer.parameters.items()}

    def distance(self, before: Gradients) -> float:
        moves = (p.detach() - before[name] for name, p in self.trainer.parameters.items())
        return math.sqrt(sum(float(move.square().sum()) for move in moves))


@pytest.fixture
def bench(build):
    """bench("ift"): on float64 weights away from the reference, so that sums agree to the last digits that matter."""

    def make_bench(objective: str, *settings: str, **options: Any) -> Bench:
        prepared = build(objective, "reference.mode=copy", *settings, **options)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in prepared.trainer.parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        prepared.trainer.policy.module.double()
        return Bench(prepared)

    return make_bench


def close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(gradient.abs().max()) or 1.0
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-5 * scale), name


# --- micro-batches


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        *((name, ()) for name in OBJECTIVES),
        *((name, (f"objective.reduction={r}",)) for name in ("sft", "ift") for r in ("token", "sequence")),
        ("dpo", ("objective.sft_weight=0.7", "objective.reduction=token")),  # several terms with a weight
        ("aot", ()),  # pairs are matched over the whole step
        ("aot_unpaired", ("objective.sft_weight=0.7",)),
    ],
)
def test_one_batch_of_eight_is_eight_of_one(bench, objective, settings):
    rig = bench(objective, *settings)
    items = rig.items(8)
    assert len({item.length for item in items}) > 3
    whole = rig.measure(items, ONE_BATCH)
    assert whole[3] == 1
    for budget, batches in ((1, 8), (60, None)):
        parts = rig.measure(items, budget)
        assert batches is None or parts[3] == batches
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        assert parts[1].keys() == whole[1].keys()
        for name, term in parts[1].items():
            assert float(term.count) == float(whole[1][name].count), name
            assert float(term.total) == pytest.approx(float(whole[1][name].total), rel=1e-4, abs=1e-5), name
        close(parts[2], whole[2])


@pytest.mark.parametrize("objective", ONE_TERM)
def test_a_mixture_is_the_weighted_sum_of_its_parts(bench, objective):
    """Gradient of the union = (n_a g_a + n_b g_b) / (n_a + n_b), n the units of the one term with a weight."""
    rig = bench(objective)
    items = rig.items(10)
    kinds = sorted({item.row.kind.value for item in items})
    ours = [item for item in items if item.row.kind.value == kinds[0]]
    theirs = [item for item in items if item.row.kind.value != kinds[0]]
    assert ours
    assert theirs
    both, one, other = (rig.measure(part, ONE_BATCH, whole=items) for part in (items, ours, theirs))
    (name,) = [name for name, term in both[1].items() if term.weight]
    n_one, n_other = float(one[1][name].count), float(other[1][name].count)
    expected = {
        key: (n_one * one[2].get(key, 0.0) + n_other * other[2].get(key, 0.0)) / (n_one + n_other) for key in both[2]
    }
    close(both[2], expected)


# --- the KL baseline


def test_the_kl_baseline_is_a_mean_over_all_mismatched_completions_of_the_step(bench):
    rig = bench("kto")
    items, policy, reference = rig.items(8), rig.trainer.policy, rig.trainer.reference
    unrelated = rig.trainer.sampler.mismatched(items)
    assert len(unrelated) == sum(len(item.parts) for item in items)
    batches = [rig.batches(items, budget) for budget in (ONE_BATCH, 60, 1)]
    found = [kl_baseline(rig.trainer, one)["z"] for one in batches]
    alone = (rig.batches([item], 1).micro_batches[0] for item in unrelated)
    ratios = [float((policy(batch).log_probs - reference(batch).log_probs).sum().detach()) for batch in alone]
    assert [float(z) for z in found] == pytest.approx([sum(ratios) / len(ratios)] * 3, rel=1e-5)
    assert not any(z.requires_grad for z in found)
    assert kl_baseline(rig.trainer, StepBatches([], [])) == {}


@pytest.mark.parametrize("objective", ["kto", "per_kind"])
def test_a_step_takes_its_baseline_from_all_rows_whatever_the_micro_batches(bench, objective):
    """A reference below the policy makes z positive; the update of one pass and of many is the same."""
    rig = bench(objective, "optim.name=sgd")
    items, start = rig.items(8), rig.weights()
    reference, moved = rig.trainer.reference, []

    def lowered(batch: Any, request: ForwardRequest = PLAIN) -> Any:
        scores = reference(batch, request)
        return replace(scores, log_probs=scores.log_probs - 0.3)

    rig.trainer.reference = lowered
    for budget in (ONE_BATCH, 40):
        done = rig.step(rig.batches(items, budget), lr=1.0)
        points = [float(t.total / t.count) for name, t in done.terms.items() if name.endswith("reference_point")]
        assert points
        assert min(points) > 0.1
        moved.append((float(done.loss), rig.weights()))
        with torch.no_grad():
            for name, parameter in rig.trainer.parameters.items():
                parameter.copy_(start[name])
    assert moved[0][0] == pytest.approx(moved[1][0], abs=1e-5)
    close(moved[0][1], moved[1][1])
    assert rig.distance(moved[0][1]) > 0


# --- the update


@pytest.mark.parametrize("largest", [0.01, 0.0])
def test_clipping_bounds_the_update_and_the_norm_shown_is_from_before(bench, largest):
    """0: never clip. Tokens are counted without padding."""
    rig = bench("sft", "optim.name=sgd")
    items, before = rig.items(4), rig.weights()
    done = rig.step(rig.batches(items), max_grad_norm=largest, lr=1.0)
    assert float(done.grad_norm) > 0.1
    assert rig.distance(before) == pytest.approx(largest or float(done.grad_norm), rel=1e-3)
    assert done.tokens == sum(encoded.length for item in items for encoded in item.encoded)
    assert done.supervised_tokens == sum(int(encoded.supervised.sum()) for item in items for encoded in item.encoded)


class Poisoned:
    """The policy, but the log-probs of rows with this token are multiplied by `value`."""

    def __init__(self, policy: Policy, token: int, value: float) -> None:
        self.policy, self.token, self.value = policy, token, value

    def __call__(self, batch: Any, request: ForwardRequest = PLAIN) -> Any:
        scores = self.policy(batch, request)
        hit = (batch.input_ids == self.token).any(1)[batch.sequence]
        return replace(scores, log_probs=scores.log_probs * torch.where(hit, self.value, 1.0))


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        *(pytest.param(name, math.nan, marks=() if name == "dft" else pytest.mark.slow) for name in OBJECTIVES),
        ("sft", math.inf),
        ("dpo", math.inf),
    ],
)
def test_a_row_that_is_not_finite_changes_no_weight_and_is_named(bench, objective, value):
    rig = bench(objective)
    items = rig.items(6)
    token = next(
        token
        for token in range(3, 61)
        if sum(any(token in encoded.ids for encoded in item.encoded) for item in items) == 1
    )
    bad = next(item.row.id for item in items if any(token in encoded.ids for encoded in item.encoded))
    trainer = rig.trainer
    trainer.policy = Poisoned(trainer.policy, token, value)
    before = rig.weights()
    assert not rig.step(Collator(64, trainer.collator.pad_id)(items)).finite
    trainer.objective = rig.objective()
    assert nonfinite_rows(trainer, items, CONTEXT) == [bad]
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())
    assert all(p.grad is None for p in trainer.parameters.values())
    assert not trainer.optimiser.state


# --- backward through the fused head, in chunks


@contextmanager
def counted_chunks(parts: list[list[slice]]) -> Iterator[None]:
    """The head works in chunks of CHUNK rows, and the chunks of every backward pass are noted."""
    real = Head.chunked_backward

    def counted(self_: Head, states: Any, target_ids: Any, slices: Sequence[slice], *rest: Any) -> None:
        parts.append(list(slices))
        real(self_, states, target_ids, slices, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "chunked_backward", counted)
        patch.setattr(head, "CHUNK_ELEMENTS", CHUNK * 61)
        yield


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("sft", ()),
        ("dpo", ()),
        ("uft", ()),
        ("dft", ()),
        ("ift", ()),
        ("ift", ("objective.lam=0",)),
        ("ift", ("objective.embed_grad=true",)),
    ],
)
def test_objectives_with_one_forward_are_evaluated_chunk_by_chunk(bench, objective, settings):
    """In chunks of whole rows, with the loss and the gradients of a padded batch; the reference runs once for all."""
    rig = bench(objective, "train.packing=packed", *settings)
    items, chunked = rig.items(8), list[list[slice]]()
    padded = rig.measure(items, ONE_BATCH)
    reference, reference_runs = rig.trainer.reference, []

    def counted(batch: Any, *rest: Any) -> Any:
        reference_runs.append(batch)
        assert reference is not None
        return reference(batch, *rest)

    rig.trainer.reference = counted if reference else None
    with counted_chunks(chunked):
        packed = rig.measure(items, ONE_BATCH, layout=Layout.SHARED)
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    close(packed[2], padded[2])
    assert len(reference_runs) == (reference is not None)
    (parts,) = chunked
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) > 2
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    rows = sorted(sum(one.targets for one in item.encoded) for item in items)
    assert all(size <= CHUNK or size in rows for size in sizes)


def test_padded_batches_and_distributions_are_differentiated_as_a_whole(bench):
    chunked: list[list[slice]] = []
    with counted_chunks(chunked):
        rig = bench("sft", "train.packing=packed")
        rig.measure(rig.items(8), ONE_BATCH)
        anchored = bench("sft", "train.packing=packed", "objective.alpha=0.1", run="anchor")
        anchored.measure(anchored.items(8), ONE_BATCH, layout=Layout.SHARED)
    assert chunked == []


def test_the_objective_s_state_is_written_once_for_every_row(bench):
    rig, states = bench("dft2", "train.packing=packed"), []
    for layout in (Layout.PADDED, Layout.SHARED):
        objective = rig.objective()
        rig.step(rig.batches(rig.items(8), ONE_BATCH, layout), objective, update=False)
        states.append(objective.state["log_u"])
        assert not torch.equal(states[-1], rig.objective().state["log_u"])
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-5)


# --- costs, counted in tokens that go through the body and rows that meet the head


@dataclass
class Cost:
    """Of the policy, in one step."""

    learned: int = 0  # tokens through the body with gradients
    looked: int = 0  # without
    rows: int = 0  # hidden states that met the output head


def cost(prepared: Prepared, items: Sequence[Example], budget: int = ONE_BATCH) -> Cost:
    trainer, found, logits = prepared.trainer, Cost(), Head.logits

    def counted(*args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        fed = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert fed is not None
        size = fed.shape[0] * fed.shape[1]
        found.learned += size * torch.is_grad_enabled()
        found.looked += size * (not torch.is_grad_enabled())

    def noted(self: Head, hidden: torch.Tensor, *rest: Any, **keywords: Any) -> torch.Tensor:
        found.rows += len(hidden)
        return logits(self, hidden, *rest, **keywords)

    handle = trainer.policy.body.register_forward_pre_hook(
        lambda _, args, kwargs: counted(*args, **kwargs), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Head, "logits", noted)
        rig = Bench(prepared)
        rig.step(rig.batches(items, budget, Layout.SHARED), update=False)
    handle.remove()
    return found


PACKED = ("train.packing=packed", "reference.mode=cached")


def targets(items: Sequence[Example]) -> int:
    return sum(one.targets for item in items for one in item.encoded)


@pytest.mark.parametrize("budget", [ONE_BATCH, 64])
def test_the_longest_row_twice_as_long_costs_its_own_tokens_only(build, budget):
    prepared = build("sft", *PACKED)
    items = prepared.trainer.sampler.take(8)
    before = cost(prepared, items, budget)
    longest = max(items, key=lambda item: item.length)
    encoded = longest.encoded[0]
    ids = np.concatenate([encoded.ids, np.full(encoded.length, 7, encoded.ids.dtype)])
    doubled = Tokens(ids, np.concatenate([encoded.supervised, np.ones(encoded.length, bool)]), encoded.prompt_length)
    twice = replace(longest, encoded=(doubled, *longest.encoded[1:]))
    after = cost(prepared, [twice if item is longest else item for item in items], budget)
    assert after.learned - before.learned == encoded.length
    assert after.rows - before.rows == encoded.length
    assert before.rows == targets(items)


@pytest.mark.parametrize(
    ("objective", "kind", "settings"),
    [("dpo", "preference", ()), *(("dft", "negatives", (f"objective.negatives={n}",)) for n in (1, 3))],
)
def test_completions_of_a_row_cost_their_prompt_once(build, files, objective, kind, settings):
    prepared = build(objective, *PACKED, *settings, sources={kind: files[kind]})
    items = prepared.trainer.sampler.take(4)
    prompts = sum(item.encoded[0].prompt_length for item in items)
    completions = sum(one.length - one.prompt_length - 1 for item in items for one in item.encoded)
    found = cost(prepared, items)
    assert found.learned == prompts + completions
    assert found.looked == 0, "the reference was computed before"
    assert found.rows == targets(items)


def test_ift_looks_once_more_and_uft_never(build):
    """On the same demonstrations, in passes of SFT: a forward without gradients beside it; nothing."""
    costs = {}
    for objective in ("sft", "ift", "uft"):
        prepared = build(objective, *PACKED[:1], *(PACKED[1:] if objective == "uft" else ()), run=objective)
        items = [item for item in prepared.trainer.sampler.take(16) if item.row.source == "demonstration"]
        assert len(items) > 1
        costs[objective] = cost(prepared, items)
    assert costs["uft"] == costs["sft"]
    assert costs["ift"].learned == costs["ift"].looked == costs["sft"].learned
    assert costs["ift"].rows == 2 * costs["sft"].rows
    assert costs["sft"].looked == 0
