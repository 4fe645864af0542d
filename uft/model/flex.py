"""Attention over packed rows by torch's `flex_attention`: one kernel for all spans, in any precision of a GPU.

A prompt shared by completions stands once among the keys and is read where it is. Which blocks of 128 queries and keys
have anything to say to each other is worked out from the spans, once per batch, without a mask of the whole pack.

On a GPU the kernel is compiled, lazily and once per process: sizes that change from pack to pack are symbols in it.
What is another kernel is another shape or number of heads, precision, scaling, with or without gradients. Without
compilation (on a CPU) it holds all scores of the pack at once, and torch refuses gradients: that is for tests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from uft.model.kernels import Spans, computed_in

Tensor = torch.Tensor

BLOCK = 128
"""Queries, and keys, of a block: torch's own default."""


class Visible(NamedTuple):
    """Query t sees the keys `own[t]` to t, and those from `first[t]` to before `last[t]`; (T,) int32 each."""

    own: Tensor
    first: Tensor
    last: Tensor


def visible_of(spans: Spans, device: torch.device) -> Visible:
    starts = [0, *accumulate(span.length for span in spans)]
    lengths = torch.tensor([span.length for span in spans])
    bounds = [
        starts[:-1],
        [starts[span.prompt] for span in spans],
        [starts[span.prompt] + span.prefix for span in spans],
    ]
    per_span = torch.tensor(bounds, dtype=torch.int32)
    return Visible(*per_span.repeat_interleave(lengths, 1).to(device).unbind())


def blocks_of(visible: Visible) -> tuple[Tensor, Tensor]:
    """(blocks of queries, blocks of keys) bool each: of which pairs of blocks something is seen, and of which all."""
    tokens, device = visible.own.numel(), visible.own.device
    count = -(-tokens // BLOCK)
    begin = torch.arange(count, dtype=torch.int32, device=device) * BLOCK

    def within(low: Tensor, high: Tensor) -> Tensor:
        """(T, blocks): how many keys of each block are from `low` (T,) to before `high` (T,)."""
        return (torch.minimum(high[:, None], begin + BLOCK) - torch.maximum(low[:, None], begin)).clamp(min=0)

    after = torch.arange(1, tokens + 1, dtype=torch.int32, device=device)
    seen = within(visible.own, after) + within(visible.first, visible.last)
    seen = pad(seen, (0, 0, 0, count * BLOCK - tokens)).view(count, BLOCK, count).sum(1)
    return seen > 0, seen == BLOCK * BLOCK


@lru_cache(maxsize=8)  # every layer asks for the same
def block_mask_of(spans: Spans, device: torch.device) -> Any:
    """torch's BlockMask of a pack."""
    from torch.nn.attention.flex_attention import BlockMask

    visible = visible_of(spans, device)
    own, first, last = visible

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((own[query] <= key) & (key <= query)) | ((first[query] <= key) & (key < last[query]))

    some, all_of_it = blocks_of(visible)
    tokens = own.numel()
    return BlockMask.from_kv_blocks(
        *_listed(some & ~all_of_it),
        *_listed(all_of_it),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, blocks) bool -> (1, 1, blocks) how many of each row, (1, 1, blocks, blocks) which, those first; int32.

    A pack of one block has an empty second one: compiled kernels take a size of 1 for a constant, and are made anew.
    """
    more = max(0, 2 - len(chosen))
    chosen = pad(chosen, (0, more, 0, more)).to(torch.int32)
    indices = chosen.argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


def flex(query: Tensor, key: Tensor, value: Tensor, spans: Spans, dropout: float, scaling: float | None) -> Tensor:
    """A kernel for all spans at once; without dropout."""
    assert dropout == 0, "flex_attention has no dropout"
    dtype, kind = computed_in(query), query.device.type
    with torch.autocast(kind, enabled=False):  # what it would do is done; and its state would make another kernel
        attended = attention_on(kind)(
            *(tensor.to(dtype) for tensor in (query, key, value)),
            block_mask=block_mask_of(spans, query.device),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,  # None would make another kernel
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options={"BACKEND": "TRITON"},  # one kernel for all lengths: short packs would get another
        )
    return attended.transpose(1, 2)


def attention_on(kind: str) -> Callable[..., Tensor]:
    """`flex_attention` for devices of a kind."""
    return _plain() if kind == "cpu" else compiled()


def _plain() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Tensor] = flex_attention
    return plain


@cache
def compiled(backend: str = "inductor") -> Callable[..., Tensor]:
    """Whole or not at all: compiled once too often for torch, it fails and does not hold all scores of a pack."""
    made: Callable[..., Tensor] = torch.compile(_plain(), dynamic=True, fullgraph=True, backend=backend)
    return made
