"""Out of memory: what the step needed, and which keys make it need less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from uft.config.schema import Config
from uft.data.batches import Item
from uft.errors import FAILED, Problem, UftError
from uft.training.device import tokens_per_pass

KEYS = 3  # that are told
NO_TORCH_CLASS = ("can't allocate memory", "not enough memory")
"""What torch says in a plain RuntimeError when the CPU's allocator fails."""


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_TORCH_CLASS)


@contextmanager
def sparing(what: str, config: Config, items: Sequence[Item] = ()) -> Iterator[None]:
    """Within, running out of memory is a UftError (code 1) about `what`, which worked on `items`."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise explained(error, what, config, items) from error


def explained(error: BaseException, what: str, config: Config, items: Sequence[Item] = ()) -> UftError:
    """What needed how much, and the first three keys that would help."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    keys = [line for line in (remedy(config) for remedy in REMEDIES) if line][:KEYS]
    problem = Problem(what, f"out of memory: {said}", advice=(*needs(config, items), *keys))
    return UftError(problem, code=FAILED)


def needs(config: Config, items: Sequence[Item]) -> Iterator[str]:
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
