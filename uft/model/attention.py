"""Attention over packed rows, as one more implementation in transformers' registry.

A batch's :class:`Segments` travel with the forward pass as the keyword `segments` down to the attention function, so
that layers made again in the backward pass see them too. Without them (padded batches, generation) the function is the
implementation it stands on, to the last bit.

What computes it is one of four kernels: see `uft.model.kernel_choice`.
"""

from __future__ import annotations

from typing import Any

import torch

from uft.data.batch import Segments
from uft.model.kernel_choice import KERNELS, choose_kernel
from uft.model.kernels import Spans

Tensor = torch.Tensor

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
    """(1, heads, T, D) queries, (1, key heads, T, D) keys, (1, key heads, T, E) values -> (1, T, heads, E).

    `scaling` multiplies the scores, 1/sqrt(D) by default. Windows are not looked at: rows are shorter than those.
    """
    if softcap is not None or position_bias is not None or s_aux is not None:
        raise CannotPack("its attention scores are capped or biased")
    return KERNELS[choose_kernel(query, key, value, dropout, scaling)](query, key, value, spans, dropout, scaling)
