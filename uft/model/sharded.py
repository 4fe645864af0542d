"""A model sharded by FSDP2: `fully_shard` around every block and around the whole, filled from rank 0.

Every process holds a shard of each weight, its gradient and its moments. A block is gathered for its forward and its
backward pass; embeddings and head, which is read in chunks after the forward pass, stay gathered until the backward
pass is over. Gradients are sums over processes, as everywhere here: losses were divided by global counts before.
"""

from __future__ import annotations

from collections.abc import Callable
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


def load_sharded(
    load: Callable[[], nn.Module], adapt: Callable[[Any], nn.Module], model: Model, device: torch.device
) -> Policy:
    """A policy of which every process has a shard.

    `load` makes the full module on the CPU, in rank 0 alone; `adapt` makes a module of the same structure from an empty
    transformers model. No device ever holds the full model, nor does the memory of any other process.
    """
    group = ranks()
    full: list[nn.Module] = []

    def read() -> tuple[Any, Any, dict[str, torch.dtype], list[str]]:
        full.append(load())
        dtypes = {name: parameter.dtype for name, parameter in full[0].named_parameters()}
        base = Policy(full[0], model.dtype).base
        return base.config, base.generation_config, dtypes, getattr(base, "uft_notes", [])

    config, generation, dtypes, notes = group.on_rank0(read)
    with torch.device("meta"):
        base = auto_model().from_config(config, trust_remote_code=model.trust_remote_code)
        policy = Policy(adapt(base), model.dtype)
    base.generation_config = generation
    policy.notes += notes
    for name, parameter in policy.module.named_parameters():
        parameter.data = parameter.data.to(dtypes.pop(name))
    assert not dtypes, f"weights that the empty model does not have: {list(dtypes)[:5]}"
    shard(policy, device)
    fill(policy.module, full[0] if group.is_rank0 else None, device)
    policy.train()
    return policy


def shard(policy: Policy, device: torch.device) -> None:
    """Shard the (empty) model of `policy`: each block is a unit, the rest another."""
    group = ranks()
    assert group.sharding is not None
    mesh = init_device_mesh(device.type, (group.size,))
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if group.sharding.offload else OffloadPolicy()
    dtype = DTYPES[policy.dtype]
    # computation keeps autocast's precisions, as on one process; only the gathered weights take the forward's precision
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = narrow if dtype != torch.float32 else MixedPrecisionPolicy()
    divide = partial(fully_shard, mesh=mesh, offload_policy=offload)
    for block in blocks(policy.base):
        divide(block, reshard_after_forward=group.sharding.reshard, mp_policy=precision)
    divide(policy.base, reshard_after_forward=False)
    units = [module for module in policy.base.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    policy.base.uft_states = policy.states
    register_fsdp_forward_method(policy.base, "uft_states")
    policy.sharded_states = policy.base.uft_states

    def reshard() -> None:
        for unit in units:
            unit.reshard()

    policy.reshard = reshard


@torch.no_grad()
def fill(module: nn.Module, full: nn.Module | None, device: torch.device) -> None:
    """Give every process its shard of each weight of `full`, one weight after the other, and all of the buffers."""
    offloaded = ranks().sharding is not None and ranks().sharding.offload  # type: ignore[union-attr]
    module.to_empty(device=torch.device("cpu") if offloaded else device)
    source = dict(full.named_parameters()) if full is not None else {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor), name
        weight = source[name].data if source else torch.empty(parameter.shape, dtype=parameter.dtype)
        shards = distribute_tensor(weight.to(device), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(shards.to_local())
    buffers = dict(full.named_buffers()) if full is not None else {}
    for name, buffer in module.named_buffers():
        if buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    if offloaded:  # buffers are used on the device where the weights are gathered
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                setattr(child, name, buffer.to(device))
