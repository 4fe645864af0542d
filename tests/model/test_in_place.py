"""Gradients of the embedding and the head, added where they are kept: the same numbers as autograd's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from uft.data.batch import Layout, TokenSequence, sequence_batch
from uft.model import head
from uft.model.head import embedding_in_place, own_gradient
from uft.model.policy import Policy
from uft.objectives.base import PLAIN, ForwardRequest

MODELS = ("llama", "llama_tied", "gemma2", "gpt2")


def gradients(
    policy: Policy, sequences: list[TokenSequence], request: ForwardRequest = PLAIN
) -> dict[str, torch.Tensor]:
    """Of the sum of all log-probs, over two visits."""
    for _ in range(2):
        batch = sequence_batch(sequences, 0, Layout.PADDED)
        whole = slice(0, batch.target_ids.numel())
        policy.chunked_backward(batch, request, [whole], lambda part, log_probs, argmax: torch.ones_like(log_probs))
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_by_autograd(
    build: Callable[..., Any], sequences: list[TokenSequence], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    ours = gradients(Policy(copy.deepcopy(model)), sequences)
    monkeypatch.setattr(head, "own_gradient", lambda weight: None)
    monkeypatch.setattr(head, "keeps_its_own", lambda weight: False)
    theirs = gradients(Policy(model), sequences)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[parameter], rtol=1e-5, atol=1e-5)


def test_rows_that_were_not_looked_up_are_not_touched_and_padding_learns_nothing() -> None:
    table = nn.Embedding(9, 3, padding_idx=2)
    expected = copy.deepcopy(table)
    ids, incoming = torch.tensor([[1, 2, 5, 5]]), torch.randn(1, 4, 3)
    expected(ids).backward(incoming)
    table.weight.grad = (before := torch.randn(9, 3)).clone()
    with embedding_in_place(table):
        table(ids).backward(incoming)
    torch.testing.assert_close(table.weight.grad - before, expected.weight.grad)
    assert torch.equal(table.weight.grad[[0, 2, 3, 4, 6, 7, 8]], before[[0, 2, 3, 4, 6, 7, 8]])
    assert "forward" not in vars(table)


def test_an_embedding_that_nothing_flows_into_has_no_gradient() -> None:
    """Not one of zeros: an optimiser would take it for a reason to decay the weight."""
    table = nn.Embedding(9, 3)
    with embedding_in_place(table), torch.no_grad():
        table(torch.tensor([1, 2]))
    assert table.weight.grad is None


def test_what_is_more_than_a_table_stays_as_it_is() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(ids)

    frozen = nn.Embedding(9, 3).requires_grad_(False)
    for module in (Scaled(9, 3), nn.Embedding(9, 3, max_norm=1.0), nn.Embedding(9, 3, sparse=True), frozen):
        with embedding_in_place(module):
            assert "forward" not in vars(module)


def test_who_must_be_told_of_a_gradient_is_told() -> None:
    weight = nn.Parameter(torch.zeros(3))
    assert own_gradient(weight) is weight.grad is not None
    assert own_gradient(weight * 1) is None
    told: list[torch.Tensor] = []
    weight.register_post_accumulate_grad_hook(told.append)
    assert own_gradient(weight) is None
