"""What a process runs on: its device, its threads and its kernels."""

from __future__ import annotations

import os

import torch

from uft.config.schema import Config, Hardware
from uft.errors import Problem, UftError
from uft.model.forward import Policy
from uft.model.memory import keep_freed_memory
from uft.parallel.environment import launched, local_rank
from uft.parallel.ranks import Sharding

SMALL_MODEL = 3_000_000
"""Parameters below which a second CPU thread made no run faster: at 0.3 million it cost a tenth of the speed."""

PASS, CPU_PASS = 8192, 768
"""Tokens of a forward pass unless asked otherwise. A GPU wants to be filled; a CPU is nearly as fast in small passes,
which take much less memory: see docs/performance.md."""


def choose_device(hardware: Hardware) -> torch.device:
    """The device asked for, or the best there is. Sets threads and kernels on the way."""
    name, there = hardware.device, _available()
    if name == "auto":
        name = there[0]
    if name not in there:
        usable = ", ".join(there)
        raise UftError(Problem(f"hardware.device={name}", "this machine has none", advice=(f"there is: {usable}",)))
    if name == "cpu" and hardware.keep_memory:
        keep_freed_memory()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = hardware.tf32
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if name == "cuda" and launched() > 1:
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device(name)


def _available() -> list[str]:
    """The kinds of devices of this machine, the best first."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, there in kinds.items() if there]


def tokens_per_pass(config: Config) -> int:
    """`train.micro_batch_tokens`, or what suits the device."""
    device = config.hardware.device
    on_cpu = (_available()[0] if device == "auto" else device) == "cpu"
    return config.train.micro_batch_tokens or (CPU_PASS if on_cpu else PASS)


def sharding_of(hardware: Hardware) -> Sharding | None:
    """How the configuration wants models in pieces, if it does."""
    return Sharding(hardware.reshard, hardware.offload) if hardware.sharding == "full" else None


def settle_threads(hardware: Hardware, policy: Policy) -> None:
    """One CPU thread for a small model unless asked otherwise: more would wait for each other, not work."""
    size = sum(parameter.numel() for parameter in policy.module.parameters())
    if hardware.threads is None and policy.device.type == "cpu" and size < SMALL_MODEL:
        torch.set_num_threads(1)
