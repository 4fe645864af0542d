"""Attention over packed rows, as one more implementation in transformers' registry.

A batch's :class:`Segments` travel with the forward pass as the keyword `segments` down to the attention function, so
that layers made again in the backward pass see them too. Without them (padded batches, generation) the function is the
implementation it stands on, to the last bit.

Three kernels. The loop, one call of torch's SDPA per span, is right everywhere and the fastest on a CPU, where no mask
of the whole pack is ever made. On a GPU in half precision one variable-length FlashAttention takes all spans at once,
by the `flash_attn` package or by torch; keys of a shared prompt are gathered once per completion, which costs a copy of
keys and no arithmetic. Those two were never measured.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from uft.data.batch import Segments, Span

Tensor = torch.Tensor
Spans = tuple[Span, ...]

PACKED = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_fa2"}
"""Implementations that can be stood on, since the kernels here compute the same, and what they are called with ours on
top. transformers takes every name with `flash` in it for one of its own."""


class CannotPack(Exception):
    """The model asks its attention for something that no kernel here does."""


def register(base: str) -> str:
    """The name under which attention over segments, else `base`, is in transformers' registry."""
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
    """What goes in as `attention_mask` of a packed batch: transformers takes a four-dimensional one as it is, and so
    makes none of its own, which would be as long and as wide as the pack."""
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
    """(1, heads, T, D) queries, (1, key heads, T, D) keys and values -> (1, T, heads, D).

    `scaling` multiplies the scores, 1/sqrt(D) by default. Windows are not looked at: rows are shorter than those.
    """
    if softcap is not None or position_bias is not None or s_aux is not None:
        raise CannotPack("its attention scores are capped or biased")
    return KERNELS[choose_kernel(query, dropout)](query, key, value, spans, dropout, scaling)


def choose_kernel(query: Tensor, dropout: float) -> str:
    """A name of KERNELS."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return "loop"
    if importlib.util.find_spec("flash_attn") is not None:
        return "flash_attn"
    return "varlen" if dropout == 0 and importlib.util.find_spec("torch.nn.attention.varlen") else "loop"


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
        if layout.key_index is not None:
            k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
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


Kernel = Callable[[Tensor, Tensor, Tensor, Spans, float, float | None], Tensor]
KERNELS: dict[str, Kernel] = {"loop": loop, "flash_attn": at_once(_flash_attn), "varlen": at_once(_torch_varlen)}
