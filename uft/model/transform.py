"""What architectures do to logits before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Transform:
    """What an architecture does to `hidden @ weight.T + bias` before the softmax."""

    scale: float = 1.0  # Cohere multiplies by logit_scale, Granite divides by logits_scaling
    softcap: float | None = None  # Gemma 2 and 3: softcap * tanh(logits / softcap)

    def apply_(self, logits: Tensor) -> Tensor:
        """In place, and returns it; a copy where autograd needs the value of tanh."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is None:
            return logits
        capped = logits.div_(self.softcap).tanh_()
        return capped * self.softcap if capped.requires_grad else capped.mul_(self.softcap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, in place; `logits` are the transformed ones."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
"""Configuration keys of known logit scales: 1 multiplies, -1 divides. `Policy.check_head` tells when this is wrong."""


def transform_of(config: Any) -> Transform:
    """The transform that a transformers configuration asks for."""
    scale = 1.0
    for key, power in SCALES.items():
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            scale *= float(value) ** power
    softcap = getattr(config, "final_logit_softcapping", None)
    return Transform(scale, None if softcap is None else float(softcap))
