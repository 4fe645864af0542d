"""The part of a checkpoint that is in pieces: written by all processes at once, read back by any number of them.

torch.distributed.checkpoint, in a folder of its own beside the small tensors. Every process writes what it has, in the
background: the weights are copied first, and training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from uft.parallel.ranks import ranks

Tensor = torch.Tensor
FOLDER = "shards"

_messages: list[Any] = []


def begin(folder: Path, tensors: Mapping[str, Tensor]) -> Future[Any]:
    """Start to write; the future is done when this process's part is on the disk and, in the first one, the index."""
    if not _messages:  # apart from the training's own messages, which go on meanwhile
        _messages.append(dist.new_group(backend="gloo"))
    return dcp.async_save(dict(tensors), checkpoint_id=folder / FOLDER, process_group=_messages[0])  # type: ignore


def there(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


def read(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`model/NAME` and `optimiser/NAME/KEY`, whole or in pieces as the `parameters` are now."""
    reader = dcp.FileSystemReader(folder / FOLDER)
    found: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata), key
        part, _, name = key.partition("/")
        like = parameters.get(name if part == "model" else name.rpartition("/")[0])
        if isinstance(like, DTensor) and like.shape == stored.size:
            found[key] = torch.zeros_like(like, dtype=stored.properties.dtype, requires_grad=False)
        else:
            found[key] = torch.zeros(stored.size, dtype=stored.properties.dtype)
    dcp.load(found, storage_reader=reader, no_dist=not ranks().in_step)
    return found
