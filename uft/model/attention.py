"""Attention over packed rows, as one more implementation in transformers' registry.

A batch's :class:`Segments` travel with the forward pass as the keyword `segments` down to the attention function, so
that layers made again in the backward pass see them too. Without them (padded batches, generation) the function is the
implementation it stands on, to the last bit.

What computes it is one of four kernels: see `uft.model.attention`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from uft.data.batch import Segments, Span

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


# --- Kernels that attend to many spans: a loop, and variable-length FlashAttention by its package or by torch.
#
# The loop, one call of torch's SDPA per span, is right everywhere and the fastest on a CPU, where no mask of the
# whole
# pack is ever made. The variable-length ones take all spans at once; keys of a shared prompt are gathered once per
# completion, which costs a copy of keys and no arithmetic. A fourth is in `uft.model.attention`.


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


# --- Attention over packed rows by torch's `flex_attention`: one kernel for all spans, in any precision of a GPU.
#
# A prompt shared by completions stands once among the keys and is read where it is. Which blocks of 128 queries and
# keys
# have anything to say to each other is worked out from the spans, once per batch, without a mask of the whole pack.
#
# On a GPU the kernel is compiled, lazily and once per process: sizes that change from pack to pack are symbols in it.
# What is another kernel is another shape or number of heads, precision, scaling, with or without gradients. Without
# compilation (on a CPU) it holds all scores of the pack at once, and torch refuses gradients: that is for tests
# alone.


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


# --- Which kernel attends to the spans of a pack.
#
# On a CPU the loop. On a GPU in half precision variable-length FlashAttention, by its package where that is
# installed,
# else by torch; where neither can be had (float32, a device before Ampere, heads it does not know) `flex_attention`,
# if
# on trial it says here what the loop says; else the loop. Those three were never measured.


log = logging.getLogger(__name__)

KERNELS: dict[str, Kernel] = {
    "flash_attn": at_once(_flash_attn),
    "varlen": at_once(_torch_varlen),
    "flex": flex,
    "loop": loop,
}

HALF = (torch.float16, torch.bfloat16)
AMPERE, VOLTA = (8, 0), (7, 0)

TRIAL = (Span(700, 0, 0), Span(300, 0, 650), Span(1, 0, 650), Span(306, 3, 0))
"""1307 tokens in 11 blocks: numbers that are nobody's head size or count of heads. torch takes sizes that are equal
when it compiles for one and the same, and would compile again when they part."""

WRONG = 0.05
"""Difference from the loop, of the largest number, that is no rounding in any precision."""


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> str:
    """A name of KERNELS; shapes as of `uft.model.attention.attend_spans`."""
    if query.device.type != "cuda":
        return "loop"
    capability, dtype = torch.cuda.get_device_capability(query.device), computed_in(query)
    width, value_width = query.shape[-1], value.shape[-1]
    flash = capability >= AMPERE and dtype in HALF and width == value_width <= 256
    if flash and installed("flash_attn"):
        return "flash_attn"
    if dropout > 0:
        return "loop"  # the other two have none
    if flash and width % 8 == 0 and installed("torch.nn.attention.varlen"):  # the package pads to such a width itself
        return "varlen"
    native = dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and capability >= AMPERE)
    compiles = native and capability >= VOLTA and min(width, value_width) >= 16 and installed("triton")
    several = query.shape[2] > 1  # to a compiler a size of 1 is a constant: one token would need a kernel of its own
    heads = (query.shape[1], key.shape[1])
    if compiles and several and flex_works(query.device, dtype, heads, (width, value_width), scaling):
        return "flex"
    return "loop"


@lru_cache(maxsize=8)  # every layer of every pass asks
def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@lru_cache(maxsize=32)
def flex_works(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int], scaling: float | None
) -> bool:
    """Whether flex says what the loop says, forwards and backwards; a warning if not.

    `heads`: of queries and of keys; `widths`: of keys and of values. A compiler may be missing, shared memory too small
    for such heads, in the backward pass alone: seen here, before the first step. What is compiled stays for the run.
    """
    why = None
    try:
        with torch.autocast(device.type, enabled=False):
            with torch.no_grad():
                given = _trial_tensors(device, dtype, heads, widths)
                flex(*given, TRIAL, 0.0, scaling)
            ours, theirs = (_with_gradients(kernel, given, scaling) for kernel in (flex, loop))
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
        if not all(by <= WRONG for by in off):
            why = f"it is off by {off} in values and gradients of queries, keys, values"
    except Exception as error:  # whatever a compiler raises, the answer is the same
        first = next(iter(str(error).strip().splitlines()), "")
        why = f"{type(error).__name__}: {first}"
    if why is not None:
        log.warning("flex_attention is not used here, a slower loop is: %s", why)
    return why is None


def _trial_tensors(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for TRIAL. They lie in memory as models have them, and are no views: what is compiled
    for those takes views too, but not the other way round."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(span.length for span in TRIAL)

    def random(count: int, width: int) -> Tensor:
        made = torch.randn(1, tokens, count, width, generator=generator)
        return made.to(device, dtype).transpose(1, 2).clone()

    return random(heads[0], widths[0]), random(heads[1], widths[0]), random(heads[1], widths[1])


def _with_gradients(kernel: Kernel, given: tuple[Tensor, Tensor, Tensor], scaling: float | None) -> list[Tensor]:
    """What a kernel says of TRIAL, and the gradients of queries, keys and values."""
    with torch.enable_grad():
        q, k, v = (tensor.clone().requires_grad_() for tensor in given)
        out = kernel(q, k, v, TRIAL, 0.0, scaling)
        weights = torch.linspace(-1, 1, out.shape[1], device=out.device, dtype=out.dtype)
        gradients = torch.autograd.grad((out * weights[None, :, None, None]).sum(), (q, k, v))
    return [out.detach(), *gradients]
