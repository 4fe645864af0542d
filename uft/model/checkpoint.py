"""Checkpoints: written beside their place, checksummed, flushed to disk, then renamed. Nothing is ever pickled.

`step-000400/` holds `tensors.safetensors` (trained weights, optimiser moments, a reference that moves, objective state,
random generators, meters), `state.json` (counters, cursors of the data) and `SHA256SUMS`, as `sha256sum -c` reads it.
Of a sharded model, weights and moments are in `shards/`, one safetensors file a rank, by torch.distributed.checkpoint.
A folder with the final name is complete, and an old checkpoint is deleted only when a newer one has its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from uft.distributed import ranks, shard_like
from uft.errors import FAILED, Problem, UftError
from uft.runs import Run, as_umask_leaves, file_digest, flush, shown, writing

Tensor = torch.Tensor
TENSORS, STATE, SUMS, SHARDS = "tensors.safetensors", "state.json", "SHA256SUMS", "shards"
WEIGHTS_PREFIX = "model/"
"""Prefix of the names of trained weights."""
SUM = re.compile(r"([0-9a-f]{64})  (\S+)")
UNFINISHED, REPLACED, DISCARDED = "tmp", "replaced", "discarded"
"""Endings of hidden folders: being written; waiting until its replacement has the name; being deleted."""
DAMAGED = "damaged"
"""Ending of a checkpoint that failed its checksums, which is kept until the run has come past its step."""


class Damaged(Exception):
    """A checkpoint is not what was written."""


# --- Writing.


def begin(run: Run, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint beside its place; the hidden folder, to which shards may be added until it is published."""
    folder = _hidden(run.checkpoints_dir / f"step-{step:06d}", UNFINISHED)
    with _writing(run, folder, sum(t.numel() * t.element_size() for t in tensors.values())):
        run.checkpoints_dir.mkdir(exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        # clone: safetensors refuses tensors that share memory (tied weights), and the copy is on the CPU anyway
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    return folder


def begin_shards(folder: Path, tensors: Mapping[str, Tensor]) -> Future[Any]:
    """All ranks: write sharded tensors below `folder` in the background; done when this rank's file is on the disk.

    The tensors are copied before this returns, so training can go on.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    # the writer's own stager copies the empty storages that FSDP leaves behind, and fails
    stager = DefaultStager(StagingOptions(False, False, False, False))
    save: Any = partial(dcp.async_save, storage_writer=writer, async_stager=stager, process_group=_gloo_group())
    return save(dict(tensors))


@cache
def _gloo_group() -> dist.ProcessGroup:
    """A group apart from the training's own, whose messages go on meanwhile."""
    return dist.new_group(backend="gloo")


def publish(run: Run, folder: Path) -> Path:
    """Checksum and flush the hidden `folder`, then rename it to its final name, which is returned; an older one of that
    name is replaced. Raises UftError (code 1) where the disk is full; the earlier checkpoints are as they were."""
    place = final(folder)
    replaced = _hidden(place, REPLACED)
    with _writing(run, folder):
        as_umask_leaves(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sums = "".join(f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
        (folder / SUMS).write_text(sums, encoding="utf-8")
        for path in (*folder.rglob("*"), folder):
            flush(path)
        if place.exists():
            _replace(place, replaced)
        os.replace(folder, place)
        flush(run.checkpoints_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return place


def prune(run: Run, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` and the best, and what a killed process left unfinished."""
    complete = run.checkpoints()
    for step, folder in complete[:-keep_last]:
        if step != best_step:
            hidden = _hidden(folder, DISCARDED)
            _replace(folder, hidden)  # first: half a checkpoint must never bear a final name
            shutil.rmtree(hidden, ignore_errors=True)
    for leftover in run.checkpoints_dir.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    newest = max((step for step, _ in complete), default=-1)
    for aside in run.checkpoints_dir.glob(f"step-*.{DAMAGED}"):
        if int(aside.stem.removeprefix("step-")) <= newest:
            shutil.rmtree(aside, ignore_errors=True)


def recover(run: Run) -> None:
    """Give a replaced checkpoint its name back where the process was killed before its replacement had it.

    It is complete: it is deleted only after the replacement has the name.
    """
    for hidden in run.checkpoints_dir.glob(f".step-*.{REPLACED}"):
        if not final(hidden).exists():
            os.replace(hidden, final(hidden))


def final(hidden: Path) -> Path:
    """`.step-000400.tmp` -> `step-000400`."""
    return hidden.with_name(hidden.name[1:].rpartition(".")[0])


def _hidden(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


@contextmanager
def _writing(run: Run, folder: Path, needs: int | None = None) -> Iterator[None]:
    """Inside, a checkpoint is written. One that the disk has no room for is deleted: the run has more to write."""
    try:
        with writing(final(folder), needs):
            yield
    except UftError:
        shutil.rmtree(folder, ignore_errors=True)
        recover(run)
        raise


def _replace(folder: Path, place: Path) -> None:
    """Rename a folder; what was in its new place is deleted."""
    shutil.rmtree(place, ignore_errors=True)
    os.replace(folder, place)


# --- Reading.


def resume(run: Run, load_checkpoint: Callable[[Path], None], say: Callable[[str], None]) -> int:
    """Load the newest undamaged checkpoint on all ranks; its step, or -1 where the run has no checkpoint.

    Damaged ones are set aside, and that is said. Raises UftError (code 1) where only damaged ones are left: whether to
    begin again is for a person to decide.
    """
    ranks().on_rank0(partial(recover, run))
    for step, folder in reversed(ranks().on_rank0(run.checkpoints)):
        damage = None
        try:
            load_checkpoint(folder)
        except Damaged as error:
            damage = str(error)
        damage = next((found for found in ranks().gather_objects(damage) if found is not None), None)
        if damage is None:
            return step
        aside = folder.with_name(f"{folder.name}.{DAMAGED}")
        ranks().on_rank0(partial(_replace, folder, aside))
        say(f"{shown(folder)} is damaged ({damage}) and set aside as {aside.name}; the one before it is used")
    if any(run.checkpoints_dir.glob(f"step-*.{DAMAGED}")):
        why = "none of the run's checkpoints is what was written into it"
        again = f"to begin again from the start:  rm -r {shown(run.checkpoints_dir)}"
        raise UftError(Problem(shown(run.path), why, advice=(again,)), code=FAILED)
    return -1


def load(folder: Path, parameters: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state; tensors of shards come back sharded like `parameters`, or whole.

    Raises Damaged before anything is read that does not have its checksum, UftError for shards of an earlier format.
    """
    return _load(folder, parameters or {}), read_state(folder)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint by their names in the policy, whole, without the moments. Raises Damaged."""
    return {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in _load(folder, {}, WEIGHTS_PREFIX).items()}


def _load(folder: Path, parameters: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`."""
    for name in _sums(folder).keys() | {TENSORS}:
        _verify(folder, name)
    with safe_open(folder / TENSORS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    if (folder / SHARDS).is_dir():
        tensors |= _load_shards(folder, parameters, prefix)
    return tensors


def read_state(folder: Path) -> dict[str, Any]:
    """The counters and cursors of a checkpoint, without its tensors. Raises Damaged."""
    _verify(folder, STATE)
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{STATE}: {error}") from error


def _load_shards(folder: Path, parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if (folder / SHARDS / ".metadata").exists():
        why = "its shards are in a format that this version of uft does not read"
        how = "finish the run with the version that began it (`git_commit` in run.json), on any number of processes"
        raise UftError(Problem(shown(folder), why, advice=(how,)))
    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDS))
    tensors: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, dcp.metadata.TensorStorageMetadata), key
        if not key.startswith(prefix):
            continue
        group, _, name = key.partition("/")
        like, dtype = parameters.get(name if group == "model" else name.rpartition("/")[0]), stored.properties.dtype
        if isinstance(like, DTensor) and like.shape == stored.size:
            tensors[key] = torch.zeros_like(like, dtype=dtype)
        else:
            tensors[key] = torch.zeros(stored.size, dtype=dtype)
    dcp.load(tensors, storage_reader=reader, no_dist=not ranks().sharded)
    return tensors


def _verify(folder: Path, name: str) -> None:
    try:
        if file_digest(folder / name) != _sums(folder).get(name):
            raise Damaged(f"{name} does not have its checksum")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or name).name}: {error.strerror}") from error


def _sums(folder: Path) -> dict[str, str]:
    """File -> checksum. Raises Damaged where there are none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise Damaged(f"{SUMS}: {error.strerror}") from error
    return {found[2]: found[1] for line in lines if (found := SUM.fullmatch(line))}


# --- The moments of an optimiser.


def optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """`NAME/KEY` -> moment. By parameter name, so that their order does not matter."""
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimiser(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        parameter = parameters[name]
        if key == "step" and not tensor.is_floating_point():  # bitsandbytes counts by a plain number
            optimiser.state[parameter][key] = int(tensor)
            continue
        if key != "step":
            tensor = shard_like(tensor, parameter)
        elif optimiser.defaults.get("fused"):  # else torch keeps the step counter on the CPU
            tensor = tensor.to(parameter.device)
        optimiser.state[parameter][key] = tensor.clone()
