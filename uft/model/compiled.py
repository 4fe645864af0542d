"""`torch.compile` of a model's blocks, one after another: the same code for all of them is compiled once.

Only forward passes with gradients use it. Sampling, the battery and a reference go the plain way, which needs no
compilation of their shapes. Attention stays as it is: its kernels are whole already, and who attends to whom is another
thing in every pack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from uft.errors import Problem, UftError
from uft.model.blocks import blocks
from uft.model.forward import HEAD_TOLERANCE, Policy
from uft.model.packed import trial_sequences
from uft.model.sequences import sequence_batch

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
