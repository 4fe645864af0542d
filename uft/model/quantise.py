"""Frozen weights in four bits under an adapter (QLoRA, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from uft.errors import Problem, UftError

Tensor = torch.Tensor

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: four bits, a byte for the scale of 64, and four for the scale of 256 of those."""


def bitsandbytes(key: str) -> Any:
    """The package, which `key` needs. Raises UftError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        problem = Problem(key, f"needs bitsandbytes ({error})")
        raise UftError(problem, footer="Install it:  pip install 'uft-lm[bitsandbytes]'") from error


def quantise(block: nn.Module, dtype: torch.dtype) -> None:
    """Exchange the linear layers within `block` for such with weights in four bits, multiplied in `dtype`.

    Layers of a class of their own (routers of experts) stay, and so do their weights.
    """
    library = bitsandbytes("model.quantize=nf4")
    for name, layer in list(block.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        narrow = library.nn.Linear4bit(1, 1, layer.bias is not None, dtype, quant_type="nf4", device="meta")
        narrow.in_features, narrow.out_features, narrow.bias = layer.in_features, layer.out_features, layer.bias
        narrow.support_avx512bf16_for_cpu = False  # it would lay weights out anew in evaluation, which training rereads
        weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=narrow)
        narrow.weight = weight.to(layer.weight.device)  # where they are quantised, but for the meta device
        block.set_submodule(name, narrow)


def is_quantised(weight: Tensor) -> bool:
    return hasattr(weight, "quant_type")


def weights_in(parameter: Tensor) -> int:
    """The numbers that a parameter stands for: two a byte where it is quantised."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def bytes_of(parameter: Tensor) -> int:
    """Bytes of a parameter as it is stored on its device."""
    if is_quantised(parameter):
        return round(NF4_BYTES * weights_in(parameter))
    return parameter.numel() * parameter.element_size()


@torch.no_grad()
def plain_state(base: nn.Module) -> Mapping[str, Tensor]:
    """The state of a model, with the values that its quantised weights stand for."""
    quantised = {n: p for n, p in base.named_parameters(remove_duplicate=False) if is_quantised(p)}
    if not quantised:
        return base.state_dict()
    functional = bitsandbytes("model.quantize=nf4").functional
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict().items():
        weight: Any = quantised.get(name)
        if weight is not None:
            state[name] = functional.dequantize_4bit(weight.data, weight.quant_state)
        elif not any(name.startswith(f"{owner}.") for owner in quantised):  # their scales
            state[name] = tensor
    return state
