"""The device of a process: which one, its threads, kernels and generators, and advice where its memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from uft.config.schema import Config, Hardware
from uft.data.batch import Example
from uft.distributed import Sharding
from uft.environment import launched, local_rank
from uft.errors import FAILED, Problem, UftError
from uft.model.memory import keep_freed_memory
from uft.model.policy import Policy

SMALL_MODEL = 3_000_000
"""Parameters below which a second CPU thread made no run faster: at 0.3 million it cost a tenth of the speed."""

PASS, CPU_PASS = 8192, 768
"""Tokens of a forward pass unless asked otherwise. A GPU wants to be filled; a CPU is nearly as fast in small passes,
which take much less memory: see docs/performance.md."""


def choose_device(hardware: Hardware) -> torch.device:
    """The device asked for, or the best there is; also sets threads, precision and determinism of the process."""
    there = _available()
    name = there[0] if hardware.device == "auto" else hardware.device
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
    """`train.micro_batch_tokens`, or the default of the device."""
    device = config.hardware.device
    on_cpu = (_available()[0] if device == "auto" else device) == "cpu"
    return config.train.micro_batch_tokens or (CPU_PASS if on_cpu else PASS)


def sharding_of(hardware: Hardware) -> Sharding | None:
    """The sharding of models that the configuration asks for; None: every rank has whole models."""
    return Sharding(hardware.reshard, hardware.offload) if hardware.sharding == "full" else None


def settle_threads(hardware: Hardware, policy: Policy) -> None:
    """One CPU thread for a small model unless asked otherwise: more threads would wait for each other."""
    size = sum(parameter.numel() for parameter in policy.module.parameters())
    if hardware.threads is None and policy.device.type == "cpu" and size < SMALL_MODEL:
        torch.set_num_threads(1)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- Out of memory: the size of the step, and the keys that make it smaller.


REMEDIES = 3  # in one error, at most
CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")
"""Words of the plain RuntimeError that torch raises when the CPU's allocator fails."""


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_ALLOCATOR)


@contextmanager
def oom_advice(what: str, config: Config, items: Sequence[Example] = ()) -> Iterator[None]:
    """Inside, running out of memory becomes a UftError (code 1) about `what`, which worked on `items`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explain_oom(error, what, config, items) from error


def explain_oom(error: BaseException, what: str, config: Config, items: Sequence[Example] = ()) -> UftError:
    """The error's own words, the size of the step if there was one, and the cheapest keys that help."""
    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = []
    if lengths := [encoded.length for item in items for encoded in item.encoded]:
        advice.append(
            f"the step has {len(items)} rows, {len(lengths)} sequences, {sum(lengths):,} tokens; the longest sequence "
            f"has {max(lengths):,}; passes of up to {tokens_per_pass(config):,} tokens"
        )
    remedies = [f"shorter passes:  train.micro_batch_tokens={max(1, tokens_per_pass(config) // 2)}"]
    if not config.model.gradient_checkpointing:
        remedies.append("recompute activations:  model.gradient_checkpointing=true")
    if config.model.adapter == "none":
        remedies.append("train an adapter alone:  model.adapter=lora")
    remedies.append(f"shorter rows:  train.max_length={max(2, config.train.max_length // 2)} data.too_long=drop")
    problem = Problem(what, f"out of memory: {message}", advice=(*advice, *remedies[:REMEDIES]))
    return UftError(problem, code=FAILED)
