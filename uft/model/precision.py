"""The precision in which a model is stored and multiplied."""

from __future__ import annotations

from dataclasses import replace

import torch

from uft.config.models import size_of_model
from uft.config.schema import Model

TINY = 10_000_000
"""Parameters below which `model.dtype=auto` is float32: not their products are what takes time."""


def settled(model: Model, device: torch.device) -> Model:
    """`model` with its precision on `device` said, where that is `auto`: bfloat16 where the device multiplies it
    natively, unless the model is small."""
    if model.dtype != "auto":
        return model
    narrow = multiplies_bfloat16(device) and not is_tiny(model)
    return replace(model, dtype="bfloat16" if narrow else "float32")


def why_precision(model: Model, device: torch.device) -> str:
    """A line about the precision that was chosen."""
    does = "multiplies" if multiplies_bfloat16(device) else "does not multiply"
    small = ", and the model is small" if is_tiny(model) else ""
    return f"model.dtype=auto is {model.dtype}: this {device.type} {does} bfloat16 natively{small}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16; others make them of float32, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last: ARM


def is_tiny(model: Model) -> bool:
    size = size_of_model(model.path)
    return model.path.startswith("builtin:") or (size is not None and size < TINY)


def storage_dtype(model: Model) -> str:
    """Stored precision: the forward's where weights are frozen or `master_weights` is off, else float32."""
    return model.dtype if model.adapter == "lora" or not model.master_weights else "float32"
