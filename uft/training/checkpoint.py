"""Checkpoints: written beside, flushed, then renamed. What has the final name is whole; nothing here is ever pickled.

A checkpoint is a folder `step-000400/` with one safetensors file (trained weights, optimiser moments, objective state,
random generators, meters), one JSON file (counters, cursors of the data) and the checksums of all, as `sha256sum -c`
reads them. The old one is deleted only when the new one has its name. Of a model in pieces, weights and moments are in
a folder beside these: `uft.training.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from uft.distributed import ranks, shard_like
from uft.errors import FAILED, Problem, UftError
from uft.runs import Run, as_umask_leaves, shown, writing

Tensor = torch.Tensor
TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"
SUM = re.compile(r"([0-9a-f]{64})  (\S+)")
ASIDE = "damaged"
"""How the folder of a checkpoint ends that is not what was written; it is kept until the run has come past its step."""
WRITTEN = ".tmp"
REPLACED, DISCARDED = "replaced", "discarded"
"""How a hidden folder ends: one that waits for its replacement to get its name, and one that is being deleted."""


def nested(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix/`, without it."""
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Moments by parameter name (`names`: id(parameter) -> name), so that no order of parameters is relied upon."""
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimiser.state.items()
        for key, value in values.items()
        if value is not None
    }


def load_optimiser(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    fused = bool(optimiser.defaults.get("fused"))
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        # torch keeps the step counter on the CPU unless the kernel is fused
        step = tensor.to(parameter.device) if fused else tensor
        place = step if key == "step" else shard_like(tensor, parameter)
        optimiser.state[parameter][key] = place.clone()


def random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Publish `step-XXXXXX`; returns its folder. Saving a step that is there already replaces it.

    Raises UftError (code 1) where there is no room for it; the earlier ones are as they were.
    """
    return publish(run, begin(run, step, tensors, state))


def begin(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint beside its place; the hidden folder, to which more may be added before it is published."""
    beside = run.checkpoints_dir / f".step-{step:06d}{WRITTEN}"
    with _writing(run, beside, sum(t.numel() * t.element_size() for t in tensors.values())):
        run.checkpoints_dir.mkdir(exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        # clone: safetensors refuses tensors that share memory (tied weights), and the copy is on the CPU anyway
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, beside / TENSORS)
        (beside / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    return beside


def publish(run: Run, beside: Path) -> Path:
    """Give a checkpoint that was begun its name, once all of it is on the disk; its folder."""
    place = final(beside)
    replaced = _hidden(place, REPLACED)
    with _writing(run, beside):
        as_umask_leaves(beside)
        files = [path for path in sorted(beside.rglob("*")) if path.is_file()]
        sums = "".join(f"{_digest(path)}  {path.relative_to(beside).as_posix()}\n" for path in files)
        (beside / SUMS).write_text(sums, encoding="utf-8")
        for path in (*beside.rglob("*"), beside):
            _flush(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if place.exists():
            os.replace(place, replaced)
        os.replace(beside, place)
        _flush(run.checkpoints_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return place


def final(beside: Path) -> Path:
    """Where a checkpoint that is being written will be."""
    return beside.with_name(beside.name[1:].removesuffix(WRITTEN))


@contextmanager
def _writing(run: Run, beside: Path, needs: int | None = None) -> Iterator[None]:
    """Within, a checkpoint is written. What there is no room for is taken away: the run has more to write."""
    try:
        with writing(final(beside), needs):
            yield
    except UftError:
        shutil.rmtree(beside, ignore_errors=True)
        recover(run)
        raise


class Damaged(Exception):
    """A checkpoint is not what was written."""


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state. Raises Damaged before anything is read that is not what was written."""
    for name in _sums(folder).keys() | {TENSORS}:
        _verify(folder, name)
    return load_file(folder / TENSORS), read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The counters and cursors of a checkpoint, without its tensors. Raises Damaged."""
    _verify(folder, STATE)
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def resume(run: Run, load_checkpoint: Callable[[Path], None], say: Callable[[str], None]) -> int:
    """Load the newest whole checkpoint in all processes; its step, or -1 where the run has none at all.

    Damaged ones are set aside, and that is said. Raises UftError (code 1) where no other one is left: what the run has
    learned is lost, and to begin again is for a person to decide.
    """
    ranks().on_rank0(partial(recover, run))
    for step, folder in reversed(ranks().on_rank0(run.checkpoints)):
        damages = ranks().gather_objects(_damage(load_checkpoint, folder))
        damage = next((found for found in damages if found is not None), None)
        if damage is None:
            return step
        aside = ranks().on_rank0(partial(_set_aside, folder))
        say(f"{shown(folder)} is damaged ({damage}) and set aside as {aside.name}; the one before it is used")
    if any(run.checkpoints_dir.glob(f"step-*.{ASIDE}")):
        why = "none of the run's checkpoints is what was written into it"
        again = f"to begin again from the start:  rm -r {shown(run.checkpoints_dir)}"
        raise UftError(Problem(shown(run.path), why, advice=(again,)), code=FAILED)
    return -1


def _damage(load_checkpoint: Callable[[Path], None], folder: Path) -> str | None:
    try:
        load_checkpoint(folder)
    except Damaged as damage:
        return str(damage)
    return None


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.{ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def _verify(folder: Path, name: str) -> None:
    try:
        if _digest(folder / name) != _sums(folder).get(name):
            raise Damaged(f"{name} does not have its checksum")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or name).name}: {error.strerror}") from error


def _sums(folder: Path) -> dict[str, str]:
    """File -> checksum, as written beside them. Raises Damaged where there are none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Damaged(f"{SUMS}: {error.strerror}") from error
    return {found[2]: found[1] for line in lines if (found := SUM.fullmatch(line))}


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _hidden(folder: Path, why: str) -> Path:
    return folder.with_name(f".{folder.name}.{why}")


def _discard(folder: Path) -> None:
    """Take the name away first: half a checkpoint must never bear one."""
    hidden = _hidden(folder, DISCARDED)
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def recover(run: Run) -> None:
    """Give a checkpoint its name back if the process was killed between taking it away and naming its replacement.

    It is whole: what was replaced is deleted only after the replacement has the name.
    """
    for hidden in run.checkpoints_dir.glob(f".step-*.{REPLACED}"):
        final = hidden.with_name(hidden.name[1:].removesuffix(f".{REPLACED}"))
        if not final.exists():
            os.replace(hidden, final)


def prune(run: Run, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` and the best, and what a killed process left half done."""
    complete = run.checkpoints()
    for step, folder in complete[:-keep_last]:
        if step != best_step:
            _discard(folder)
    for leftover in run.checkpoints_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    newest = max((step for step, _ in complete), default=-1)
    for aside in run.checkpoints_dir.glob(f"step-*.{ASIDE}"):
        if int(aside.stem.removeprefix("step-")) <= newest:
            shutil.rmtree(aside, ignore_errors=True)


# --- The part of a checkpoint that is in pieces: written by all processes at once, read back by any number of them.
#
# torch.distributed.checkpoint, in a folder of its own beside the small tensors. Every process writes what it has, in
# the
# background: the weights are copied first, and training goes on. The index is a pickle, by torch's own format: it is
# read
# by names that are known, and nothing else can come out of it.


FOLDER = "shards"
INDEX = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
    *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
)

_messages: list[Any] = []


def begin_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> Future[Any]:
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


def is_sharded(folder: Path) -> bool:
    return (folder / FOLDER).is_dir()


def read_sharded(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    dcp.load(found, storage_reader=reader, no_dist=not ranks().sharded)
    return found
