"""Will it fit: an estimate by part for the start card, and what was really used."""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from uft.model.forward import Policy
from uft.model.head import CHUNK_ELEMENTS

MOMENTS = {"adamw": 2, "rmsprop": 1, "sgd": 0}
"""Float32 numbers an optimiser keeps per trained weight (momentum adds one to RMSprop and SGD)."""


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
    recompute: bool  # gradient checkpointing


def shape_of(policy: Policy) -> Shape:
    config: Any = policy.base.config.get_text_config()
    trained = policy.trainable().values()
    return Shape(
        weight_bytes=sum(p.numel() * p.element_size() for p in policy.module.parameters()),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        trained=sum(p.numel() for p in trained),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=policy.embedding_rows,
        activation_bytes=4 if policy.dtype == "float32" else 2,
        recompute=policy.recomputes,
    )


def estimate(
    shape: Shape, *, optimiser: str, momentum: bool, micro_batch_tokens: int, reference_mode: str | None
) -> dict[str, int]:
    """Bytes by part. Weights, gradients, moments and the reference are exact; activations are a rule of thumb.

    Per token and layer a gated transformer keeps about 10 vectors of the hidden size (norms, queries, keys, values,
    attention output, residuals) and 4 of the intermediate one; recomputing keeps one hidden vector per layer, and one
    layer in full. Attention weights are not kept (SDPA and FlashAttention).
    """
    hidden = shape.hidden * shape.activation_bytes
    layer = 10 * hidden + 4 * shape.intermediate * shape.activation_bytes
    per_token = shape.layers * hidden + layer if shape.recompute else shape.layers * layer
    head_rows = min(micro_batch_tokens, max(1, CHUNK_ELEMENTS // shape.vocabulary))
    moments = MOMENTS[optimiser] + (momentum and optimiser != "adamw")
    return {
        "weights": shape.weight_bytes,
        "gradients": shape.trained_bytes,
        "optimiser": 4 * shape.trained * moments,
        "activations": micro_batch_tokens * per_token,
        "head": 2 * 4 * head_rows * shape.vocabulary,  # a chunk of logits and its gradient
        "reference": shape.weight_bytes if reference_mode == "copy" else 0,
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: by tensors on a GPU, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed for the next tensor; whether it listens. For the rest of the process.

    By default every block of 32 MiB and more comes from the kernel and goes back to it, page by page, zeroed each time:
    that is a chunk of logits, several times over.
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
