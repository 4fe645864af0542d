"""Who takes which row of an optimiser step, and how the results become one again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from uft.parallel.ranks import ranks

Tensor = torch.Tensor

BUCKET = 2**24
"""Numbers that are summed over processes in one message: 64 MiB in float32."""


def shares(sizes: Sequence[int], owners: Sequence[Hashable], count: int) -> list[list[int]]:
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


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes. One that nobody has stays None: optimisers pass over those."""
    group = ranks()
    if group.size == 1 or group.in_step:  # in pieces, they were added up on their way back
        return
    listed = list(parameters)
    present = torch.tensor([parameter.grad is not None for parameter in listed], dtype=torch.uint8)
    anywhere = group.stacked(present).amax(0).tolist()
    gradients = []
    for parameter, there in zip(listed, anywhere, strict=True):
        if there:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        group.add_(flat)
        pieces = flat.split([gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))


def finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Whether each holds nothing but numbers; of one in pieces, whether all of it does."""
    whole = [bool(torch.isfinite(_own(tensor)).all()) for tensor in tensors]
    if not ranks().in_step:
        return whole
    return [all(everywhere) for everywhere in zip(*ranks().gather(whole), strict=True)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in pieces, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
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
