"""The layers that a transformers model is made of: what is compiled, put in pieces and recomputed one at a time."""

from __future__ import annotations

from typing import Any

from torch import nn


def blocks(base: Any) -> list[nn.Module]:
    """The blocks of a model's body in their order, as transformers marks them; else what its lists of layers hold."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    body = base.get_decoder()
    marked: list[nn.Module] = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    return marked or [block for child in body.children() if isinstance(child, nn.ModuleList) for block in child]
