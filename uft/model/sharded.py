"""A model in pieces: FSDP2's `fully_shard` around every block and around the whole, filled from the first process.

Every process holds a share of each weight, its gradient and its moments. A block is gathered for its forward and its
backward pass; embeddings and head, which is read in chunks after the forward pass, stay gathered until the backward
pass is over. Gradients are sums over processes, as everywhere here: losses were divided by global counts before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from uft.config.schema import Model
from uft.distributed import ranks
from uft.model.policy import DTYPES, Policy, auto_model, blocks

Tensor = torch.Tensor


def in_pieces(
    load: Callable[[], nn.Module], dress: Callable[[Any], nn.Module], model: Model, device: torch.device
) -> Policy:
    """A policy of which every process has a share.

    `load` makes the whole module on the CPU, which happens in the first process alone; `dress` makes the like of it of
    an empty transformers model. No device ever holds the whole, and no other process's memory.
    """
    group = ranks()
    whole: list[nn.Module] = []

    def read() -> tuple[Any, Any, dict[str, torch.dtype]]:
        whole.append(load())
        dtypes = {name: parameter.dtype for name, parameter in whole[0].named_parameters()}
        base = Policy(whole[0], model.dtype).base
        return base.config, base.generation_config, dtypes

    config, generation, dtypes = group.on_rank0(read)
    with torch.device("meta"):
        base = auto_model().from_config(config, trust_remote_code=model.trust_remote_code)
        policy = Policy(dress(base), model.dtype)
    base.generation_config = generation
    for name, parameter in policy.module.named_parameters():
        parameter.data = parameter.data.to(dtypes.pop(name))
    assert not dtypes, f"weights that the empty model does not have: {list(dtypes)[:5]}"
    shard(policy, device)
    fill(policy.module, whole[0] if group.is_rank0 else None, device)
    policy.train()
    return policy


def shard(policy: Policy, device: torch.device) -> None:
    """Put the (empty) model of `policy` in pieces, each block a unit, the rest another."""
    group = ranks()
    assert group.sharding is not None
    mesh = init_device_mesh(device.type, (group.size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if group.sharding.offload else OffloadPolicy()
    dtype = DTYPES[policy.dtype]
    # what is computed stays what autocast computes on one process; only the weights travel in the forward's precision
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = narrow if dtype != torch.float32 else MixedPrecisionPolicy()
    whole = partial(fully_shard, mesh=mesh, offload_policy=offload)
    for block in blocks(policy.base):
        whole(block, reshard_after_forward=group.sharding.reshard, mp_policy=precision)
    whole(policy.base, reshard_after_forward=False)
    for module in policy.base.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    policy.base.uft_states = policy.states
    register_fsdp_forward_method(policy.base, "uft_states")
    policy.through, policy.give_back = policy.base.uft_states, partial(_give_back, policy)


@torch.no_grad()
def fill(module: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give every process its share of each weight of `whole`, one weight after the other, and all of the buffers."""
    offloaded = ranks().sharding is not None and ranks().sharding.offload  # type: ignore[union-attr]
    module.to_empty(device=torch.device("cpu") if offloaded else device)
    source = dict(whole.named_parameters()) if whole is not None else {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), name
        full = source[name].data if source else torch.empty(parameter.shape, dtype=parameter.dtype)
        shares = distribute_tensor(full.to(device), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shares.to_local())
    buffers = dict(whole.named_buffers()) if whole is not None else {}
    for name, buffer in module.named_buffers():
        if buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    if offloaded:  # buffers work where the weights are gathered
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                setattr(child, name, buffer.to(device))


def _give_back(policy: Policy) -> None:
    """Free what is still gathered after a forward pass that no backward pass follows."""
    for unit in units(policy):
        unit.reshard()  # type: ignore[operator]  # every unit is an FSDPModule


def units(policy: Policy) -> list[nn.Module]:
    """What is gathered at a time: every block, then the rest."""
    inner = [m for m in policy.base.modules() if isinstance(m, FSDPModule) and m is not policy.base]
    return [*inner, policy.base]


@contextmanager
def gathered(unit: nn.Module) -> Iterator[None]:
    """The weights of one unit whole, in every process."""
    assert isinstance(unit, FSDPModule)
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
