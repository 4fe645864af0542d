"""The exported folder of a model in pieces: gathered block by block, written file by file by the first process."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from uft.model.forward import Policy
from uft.model.sharded import gathered, units
from uft.parallel.ranks import ranks

Tensor = torch.Tensor

FILE_BYTES = 5_000_000_000
"""What the first process holds at most besides one block, and how large a file becomes."""


def write_pieces(policy: Policy, folder: Path, dtype: torch.dtype) -> None:
    """Weights, configuration, generation settings and adapter to `folder`. All take part, the first process writes."""
    from uft.model.export import merged_state

    files, adapter = _Files(folder), dict[str, Tensor]()
    for unit in units(policy):
        with gathered(unit):
            if not ranks().first:
                continue
            own = dict(_weights(policy.base, unit))
            files.add(merged_state(policy.base, dtype, own))
            adapter |= {name: tensor.cpu().clone() for name, tensor in own.items() if ".lora_" in name}
    if ranks().first:
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
