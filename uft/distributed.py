"""Collective operations over the ranks of a run. With one rank, every operation returns what it is given.

Replicated: every rank has whole models, may do another part of a task, and tells the others the result. Sharded: the
model's weights are divided, every forward pass needs all ranks, so all of them do the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from uft.environment import PeerLost, launched
from uft.errors import first_line

Tensor = torch.Tensor
T = TypeVar("T")
R = TypeVar("R")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others: as long as rank 0 may need to write a large model."""


@dataclass(frozen=True)
class Sharding:
    """Every rank holds a shard of every weight, its gradient and its moments."""

    reshard: bool = True  # free a layer's gathered weights after its forward pass, and gather them for the backward
    offload: bool = False  # keep the shards in the CPU's memory between uses


@dataclass(frozen=True)
class Ranks:
    """This rank and its group. Every operation has to be called by all ranks, in the same order.

    Raises PeerLost where another process has ended.
    """

    rank: int = 0
    size: int = 1
    sharding: Sharding | None = None  # of the model, if it is sharded

    @property
    def sharded(self) -> bool:
        """Whether all ranks must make the same forward passes."""
        return self.sharding is not None

    @property
    def is_rank0(self) -> bool:
        """Whether this rank writes files, lines and metrics."""
        return self.rank == 0

    def gather_objects(self, value: T) -> list[T]:
        """Each rank's value, by rank. Sent pickled, among processes of one program."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _lost_peers():
            dist.all_gather_object(found, value)
        return found

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(n,) of each -> (ranks, n)."""
        if self.size == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        with _lost_peers():
            dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum in place."""
        if self.size > 1:
            with _lost_peers():
                dist.all_reduce(tensor)

    def all_reduce_max(self, value: int) -> int:
        if self.size == 1:
            return value
        number = torch.tensor(int(value))
        with _lost_peers():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def barrier(self) -> None:
        self.all_reduce_max(0)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """The result of `work`, which rank 0 does alone while the others wait. Its exception is raised on all ranks."""
        if self.size == 1:
            return work()
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.is_rank0:
            try:
                with _within(ALONE):
                    outcome = (work(), None)
            except Exception as error:
                outcome = (None, error)
        result, problem = self.gather_objects(outcome)[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # one of the two is there

    def map_shards(self, things: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """`work` on all things, a result for each; every rank does a share. An exception is raised on all ranks."""
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
        results: list[R | None] = [None] * len(things)
        for rank, (share, raised) in enumerate(self.gather_objects((found, problem))):
            if raised is not None:
                raise raised
            results[rank :: self.size] = share
        return results  # type: ignore[return-value]  # every place is filled


ALONE = Ranks()
_now = ALONE
_override = threading.local()  # of one thread, while the other threads of the process go on


def ranks() -> Ranks:
    """This rank and its group."""
    return getattr(_override, "group", _now)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torch's launcher started, by gloo between CPUs and NCCL between GPUs."""
    global _now
    if launched() == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with _lost_peers():
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    _now = Ranks(dist.get_rank(), dist.get_world_size())
    try:
        yield _now
        dist.destroy_process_group()
    finally:
        _now = ALONE


def set_sharding(sharding: Sharding | None) -> None:
    """From here on models are loaded sharded, and all ranks make every forward pass together; None: replicated."""
    global _now
    _now = replace(_now, sharding=sharding if _now.size > 1 else None)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside, this rank works by itself, unless the model is sharded."""
    with _within(ranks() if ranks().sharded else ALONE):
        yield


@contextmanager
def _within(group: Ranks) -> Iterator[None]:
    before = vars(_override).copy()
    _override.group = group
    try:
        yield
    finally:
        del _override.group
        vars(_override).update(before)


@contextmanager
def _lost_peers() -> Iterator[None]:
    """torch reports a lost connection by errors of several kinds, all of them RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(first_line(error)) from error


# --- The rows of an optimiser step, and gradients.


BUCKET = 2**24
"""Numbers that are summed over ranks in one message: 64 MiB in float32."""


def balanced_shards(sizes: Sequence[int], owners: Sequence[Hashable], count: int) -> list[list[int]]:
    """The positions of the things that each of `count` ranks takes, in order; balanced by size, rank 0 never idle.

    Things of one owner stay together. The largest group goes first, to the rank that has least: every rank computes the
    same from the same numbers, without a message.
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
    """Sum gradients over replicated ranks, in buckets. One that no rank has stays None: optimisers skip those."""
    group = ranks()
    if group.size == 1 or group.sharded:  # FSDP summed them in the backward pass
        return
    parameters = list(parameters)
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    anywhere = group.all_gather(present).amax(0).tolist()
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter, there in zip(parameters, anywhere, strict=True):
        if not there:
            continue
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = gradient
        if not buckets or buckets[-1][0].dtype != gradient.dtype or gradient.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(gradient)
        room -= gradient.numel()
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        group.all_reduce_sum(flat)
        for gradient, summed in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def all_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each holds finite numbers only; of a sharded one, whether all shards do."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    finite = [bool(torch.isfinite(tensor).all()) for tensor in local]
    if not ranks().sharded:
        return finite
    return [all(everywhere) for everywhere in zip(*ranks().gather_objects(finite), strict=True)]


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, on the device of `like` and sharded as that is."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        moved = tensor.to(like.to_local().device)
        return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)
