"""`flex_attention` over packed rows: who sees whom, the loop's values and gradients, one compilation for all lengths.

torch refuses gradients on a CPU, where its compiled kernel has none. What it falls back to without compilation has
them: the refusal is taken away here, and the same mathematics is looked at. No kernel of a GPU is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from uft.data.batch import Layout, Span, sequence_batch
from uft.model import attention
from uft.model.attention import loop
from uft.model.layout import settle_layout, trial_sequences
from uft.model.policy import Policy

Tensor = torch.Tensor
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LAYOUTS = {
    "one span": (Span(7, 0, 0),),
    "one token": (Span(1, 0, 0),),
    "prompts of several lengths": (
        Span(5, 0, 0),
        Span(3, 0, 4),
        Span(1, 0, 4),
        Span(6, 3, 0),
        Span(1, 4, 0),
        Span(2, 3, 1),
    ),
    "several blocks": (Span(190, 0, 0), Span(150, 0, 140), Span(1, 0, 140), Span(40, 3, 0), Span(130, 3, 39)),
}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *given: None)


def tensors(spans: tuple[Span, ...], heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = sum(span.length for span in spans)
    shapes = [(1, length, count, 16) for count in (heads[0], heads[1], heads[1])]
    made = [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def assert_as_the_loop(spans: tuple[Span, ...], heads: tuple[int, int], dtype: torch.dtype, scaling: float | None):
    q, k, v = tensors(spans, heads, dtype)
    found, expected = (kernel(q, k, v, spans, 0.0, scaling) for kernel in (attention.flex, loop))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    near = {"atol": 2e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(found, expected, **near)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **near)


# --- who sees whom


def test_the_mask_is_what_one_would_write_down():
    """A prompt of three tokens, two completions that see two of them, and a row of its own."""
    spans = (Span(3, 0, 0), Span(2, 0, 2), Span(1, 0, 2), Span(2, 3, 0))
    by_hand = ["x.......", "xx......", "xxx.....", "xx.x....", "xx.xx...", "xx...x..", "......x.", "......xx"]
    at = torch.arange(8)
    mask = attention.block_mask_of(spans, CPU).mask_mod(0, 0, at[:, None], at[None])
    assert ["".join(".x"[seen] for seen in row) for row in mask.tolist()] == by_hand


@st.composite
def packs(draw: Any) -> tuple[Span, ...]:
    """Rows as packing makes them, some as long as several blocks."""
    spans: list[Span] = []
    for completions in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        prompt, length = len(spans), draw(st.integers(1, 300))
        spans.append(Span(length, prompt, 0))
        if prefix := draw(st.integers(0, length)):
            spans += [Span(draw(st.integers(1, 150)), prompt, prefix) for _ in range(completions)]
    return tuple(spans)


@given(spans=packs())
@settings(max_examples=40, deadline=None)
def test_masks_and_blocks_are_those_of_the_dense_mask(visible: Any, spans: tuple[Span, ...]):
    dense, ours = visible(spans), attention.block_mask_of(spans, CPU)
    tokens = len(dense)
    at = torch.arange(tokens)
    assert torch.equal(ours.mask_mod(0, 0, at[:, None], at[None]), dense)
    theirs = create_block_mask(lambda b, h, q, k: dense[q, k], 1, 1, tokens, tokens, device="cpu")
    assert ours.shape == theirs.shape
    blocks = theirs.kv_num_blocks.shape[-1]
    for kind in ("kv_num_blocks", "q_num_blocks", "full_kv_num_blocks", "full_q_num_blocks"):
        count, expected = getattr(ours, kind)[0, 0], getattr(theirs, kind)[0, 0]
        assert torch.equal(count[:blocks], expected)
        assert not count[blocks:].any()
        which = kind.replace("num_blocks", "indices")
        for row, many in enumerate(expected.tolist()):
            listed = [getattr(mask, which)[0, 0, row, :many].sort().values for mask in (ours, theirs)]
            assert torch.equal(*listed)


def test_a_mask_is_made_once_for_all_layers():
    spans = LAYOUTS["several blocks"]
    assert attention.block_mask_of(spans, CPU) is attention.block_mask_of(tuple(spans), CPU)


# --- what it says


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
def test_it_says_what_the_loop_says_in_every_layout(spans: tuple[Span, ...]):
    assert_as_the_loop(spans, (4, 2), torch.float64, None)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("heads", "scaling"), [((2, 2), 0.7), ((6, 2), 0.3), ((4, 1), None)])
def test_with_any_heads_and_scaling(heads: tuple[int, int], scaling: float | None, dtype: torch.dtype):
    assert_as_the_loop(LAYOUTS["prompts of several lengths"], heads, dtype, scaling)


def test_torch_still_refuses_gradients_on_a_cpu():
    """When it does not, the fixture can go."""
    spans = LAYOUTS["one span"]
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        attention.flex(*tensors(spans, (2, 2), torch.float32), spans, 0.0, None)


def test_it_has_no_dropout():
    spans = LAYOUTS["one span"]
    with pytest.raises(AssertionError):
        attention.flex(*tensors(spans, (2, 2), torch.float32), spans, 0.1, None)


@pytest.mark.usefixtures("gradients")
def test_a_model_says_and_learns_the_same(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    policy = Policy(build("llama"))
    settle_layout(policy, "packed", 30)
    batch = sequence_batch(trial_sequences(policy.embedding_rows), pad_id=0, layout=Layout.SHARED)
    found = {}
    for name in ("loop", "flex"):
        monkeypatch.setattr(attention, "choose_kernel", lambda *given, name=name: name)
        policy.module.zero_grad(set_to_none=True)
        log_probs = policy(batch).log_probs
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
        found[name] = log_probs.detach(), {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
    torch.testing.assert_close(found["flex"][0], found["loop"][0], atol=1e-5, rtol=1e-5)
    assert found["flex"][1].keys() == found["loop"][1].keys()
    for name, gradient in found["loop"][1].items():
        torch.testing.assert_close(found["flex"][1][name], gradient, atol=1e-4, rtol=1e-4)


def test_a_model_in_mixed_precision_is_let_through(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    """Queries and keys come in float32, values in bfloat16."""
    monkeypatch.setattr(attention, "choose_kernel", lambda *given: "flex")
    policy = Policy(build("llama"), "bfloat16")
    with torch.no_grad():
        settle_layout(policy, "packed", 30)
    assert policy.layout is Layout.SHARED


# --- what is compiled


@pytest.mark.slow
@pytest.mark.usefixtures("gradients")
def test_after_the_trial_nothing_is_compiled_for_other_lengths(monkeypatch: pytest.MonkeyPatch):
    """One kernel with gradients and one without; 3 blocks and 3 heads, 16 tokens and a width of 16 are no exception."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(attention, "attention_on", lambda kind: attention.compiled("aot_eager"))
    attention.flex_works.cache_clear()
    assert attention.flex_works(CPU, torch.float32, (6, 3), (16, 16), 0.3)
    assert counters["stats"]["unique_graphs"] == 2
    for length in (16, 129, 300):
        spans = (Span(length - 2, 0, 0), Span(2, 0, length - 3))
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                made = [torch.randn(1, length, heads, 16, requires_grad=gradients) for heads in (6, 3, 3)]
                q, k, v = (tensor.transpose(1, 2) for tensor in made)
                q, k = q * 1.5, k * 1.5  # as after a rotation; values are a view of what a projection made
                found, expected = (kernel(q, k, v, spans, 0.0, 0.3) for kernel in (attention.flex, loop))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
