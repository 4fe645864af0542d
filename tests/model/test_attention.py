"""Attention over packed rows: kernels against one dense mask, their choice, and the plain implementation unpacked."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from uft.data.batch import Span
from uft.model import attention
from uft.model.attention import CannotPack, attend_spans, register, takes_varlen
from uft.model.layout import settle_layout
from uft.model.policy import Policy

Tensor = torch.Tensor
SPANS = (Span(5, 0, 0), Span(3, 0, 4), Span(1, 0, 4), Span(6, 3, 0), Span(1, 4, 0), Span(2, 3, 1))


def tensors(heads: int, key_heads: int, length: int = 18) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, length, 8), (1, key_heads, length, 8), (1, key_heads, length, 8))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def plain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Variable-length attention as torch documents it: (T, heads, D), causal from the lower right."""
    assert window_size == (-1, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    out = []
    queries, keys = query_ends.tolist(), key_ends.tolist()
    for n in range(len(queries) - 1):
        ends = (queries[n : n + 2], keys[n : n + 2], keys[n : n + 2])
        one = [tensor[a:b].transpose(0, 1) for tensor, (a, b) in zip((q, k, v), ends, strict=True)]
        rows, columns = one[0].shape[1], one[1].shape[1]
        assert rows <= longest_query
        assert columns <= longest_key
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out.append(scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("varlen", [False, True])
def test_kernels_attend_to_what_the_spans_say(monkeypatch: pytest.MonkeyPatch, visible: Any, varlen: bool):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "takes_varlen", lambda *given: varlen)
    for heads, scaling in product([(2, 2), (4, 2), (4, 1)], [None, 0.7]):
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


def test_what_no_kernel_does_is_refused():
    for asked in ("softcap", "position_bias", "s_aux"):
        with pytest.raises(CannotPack):
            attend_spans(*tensors(2, 2), SPANS, **{asked: torch.ones(())})


def test_without_segments_it_is_the_implementation_it_stands_on_to_the_last_bit(build: Callable[..., Any], batch: Any):
    model = build("llama").eval()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    plain, told = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation(register("sdpa"))
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), told)


def test_in_mixed_precision_varlen_gets_the_dtype_that_torchs_own_would(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Rotated queries and keys are float32 under autocast, values are not."""
    seen = set()

    def noted(*given: Any, **settings: Any) -> Tensor:
        seen.update(tensor.dtype for tensor in given[:3])
        return plain_varlen(*given, **settings)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", noted)
    monkeypatch.setattr(attention, "takes_varlen", lambda *given: True)
    settle_layout(Policy(build("llama"), "bfloat16"), "packed", 30)
    assert seen == {torch.bfloat16}


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "a CPU": (False, {"device": "cpu"}),
    "an Apple": (False, {"device": "mps"}),
    "bfloat16": (True, {}),
    "float16": (True, {"dtype": torch.float16}),
    "float32 under autocast": (True, {"dtype": torch.float32, "autocast": torch.bfloat16}),
    "heads of 256": (True, {"width": 256}),
    "dropout": (False, {"dropout": 0.1}),
    "heads that need padding": (False, {"width": 100}),
    "wide heads": (False, {"width": 264}),
    "values of another width": (False, {"width": 192, "value_width": 128}),
    "float32": (False, {"dtype": torch.float32}),
    "float64 under autocast": (False, {"dtype": torch.float64, "autocast": torch.bfloat16}),
    "before Ampere": (False, {"capability": (7, 5), "dtype": torch.float16}),
}


def test_the_kernel_is_what_device_precision_and_heads_allow(monkeypatch: pytest.MonkeyPatch):
    found = {}
    for name, (_, changes) in CASES.items():
        case = {"device": "cuda", "capability": (8, 0), "dtype": torch.bfloat16, "width": 64, "dropout": 0.0} | changes
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, case=case: case["capability"])
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind, case=case: "autocast" in case)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind, case=case: case["autocast"])
        shapes = [(1, 4, 20, case["width"]), (1, 4, 20, case.get("value_width", case["width"]))]
        device, dtype = torch.device(case["device"]), case["dtype"]
        query, value = (SimpleNamespace(device=device, dtype=dtype, shape=shape) for shape in shapes)
        found[name] = takes_varlen(query, value, case["dropout"])
    assert found == {name: expected for name, (expected, _) in CASES.items()}
