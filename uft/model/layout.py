"""Which layout a model gets: packed where that changes nothing but speed, which is tried on the model itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch

from uft.data.batch import Batch, Layout, TokenSequence, sequence_batch
from uft.errors import Problem, UftError
from uft.model.attention import PACKED, CannotPack, register
from uft.model.policy import HEAD_TOLERANCE, Policy, blocks

Tensor = torch.Tensor

SMALL_MODEL = 3_000_000
"""Parameters below which padding is the faster on a CPU: a call per row and layer costs more than the padding saves."""

LEAK = 0.1
"""Share of the tolerance by which a row may move when another one changes: the same kernels on the same shapes."""


def settle_layout(policy: Policy, packing: str, longest: int) -> None:
    """Give `policy` the layout of `train.packing`, and its attention what that takes; a note says what and why.

    `longest`: tokens of the longest row there will be. Raises UftError where packing was asked for and cannot be.
    """
    if packing == "padded":
        return
    why = None if packing == "packed" else _not_worth_it(policy)
    why = why or next((found for reason in REASONS if (found := reason(policy, longest))), None) or _try(policy)
    if why is None:
        policy.notes.append("rows packed without padding, the prompt of a row's completions once")
    elif packing == "packed":
        raise UftError(Problem("train.packing=packed", why, advice=("train.packing=padded", "train.packing=auto")))
    else:
        policy.notes.append(f"rows padded: {why}")


def follow_layout(reference: Policy, policy: Policy, longest: int) -> None:
    """Give a reference beside `policy` its layout. Raises UftError where it cannot have it."""
    if policy.layout is Layout.PADDED:
        return
    why = next((found for reason in REASONS if (found := reason(reference, longest))), None) or _try(reference)
    if why is not None:
        problem = Problem("reference.path", f"cannot read packed rows: {why}", advice=("train.packing=padded",))
        raise UftError(problem)


# --- reasons why not


def _not_worth_it(policy: Policy) -> str | None:
    size = sum(parameter.numel() for parameter in policy.module.parameters())
    if policy.device.type == "cpu" and size < SMALL_MODEL:
        return "faster for so small a model on a CPU"
    return None


def _no_positions(policy: Policy, longest: int) -> str | None:
    return None if policy.takes_positions else "the model takes no position_ids"


def _other_attention(policy: Policy, longest: int) -> str | None:
    return None if policy.attention in PACKED else f"attention {policy.attention} knows no rows within a pack"


def _window(policy: Policy, longest: int) -> str | None:
    config = _config(policy)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    shortest = min((window for window in windows if window), default=longest)
    if shortest >= longest or getattr(config, "use_sliding_window", True) is False:
        return None
    return f"its attention window of {shortest} tokens is shorter than the longest row of {longest}"


def _not_causal(policy: Policy, longest: int) -> str | None:
    return None if getattr(_config(policy), "is_causal", True) else "its attention is not causal"


REASONS: tuple[Callable[[Policy, int], str | None], ...] = (
    _no_positions,
    _other_attention,
    _window,
    _not_causal,
)


def _config(policy: Policy) -> Any:
    return policy.base.config.get_text_config()


# --- the trial


def _try(policy: Policy) -> str | None:
    """Switch `policy` over and look whether rows still say the same and leave each other alone; back if not."""
    before = policy.attention
    try:
        policy.base.set_attn_implementation(register(before))
        if policy.base.config.get_text_config()._attn_implementation != PACKED[before]:
            why: str | None = "its attention cannot be exchanged"
        else:
            why = _wrong(policy)
    except CannotPack as error:
        why = str(error)
    except Exception as error:  # whatever a model of any origin raises, the answer is the same
        why = f"it fails on a pack ({type(error).__name__}: {error})"
    if why is None:
        policy.layout = Layout.SHARED
    else:
        policy.base.set_attn_implementation(before)
    return why


@torch.no_grad()
def _wrong(policy: Policy) -> str | None:
    """What is wrong with packed rows, on a few small ones."""
    training = policy.module.training
    policy.eval()
    try:
        sequences = trial_sequences(policy.embedding_rows)
        padded = policy(_batch(policy, sequences, Layout.PADDED)).log_probs
        packed = policy(_batch(policy, sequences, Layout.SHARED))
        tolerance = HEAD_TOLERANCE[policy.dtype] * max(1.0, float(padded.abs().max()))
        difference = float((packed.log_probs - padded).abs().max())
        if not difference <= tolerance:
            return f"packed log-probs differ from padded ones by {difference:.1e}"
        moved = max(_moved(policy, sequences, number, packed.log_probs) for number in range(len(sequences)))
        return None if moved <= LEAK * tolerance else f"a row in a pack moves others by {moved:.1e}"
    finally:
        policy.train(training)


def _moved(policy: Policy, sequences: list[TokenSequence], number: int, before: Tensor) -> float:
    """How far the others' log-probs move when sequence `number` says something else after its prompt."""
    ids, supervised = sequences[number]
    other = np.where(supervised, (ids + policy.embedding_rows // 2 + 1) % policy.embedding_rows, ids)
    batch = _batch(policy, [*sequences[:number], (other, supervised), *sequences[number + 1 :]], Layout.SHARED)
    others = batch.sequence != number
    return float((policy(batch).log_probs - before)[others].abs().max())


def _batch(policy: Policy, sequences: list[TokenSequence], layout: Layout) -> Batch:
    return sequence_batch(sequences, pad_id=0, layout=layout).to(policy.device)


def trial_sequences(vocabulary: int) -> list[TokenSequence]:
    """A row with three completions, the second of one token, between two rows with one; tokens all over the vocabulary.

    Lengths are all different, so that a mask that is off by one is off for some of them.
    """
    made = []
    for number, (prompt, completion) in enumerate(((3, 9), (7, 5), (7, 1), (7, 8), (11, 4))):
        start = (0, 1, 1, 1, 2)[number] * 7919  # the same prompt for the three in the middle
        ids = np.concatenate([start + 31 * np.arange(prompt), 104_729 * (number + 1) + 17 * np.arange(completion)])
        made.append(((ids % vocabulary).astype(np.int64), np.arange(prompt + completion) >= prompt))
    return made


# --- `torch.compile` of a model's blocks, one after another: the same code for all of them is compiled once.
#
# Only forward passes with gradients use it. Sampling, the battery and a reference go the plain way, which needs no
# compilation of their shapes. Attention stays as it is: its kernels are whole already, and who attends to whom is
# another
# thing in every pack.


KEY = "model.compile=true"


def compile_blocks(policy: Policy) -> None:
    """Compile, and look on a few small rows whether it says the same. Raises UftError where it cannot or does not."""
    found = blocks(policy.base)
    if not found:
        raise UftError(Problem(KEY, "no blocks are found in this model", advice=("model.compile=false",)))
    training = policy.module.training
    before = _log_probs(policy.train())  # as it will be used, unless it throws dice then
    if not torch.equal(before, _log_probs(policy)):
        before = _log_probs(policy.eval())
    for block in found:
        block.forward = _with_gradients(block.forward)
    try:
        after = _log_probs(policy)
    except Exception as error:  # no C++ compiler, a model that cannot be traced: whatever it is, it is not compiled
        first = next(iter(str(error).strip().splitlines()), "")
        why = f"this model cannot be compiled here ({type(error).__name__}: {first})"
        raise UftError(Problem(KEY, why, advice=("model.compile=false",))) from error
    finally:
        policy.train(training)
    difference = float((after - before).abs().max())
    if not difference <= HEAD_TOLERANCE[policy.dtype] * max(1.0, float(before.abs().max())):
        why = f"log-probs of the compiled model differ by {difference:.1e}"
        raise UftError(Problem(KEY, why, advice=("model.compile=false",)))
    policy.notes.append(f"{len(found)} blocks compiled")


def _with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True)

    @wraps(forward)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return chosen


def _log_probs(policy: Policy) -> torch.Tensor:
    """Of a few rows in the layout of the run, in a pass with gradients."""
    batch = sequence_batch(trial_sequences(policy.embedding_rows), pad_id=0, layout=policy.layout).to(policy.device)
    return policy(batch).log_probs.detach()
