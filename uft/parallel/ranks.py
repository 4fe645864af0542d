"""The processes of a run. Alone, everything here gives back what it was given: few need to know how many there are.

Two ways to work together. *Apart*: every process has the whole model, may do another part of a task, and tells the
others what came of it. *In step*: the model is in pieces, every forward pass needs all processes, so all do the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from uft.parallel.environment import PeerLost, launched

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
    def in_step(self) -> bool:
        """Whether all must make the same forward passes."""
        return self.sharding is not None

    @property
    def first(self) -> bool:
        """Whether this one writes files, lines and metrics."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each of them has, in order of ranks. Sent pickled, among processes of one program."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _listening_for_losses():
            dist.all_gather_object(found, value)
        return found

    def stacked(self, tensor: Tensor) -> Tensor:
        """(n,) of each -> (ranks, n)."""
        if self.size == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.size)]
        with _listening_for_losses():
            dist.all_gather(rows, tensor.contiguous())
        return torch.stack(rows)

    def add_(self, tensor: Tensor) -> None:
        """The sum over all of them, in place."""
        if self.size > 1:
            with _listening_for_losses():
                dist.all_reduce(tensor)

    def largest(self, value: int) -> int:
        if self.size == 1:
            return value
        number = torch.tensor(int(value))
        with _listening_for_losses():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def wait(self) -> None:
        """Until all have come here."""
        self.largest(0)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, alone; the others wait. An exception there is raised everywhere."""
        if self.size == 1:
            return work()
        kept: tuple[T | None, Exception | None] = (None, None)
        if self.first:
            try:
                with _as(ALONE):
                    kept = (work(), None)
            except Exception as error:
                kept = (None, error)
        result, problem = self.gather(kept)[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # one of the two is there

    def spread(self, things: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """`work` on all things, a result for each: everybody does a share. What one raises, all raise."""
        if self.size == 1 or self.in_step:
            return list(work(things))
        found: Sequence[R] = ()
        problem: Exception | None = None
        try:
            found = work(things[self.rank :: self.size])
        except PeerLost:
            raise
        except Exception as error:
            problem = error
        shares = self.gather((found, problem))
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
def joined() -> Iterator[Ranks]:
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


def keep_step(sharding: Sharding | None) -> None:
    """From here on models are loaded in pieces, and every forward pass is made by all together; None: apart again."""
    global _now
    _now = replace(_now, sharding=sharding if _now.size > 1 else None)


@contextmanager
def by_itself() -> Iterator[None]:
    """What this process does in here concerns the others only where the model is in pieces."""
    with _as(ranks() if ranks().in_step else ALONE):
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
