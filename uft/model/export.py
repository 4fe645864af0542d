"""Export: the model folder that a run leaves behind, in plain Hugging Face format, loaded by transformers alone."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from uft.distributed import ranks
from uft.errors import UftError
from uft.heartbeat import activity
from uft.model.policy import Policy
from uft.runs import as_umask_leaves, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor


@activity("the model was exported", moving=True)
def export(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write weights, configuration, generation settings, tokenizer and chat template to `folder`; returns it.

    All processes call it; rank 0 writes. A sharded model is gathered in the memory of rank 0's CPU. An adapter is
    merged into the weights, and is saved besides in `folder/adapter` for PEFT. The folder appears by rename: it is the
    old one or the complete new one. The policy itself is not changed. Raises UftError where there is no room.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.tmp")
    bytes_needed = sum(p.numel() for p in policy.module.parameters()) * dtype.itemsize
    state: Mapping[str, Any] = {}
    if ranks().sharded:
        policy.reshard()
        state = get_model_state_dict(policy.base, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with writing(folder, bytes_needed):
                folder.parent.mkdir(parents=True, exist_ok=True)
                weights = state or policy.base.state_dict()
                plain_model(policy, dtype, weights).save_pretrained(beside)
                if policy.has_adapter:
                    adapter = {f"base_model.model.{name}": t for name, t in weights.items() if ".lora_" in name}
                    peft_model: Any = policy.module
                    # False: the embeddings are not part of it, and to find that out PEFT would ask the hub
                    peft_model.save_pretrained(beside / "adapter", state_dict=adapter, save_embedding_layers=False)
                tokenizer.save_pretrained(beside)
                as_umask_leaves(beside)
                _flush(beside)
                _publish(beside, folder)
        except UftError:
            shutil.rmtree(beside, ignore_errors=True)  # leaves room for the other files of the run
            raise

    ranks().on_rank0(write)
    return folder


def plain_model(policy: Policy, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Any:
    """A model of the policy's own class on the CPU with `weights`, the adapter merged in; ties stay ties."""
    base = policy.base
    config = copy.deepcopy(base.config)
    config.dtype = dtype
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = type(base)(config)
    missing, unexpected = model.load_state_dict(merged_state(base, dtype, weights), strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, f"weights that the plain model does not have: {unexpected[:5]}"
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"weights that the policy does not have: {left[:5]} {missing[:5]}"
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


@torch.no_grad()
def merged_state(base: nn.Module, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, the state of `base`, without the adapter: `weight + scale * B A` in float32, then cast to `dtype`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted: dict[str, Any] = {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        owner, _, rest = name.partition(".base_layer.")
        if owner in adapted:
            if rest == "weight":
                layer = adapted[owner]
                for active in layer.active_adapters:
                    a, b = (weights[f"{owner}.lora_{side}.{active}.weight"].float() for side in "AB")
                    delta = (b @ a) * layer.scaling[active]
                    tensor = tensor.float() + (delta.T if layer.fan_in_fan_out else delta)
            name = f"{owner}.{rest}"
        elif ".lora_" in name:
            continue
        state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()
    return state


def _flush(folder: Path) -> None:
    """Sync everything below `folder` to the disk, before it gets its name."""
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
