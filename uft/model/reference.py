"""The reference: the initial policy, or another model, whose log-probs of the same targets objectives compare with.

Three ways that agree to 1e-5: a frozen copy beside the policy, the policy with its adapter switched off, and log-probs
computed once and kept on disk. All start from the files of `model.path` (or `reference.path`), never from a checkpoint,
so that a resumed run has the same reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from uft.config.schema import Model, ReferenceModel
from uft.data.batch import Batch
from uft.data.packing import Layout
from uft.errors import Problem, UftError
from uft.model.forward import Policy
from uft.model.head import Predictions
from uft.model.load import check_vocabulary, load_base, load_frozen, pad_id, storage_dtype, whereabouts
from uft.model.packed import follow_layout
from uft.model.reference_cache import LogProbStore, ReferenceColumn, weights_digest
from uft.objectives.base import PLAIN, Ask, Forward, Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor

VISITS_WORTH_A_CACHE = 1.5
"""Visits per row from which one pass over all rows beats a forward of the copy at every visit."""


@dataclass(frozen=True)
class Reference:
    """`forward` is what objectives get. In mode `cached`, `column` must be filled first and its values put into the
    batches: `column.fill(encoded)`, `feed.reference = column`."""

    mode: str
    why: str
    forward: Forward
    column: ReferenceColumn | None = None


def make_reference(
    policy: Policy,
    model: Model,
    reference: ReferenceModel,
    *,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    visits_per_row: float,
    cache: Path,
    distributions: bool = False,
    longest_row: int = 0,
) -> Reference:
    """The reference of a run, in the mode asked for or the cheapest one. May be called on a trained policy.

    `visits_per_row`: how often the run visits a row on average; `cache`: root of the caches on disk; `distributions`:
    whether the objective compares with whole distributions; `longest_row`: tokens of the longest sequence.
    """
    mode, why = choose_mode(model, reference, visits_per_row, distributions)
    without_adapter = model.adapter == "lora" and reference.path is None

    def frozen() -> Frozen:
        if without_adapter:
            return Frozen(policy)
        other = _copy(model, reference, device, tokenizer)
        follow_layout(other, policy, longest_row)
        return Frozen(other)

    def adapter_off() -> Reference:
        return Reference(mode, why, Frozen(policy))

    def copy() -> Reference:
        return Reference(mode, why, frozen())

    def cached() -> Reference:
        digest = weights_digest(whereabouts(model, reference.path), lambda: load_base(model, device, reference.path))
        identity = {
            "weights": digest,
            "dtype": f"{model.dtype} of {storage_dtype(model)}",
            "attention": f"{model.attention} {policy.attention}",
            "device": device.type,
            **({} if policy.layout is Layout.PADDED else {"layout": policy.layout.value}),
        }
        store = LogProbStore.of(cache / "reference", identity)
        column = ReferenceColumn(store, frozen, pad_id(tokenizer), device, policy.layout)
        return Reference(mode, why, FromColumn(), column)

    ways: dict[str, Callable[[], Reference]] = {"adapter_off": adapter_off, "copy": copy, "cached": cached}
    return ways[mode]()


def choose_mode(
    model: Model, reference: ReferenceModel, visits_per_row: float, distributions: bool = False
) -> tuple[str, str]:
    """(mode, one line why). Raises UftError for a mode that cannot be."""
    adapter_possible = model.adapter == "lora" and reference.path is None
    if reference.mode == "adapter_off" and not adapter_possible:
        why = "there is no adapter" if model.adapter != "lora" else "reference.path names another model"
        problem = Problem("reference.mode=adapter_off", why, advice=("possible: auto, copy, cached",))
        raise UftError(problem)
    if reference.mode == "cached" and distributions:
        why = "the objective compares whole distributions, and a cache keeps log-probs of the targets alone"
        raise UftError(Problem("reference.mode=cached", why, advice=("possible: auto, copy, adapter_off",)))
    if reference.mode != "auto":
        return reference.mode, "asked for"
    if adapter_possible:
        return "adapter_off", "the frozen weights under the adapter are the reference"
    if distributions:
        return "copy", "whole distributions are compared, which no cache keeps"
    if visits_per_row > VISITS_WORTH_A_CACHE:
        return "cached", f"each row is visited {visits_per_row:.1f} times on average: computed once"
    return "copy", f"each row is visited {visits_per_row:.1f} times on average: nothing to save by keeping"


class Frozen:
    """A policy as a reference: its adapter, if any, off; no dropout, no gradient."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, batch: Batch, ask: Ask = PLAIN) -> Scores:
        with self._as_it_began() as policy:
            return policy(batch, ask)

    def predictions(self, batch: Batch) -> Predictions:
        with self._as_it_began() as policy:
            return policy.predictions(batch)

    @contextmanager
    def _as_it_began(self) -> Iterator[Policy]:
        policy = self.policy
        training = policy.module.training
        try:
            policy.eval()
            with torch.no_grad(), policy.adapter_disabled() if policy.has_adapter else nullcontext():
                yield policy
        finally:
            if training:
                policy.train()


class FromColumn:
    """The reference that was computed before: the batch brings its log-probs along."""

    def __call__(self, batch: Batch, ask: Ask = PLAIN) -> Scores:
        assert ask == PLAIN, "cached log-probs are of the plain inputs, and all there is"
        return Scores(batch.columns["reference"])


def _copy(model: Model, reference: ReferenceModel, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> Policy:
    policy = load_frozen(model, device, reference.path)
    check_vocabulary(policy.base, tokenizer, "reference.path" if reference.path else "model.path")
    return policy
