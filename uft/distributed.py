"""The processes of a run. Alone, everything here gives back what it was given: few need to know how many there are.

Two ways to work together. *Apart*: every process has the whole model, may do another part of a task, and tells the
others what came of it. *In step*: the model is in pieces, every forward pass needs all processes, so all do the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

# --- Who this process is, by what torch's launcher put into its environment, and what it leaves for whoever started
# it.
#
# No torch here: a launcher reads it, and workers before they have imported anything.


FOLDER = "UFT_FAILURES"
"""Where the processes of a run leave word for the one that started them."""


class PeerLost(Exception):
    """Another process of the run ended: whatever it was asked for will never come."""


def launched() -> int:
    """How many processes torch's launcher started; 1 where it started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_rank() -> int:
    """This process among those of its machine: which of its devices it takes."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def note(text: str) -> None:
    """Why this process failed. The first one says so itself; nobody would hear the others."""
    _write(f"why-{rank()}", text)


def note_code(code: int) -> None:
    """The exit code of the request, which is the first process's."""
    if rank() == 0:
        _write("code", str(code))


def reasons(folder: Path) -> dict[int, str]:
    """Process -> what it said."""
    files = sorted(folder.glob("why-*"))
    return {int(file.name.removeprefix("why-")): file.read_text(encoding="utf-8") for file in files}


def noted_code(folder: Path) -> int | None:
    file = folder / "code"
    return int(file.read_text()) if file.is_file() else None


def _write(name: str, text: str) -> None:
    folder = os.environ.get(FOLDER)
    if folder:
        Path(folder, name).write_text(text, encoding="utf-8", errors="replace")


Tensor = torch.Tensor
T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: as long as the first one may need to write a large model."""


@dataclass(frozen=True)
class Sharding:
    """How a model is in pieces: every process holds a share of every weight, its gradient and its moments."""

    reshard: bool = True  # give a layer's weights back after its forward pass, and gather them again for the backward
    offload: bool = False  # keep the shares in the CPU's memory while they are not at work


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. Whatever is asked of `Ranks` is asked by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    sharding: Sharding | None = None  # of the model, if it is in pieces

    @property
    def sharded(self) -> bool:
        """Whether all must make the same forward passes."""
        return self.sharding is not None

    @property
    def is_rank0(self) -> bool:
        """Whether this one writes files, lines and metrics."""
        return self.rank == 0

    def gather_objects(self, value: T) -> list[T]:
        """What each of them has, in order of ranks. Sent pickled, among processes of one program."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _listening_for_losses():
            dist.all_gather_object(found, value)
        return found

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(n,) of each -> (ranks, n)."""
        if self.size == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        with _listening_for_losses():
            dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """The sum over all of them, in place."""
        if self.size > 1:
            with _listening_for_losses():
                dist.all_reduce(tensor)

    def all_reduce_max(self, value: int) -> int:
        if self.size == 1:
            return value
        number = torch.tensor(int(value))
        with _listening_for_losses():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def barrier(self) -> None:
        """Until all have come here."""
        self.all_reduce_max(0)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, alone; the others wait. An exception there is raised everywhere."""
        if self.size == 1:
            return work()
        kept: tuple[T | None, Exception | None] = (None, None)
        if self.is_rank0:
            try:
                with _as(ALONE):
                    kept = (work(), None)
            except Exception as error:
                kept = (None, error)
        result, problem = self.gather_objects(kept)[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # one of the two is there

    def map_shards(self, things: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """`work` on all things, a result for each: everybody does a share. What one raises, all raise."""
        if self.size == 1 or self.sharded:
            return list(work(things))
        found: Sequence[R] = ()
        problem: Exception | None = None
        try:
            found = work(things[self.rank :: self.size])
        except PeerLost:
            raise
        except Exception as error:
            problem = error
        shares = self.gather_objects((found, problem))
        for _, raised in shares:
            if raised is not None:
                raise raised
        results: list[R | None] = [None] * len(things)
        for rank, (share, _) in enumerate(shares):
            results[rank :: self.size] = share
        return results  # type: ignore[return-value]  # every place is filled


ALONE = Ranks()
_now = ALONE
_meanwhile = threading.local()  # what one thread does by itself is nothing to the others of its process


def ranks() -> Ranks:
    """This process among the others of its run."""
    return getattr(_meanwhile, "group", _now)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Among the processes that the environment tells of, by messages between CPUs and, where there are any, GPUs."""
    global _now
    if launched() == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with _listening_for_losses():
        dist.init_process_group(backend, timeout=PATIENCE)
    _now = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield _now
        dist.destroy_process_group()
    finally:
        _now = ALONE


def set_sharding(sharding: Sharding | None) -> None:
    """From here on models are loaded in pieces, and every forward pass is made by all together; None: apart again."""
    global _now
    _now = replace(_now, sharding=sharding if _now.size > 1 else None)


@contextmanager
def single_process() -> Iterator[None]:
    """What this process does in here concerns the others only where the model is in pieces."""
    with _as(ranks() if ranks().sharded else ALONE):
        yield


@contextmanager
def _as(group: Ranks) -> Iterator[None]:
    before = vars(_meanwhile).copy()
    _meanwhile.group = group
    try:
        yield
    finally:
        del _meanwhile.group
        vars(_meanwhile).update(before)


@contextmanager
def _listening_for_losses() -> Iterator[None]:
    """torch tells of a lost connection by errors of several kinds, all of them RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error).strip().splitlines()[0]) from error


# --- Who takes which row of an optimiser step, and how the results become one again.


BUCKET = 2**24
"""Numbers that are summed over processes in one message: 64 MiB in float32."""


def balanced_shards(sizes: Sequence[int], owners: Sequence[Hashable], count: int) -> list[list[int]]:
    """Positions of the things that each of `count` processes takes, in their order; balanced, the first never idle.

    Things of one owner stay together. The largest goes first to whoever has least: a rule that every process applies
    to the same numbers, so that nobody is told anything.
    """
    groups: dict[Hashable, list[int]] = {}
    for position, owner in enumerate(owners):
        groups.setdefault(owner, []).append(position)
    weights = {owner: sum(sizes[position] for position in group) for owner, group in groups.items()}
    loads, taken = [0] * count, [list[int]() for _ in range(count)]
    for owner in sorted(groups, key=lambda owner: -weights[owner]):
        least = loads.index(min(loads))
        loads[least] += weights[owner]
        taken[least] += groups[owner]
    return [sorted(positions) for positions in taken]


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes. One that nobody has stays None: optimisers pass over those."""
    group = ranks()
    if group.size == 1 or group.sharded:  # in pieces, they were added up on their way back
        return
    listed = list(parameters)
    present = torch.tensor([parameter.grad is not None for parameter in listed], dtype=torch.uint8)
    anywhere = group.all_gather(present).amax(0).tolist()
    gradients = []
    for parameter, there in zip(listed, anywhere, strict=True):
        if there:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        group.all_reduce_sum(flat)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def all_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each holds nothing but numbers; of one in pieces, whether all of it does."""
    whole = [bool(torch.isfinite(_own(tensor)).all()) for tensor in tensors]
    if not ranks().sharded:
        return whole
    return [all(everywhere) for everywhere in zip(*ranks().gather_objects(whole), strict=True)]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in pieces, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, where `like` is and in pieces as that is."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        moved = tensor.to(like.to_local().device)
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def _own(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype, up to BUCKET numbers together."""
    found: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not found or found[-1][0].dtype != tensor.dtype or tensor.numel() > room:
            found.append([])
            room = BUCKET
        found[-1].append(tensor)
        room -= tensor.numel()
    return found
