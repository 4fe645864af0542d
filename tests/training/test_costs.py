"""What a step costs, counted in tokens that go through the model and in rows that meet its output head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from uft.data.batch import Example, Layout
from uft.data.chat import Tokens
from uft.data.loader import Collator
from uft.model import head
from uft.objectives.base import StepContext
from uft.training.setup import Prepared
from uft.training.step import forward_backward

PACKED = ("train.packing=packed", "reference.mode=cached")
ONE_BATCH = 100_000


@dataclass
class Cost:
    """Of the policy, in one step."""

    learned: int = 0  # tokens through the body with gradients
    looked: int = 0  # without
    rows: int = 0  # hidden states that met the output head


def cost(
    prepared: Prepared, items: Sequence[Example], monkeypatch: pytest.MonkeyPatch, budget: int = ONE_BATCH
) -> Cost:
    trainer, found = prepared.trainer, Cost()
    body, logits = trainer.policy.body, head._logits

    def counted(*args: torch.Tensor, **kwargs: torch.Tensor) -> None:
        fed = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        assert fed is not None
        size = fed.shape[0] * fed.shape[1]
        found.learned += size * torch.is_grad_enabled()
        found.looked += size * (not torch.is_grad_enabled())

    def noted(hidden: torch.Tensor, *rest: object, **keywords: object) -> torch.Tensor:
        found.rows += len(hidden)
        return logits(hidden, *rest, **keywords)

    handle = body.register_forward_pre_hook(lambda _, args, kwargs: counted(*args, **kwargs), with_kwargs=True)
    with monkeypatch.context() as patched:
        patched.setattr(head, "_logits", noted)
        batches = Collator(budget, trainer.pad_id, Layout.SHARED)(items).batches
        forward_backward(trainer.objective, batches, trainer.policy, trainer.reference, StepContext(step=3, steps=10))
    handle.remove()
    return found


def targets(items: Sequence[Example]) -> int:
    return sum(one.targets for item in items for one in item.encoded)


def longer(encoded: Tokens, by: int) -> Tokens:
    """With `by` more tokens to learn."""
    ids = np.concatenate([encoded.ids, np.full(by, 7, encoded.ids.dtype)])
    return Tokens(ids, np.concatenate([encoded.supervised, np.ones(by, bool)]), encoded.prompt_length)


@pytest.mark.parametrize("budget", [ONE_BATCH, 64])
def test_the_longest_row_twice_as_long_costs_its_own_tokens_only(
    build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    prepared = build("sft", *PACKED)
    items = prepared.trainer.sampler.take(8)
    before = cost(prepared, items, monkeypatch, budget)
    longest = max(items, key=lambda item: item.length)
    (encoded,) = longest.encoded[:1]
    doubled = replace(longest, encoded=(longer(encoded, encoded.length), *longest.encoded[1:]))
    after = cost(prepared, [doubled if item is longest else item for item in items], monkeypatch, budget)
    assert after.learned - before.learned == encoded.length
    assert after.rows - before.rows == encoded.length
    assert before.rows == targets(items)


@pytest.mark.parametrize("negatives", [1, 2, 3])
def test_negatives_cost_their_completions_and_no_prompt(
    build: Callable[..., Prepared], files: dict[str, object], monkeypatch: pytest.MonkeyPatch, negatives: int
) -> None:
    rows = {"negatives": files["negatives"]}
    settings = (*PACKED, f"objective.negatives={negatives}", "train.batch_size=4")
    prepared = build("dft", *settings, sources=rows)
    items = prepared.trainer.sampler.take(4)
    assert all(len(item.encoded) == 1 + negatives for item in items)
    prompts = sum(item.encoded[0].prompt_length for item in items)
    completions = sum(one.length - one.prompt_length - 1 for item in items for one in item.encoded)
    found = cost(prepared, items, monkeypatch)
    assert found.learned == prompts + completions
    assert found.looked == 0, "the reference was computed before"
    assert found.rows == targets(items)


def test_a_pair_costs_its_prompt_once(build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = build("dpo", *PACKED)
    items = prepared.trainer.sampler.take(8)
    prompts = sum(item.encoded[0].prompt_length for item in items)
    completions = sum(one.length - one.prompt_length - 1 for item in items for one in item.encoded)
    assert cost(prepared, items, monkeypatch).learned == prompts + completions


def test_ift_looks_once_more_and_uft_never(build: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same demonstrations, in passes of SFT: a forward without gradients beside it; nothing."""
    costs = {}
    for objective in ("sft", "ift", "uft"):
        prepared = build(objective, *PACKED[:1], *(PACKED[1:] if objective == "uft" else ()), run=objective)
        sampler = prepared.trainer.sampler
        items = [item for item in sampler.take(16) if item.row.source == "demonstration"]
        assert len(items) > 1
        costs[objective] = cost(prepared, items, monkeypatch)
    assert costs["uft"] == costs["sft"]
    assert costs["ift"].learned == costs["ift"].looked == costs["sft"].learned
    assert costs["ift"].rows == 2 * costs["sft"].rows
    assert costs["sft"].looked == 0
