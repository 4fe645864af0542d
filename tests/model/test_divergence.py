"""KL(reference || policy) over the whole vocabulary, against transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from uft.config.schema import Lora
from uft.data.batch import Batch
from uft.model.policy import Policy, add_lora
from uft.model.reference import FromColumn, Frozen
from uft.objectives.base import ForwardRequest

Build = Callable[..., Any]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def lora_policy(build: Build, **lora: Any) -> Policy:
    """A policy whose adapter is away from its start."""
    policy = Policy(add_lora(build("llama"), Lora(rank=2, **lora), init_seed=0, float32=True))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.2)
    return policy


def log_softmax(model: Any, batch: Batch) -> torch.Tensor:
    """(N, V) of the positions that predict a target."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()
    return logits.flatten(0, 1)[batch.predictor].log_softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_divergence_is_over_the_whole_vocabulary_of_plain_transformers(build: Build, batch: Batch, name: str):
    model, other = build(name), build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    policy = Policy(model)
    with torch.no_grad():
        theirs = log_softmax(other, batch)
    expected = (theirs.exp() * (theirs - log_softmax(model, batch))).sum(1)
    expected.sum().backward()
    expected_gradients = gradients(policy)
    model.zero_grad()
    scores = policy(batch, ForwardRequest(anchor=Frozen(Policy(other))))
    scores.divergence.sum().backward()
    torch.testing.assert_close(scores.divergence, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.log_probs, policy(batch).log_probs)
    assert policy(batch).divergence is None
    assert gradients(policy).keys() == expected_gradients.keys()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)
    assert [n for n, p in other.named_parameters() if p.grad is not None] == []


def test_divergence_from_the_own_weights_without_the_adapter(build: Build, batch: Batch):
    """The reference is the policy with its adapter off; its mode stays as it was."""
    policy = lora_policy(build)
    with torch.no_grad():
        theirs, ours = log_softmax(build("llama"), batch), log_softmax(policy.module, batch)
    expected = (theirs.exp() * (theirs - ours)).sum(1)
    policy.train()
    found = policy(batch, ForwardRequest(anchor=Frozen(policy))).divergence
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.min() > 0
    found.sum().backward()
    assert policy.module.training
    assert gradients(policy).keys() == policy.trainable().keys()
    with policy.module.disable_adapter():
        nothing = policy(batch, ForwardRequest(anchor=Frozen(policy))).divergence
    assert float(nothing.detach().abs().max()) < 1e-6


def test_divergence_where_an_adapter_sits_on_the_head(build: Build, batch: Batch):
    policy = lora_policy(build, targets=["lm_head"])
    policy.check_head()
    with torch.no_grad():
        theirs, ours = log_softmax(build("llama"), batch), log_softmax(policy.module, batch)
    found = policy(batch, ForwardRequest(anchor=Frozen(policy))).divergence
    torch.testing.assert_close(found, (theirs.exp() * (theirs - ours)).sum(1), atol=1e-5, rtol=1e-5)


def test_a_cache_of_log_probs_cannot_tell_a_divergence(build: Build, batch: Batch):
    with pytest.raises(AssertionError, match="log-probs of the targets alone"):
        Policy(build("llama"))(batch, ForwardRequest(anchor=FromColumn()))
