"""The folder that a run leaves behind: plain Hugging Face, loaded by transformers alone."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uft.alive import doing
from uft.disk import as_umask_leaves, writing
from uft.errors import UftError
from uft.model.export_pieces import write_pieces
from uft.model.forward import Policy
from uft.parallel.ranks import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor


@doing("the model was exported", moving=True)
def export(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write weights, configuration, generation settings, tokenizer and chat template to `folder`; returns it.

    All processes come here; the first one writes. An adapter is merged into the weights, and lies besides in
    `folder/adapter` for PEFT. The folder appears by rename: it is the old one or the whole new one. The policy itself
    is not touched. Raises UftError where there is no room.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.tmp")
    if ranks().first:
        shutil.rmtree(beside, ignore_errors=True)
    in_pieces, needs = ranks().in_step, sum(p.numel() for p in policy.module.parameters()) * dtype.itemsize
    try:
        if ranks().first:
            with writing(folder, needs):
                folder.parent.mkdir(parents=True, exist_ok=True)
        if in_pieces:
            with writing(folder, needs):
                write_pieces(policy, beside, dtype)

        def write() -> None:
            with writing(folder, needs):
                if not in_pieces:
                    _write_whole(policy, beside, dtype)
                tokenizer.save_pretrained(beside)
                as_umask_leaves(beside)
                _flush(beside)
                _publish(beside, folder)

        ranks().from_first(write)
    except UftError:
        if ranks().first:
            shutil.rmtree(beside, ignore_errors=True)  # room for what else the run has to write
        raise
    return folder


def _write_whole(policy: Policy, beside: Path, dtype: torch.dtype) -> None:
    plain_model(policy, dtype).save_pretrained(beside)
    if policy.has_adapter:
        peft_model: Any = policy.module
        # False: the embeddings are not part of it, and to find that out PEFT would ask the hub
        peft_model.save_pretrained(beside / "adapter", save_embedding_layers=False)


def plain_model(policy: Policy, dtype: torch.dtype) -> Any:
    """A model of the policy's own class on the CPU with its weights, the adapter merged in; ties stay ties."""
    base = policy.base
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = type(base)(config)
    state = merged_state(base, dtype)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, f"weights that the plain model does not have: {unexpected[:5]}"
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"weights that the policy does not have: {left[:5]} {missing[:5]}"
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


@torch.no_grad()
def merged_state(base: nn.Module, dtype: torch.dtype, part: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State of the model as if it had never carried an adapter: `weight + scale * B A` in float32, then `dtype`.

    `part`: those of its tensors that are wanted; None: all.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    state: dict[str, Tensor] = {}
    for name, tensor in (base.state_dict() if part is None else part).items():
        owner, _, rest = name.partition(".base_layer.")
        if owner in adapted:
            if rest == "weight":
                tensor = tensor.float() + _delta(adapted[owner]).to(tensor.device)
            name = f"{owner}.{rest}"
        elif any(part.startswith("lora_") for part in name.split(".")):
            continue
        state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()
    return state


def _delta(layer: Any) -> Tensor:
    """What the active adapters of a layer add to its weight, float32."""
    return torch.stack([layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]).sum(0)


def _flush(folder: Path) -> None:
    """Everything below `folder` to the disk, before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _publish(beside: Path, folder: Path) -> None:
    """Rename, moving an older folder of that name out of the way first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
