"""Padded, packed, prompt shared, one by one: the same losses and gradients under every objective and on every model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from uft.config.schema import Lora
from uft.data.batch import Example, Layout, collate, make_example, mismatched
from uft.data.chat import Tokens
from uft.data.loader import Collator
from uft.data.rows import ANNOTATIONS, Completion, Kind, Message, Row
from uft.model import head
from uft.model.layout import settle_layout
from uft.model.policy import Policy, add_lora
from uft.model.reference import Frozen
from uft.objectives import make
from uft.objectives.base import ForwardRequest, Objective, StepContext
from uft.objectives.policy_gradient import SPREAD
from uft.training.step import optimiser_step

sys.path.insert(0, str(Path(__file__).parents[1] / "objectives"))
from toys import PRESETS, apart, settings

MODELS = ["llama_tied", "qwen2", "gemma3", "cohere", "gpt2"]
WORDS = 61
PROMPT, LONGEST = 9, 9
ALL, ALONE = 10_000, 1  # token budgets: one batch, a row a batch
Build = Callable[..., Any]


def fresh(name: str, **changes: Any) -> Objective:
    """The objective as if every example had been visited before."""
    objective = make({**settings(name), **changes})
    objective.start(100)
    if "log_u" in objective.state:
        objective.state["log_u"].copy_(torch.linspace(-3, 3, 100))
    return objective


def first(names: list[str]) -> list[Any]:
    """Objectives that are unlike each other, and in the slow part the others: tests/objectives/test_rules.py holds them
    all to the same rules on batches made by hand."""
    unlike = list(apart(names))[::2]
    return [pytest.param(name, marks=() if name in unlike else pytest.mark.slow) for name in names]


class Words:
    """Random rows of unequal lengths, each completion with its tokens."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(11)

    def ids(self, most: int) -> np.ndarray:
        return self.random.integers(3, WORDS, int(self.random.integers(1, most + 1))).astype(np.int32)

    def row(self, kind: Kind, number: int) -> tuple[Row, tuple[Tokens, ...]]:
        def completion(**feedback: Any) -> Completion:
            written = dict.fromkeys(ANNOTATIONS, float(-self.random.random()))
            return Completion((Message("assistant", "x"),), annotations=written, **feedback)

        completions = {
            Kind.DEMONSTRATION: lambda: (completion(),),
            Kind.PREFERENCE: lambda: (completion(preferred=True), completion(preferred=False)),
            Kind.BINARY: lambda: (completion(label=bool(number % 2)),),
            Kind.SCORED: lambda: (completion(score=0.9), completion(score=0.1), completion(score=0.6)),
            Kind.NEGATIVES: lambda: (
                completion(),
                *(completion(sampled_by="m", log_prob=-float(n)) for n in (3, 4, 5)),
            ),
            Kind.ROLLOUT: lambda: tuple(
                replace(completion(sampled_by="m", score=n / 3), annotations={SPREAD: 0.4})
                for n in range(1 + number % 3, -1, -1)
            ),
        }[kind]()
        prompt = self.ids(PROMPT)
        row = Row("source", number, (Message("user", "p"),), completions)
        return row, tuple(self.encoded(prompt, n == 1) for n in range(len(completions)))

    def encoded(self, prompt: np.ndarray, one: bool) -> Tokens:
        """`one`: of a single token. The prompts of a row differ at their end now and then, as tokenizers make them."""
        prompt = prompt.copy()
        if self.random.random() < 0.2:
            prompt[-1] = 3 + (prompt[-1] + 1) % (WORDS - 3)
        ids = np.concatenate([prompt, self.ids(1 if one else LONGEST)])
        supervised = np.arange(len(ids)) >= len(prompt)
        if len(ids) > len(prompt) + 4:
            supervised[len(prompt) + 2] = False  # between two turns
        return Tokens(ids, supervised, len(prompt))


def items_of(objective: Objective, count: int = 10) -> list[Example]:
    """Rows of all kinds that the objective takes something of, one of them twice."""
    words, found = Words(), []
    sampled = len(objective.views) == 1 or getattr(objective, "shown", "") == "group"  # alone it has no advantage
    kinds = [kind for kind in Kind if kind in objective.views and (kind is not Kind.ROLLOUT or sampled)]
    for number in range(count):
        row, encoded = words.row(kinds[number % len(kinds)], number)
        item = make_example(row, encoded, number, 0, lambda row, visit: objective.views[row.kind](row, visit))
        found += [item] if item is not None else []
    return [*found, found[0]]


@dataclass
class Measured:
    loss: float
    terms: dict[str, float]
    gradients: dict[str, torch.Tensor]


def measure(
    objective: Objective, policy: Policy, reference: Any, items: list[Example], layout: Layout, budget: int
) -> Measured:
    batches = Collator(budget, 0, layout)(items, mismatched(items, 64) if objective.needs.mismatched else ())
    parameters = policy.trainable()
    optimiser = torch.optim.SGD(parameters.values())
    parts = {"objective": objective, "policy": policy, "reference": reference, "device": policy.device}
    learner: Any = SimpleNamespace(**parts, optimiser=optimiser, parameters=parameters)
    step = optimiser_step(learner, batches, StepContext(step=3, steps=10, noise=0.7), update=False)
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    values = {name: float(term.total / term.count.clamp(min=1)) for name, term in step.terms.items()}
    return Measured(float(step.loss), values, gradients)


def packing(model: Any) -> Policy:
    """A policy that reads packed batches, in training mode."""
    policy = Policy(model)
    policy.check_head()
    settle_layout(policy, "packed", 30)
    return policy.train()


def moved(model: Any) -> Any:
    """A copy away from where it was, so that policy and reference differ."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


def assert_same(ours: Measured, theirs: Measured) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
    assert ours.terms == pytest.approx(theirs.terms, rel=1e-4, abs=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    assert largest > 0
    for name, gradient in ours.gradients.items():
        difference = float((gradient - theirs.gradients[name]).abs().max())
        assert difference <= 1e-5 * largest, name


LAYOUTS = [(Layout.PACKED, ALL), (Layout.SHARED, 40), (Layout.SHARED, ALONE)]


def same_in_every_layout(name: str, policy: Policy, reference: Any, **changes: Any) -> Measured:
    """The loss and its gradients with padding, which they equal in the other layouts."""
    items = items_of(fresh(name))
    padded = measure(fresh(name, **changes), policy, reference, items, Layout.PADDED, ALL)
    for layout, budget in LAYOUTS:
        assert_same(measure(fresh(name, **changes), policy, reference, items, layout, budget), padded)
    return padded


def lora_policy(model: Any) -> Policy:
    """A policy that packs, with an adapter away from its start."""
    policy = packing(add_lora(model, Lora(rank=2), 0, float32=True))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.1, generator=generator)
    return policy


@pytest.fixture(scope="module")
def pair(build: Build) -> tuple[Policy, Frozen]:
    """A small Llama that packs, and its reference."""
    model = build("llama")
    return packing(moved(model)), Frozen(packing(model))


@pytest.mark.parametrize("name", first(PRESETS))
def test_every_objective_has_the_same_loss_and_gradient_in_every_layout(
    pair: tuple[Policy, Frozen], name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 14 * WORDS)  # a row or two at a time, some rows in two chunks
    same_in_every_layout(name, *pair)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_does(build: Build, name: str):
    model = build(name)
    pair = packing(moved(model)), Frozen(packing(model))
    for objective in ("dpo", "ift"):
        same_in_every_layout(objective, *pair)


@pytest.mark.parametrize("adapter", [pytest.param(True, marks=pytest.mark.slow), False], ids=["lora", "all weights"])
def test_also_with_an_adapter_and_with_activations_made_again(build: Build, adapter: bool):
    policy = lora_policy(build("llama")) if adapter else packing(moved(build("llama")))
    reference = Frozen(policy) if adapter else Frozen(packing(build("llama")))
    padded = [same_in_every_layout(objective, policy, reference) for objective in ("dft", "ift")]
    policy.base.activation_checkpointing_enable({"use_reentrant": False})
    for objective, before in zip(("dft", "ift"), padded, strict=True):
        assert_same(same_in_every_layout(objective, policy, reference), before)


def test_ift_mixes_what_is_among_the_inputs(pair: tuple[Policy, Frozen]):
    for changes in ({"embed_grad": True}, {"lam": 0.0}, {"propagation": "eq21", "reduction": "token"}):
        same_in_every_layout("ift", *pair, **changes)


def test_guesses_are_the_same_in_every_layout(pair: tuple[Policy, Frozen]):
    items = items_of(fresh("sft"))
    with torch.no_grad():
        argmax = [pair[0](collate(items, 0, layout), ForwardRequest(argmax=True)).argmax for layout in Layout]
    assert all(torch.equal(argmax[0], other) for other in argmax)


def columns(reference: Frozen, items: list[Example]) -> list[Example]:
    """The items with the reference's log-probs beside them, as a cache brings them: each from a batch alone."""
    found = []
    for item in items:
        with torch.no_grad():
            log_probs = reference(collate([item], 0, Layout.SHARED)).log_probs
        pieces = log_probs.split([one.targets for one in item.encoded])
        found.append(replace(item, reference=tuple(piece.numpy() for piece in pieces)))
    return found


@pytest.mark.parametrize("name", first(PRESETS))
def test_a_chunk_of_a_few_rows_is_all_logits_at_once(
    pair: tuple[Policy, Frozen], name: str, monkeypatch: pytest.MonkeyPatch
):
    """Against the model's own logits of every position, through its own head."""
    items = items_of(fresh(name))
    policy, reference = pair
    with monkeypatch.context() as patched:
        for one in (policy, reference.policy):
            patched.setattr(one, "head", None)
        full = measure(fresh(name), *pair, items, Layout.PADDED, ALL)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * WORDS)
    assert_same(measure(fresh(name), *pair, items, Layout.SHARED, ALL), full)


CACHEABLE = [name for name in PRESETS if fresh(name).needs.reference and not fresh(name).needs.distributions]


@pytest.mark.parametrize("name", first(CACHEABLE))
def test_a_reference_kept_beside_the_rows_is_the_model_itself(pair: tuple[Policy, Frozen], name: str):
    items = items_of(fresh(name))
    asked = measure(fresh(name), *pair, items, Layout.SHARED, ALL)
    assert_same(measure(fresh(name), *pair, columns(pair[1], items), Layout.SHARED, ALL), asked)


def test_the_adapter_switched_off_is_a_copy_of_what_is_below_it(build: Build):
    policy, below = lora_policy(build("llama")), packing(build("llama"))
    for name in ("dpo", "uft", "kto", "anchored_sft"):
        references = (Frozen(policy), Frozen(below))
        off, beside = (
            measure(fresh(name), policy, reference, items_of(fresh(name)), Layout.SHARED, ALL)
            for reference in references
        )
        assert_same(off, beside)
