"""Packed attention: an implementation in transformers' registry that attends within the spans of a packed batch.

A batch's :class:`Segments` travel through the forward pass as the keyword `segments` down to the attention function, so
that layers recomputed in the backward pass see them too. Without them (padded batches, generation) the function is the
implementation it replaces, to the last bit.

Two kernels: torch's variable-length FlashAttention (a GPU from Ampere on, half precision), and one SDPA call per span,
which works everywhere and is the fastest on a CPU. Neither makes a mask of the whole pack.
"""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from uft.data.batch import Segments, Span

Tensor = torch.Tensor
Spans = tuple[Span, ...]

PACKED = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_fa2"}
"""Implementations that the kernels here can replace, and the names of the packed ones. transformers takes every name
that contains `flash` for one of its own."""

AMPERE = (8, 0)
HALF = (torch.float16, torch.bfloat16)


class CannotPack(Exception):
    """The model asks its attention for something that no kernel here computes."""


def register(base: str) -> str:
    """Register packed attention on top of the implementation `base`; returns its name in transformers' registry."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS[base]

    @torch.compiler.disable
    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        segments: Segments | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            return plain(module, query, key, value, attention_mask, **settings)
        return attend_spans(query, key, value, segments.spans, **settings), None

    name = PACKED[base]
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def no_mask(device: torch.device) -> Tensor:
    """The `attention_mask` of a packed batch. transformers passes a four-dimensional mask on unchanged and makes none
    of its own, which would be as long and as wide as the pack."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend_spans(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(1, heads, T, D) queries, (1, key heads, T, D) keys, (1, key heads, T, E) values -> (1, T, heads, E).

    `scaling` multiplies the scores, 1/sqrt(D) by default. Sliding windows are ignored: `layout` packs only rows that
    are shorter than the window. Raises CannotPack for capped or biased scores.
    """
    if softcap is not None or position_bias is not None or s_aux is not None:
        raise CannotPack("its attention scores are capped or biased")
    if takes_varlen(query, value, dropout):
        return varlen(query, key, value, spans, scaling)
    return loop(query, key, value, spans, dropout, scaling)


def takes_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel can be used. It has no dropout and pads no heads."""
    if query.device.type != "cuda" or dropout > 0 or compute_dtype(query) not in HALF:
        return False
    width = query.shape[-1]
    fits = width == value.shape[-1] <= 256 and width % 8 == 0
    return fits and torch.cuda.get_device_capability(query.device) >= AMPERE


def compute_dtype(query: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, as for torch's SDPA.

    Under autocast models hand over rotated queries and keys in float32 beside bfloat16 values. SDPA casts by itself.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return query.dtype


@cache
def is_slow_in_half(device: torch.device) -> bool:
    """Whether torch's kernel takes no longer in float32: on a CPU without AMX, where the backward pass of a short span
    takes up to three times as long in bfloat16."""
    return device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16", False)


def loop(query: Tensor, key: Tensor, value: Tensor, spans: Spans, dropout: float, scaling: float | None) -> Tensor:
    """One SDPA call per span."""
    if is_slow_in_half(query.device) and compute_dtype(query) in HALF:
        with torch.autocast(query.device.type, enabled=False):
            return loop(query.float(), key.float(), value.float(), spans, dropout, scaling).to(value.dtype)
    lengths = [span.length for span in spans]
    # split, not slices: the gradient of a slice is as large as all of the pack
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    parts = []
    for number, (span, q) in enumerate(zip(spans, query.split(lengths, 2), strict=True)):
        k, v, mask = keys[number], values[number], None
        if span.prefix:
            k = torch.cat([keys[span.prompt][:, :, : span.prefix], k], 2)
            v = torch.cat([values[span.prompt][:, :, : span.prefix], v], 2)
            mask = torch.ones(span.length, span.prefix + span.length, dtype=torch.bool, device=q.device)
            mask = mask.tril(span.prefix)
        causal, grouped = mask is None, query.shape[1] != key.shape[1]
        attended = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
        parts.append(attended.transpose(1, 2))  # as the model wants it, and as the kernel has it
    return torch.cat(parts, 1)


def varlen(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float | None) -> Tensor:
    """All spans at once by torch's variable-length FlashAttention, causal from the lower right.

    The keys of a shared prompt are gathered once per completion: a copy of keys, no arithmetic.
    """
    from torch.nn.attention.varlen import varlen_attn

    key_index, query_ends, key_ends, longest_query, longest_key = varlen_bounds(spans, query.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if key_index is not None:  # before rounding: the gradients of a shared prompt are summed here
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
    q, k, v = (tensor.to(compute_dtype(query)) for tensor in (q, k, v))
    bounds, grouped = (query_ends, key_ends, longest_query, longest_key), q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out[None]


@lru_cache(maxsize=8)  # every layer asks for the same
def varlen_bounds(spans: Spans, device: torch.device) -> tuple[Tensor | None, Tensor, Tensor, int, int]:
    """Spans as variable-length kernels take them: (keys,) int64 into the pack, or None for the pack itself; where each
    span's queries and keys end, (spans + 1,) int32 beginning with 0; the longest of each."""
    starts = [0, *accumulate(span.length for span in spans)]
    queries, keys = [span.length for span in spans], [span.prefix + span.length for span in spans]
    index = None
    if any(span.prefix for span in spans):
        pieces = [
            torch.arange(first, first + count)
            for span, start in zip(spans, starts, strict=False)
            for first, count in ((starts[span.prompt], span.prefix), (start, span.length))
        ]
        index = torch.cat(pieces).to(device)
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (queries, keys)
    )
    return index, query_ends, key_ends, max(queries), max(keys)
