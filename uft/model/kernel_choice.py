"""Which kernel attends to the spans of a pack.

On a CPU the loop. On a GPU in half precision variable-length FlashAttention, by its package where that is installed,
else by torch; where neither can be had (float32, a device before Ampere, heads it does not know) `flex_attention`, if
on trial it says here what the loop says; else the loop. Those three were never measured.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

from uft.data.batch import Span
from uft.model.flex import flex
from uft.model.kernels import Kernel, _flash_attn, _torch_varlen, at_once, computed_in, loop

Tensor = torch.Tensor
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
