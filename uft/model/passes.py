"""Around a pass of a model: embedding noise, offloaded activations, weights cast once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from uft.data.batch import Batch

Tensor = torch.Tensor

SMALL_TENSOR = 1024
"""Numbers below which a tensor is not worth a copy to another memory."""


@dataclass
class EmbeddingNoise:
    """Noise of NEFTune (arXiv 2310.05914): uniform in [-1, 1], times alpha / sqrt(its tokens x hidden size).

    A function of `key` and the number of the pass, so that a resumed step draws what it would have drawn.
    """

    alpha: float
    key: tuple[int, ...]
    passes: int = 0

    def like(self, embedded: Tensor, batch: Batch) -> Tensor:
        """(B, L, H) in the precision of `embedded`."""
        seed = int(np.random.SeedSequence((*self.key, self.passes)).generate_state(1)[0])
        self.passes += 1
        generator = torch.Generator(embedded.device).manual_seed(seed)
        uniform = torch.rand(embedded.shape, generator=generator, device=embedded.device).mul_(2).sub_(1)
        scale = self.alpha / (batch.company * embedded.shape[-1]).sqrt()
        return (uniform * scale[..., None]).to(embedded.dtype)


def offloading(module: nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """Within, what the backward pass will need is copied to the CPU's memory, weights and small tensors left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if tensor.numel() < SMALL_TENSOR or tensor.untyped_storage().data_ptr() in weights:
            return None, tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class NarrowCopy:
    """The values of a layer's float32 weight in bfloat16, cast again when the weight has changed.

    torch counts the changes of a tensor, but not those by the kernel of a fused optimiser: after an update, or another
    change, `version` is set to -1.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.values, self.version = torch.empty(0), -1

    def refresh(self) -> Tensor:
        """The values, (out, in) bfloat16."""
        weight, version = self.layer.weight, self.layer.weight._version
        if self.values.shape != weight.shape or self.values.device != weight.device:
            self.values = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
            self.version = -1
        if self.version != version:
            self.values.copy_(weight.detach())
            self.version = version
        return self.values


def narrow_linears(module: nn.Module) -> list[NarrowCopy]:
    """Let the trained linear layers within `module` multiply by such copies under autocast, which would cast their
    weights in every pass: the same values, and the same gradients in float32."""
    copies = []
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad and layer.weight.dtype == torch.float32:
            untyped: Any = layer
            untyped.narrow = NarrowCopy(layer)
            untyped.forward = partial(_narrow_forward, layer)
            copies.append(untyped.narrow)
    return copies


def _narrow_forward(layer: Any, inputs: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(inputs.device.type):
        return F.linear(inputs, layer.weight, layer.bias)
    # a compiled block cannot ask: `Policy.states` did before it
    values = layer.narrow.values if torch.compiler.is_compiling() else layer.narrow.refresh()
    return F.linear(inputs, _Narrowed.apply(layer.weight, values), layer.bias)


class _Narrowed(torch.autograd.Function):
    """The second tensor, whose gradient goes to the first in its precision."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming.float(), None
