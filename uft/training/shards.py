"""The part of a checkpoint that is in pieces: written by all processes at once, read back by any number of them.

torch.distributed.checkpoint, in a folder of its own beside the small tensors. Every process writes what it has, in the
background: the weights are copied first, and training goes on. The index is a pickle, by torch's own format: it is read
by names that are known, and nothing else can come out of it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from uft.errors import Problem, UftError
from uft.parallel.ranks import ranks

Tensor = torch.Tensor
FOLDER = "shards"
INDEX = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
    *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
)

_messages: list[Any] = []


def begin(folder: Path, tensors: Mapping[str, Tensor]) -> Future[Any]:
    """Start to write; the future is done when this process's part is on the disk and, in the first one, the index."""
    if not _messages:  # apart from the training's own messages, which go on meanwhile
        _messages.append(dist.new_group(backend="gloo"))
    return dcp.async_save(dict(tensors), checkpoint_id=folder / FOLDER, process_group=_messages[0])  # type: ignore


class _Names(pickle.Unpickler):
    """What an index is made of."""

    KNOWN = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in INDEX),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise UftError(Problem("checkpoint", f"its index holds {module}.{name}, which no checkpoint of ours does"))
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Names(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def there(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


def read(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`model/NAME` and `optimiser/NAME/KEY`, whole or in pieces as the `parameters` are now."""
    reader = _Reader(folder / FOLDER)
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
