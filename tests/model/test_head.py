from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from uft.model import head as head_module
from uft.model.head import Head, Predictions, Transform, log_probs_of, transform_of

TRANSFORMS = [Transform(), Transform(scale=0.5), Transform(softcap=1.5), Transform(scale=1.7, softcap=2.0)]


PLAIN = Transform()


def make(bias: bool = False, transform: Transform = PLAIN, dtype: torch.dtype = torch.float64) -> Head:
    torch.manual_seed(0)
    projection = nn.Linear(4, 11, bias=bias, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.normal_(projection.weight)
    return Head(projection, transform, dtype)


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 4, dtype=dtype, requires_grad=True), torch.randint(0, 11, (rows,))


def plain(head: Head, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    logits = head.projection(hidden) * head.transform.scale
    if head.transform.softcap:
        logits = head.transform.softcap * torch.tanh(logits / head.transform.softcap)
    return logits.log_softmax(-1).gather(1, target_ids[:, None]).squeeze(1)


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 11 * request.param)
    return request.param


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_equal_the_plain_path(chunk: int, transform: Transform, bias: bool):
    head = make(bias, transform)
    assert head.rows == chunk
    hidden, target_ids = inputs(7)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    wanted = [hidden, *head.projection.parameters()]
    expected = plain(head, hidden, target_ids)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), wanted)
    found, argmax = head(hidden, target_ids)
    gradients = torch.autograd.grad((found * weights).sum(), wanted)
    assert argmax is None
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_told_part_by_part_are_those_of_the_whole(chunk: int, transform: Transform, bias: bool):
    """The loss is the sum over parts of (sum of log-probs)^2, which separates over parts alone."""
    head = make(bias, transform)
    states, target_ids = inputs(7)
    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    wanted = [states, *head.projection.parameters()]
    log_probs = plain(head, states * 2, target_ids)
    expected = torch.autograd.grad(sum(log_probs[part].sum() ** 2 for part in parts), wanted)
    seen = []

    def loss_grad(part: slice, told: torch.Tensor, argmax: torch.Tensor | None) -> torch.Tensor:
        seen.append((part, told.clone(), argmax))
        return 2 * told.sum().expand(len(told))

    head.chunked_backward(states * 2, target_ids, parts, loss_grad, with_argmax=True)
    assert [part for part, _, _ in seen] == parts
    torch.testing.assert_close(torch.cat([told for _, told, _ in seen]), log_probs.detach(), atol=1e-12, rtol=0)
    argmax = head(states * 2, target_ids, with_argmax=True)[1]
    assert argmax is not None
    assert torch.equal(torch.cat([g for _, _, g in seen if g is not None]), argmax)
    for tensor, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-10, rtol=1e-10)


def test_a_visit_leaves_frozen_weights_alone_and_adds_to_what_is_there():
    head = make()
    head.projection.requires_grad_(False)
    states, target_ids = inputs(3)
    states.grad = torch.ones_like(states)
    head.chunked_backward(states, target_ids, [slice(0, 3)], lambda part, told, argmax: torch.zeros_like(told))
    assert head.projection.weight.grad is None
    assert torch.equal(states.grad, torch.ones_like(states))
    head.chunked_backward(states.detach(), target_ids, [slice(0, 3)], lambda part, told, argmax: torch.ones_like(told))


def test_no_logits_are_held_while_the_body_has_its_backward_pass():
    head, (leaf, target_ids), held = make(), inputs(6), []
    others = logits_alive()  # what other tests of this process left

    def look(_: torch.Tensor) -> None:
        held.append([tensor for tensor in logits_alive() if not any(tensor is other for other in others)])

    leaf.register_hook(look)
    head.chunked_backward(leaf * 2, target_ids, [slice(0, 6)], lambda part, told, argmax: torch.ones_like(told))
    assert held == [[]]


def logits_alive() -> list[torch.Tensor]:
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.ndim == 2 and t.shape[1] == 11]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(chunk: int, transform: Transform):
    head = make(True, transform)
    hidden, target_ids = inputs(5)

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        arguments = (target_ids, transform, torch.float64, head.rows, False)
        return head_module._SelectedLogProbs.apply(hidden, weight, bias, *arguments)[0]

    assert torch.autograd.gradcheck(function, (hidden, head.projection.weight, head.projection.bias))


def test_a_frozen_head_still_passes_the_gradient_on(chunk: int):
    head = make()
    head.projection.requires_grad_(False)
    hidden, target_ids = inputs(7)
    expected = torch.autograd.grad(plain(head, hidden, target_ids).sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(head(hidden, target_ids)[0].sum(), hidden)[0], expected)


def test_backward_can_be_repeated(chunk: int):
    head = make()
    hidden, target_ids = inputs(7)
    log_probs, _ = head(hidden, target_ids)
    first = torch.autograd.grad(log_probs.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(log_probs.sum(), hidden)[0])


def test_guesses_are_the_argmax(chunk: int):
    head = make()
    hidden, target_ids = inputs(7)
    _, argmax = head(hidden, target_ids, with_argmax=True)
    assert torch.equal(argmax, head.projection(hidden).argmax(-1))
    assert torch.equal(argmax, log_probs_of(head.projection(hidden), target_ids, with_argmax=True)[1])


def test_no_rows_give_no_values_and_zero_gradients(chunk: int):
    head = make()
    hidden, target_ids = inputs(0)
    log_probs, _ = head(hidden, target_ids)
    log_probs.sum().backward()
    assert log_probs.shape == (0,)
    assert not head.projection.weight.grad.any()


def test_log_probs_and_weight_gradients_are_float32_under_bfloat16(chunk: int):
    head = make(dtype=torch.bfloat16)
    hidden, target_ids = inputs(7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, _ = head(hidden, target_ids)
    log_probs.sum().backward()
    assert log_probs.dtype == head.projection.weight.grad.dtype == torch.float32
    expected = plain(make(dtype=torch.float32), hidden.detach(), target_ids)
    torch.testing.assert_close(log_probs, expected, atol=0.05, rtol=0)


def test_transforms_are_read_from_configurations():
    from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    assert transform_of(LlamaConfig()) == Transform()
    assert transform_of(CohereConfig(logit_scale=0.25)) == Transform(scale=0.25)
    assert transform_of(GraniteConfig(logits_scaling=4.0)) == Transform(scale=0.25)
    assert transform_of(Gemma2Config(final_logit_softcapping=30.0)) == Transform(softcap=30.0)


# --- divergence ------------------------------------------------------------------------------------------------------


def two_predictions(rows: int, transform: Transform = PLAIN, bias: bool = False) -> tuple[Predictions, Predictions]:
    """Ours, whose states and head want gradients, and those of another model of the same vocabulary."""
    ours, theirs = make(bias, transform), make(bias, transform)
    with torch.no_grad():
        for parameter in theirs.projection.parameters():
            parameter.mul_(-0.5)
    hidden, _ = inputs(rows)
    return Predictions(hidden, ours), Predictions(hidden.detach() * 2 + 1, theirs)


def log_softmax(predictions: Predictions) -> torch.Tensor:
    """All logits at once, without a chunk."""
    head = predictions.head
    assert head is not None
    every = [torch.full(predictions.states.shape[:1], token) for token in range(head.vocabulary)]
    return torch.stack([plain(head, predictions.states, target_ids) for target_ids in every], 1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_divergence_in_chunks_is_that_of_all_logits_in_value_and_gradient(chunk: int, transform: Transform, bias: bool):
    ours, theirs = two_predictions(7, transform, bias)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    wanted = [ours.states, *ours.head.projection.parameters()]
    expected = torch.nn.functional.kl_div(
        log_softmax(ours), log_softmax(theirs).detach(), log_target=True, reduction="none"
    )
    expected_gradients = torch.autograd.grad((expected.sum(1) * weights).sum(), wanted)
    found = ours.divergence_from(theirs)
    torch.testing.assert_close(found, expected.sum(1), atol=1e-12, rtol=0)
    assert found.min() > 0
    for gradient, other in zip(torch.autograd.grad((found * weights).sum(), wanted), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


def test_divergence_sends_no_gradient_to_the_other_side(chunk: int):
    ours, theirs = two_predictions(7)
    theirs = Predictions(theirs.states.requires_grad_(), theirs.head)
    ours.divergence_from(theirs).sum().backward()
    assert ours.states.grad.abs().sum() > 0
    assert theirs.states.grad is None
    assert theirs.head.projection.weight.grad is None


def test_divergence_from_oneself_is_zero_and_so_is_its_gradient(chunk: int):
    ours, _ = two_predictions(7)
    found = ours.divergence_from(ours)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-14, rtol=0)
    found.sum().backward()
    torch.testing.assert_close(ours.states.grad, torch.zeros_like(ours.states), atol=1e-14, rtol=0)


def test_divergence_of_logits_that_are_all_there(chunk: int):
    """Where the head is no plain matrix, states are the logits themselves."""
    ours, theirs = two_predictions(7)
    whole = [Predictions(side.head.projection(side.states), None) for side in (ours, theirs)]
    torch.testing.assert_close(whole[0].divergence_from(whole[1]), ours.divergence_from(theirs))
    torch.testing.assert_close(whole[0].divergence_from(theirs), ours.divergence_from(theirs))


def test_divergence_of_no_rows(chunk: int):
    ours, theirs = two_predictions(0)
    found = ours.divergence_from(theirs)
    assert found.shape == (0,)
    found.sum().backward()


def test_divergence_is_float32_under_bfloat16_and_finite_at_the_extremes(chunk: int):
    ours, theirs = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    hidden, _ = inputs(7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Predictions(hidden, ours).divergence_from(Predictions(hidden.detach() * 3e4, theirs))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert ours.projection.weight.grad.dtype == torch.float32
