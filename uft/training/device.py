"""What a process runs on: its device, its threads and its kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from uft.config.schema import Config, Hardware
from uft.data.batch import Example
from uft.distributed import Sharding, launched, local_rank
from uft.errors import FAILED, Problem, UftError
from uft.model.memory import keep_freed_memory
from uft.model.policy import Policy

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


# --- Out of memory: what the step needed, and which keys make it need less.


KEYS = 3  # that are told
NO_TORCH_CLASS = ("can't allocate memory", "not enough memory")
"""What torch says in a plain RuntimeError when the CPU's allocator fails."""


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_TORCH_CLASS)


@contextmanager
def oom_advice(what: str, config: Config, items: Sequence[Example] = ()) -> Iterator[None]:
    """Within, running out of memory is a UftError (code 1) about `what`, which worked on `items`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explain_oom(error, what, config, items) from error


def explain_oom(error: BaseException, what: str, config: Config, items: Sequence[Example] = ()) -> UftError:
    """What needed how much, and the first three keys that would help."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    keys = [line for line in (remedy(config) for remedy in REMEDIES) if line][:KEYS]
    problem = Problem(what, f"out of memory: {said}", advice=(*needs(config, items), *keys))
    return UftError(problem, code=FAILED)


def needs(config: Config, items: Sequence[Example]) -> Iterator[str]:
    """What the step asked for, in a line; nothing where it was no step."""
    lengths = [encoded.length for item in items for encoded in item.encoded]
    if lengths:
        yield (
            f"the step has {len(items)} rows, {len(lengths)} sequences, {sum(lengths):,} tokens; the longest sequence "
            f"has {max(lengths):,}; passes of up to {tokens_per_pass(config):,} tokens"
        )


def _smaller_passes(config: Config) -> str:
    half = max(1, tokens_per_pass(config) // 2)
    return f"shorter passes:  train.micro_batch_tokens={half}"


def _recompute(config: Config) -> str:
    return "" if config.model.gradient_checkpointing else "recompute activations:  model.gradient_checkpointing=true"


def _adapter(config: Config) -> str:
    return "train an adapter alone:  model.adapter=lora" if config.model.adapter == "none" else ""


def _shorter(config: Config) -> str:
    return f"shorter rows:  train.max_length={max(2, config.train.max_length // 2)} data.too_long=drop"


REMEDIES: tuple[Callable[[Config], str], ...] = (_smaller_passes, _recompute, _adapter, _shorter)
"""In the order in which they cost least."""
