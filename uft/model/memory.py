"""Memory: an estimate by part for the start card, and measurements of the peak."""

from __future__ import annotations

import ctypes
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uft.config.schema import Config
from uft.model.head import chunk_rows
from uft.model.policy import DTYPES, Policy, blocks
from uft.model.precision import bytes_of, weights_in

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
HUGE = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that memory depends on."""

    weight_bytes: int  # of all weights as they are stored
    trained_bytes: int  # of the trained ones
    trained: int  # trained weights
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    activation_bytes: int  # per number: 4 in float32, 2 in bfloat16
    recomputed: int = 0  # layers whose activations are recomputed in the backward pass
    shared_bytes: int = 0  # of weights outside the blocks: embeddings and head, as they are stored
    block_bytes: int = 0  # of the largest block
    head_rows: int = 0  # of a chunk of logits; 0: as on a CPU
    cast_bytes: int = 0  # of bfloat16 copies of float32 weights
    stored_bytes: float = 4  # per weight of a block
    offloaded: bool = False  # activations are in the CPU's memory, but for the layer at work
    hidden_trained: int = 0  # trained weights in matrices of blocks
    factors: int = 0  # rows and columns of trained matrices, and trained weights outside of matrices


MOMENTS: dict[str, Callable[[Shape], int]] = {
    "adamw": lambda shape: 8 * shape.trained,
    "adamw8bit": lambda shape: 2 * shape.trained + 8 * shape.trained // 256,  # two in a byte each, with their scales
    "adafactor": lambda shape: 4 * shape.factors,
    "muon": lambda shape: 8 * shape.trained - 4 * shape.hidden_trained,
    "rmsprop": lambda shape: 4 * shape.trained,
    "sgd": lambda shape: 0,
}
"""Bytes of an optimiser's moments (momentum adds one in float32 to RMSprop and SGD)."""


def shape_of(policy: Policy) -> Shape:
    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(map(bytes_of, parameters))

    config: Any = policy.base.config.get_text_config()
    all_blocks = blocks(policy.base)
    widths = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # Gemma 3n: one a layer
    weights, layers = size(policy.module.parameters()), [size(block.parameters()) for block in all_blocks]
    names, trainable = hidden_matrices(policy), policy.trainable()
    numbers = sum(weights_in(parameter) for block in all_blocks for parameter in block.parameters())
    return Shape(
        weight_bytes=weights,
        trained_bytes=size(trainable.values()),
        trained=sum(p.numel() for p in trainable.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=widths if isinstance(widths, int) else max(widths),
        vocabulary=policy.embedding_rows,
        activation_bytes=4 if policy.dtype == "float32" else 2,
        recomputed=sum(getattr(block, "gradient_checkpointing", False) for block in all_blocks),
        stored_bytes=sum(layers) / numbers if numbers else next(iter(policy.base.parameters())).element_size(),
        head_rows=chunk_rows(policy.embedding_rows, policy.device),
        cast_bytes=sum(2 * copy.layer.weight.numel() for copy in policy.narrow),
        offloaded=policy.offloads,
        hidden_trained=sum(trainable[name].numel() for name in names),
        factors=sum(
            sum(p.shape[-2:]) * math.prod(p.shape[:-2]) if p.ndim > 1 else p.numel() for p in trainable.values()
        ),
        shared_bytes=weights - sum(layers),
        block_bytes=max(layers, default=0),
    )


def hidden_matrices(policy: Policy) -> set[str]:
    """Names of the trained matrices within blocks: what Muon updates."""
    inside = {id(p) for block in blocks(policy.base) for p in block.parameters() if p.ndim == 2}
    return {name for name, parameter in policy.trainable().items() if id(parameter) in inside}


def estimate(
    config: Config, shape: Shape, tokens: int, reference_mode: str | None = None, other: Shape | None = None
) -> dict[str, int]:
    """Bytes on each device by part. Weights, gradients, moments and the reference are exact; activations are a rule of
    thumb. `tokens`: of the largest micro-batch; `other`: the model compared with, where it is not the policy's.

    Per token and layer a gated transformer keeps about 10 vectors of the hidden size (norms, queries, keys, values,
    attention output, residuals) and 4 of the intermediate one; recomputing keeps one hidden vector per layer, and one
    layer in full, and so does keeping activations elsewhere. Attention weights are not kept (SDPA and FlashAttention).

    Of a sharded model, a device holds besides its shard the gathered weights: embeddings and head with their gradient,
    and two blocks, one computing and one in transfer.
    """
    optim, hardware = config.optim, config.hardware
    hidden = shape.hidden * shape.activation_bytes
    layer = 10 * hidden + 4 * shape.intermediate * shape.activation_bytes
    again = shape.recomputed
    if shape.offloaded:
        again, hidden = shape.layers, 0
    per_token = again * hidden + (shape.layers - again + bool(again)) * layer
    head_rows = min(tokens, shape.head_rows or chunk_rows(shape.vocabulary, torch.device("cpu")))
    with_momentum = optim.momentum > 0 and optim.name in ("rmsprop", "sgd")
    moments = MOMENTS[optim.name](shape) + 4 * shape.trained * with_momentum
    sharded = hardware.sharding == "full"
    share = hardware.processes * hardware.nodes if sharded else 1
    kept = 0 if sharded and hardware.offload else 1
    travelling = int(2 * shape.block_bytes * shape.activation_bytes / shape.stored_bytes)
    gathered = (2 if shape.trained_bytes else 1) * (shape.shared_bytes + travelling)
    return {
        "weights": kept * shape.weight_bytes // share,
        "gradients": kept * shape.trained_bytes // share,
        "optimiser": kept * moments // share,
        "copies in bfloat16": shape.cast_bytes,
        "activations": tokens * per_token,
        "head": 2 * 4 * head_rows * shape.vocabulary,  # a chunk of logits and its gradient
        "reference": kept * (other or shape).weight_bytes // share if reference_mode == "copy" else 0,
        "gathered": gathered if sharded else 0,
    }


def step_flops(shape: Shape, tokens: int, supervised: int, *, trained_share: float = 1.0) -> float:
    """Floating-point operations of a forward and a backward pass: two a weight and token forward, two backward to the
    inputs, two more to the weights that are trained; the head on supervised tokens alone; attention left out."""
    body = (shape.weight_bytes - shape.shared_bytes) / shape.stored_bytes
    head = shape.vocabulary * shape.hidden
    return (4 + 2 * trained_share) * (body * tokens + head * supervised)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second of the fastest of some products of large matrices: what else the device does
    meanwhile slows others."""
    left, fastest = torch.ones(size, size, device=device, dtype=dtype), math.inf
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or fastest == math.inf:
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


PEAKS = {
    **{"B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12},
    **{"L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "4090": 165e12, "3090": 71e12},
}
"""Floating-point operations a second of dense products in bfloat16, by a part of the name (NVIDIA's data sheets)."""


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a device: known of a GPU, else that of a product that is timed now (0.1 s)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((rate for part, rate in PEAKS.items() if part in name), None) if dtype == torch.bfloat16 else None
    return known or matrix_rate(device, dtype, 512 if device.type == "cpu" else 4096, 0.1)


@dataclass(frozen=True)
class Utilisation:
    """MFU: the share of what devices can do at best that goes into a policy's own products (PaLM, arXiv 2204.02311,
    appendix B), without attention; neither recomputing nor further passes of an objective or a reference count."""

    shape: Shape
    trained_share: float
    peak: float  # of all processes together

    @classmethod
    def of(cls, policy: Policy, processes: int) -> Utilisation:
        shape, rate = shape_of(policy), peak_rate(policy.device, DTYPES[policy.dtype])
        return cls(shape, shape.trained / max(1, policy.size), processes * rate)

    def __call__(self, tokens: int, supervised: int, seconds: float) -> float:
        work = step_flops(self.shape, tokens, supervised, trained_share=self.trained_share)
        return work / (self.peak * max(seconds, 1e-9))


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: by tensors on a GPU, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


def used_memory(device: torch.device) -> int:
    """Bytes in use now, measured like `peak_memory`; where the system does not tell, the peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory(device)
    return pages * resource.getpagesize()


def keep_freed_memory() -> bool:
    """Make glibc's malloc reuse freed memory for the next tensor, for the rest of the process; returns whether it does.

    By default every block of 32 MiB and more comes from the kernel and goes back to it, page by page, zeroed each time:
    that is the size of a chunk of logits.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(option, HUGE) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def device_memory(device: torch.device) -> dict[str, float]:
    """Gigabytes in use at most so far and in all, of a GPU; {} where memory is the machine's."""
    if device.type != "cuda":
        return {}
    total = torch.cuda.get_device_properties(device).total_memory
    return {"memory_gb": peak_memory(device) / 1e9, "memory_total_gb": total / 1e9}
