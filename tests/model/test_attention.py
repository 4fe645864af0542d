"""Attention over packed rows: kernels against one dense mask; the plain implementation where nothing is packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from uft.data.batch import Span
from uft.model import attention
from uft.model.attention import CannotPack, Varlen, at_once, attend_spans, register
from uft.model.layout import settle_layout
from uft.model.policy import Policy

Tensor = torch.Tensor
SPANS = (Span(5, 0, 0), Span(3, 0, 4), Span(1, 0, 4), Span(6, 3, 0), Span(1, 4, 0), Span(2, 3, 1))


def tensors(heads: int, key_heads: int, length: int = 18) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, length, 8), (1, key_heads, length, 8), (1, key_heads, length, 8))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, dropout: float, scaling: float | None) -> Tensor:
    """What FlashAttention computes of variable lengths, as its documentation says: causal from the lower right."""
    out = []
    queries, keys = layout.query_ends.tolist(), layout.key_ends.tolist()
    for n in range(len(queries) - 1):
        ends = (queries[n : n + 2], keys[n : n + 2], keys[n : n + 2])
        one = [tensor[a:b].transpose(0, 1) for tensor, (a, b) in zip((q, k, v), ends, strict=True)]
        rows, columns = one[0].shape[1], one[1].shape[1]
        assert rows <= layout.longest_query
        assert columns <= layout.longest_key
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out.append(scaled_dot_product_attention(*one, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("name", ["loop", "varlen"])
def test_kernels_attend_to_what_the_spans_say(
    monkeypatch: pytest.MonkeyPatch, visible: Any, name: str, scaling: float | None, heads: tuple[int, int]
):
    monkeypatch.setitem(attention.KERNELS, "varlen", at_once(plain_varlen))
    monkeypatch.setattr(attention, "choose_kernel", lambda *given: name)
    q, k, v = tensors(*heads)
    weights = torch.randn(1, 18, heads[0], 8, generator=torch.Generator().manual_seed(1))
    found = attend_spans(q, k, v, SPANS, scaling=scaling, is_causal=True, sliding_window=None)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=visible(SPANS), scale=scaling, enable_gqa=True)
    expected = torch.autograd.grad((dense.transpose(1, 2) * weights).sum(), (q, k, v))
    torch.testing.assert_close(found, dense.transpose(1, 2), atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_dropout_reaches_the_kernel():
    q, k, v = tensors(2, 2)
    torch.manual_seed(0)
    assert not torch.equal(attend_spans(q, k, v, SPANS, dropout=0.5), attend_spans(q, k, v, SPANS))


@pytest.mark.parametrize("asked", ["softcap", "position_bias", "s_aux"])
def test_what_no_kernel_does_is_refused(asked: str):
    with pytest.raises(CannotPack):
        attend_spans(*tensors(2, 2), SPANS, **{asked: torch.ones(())})


def test_without_segments_it_is_the_implementation_it_stands_on_to_the_last_bit(build: Callable[..., Any], batch: Any):
    model = build("llama").eval()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    plain, told = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation(register("sdpa"))
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), told)


def test_in_mixed_precision_other_kernels_than_the_loop_get_what_torchs_own_would(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Rotated queries and keys are float32 under autocast, values are not."""
    seen = set()

    def noted(*given: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in given[:3])
        return plain_varlen(*given)

    monkeypatch.setitem(attention.KERNELS, "varlen", at_once(noted))
    monkeypatch.setattr(attention, "choose_kernel", lambda *given: "varlen")
    settle_layout(Policy(build("llama"), "bfloat16"), "packed", 30)
    assert seen == {torch.bfloat16}
