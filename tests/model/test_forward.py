from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from uft.config.schema import Lora
from uft.data.batch import Batch, Layout, sequence_batch
from uft.errors import UftError
from uft.model import passes
from uft.model.passes import EmbeddingNoise, offloading
from uft.model.policy import Policy, add_lora
from uft.model.reference import FromColumn, Frozen
from uft.objectives.base import ForwardRequest

ALL = ["llama", "llama_tied", "mistral", "qwen2", "phi3", "gemma2", "gemma3", "cohere", "granite", "gpt2"]
Build = Callable[..., Any]


def plain_log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """What transformers alone says, from full logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().log_softmax(-1)
    return logits.flatten(0, 1)[batch.predictor].gather(1, batch.target_ids[:, None]).squeeze(1)


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


def lora_policy(build: Build, name: str = "llama", **lora: Any) -> Policy:
    """A policy whose adapter is away from its start."""
    policy = Policy(add_lora(build(name), Lora(rank=2, **lora), init_seed=0, float32=True))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.2)
    return policy


@pytest.mark.parametrize("name", ALL)
def test_log_probs_and_gradients_are_those_of_plain_transformers(build: Build, batch: Batch, name: str):
    model = build(name)
    policy = Policy(model)
    weights = torch.linspace(0.5, 2, batch.target_ids.numel())
    expected = plain_log_probs(model, batch)
    (expected * weights).sum().backward()
    expected_gradients = gradients(policy)
    model.zero_grad()
    assert policy.check_head(batch) < 1e-5
    assert policy.head is not None
    found = policy(batch).log_probs
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    assert gradients(policy).keys() == expected_gradients.keys()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)


def test_noise_on_the_embeddings_is_neftunes(build: Build, batch: Batch, sequences: Any):
    """Uniform on [-s, s] with s = alpha / sqrt(L H), in training alone; a function of its key and the pass."""
    for one in (batch, *(sequence_batch(sequences, 0, layout) for layout in (Layout.PACKED, Layout.SHARED))):
        embedded = torch.zeros(*one.input_ids.shape, 4096)
        first, second = (EmbeddingNoise(5.0, (1, 2)) for _ in range(2))
        noise = first.like(embedded, one)
        assert torch.equal(noise, second.like(embedded, one))
        assert not torch.equal(noise, first.like(embedded, one)), "of another pass"
        bound = 5 / (one.company * 4096).sqrt()
        torch.testing.assert_close(noise.abs().amax(-1), bound, rtol=0.01, atol=0)
        torch.testing.assert_close(noise.std(-1), bound / 3**0.5, rtol=0.1, atol=0)
    assert batch.company[:, 0].tolist() == batch.attention_mask.sum(1).tolist()
    policy = Policy(build("llama")).train()
    before = policy(batch).log_probs
    policy.noise = EmbeddingNoise(5.0, (0,))
    assert not torch.allclose(policy(batch).log_probs, before, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(policy(batch).log_probs, before)
    assert torch.equal(policy.eval()(batch).log_probs, before)


def test_activations_that_wait_elsewhere_change_no_gradient(
    build: Build, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    """They are copied, and weights are not."""
    monkeypatch.setattr(passes, "SMALL_TENSOR", 64)
    found = []
    for offloads in (False, True):
        policy = Policy(build("llama_tied"))
        policy.offloads = offloads
        policy(batch).log_probs.sum().backward()
        found.append(gradients(policy))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    weight, other = nn.Parameter(torch.ones(8, 16)), torch.ones(8, 16, requires_grad=True)
    with offloading(nn.ParameterList([weight])):
        product = weight * other
    saved = {name: getattr(product.grad_fn, name) for name in ("_saved_self", "_saved_other")}
    assert saved["_saved_self"].data_ptr() == weight.data_ptr()
    assert saved["_saved_other"].data_ptr() != other.data_ptr()


def test_a_head_that_disagrees_is_replaced_by_the_models_own_and_reported(
    build: Build, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    model = build("llama")
    forward = type(model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2  # an undeclared transform
        return out

    monkeypatch.setattr(type(model), "forward", doubled)
    policy = Policy(model)
    assert policy.check_head() > 0.1
    assert "the model's own" in policy.describe()[-1]
    torch.testing.assert_close(policy(batch).log_probs, plain_log_probs(model, batch), atol=1e-5, rtol=0)
    assert policy(batch, ForwardRequest(argmax=True)).argmax.shape == batch.target_ids.shape


def test_an_adapter_on_the_head_takes_the_models_own_path(build: Build, batch: Batch):
    policy = lora_policy(build, targets=["lm_head"])
    policy.check_head()
    assert any("the model's own" in line for line in policy.describe())
    torch.testing.assert_close(policy(batch).log_probs, plain_log_probs(policy.module, batch), atol=1e-5, rtol=0)


def test_guesses_are_the_most_likely_tokens_in_the_targets_places(build: Build, batch: Batch):
    model = build("gemma2")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = logits.flatten(0, 1)[batch.predictor].argmax(-1)
    policy = Policy(model)
    assert torch.equal(policy(batch, ForwardRequest(argmax=True)).argmax, expected)
    assert policy(batch).argmax is None


class Inputs:
    """Records what reaches the body."""

    def __init__(self, policy: Policy) -> None:
        self.seen: list[dict[str, Any]] = []
        policy.body.register_forward_pre_hook(lambda _, __, given: self.seen.append(given), with_kwargs=True)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_embeddings_are_mixed_in_the_targets_places_alone(build: Build, batch: Batch, name: str):
    policy = Policy(build(name))
    inputs = Inputs(policy)
    replace = (batch.target_ids + 5) % 61
    policy(batch, ForwardRequest(replace=replace, mix=0.3))
    found = inputs.seen[0]["inputs_embeds"].flatten(0, 1)
    embed = policy.base.get_input_embeddings()
    original = embed(batch.input_ids).flatten(0, 1)
    mixed = 0.7 * embed(batch.target_ids) + 0.3 * embed(replace)
    torch.testing.assert_close(found[batch.place], mixed)
    elsewhere = torch.ones(len(found), dtype=torch.bool)
    elsewhere[batch.place] = False
    assert torch.equal(found[elsewhere], original[elsewhere])


def test_mixing_changes_what_follows_from_nothing_to_the_other_token(build: Build, batch: Batch):
    policy = Policy(build("gemma3"))
    replace = (batch.target_ids + 5) % 61
    ids = batch.input_ids.flatten().index_copy(0, batch.place, replace).view_as(batch.input_ids)
    expected = policy(Batch(**{**vars(batch), "input_ids": ids})).log_probs
    none, half, full = (policy(batch, ForwardRequest(replace=replace, mix=mix)).log_probs for mix in (0.0, 0.5, 1.0))
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=0)
    plain = policy(batch).log_probs
    assert not torch.allclose(half, plain)
    assert torch.equal(none, plain)
    assert torch.equal(policy(batch, ForwardRequest(embed_grad=False)).log_probs, plain)


def test_embed_grad_false_reaches_the_table_only_through_a_tied_head(build: Build, batch: Batch):
    for name, mix in product(("llama", "llama_tied"), (0.0, 0.5)):
        policy = Policy(build(name))
        policy(batch, ForwardRequest(replace=batch.target_ids, mix=mix, embed_grad=False)).log_probs.sum().backward()
        table = policy.base.get_input_embeddings().weight.grad
        assert (table is not None) == (name == "llama_tied")
        assert policy.base.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_embed_grad_true_trains_both_embeddings_of_a_mixture(build: Build, batch: Batch):
    policy = Policy(build("llama"))
    replace = torch.full_like(batch.target_ids, 60)
    policy(batch, ForwardRequest(replace=replace, mix=0.5)).log_probs.sum().backward()
    table = policy.base.get_input_embeddings().weight.grad
    assert table[60].abs().sum() > 0
    assert table[batch.input_ids[0, 0]].abs().sum() > 0


def test_without_its_adapter_a_policy_is_the_base_model_and_its_gradients_survive(build: Build, batch: Batch):
    policy = lora_policy(build)
    base = plain_log_probs(build("llama"), batch)
    policy.train()
    policy(batch).log_probs.sum().backward()
    expected = gradients(policy)
    policy.module.zero_grad()
    adapted = policy(batch).log_probs
    reference = Frozen(policy)(batch).log_probs  # between the forward and the backward pass, as objectives do
    adapted.sum().backward()
    torch.testing.assert_close(reference, base, atol=1e-6, rtol=0)
    assert not torch.allclose(adapted, base)
    assert not reference.requires_grad
    assert policy.module.training
    assert gradients(policy).keys() == expected.keys() == policy.trainable().keys()
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, expected[name])


def test_dropout_is_active_in_training_only(build: Build, batch: Batch):
    policy = Policy(build("gpt2", resid_pdrop=0.5))
    policy.eval()
    assert torch.equal(policy(batch).log_probs, policy(batch).log_probs)
    policy.train()
    assert not torch.equal(policy(batch).log_probs, policy(batch).log_probs)
    assert torch.equal(Frozen(policy)(batch).log_probs, policy.eval()(batch).log_probs)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights_and_log_probs(build: Build, batch: Batch):
    model = build("llama_tied")
    policy = Policy(model, "bfloat16")
    policy.check_head()
    assert policy.head is not None
    found = policy(batch).log_probs
    found.sum().backward()
    expected = plain_log_probs(model, batch)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.05)
    assert {p.grad.dtype for p in policy.trainable().values()} == {torch.float32}


@pytest.mark.parametrize("adapter", [True, False])
def test_trained_weights_survive_saving_and_loading(build: Build, batch: Batch, adapter: bool):
    policy = lora_policy(build) if adapter else Policy(build("llama_tied"))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    saved = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
    fresh = Policy(add_lora(build("llama"), Lora(rank=2), 9, float32=True)) if adapter else Policy(build("llama_tied"))
    fresh.load_trainable(saved)
    assert torch.equal(fresh(batch).log_probs, policy(batch).log_probs)


def test_loading_other_weights_names_all_that_is_wrong(build: Build):
    policy = Policy(build("llama"))
    saved = {name: parameter.detach() for name, parameter in policy.trainable().items()}
    saved["lm_head.weight"] = torch.zeros(2, 2)
    saved["extra"] = saved.pop("model.norm.weight")
    with pytest.raises(UftError) as raised:
        policy.load_trainable(saved)
    assert {problem.what for problem in raised.value.problems} == {"lm_head.weight", "extra", "model.norm.weight"}


def test_description_says_what_is_trained_and_how(build: Build):
    text = "\n".join(lora_policy(build).describe())
    assert "LlamaForCausalLM" in text
    assert "trained (" in text
    assert "attention sdpa" in text
    assert "supervised positions only" in text
    assert "all trained" in Policy(build("llama")).describe()[0]


# --- KL(reference || policy) over the whole vocabulary


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
