"""The folder that a run leaves behind: plain Hugging Face, loaded by transformers alone."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from uft.distributed import ranks
from uft.errors import UftError
from uft.heartbeat import activity
from uft.model.policy import Policy
from uft.model.sharded import gathered, units
from uft.runs import as_umask_leaves, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor


@activity("the model was exported", moving=True)
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
    if ranks().is_rank0:
        shutil.rmtree(beside, ignore_errors=True)
    in_pieces, needs = ranks().sharded, sum(p.numel() for p in policy.module.parameters()) * dtype.itemsize
    try:
        if ranks().is_rank0:
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

        ranks().on_rank0(write)
    except UftError:
        if ranks().is_rank0:
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


# --- The exported folder of a model in pieces: gathered block by block, written file by file by the first process.


FILE_BYTES = 5_000_000_000
"""What the first process holds at most besides one block, and how large a file becomes."""


def write_pieces(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Weights, configuration, generation settings and adapter to `folder`. All take part, the first process writes."""

    files, adapter = _Files(folder), dict[str, Tensor]()
    for unit in units(policy):
        with gathered(unit):
            if not ranks().is_rank0:
                continue
            own = dict(_weights(policy.base, unit))
            files.add(merged_state(policy.base, dtype, own))
            adapter |= {name: tensor.cpu().clone() for name, tensor in own.items() if ".lora_" in name}
    if ranks().is_rank0:
        files.finish()
        config = copy.deepcopy(policy.base.config)
        config.dtype = dtype
        config.save_pretrained(folder)
        policy.base.generation_config.save_pretrained(folder)
        if policy.has_adapter:
            peft_model: Any = policy.module
            named = {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}
            peft_model.save_pretrained(folder / "adapter", state_dict=named, save_embedding_layers=False)


def _weights(base: nn.Module, unit: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in `base`, tensor) of what is gathered with `unit`; tied weights once. Buffers go with the last unit."""
    mine = {id(p) for p in unit.parameters()}
    for name, parameter in base.named_parameters():
        if id(parameter) in mine and not hasattr(parameter, "placements"):
            yield name, parameter.detach()
    if unit is base:
        kept = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in base.named_modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        }
        yield from ((name, buffer) for name, buffer in base.named_buffers() if name in kept)


@dataclass
class _Files:
    """safetensors files of at most FILE_BYTES and their index, as transformers reads them."""

    folder: Path
    waiting: dict[str, Tensor] = field(default_factory=dict)
    names: list[list[str]] = field(default_factory=list)
    bytes: int = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self.waiting and sum(t.numel() * t.element_size() for t in self.waiting.values()) + size > FILE_BYTES:
                self._write()
            self.waiting[name] = tensor.contiguous().clone()
            self.bytes += size

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.waiting, self._part(len(self.names)), metadata={"format": "pt"})
        self.names.append(list(self.waiting))
        self.waiting = {}

    def _part(self, number: int) -> Path:
        return self.folder / f".part-{number}.safetensors"

    def finish(self) -> None:
        self._write()
        count = len(self.names)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        places = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for number, place in enumerate(places):
            self._part(number).rename(self.folder / place)
        index = {name: place for names, place in zip(self.names, places, strict=True) for name in names}
        text = json.dumps({"metadata": {"total_size": self.bytes}, "weight_map": index}, indent=2)
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
