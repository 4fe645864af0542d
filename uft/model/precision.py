"""The precision in which a model is stored and multiplied.

Frozen weights under an adapter may be stored in four bits (QLoRA, arXiv 2305.14314), by bitsandbytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uft.config.models import size_of_model
from uft.config.schema import Model
from uft.errors import Problem, UftError

Tensor = torch.Tensor

TINY = 10_000_000
"""Parameters below which `model.dtype=auto` is float32: not their products are what takes time."""


def resolve_dtype(model: Model, device: torch.device) -> Model:
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


# --- weights in four bits

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: four bits, a byte for the scale of 64, and four for the scale of 256 of those."""


def bitsandbytes(key: str) -> Any:
    """The package, which `key` needs. Raises UftError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        problem = Problem(key, f"needs bitsandbytes ({error})")
        raise UftError(problem, footer="Install it:  pip install 'uft-lm[bitsandbytes]'") from error


def quantise(blocks: Sequence[nn.Module], model: Model) -> None:
    """Exchange the linear layers of `blocks` for such with weights in four bits, where `model.quantize` asks for it.

    Layers of a class of their own (routers of experts) stay, and so do their weights.
    """
    if model.quantize == "none":
        return
    library, dtype = bitsandbytes("model.quantize=nf4"), getattr(torch, model.dtype)
    for block, name, layer in [(one, *named) for one in blocks for named in one.named_modules()]:
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


WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""The file of all weights, or of the names of those that hold a part each."""


def check_weights(folder: Path, what: str) -> None:
    """UftError for two sets of weights, for parts without their index, and for whole numbers or eight bits, which would
    be loaded as the values. Damaged files are told as they are loaded."""
    from safetensors import SafetensorError, safe_open

    there, files = [name for name in WHOLE if (folder / name).is_file()], sorted(folder.glob("model*.safetensors"))
    if len(there) == 2:
        why = f"{' and '.join(WHOLE)} are both there, and name two sets of weights"
        raise UftError(Problem(what, why, advice=("move one of them away",)))
    if files and not there:
        raise UftError(Problem(what, f"{WHOLE[1]} is not there, and {files[0].name} may be a part of the weights"))
    for file in files:
        kinds = dict[str, str]()
        with suppress(SafetensorError), safe_open(file, framework="np") as held:
            kinds = {name: held.get_slice(name).get_dtype() for name in held.keys() if name.endswith(".weight")}  # noqa: SIM118
        if odd := next((name for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")), None):
            why = f"its weights are quantised, and can neither be trained nor exported: {odd} is {kinds[odd]}"
            raise UftError(Problem(what, why, advice=("give the folder of a model that is not quantised",)))
