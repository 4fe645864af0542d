"""Kernels that attend to many spans: a loop, and variable-length FlashAttention by its package or by torch.

The loop, one call of torch's SDPA per span, is right everywhere and the fastest on a CPU, where no mask of the whole
pack is ever made. The variable-length ones take all spans at once; keys of a shared prompt are gathered once per
completion, which costs a copy of keys and no arithmetic. A fourth is in `uft.model.flex`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from uft.data.batch import Span

Tensor = torch.Tensor
Spans = tuple[Span, ...]

Kernel = Callable[[Tensor, Tensor, Tensor, Spans, float, float | None], Tensor]
"""Queries, keys, values, spans, dropout, scaling -> attended; shapes as of `uft.model.attention.attend_spans`."""


def computed_in(query: Tensor) -> torch.dtype:
    """The precision that attention is computed in: autocast's where it is on, as for torch's SDPA.

    Models hand over what their positional encoding left, under autocast often float32 queries and keys beside bfloat16
    values. The loop leaves it to SDPA; every other kernel has to ask.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return query.dtype


def loop(query: Tensor, key: Tensor, value: Tensor, spans: Spans, dropout: float, scaling: float | None) -> Tensor:
    """A call per span."""
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
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(attended.transpose(1, 2))  # as the model wants it, and as the kernel has it
    return torch.cat(parts, 1)


class Varlen(NamedTuple):
    """Spans as variable-length kernels want them: queries as they lie, keys gathered, causal from the lower right."""

    key_index: Tensor | None  # (keys,) int64 into the pack; None: the pack itself
    query_ends: Tensor  # (spans + 1,) int32, beginning with 0
    key_ends: Tensor  # likewise
    longest_query: int
    longest_key: int


@lru_cache(maxsize=8)  # every layer asks for the same
def varlen_of(spans: Spans, device: torch.device) -> Varlen:
    starts = [0, *accumulate(span.length for span in spans)]
    wholes = [span.prefix + span.length for span in spans]
    index = None
    if any(span.prefix for span in spans):
        pieces = [
            piece
            for span, start in zip(spans, starts, strict=False)
            for piece in (
                torch.arange(starts[span.prompt], starts[span.prompt] + span.prefix),
                torch.arange(start, start + span.length),
            )
        ]
        index = torch.cat(pieces).to(device)

    def ends(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    lengths = [span.length for span in spans]
    return Varlen(index, ends(lengths), ends(wholes), max(lengths), max(wholes))


VarlenCall = Callable[[Tensor, Tensor, Tensor, Varlen, float, float | None], Tensor]


def at_once(call: VarlenCall) -> Kernel:
    """A kernel out of a variable-length one: (T, heads, D) each in, (T, heads, D) out."""

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, spans: Spans, dropout: float, scaling: float | None
    ) -> Tensor:
        layout = varlen_of(spans, query.device)
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        if layout.key_index is not None:  # before they are rounded: gradients of a shared prompt are added up here
            k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
        q, k, v = (tensor.to(computed_in(query)) for tensor in (q, k, v))
        return call(q, k, v, layout, dropout, scaling)[None]

    return kernel


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, dropout: float, scaling: float | None) -> Tensor:
    flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func

    ends = (layout.query_ends, layout.key_ends, layout.longest_query, layout.longest_key)
    out: Tensor = flash_attn_varlen_func(q, k, v, *ends, dropout_p=dropout, softmax_scale=scaling, causal=True)
    return out


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Varlen, dropout: float, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
