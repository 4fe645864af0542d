"""Layout and compilation of a model: packed and compiled where a trial on the model itself gives the same log-probs.

Packed rows carry no padding, and the prompt shared by a row's completions is computed once. Whether a model reads packs
correctly depends on its code: so a few small rows are run through it, padded and packed, before the first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch

from uft.data.batch import Layout
from uft.errors import Problem, UftError
from uft.model.attention import PACKED, CannotPack, register
from uft.model.policy import LEAK, Policy, blocks, common_length, evaluating, exact_products, trial_sequences

SMALL_MODEL = 3_000_000
"""Parameters below which padding is faster on a CPU: a call per row and layer costs more than the padding saves."""


def settle_layout(policy: Policy, packing: str, longest: int) -> None:
    """Give `policy` the layout of `train.packing` and the attention that it needs; a note says which and why.

    `longest`: tokens of the longest row. Raises UftError where packing was asked for and is impossible, and where a row
    of that length changes what the model makes of the others.
    """
    check_longest(policy, longest)
    if packing == "padded":
        return
    why = None
    if packing != "packed" and policy.device.type == "cpu" and policy.size < SMALL_MODEL:
        why = "faster for so small a model on a CPU"
    why = why or packing_obstacle(policy, longest) or _switch_to_packed(policy)
    if why is None:
        policy.notes.append("rows packed without padding, the prompt of a row's completions once")
    elif packing == "packed":
        raise UftError(Problem("train.packing=packed", why, advice=("train.packing=padded", "train.packing=auto")))
    else:
        policy.notes.append(f"rows padded: {why}")


def follow_layout(reference: Policy, policy: Policy, longest: int, key: str = "reference.path") -> None:
    """Give a reference beside `policy`, named by `key`, the same layout. Raises UftError where it cannot have it."""
    if policy.layout is Layout.PADDED:
        return
    why = packing_obstacle(reference, longest) or _switch_to_packed(reference)
    if why is not None:
        problem = Problem(key, f"cannot read packed rows: {why}", advice=("train.packing=padded",))
        raise UftError(problem)


@torch.no_grad()
def check_longest(policy: Policy, longest: int) -> None:
    """Refuse a model whose rotary embeddings of all rows depend on the longest row of their batch (longrope)."""
    batch, longest = policy.trial_batch(), min(longest, policy.positions or longest)
    if not policy.takes_positions or longest <= batch.input_ids.shape[1]:
        return
    last = batch.input_ids.shape[0] - 1  # stands where the end of the longest row would
    places = batch.position_ids.clone()
    places[last] += longest - batch.input_ids.shape[1]
    with evaluating(policy.module), exact_products():
        before, after = (policy(b).log_probs for b in (batch, replace(batch, position_ids=places)))
    others = batch.sequence != last
    moved = policy.difference(after[others], before[others])
    if moved <= LEAK * policy.tolerance(before) or not before.isfinite().all():
        return
    why = f"a row of {longest} tokens changes the log-probs of all others in its batch by {moved:.1e}"
    room = f"train.max_length={common_length(policy.base.config) or 'N'}"
    advice = (f"leave longer rows out:  {room} data.too_long=drop", f"cut them:  {room} data.too_long=truncate")
    raise UftError(Problem("model", f"{why} (its rotary embeddings depend on the longest)", advice=advice))


def packing_obstacle(policy: Policy, longest: int) -> str | None:
    """Why this model cannot read packed rows, by its configuration alone; None: nothing is known against it."""
    config = policy.base.config.get_text_config()
    if not policy.takes_positions:
        return "the model takes no position_ids"
    if policy.attention not in PACKED:
        return f"attention {policy.attention} knows no rows within a pack"
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "index_topk")]
    shortest = min((window for window in windows if window), default=longest)
    if shortest < longest and getattr(config, "use_sliding_window", True) is not False:
        return f"its attention window of {shortest} tokens is shorter than the longest row of {longest}"
    if getattr(config, "index_topk_blocks", None):
        return "its attention chooses blocks of tokens"
    return None if getattr(config, "is_causal", True) else "its attention is not causal"


def _switch_to_packed(policy: Policy) -> str | None:
    """Exchange the attention and compare packed with padded rows; on failure restore it and return the reason."""
    before = policy.attention
    try:
        policy.base.set_attn_implementation(register(before))
        if policy.attention_kernel != PACKED[before]:
            why: str | None = "its attention cannot be exchanged"
        else:
            why = _packing_error(policy)
    except CannotPack as error:
        why = str(error)
    except Exception as error:  # model code of any origin may raise anything here: the answer is the same
        why = f"it fails on a pack ({type(error).__name__}: {error})"
    if why is None:
        policy.layout = Layout.SHARED
    else:
        policy.base.set_attn_implementation(before)
    return why


@torch.no_grad()
def _packing_error(policy: Policy) -> str | None:
    """Compare a few small rows packed and padded, then change each row and see that no other one moves."""
    sequences, vocabulary = trial_sequences(policy.vocabulary), policy.vocabulary
    with evaluating(policy.module):
        padded = policy(policy.trial_batch()).log_probs
        packed = policy(policy.trial_batch(Layout.SHARED)).log_probs
        tolerance, difference = policy.tolerance(padded), float((packed - padded).abs().max())
        if not difference <= tolerance:
            return f"packed log-probs differ from padded ones by {difference:.1e}"
        moved = []
        for number, (ids, supervised) in enumerate(sequences):
            other = np.where(supervised, (ids + vocabulary // 2 + 1) % vocabulary, ids)
            changed = [*sequences[:number], (other, supervised), *sequences[number + 1 :]]
            batch = policy.trial_batch(Layout.SHARED, changed)
            moved.append(float((policy(batch).log_probs - packed)[batch.sequence != number].abs().max()))
    return None if max(moved) <= LEAK * tolerance else f"a row in a pack moves others by {max(moved):.1e}"


# --- torch.compile


def compiles(wanted: bool | None, device: torch.device) -> bool:
    """Whether blocks are compiled (`model.compile`): by default on a GPU, where elementwise work waits for memory."""
    return device.type == "cuda" if wanted is None else wanted


def compile_blocks(policy: Policy, asked: bool = True) -> None:
    """Compile every block of the body and compare log-probs on a few small rows.

    Raises UftError where they differ or compilation fails; unless it was `asked` for, a note says so instead.

    Block by block, so that the same code is compiled once for all of them, and only for forward passes with gradients:
    sampling, evaluation and the reference need no compilation of their shapes. Attention is excluded: its kernels are
    fused already, and spans differ in every pack.
    """
    own = {block: block.forward for block in blocks(policy.base)}
    try:
        _compile_blocks(policy)
    except UftError as error:
        if asked:
            raise
        for block, forward in own.items():
            block.forward = forward
        policy.notes.append(f"blocks are not compiled: {error.problems[0].why}")


def _compile_blocks(policy: Policy) -> None:
    key, advice = "model.compile=true", ("model.compile=false",)
    all_blocks = blocks(policy.base)
    if not all_blocks:
        raise UftError(Problem(key, "no blocks are found in this model", advice=advice))

    def log_probs() -> torch.Tensor:
        return policy(policy.trial_batch(policy.layout)).log_probs.detach()

    training = policy.module.training
    policy.train()
    before = log_probs()
    if not torch.equal(before, log_probs()):  # dropout: compare without it
        policy.eval()
        before = log_probs()
    for block in all_blocks:
        block.forward = _compiled_with_gradients(block.forward)
    try:
        after = log_probs()
    except Exception as error:  # no C++ compiler, a model that cannot be traced, ...
        first = next(iter(str(error).strip().splitlines()), "")
        why = f"this model cannot be compiled here ({type(error).__name__}: {first})"
        raise UftError(Problem(key, why, advice=advice)) from error
    finally:
        policy.train(training)
    difference = float((after - before).abs().max())
    if not difference <= policy.tolerance(before):
        raise UftError(Problem(key, f"log-probs of the compiled model differ by {difference:.1e}", advice=advice))
    policy.compiled = True
    policy.notes.append(f"{len(all_blocks)} blocks compiled")


def _compiled_with_gradients(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True)

    @wraps(forward)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return chosen
