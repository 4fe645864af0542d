from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from uft.data.batch import Layout, TokenSequence, sequence_batch
from uft.model import head as head_module
from uft.model.head import (
    Head,
    Predictions,
    Transform,
    chunk_rows,
    embedding_in_place,
    gpu_rows,
    log_probs_of,
    own_gradient,
    transform_of,
    widens,
)
from uft.model.policy import Policy
from uft.objectives.base import PLAIN as PLAIN_REQUEST

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


def assert_close(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_value_and_gradients_equal_the_plain_path(chunk: int):
    for bias, transform in product((False, True), TRANSFORMS):
        head, (hidden, target_ids) = make(bias, transform), inputs(7)
        assert head.rows == chunk
        weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
        wanted = [hidden, *head.projection.parameters()]
        expected, (found, argmax) = plain(head, hidden, target_ids), head(hidden, target_ids)
        assert argmax is None
        assert_close([found], [expected])
        assert_close(*(torch.autograd.grad((value * weights).sum(), wanted) for value in (found, expected)))


def test_gradients_told_part_by_part_are_those_of_the_whole(chunk: int):
    """The loss is the sum over parts of (sum of log-probs)^2, which separates over parts alone."""
    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    for bias, transform in product((False, True), TRANSFORMS):
        head, (states, target_ids), seen = make(bias, transform), inputs(7), []
        wanted = [states, *head.projection.parameters()]
        log_probs = plain(head, states * 2, target_ids)
        expected = torch.autograd.grad(sum(log_probs[part].sum() ** 2 for part in parts), wanted)

        def loss_grad(part: slice, told: torch.Tensor, argmax: torch.Tensor | None, seen: Any = seen) -> torch.Tensor:
            seen.append((part, told.clone(), argmax))
            return 2 * told.sum().expand(len(told))

        head.chunked_backward(states * 2, target_ids, parts, loss_grad, with_argmax=True)
        assert [part for part, _, _ in seen] == parts
        assert_close([torch.cat([told for _, told, _ in seen])], [log_probs.detach()])
        argmax = head(states * 2, target_ids, with_argmax=True)[1]
        assert argmax is not None
        assert torch.equal(torch.cat([g for _, _, g in seen]), argmax)
        assert_close([tensor.grad for tensor in wanted], expected)


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


def test_gradcheck(chunk: int):
    for transform in TRANSFORMS:
        head, (hidden, target_ids) = make(True, transform), inputs(5)

        def function(*tensors: torch.Tensor, head: Head = head, target_ids: torch.Tensor = target_ids) -> torch.Tensor:
            return head_module._SelectedLogProbs.apply(*tensors, head, target_ids, False)[0]

        assert torch.autograd.gradcheck(function, (hidden, head.projection.weight, head.projection.bias))


def test_argmax_and_a_repeated_backward_pass(chunk: int):
    head, (hidden, target_ids) = make(), inputs(7)
    log_probs, argmax = head(hidden, target_ids, with_argmax=True)
    assert torch.equal(argmax, head.projection(hidden).argmax(-1))
    assert torch.equal(argmax, log_probs_of(head.projection(hidden), target_ids, with_argmax=True)[1])
    first = torch.autograd.grad(log_probs.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(log_probs.sum(), hidden)[0])


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


def test_a_gpus_chunk_goes_by_its_memory():
    """A 32nd of it for 8 bytes a logit: 80 GiB hold 2,616 rows of Llama-3's vocabulary."""
    assert gpu_rows(128_256, 80 * 2**30) == 2560
    assert gpu_rows(128_256, 24 * 2**30) == 1024
    assert gpu_rows(32_000, 80 * 2**30) == 4096
    assert chunk_rows(49_152, torch.device("cpu")) == 341


@pytest.mark.parametrize("bias", [False, True])
def test_products_in_float32_where_a_device_has_them(chunk: int, bias: bool, monkeypatch: pytest.MonkeyPatch):
    """Emulated here: a CPU has none. Logits are then not rounded, nor sums of the weight's gradient."""
    assert not widens(torch.device("cpu"))
    plain_mm, calls = torch.mm, []

    def mm(left, right, *, out_dtype=None, out=None):
        if out_dtype is None:
            return plain_mm(left, right, out=out)
        calls.append("mm")
        assert (left.dtype, right.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16, out_dtype)
        return out.copy_(plain_mm(left.float(), right.float()))

    def addmm(total, left, right, *, out_dtype, out):
        calls.append("addmm")
        assert out is total
        assert total.dtype == out_dtype
        return out.add_(plain_mm(left.float(), right.float()))

    narrow, exact = (make(bias, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        exact.projection.weight.copy_(exact.projection.weight.bfloat16())
    hidden, target_ids = inputs(7, torch.float32)
    hidden = hidden.detach().bfloat16().float()
    expected = exact(hidden, target_ids)[0]
    expected.sum().backward()
    monkeypatch.setattr(head_module, "widens", lambda device: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = narrow(hidden, target_ids)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.sum().backward()
    own = narrow.projection.weight.grad
    torch.testing.assert_close(own, exact.projection.weight.grad, atol=0.02, rtol=0.01)
    first = own.clone()
    parts = [slice(0, 4), slice(4, 7)]
    narrow.chunked_backward(hidden, target_ids, parts, lambda part, log_probs, argmax: torch.ones_like(log_probs))
    torch.testing.assert_close(own, 2 * first, atol=1e-5, rtol=1e-5)
    assert set(calls) == {"mm", "addmm"}


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


def test_divergence_in_chunks_is_that_of_all_logits_in_value_and_gradient(chunk: int):
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for bias, transform in product((False, True), TRANSFORMS):
        ours, theirs = two_predictions(7, transform, bias)
        wanted = [ours.states, *ours.head.projection.parameters()]
        logs = log_softmax(ours), log_softmax(theirs).detach()
        expected = torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(1)
        found = ours.divergence_from(theirs)
        assert found.min() > 0
        assert_close([found], [expected])
        assert_close(*(torch.autograd.grad((value * weights).sum(), wanted) for value in (found, expected)))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_generalised_divergence_in_chunks_is_that_of_all_logits_in_value_and_gradient(chunk: int, beta: float):
    """In float64, against the definition in probabilities; TRL's own function: tests/trl."""
    ours, theirs = two_predictions(7)
    wanted = [ours.states, *ours.head.projection.parameters()]
    p, q = log_softmax(theirs).detach().exp(), log_softmax(ours).exp()
    mixed = beta * p + (1 - beta) * q
    jensen_shannon = (beta * p * (p / mixed).log() + (1 - beta) * q * (q / mixed).log()).sum()
    expected = (q * (q / p).log()).sum() if beta == 1 else jensen_shannon
    found = ours.divergence_from(theirs, beta)
    assert found.min() > 0
    assert_close([found.sum()], [expected])
    assert_close(*(torch.autograd.grad(value, wanted) for value in (found.sum(), expected)))


def test_the_collision_probability_is_that_of_all_logits(chunk: int):
    ours, _ = two_predictions(7)
    assert_close([ours.collision()], [log_softmax(ours).exp().square().sum(1).log()])
    assert not ours.collision().requires_grad
    assert ours.selected(inputs(7)[1])[0].requires_grad


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


# --- gradients of embedding and head, accumulated in place ----------------------------------------------------------

MODELS = ("llama_tied", "gemma2", "gpt2")


def gradients(policy: Policy, sequences: list[TokenSequence]) -> dict[str, torch.Tensor]:
    """Of the sum of all log-probs, over two visits."""
    for _ in range(2):
        batch = sequence_batch(sequences, 0, Layout.PADDED)
        whole = slice(0, batch.target_ids.numel())
        policy.chunked_backward(
            batch, PLAIN_REQUEST, [whole], lambda part, log_probs, argmax: torch.ones_like(log_probs)
        )
    return {name: p.grad for name, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_by_autograd(
    build: Callable[..., Any], sequences: list[TokenSequence], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    ours = gradients(Policy(copy.deepcopy(model)), sequences)
    monkeypatch.setattr(head_module, "own_gradient", lambda weight: None)
    monkeypatch.setattr(head_module, "keeps_its_own", lambda weight: False)
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
