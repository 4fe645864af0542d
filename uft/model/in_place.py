"""Gradients of vocabulary-sized weights, added where they are kept.

Autograd makes a matrix of the weight's size for every micro-batch and adds it to what is there. For the embedding and
the output head that is a vocabulary times the hidden size, written and read several times for the sake of a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor


def own_gradient(weight: Tensor) -> Tensor | None:
    """`weight.grad` to add to, made if there is none; None where somebody else must be told of a gradient."""
    if not keeps_its_own(weight):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def keeps_its_own(weight: Tensor) -> bool:
    """Whether nobody waits for autograd to bring the gradient of `weight`."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_leaf
    return plain and not weight._backward_hooks and not weight._post_accumulate_grad_hooks


@contextmanager
def embedding_in_place(module: nn.Module) -> Iterator[None]:
    """While inside, the backward pass of an embedding adds to the rows that were looked up and touches no other.

    Nobody may ask autograd for its gradient then. An embedding that is more than a table stays as it is.
    """
    if not isinstance(module, nn.Embedding) or not _plain(module) or not keeps_its_own(module.weight):
        yield
        return
    module.forward = partial(_Embedded.apply, module.weight, module.padding_idx)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _plain(module: nn.Embedding) -> bool:
    unusual = module.max_norm is not None or module.scale_grad_by_freq or module.sparse or "forward" in vars(module)
    return type(module) is nn.Embedding and module.weight.requires_grad and not unusual


class _Embedded(torch.autograd.Function):
    """weight[ids], first derivatives only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padding: int | None, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:  # a padding token learns nothing
            incoming = incoming.masked_fill((ids == ctx.padding)[..., None], 0.0)
        total = own_gradient(ctx.weight)
        assert total is not None
        total.index_add_(0, ids.flatten(), incoming.flatten(0, -2).to(total.dtype))
        return None, None, None
