"""Batch: rows as tensors, laid out for the model and described for the objective.

Two levels are kept apart. *What goes into the model* is `input_ids` and friends; its layout (`uft.data.packing`) is the
business of the batcher and the model alone. *What is asked of the model* is a flat list of N supervised targets in
sequence order. Objectives see only the second level, so no objective knows how a batch was packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor

NOT_AN_INPUT = -1
"""The `place` of a target that is not among the inputs: packed, the last token of a sequence is only asked for."""


class Span(NamedTuple):
    """`length` tokens in a row that attend causally to each other and wholly to the first `prefix` tokens of the span
    number `prompt`."""

    length: int
    prompt: int
    prefix: int


@dataclass(frozen=True)
class Segments:
    """Who attends to whom in one packed line of tokens: spans one after another, which together are all of it."""

    spans: tuple[Span, ...]
    tokens: int  # of the sequences, as if each stood there whole


@dataclass(frozen=True)
class Batch:
    """S sequences (prompt + one completion each) of R rows with N supervised targets in all.

    Model level: `input_ids`, `attention_mask`, `position_ids` are (B, L) int64; mask 1 on real tokens. Packed, B is 1
    and `segments` tells what attends to what; without it every row of the rectangle is a sequence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    # targets, in sequence order, each sequence's in reading order
    target_ids: Tensor  # (N,) int64: the supervised tokens
    predictor: Tensor  # (N,) int64: flat index into (B*L) of the position whose output predicts the target
    place: Tensor  # (N,) int64: flat index into (B*L) of the target itself among the inputs, or NOT_AN_INPUT
    offset: Tensor  # (N,) int64: the target's position within its own sequence
    sequence: Tensor  # (N,) int64, non-decreasing: which sequence the target belongs to
    # sequences
    row: Tensor  # (S,) int64, non-decreasing: which row of the batch
    role: Tensor  # (S,) int64: a Role
    target: Tensor  # (S,) float32: explicit reward in [0, 1], NaN where there is none
    good: Tensor  # (S,) bool: demonstrations, chosen, good labels, scores >= 0.5; `nll` is measured on these
    pairs: Tensor  # (P, 2) int64: sequence indices (positive, negative), all pairs within each row
    # rows
    example: Tensor  # (R,) int64: the row's number in the whole mixture; the owner of per-example state
    kind: Tensor  # (R,) int64: position of the row's Kind in `tuple(Kind)`
    columns: dict[str, Tensor]  # named extras per target (N,): "reference" log-probs
    annotations: dict[str, Tensor] = field(default_factory=dict)
    """Named extras per sequence (S,) float32, NaN where one has none: "score", and the names of rows.ANNOTATIONS."""
    segments: Segments | None = None  # of a packed batch

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, padding not counted: the same in every layout."""
        return self.segments.tokens if self.segments else int(self.attention_mask.sum())

    @property
    def lengths(self) -> Tensor:
        """(S,) int64: supervised targets of each sequence."""
        # not `bincount`, for which a GPU stops to tell how long its result is
        return torch.zeros_like(self.row).index_add_(0, self.sequence, torch.ones_like(self.sequence))

    def sum(self, values: Tensor) -> Tensor:
        """(N,) per target -> (S,) summed over each sequence, differentiable."""
        out = values.new_zeros(self.row.numel())
        return out.index_add(0, self.sequence, values)

    def mean(self, values: Tensor) -> Tensor:
        """(N,) per target -> (S,) averaged over each sequence; an empty sequence gives 0."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def targets_of(self, rows: Tensor) -> Tensor:
        """(N,) bool: the targets of `rows` (R,) bool."""
        return rows[self.row][self.sequence]

    def only(self, rows: Tensor) -> Batch:
        """The same inputs, asked only for the targets of `rows` (R,) bool; rows and sequences are counted anew."""
        sequences, targets = rows[self.row], self.targets_of(rows)
        rows_before, sequences_before = rows.cumsum(0) - 1, sequences.cumsum(0) - 1
        per_target = ("target_ids", "predictor", "place", "offset")
        return replace(
            self,
            **{name: getattr(self, name)[targets] for name in per_target},
            sequence=sequences_before[self.sequence[targets]],
            row=rows_before[self.row[sequences]],
            **{name: getattr(self, name)[sequences] for name in ("role", "target", "good")},
            pairs=sequences_before[self.pairs[sequences[self.pairs[:, 0]]]],
            **{name: getattr(self, name)[rows] for name in ("example", "kind")},
            columns={name: values[targets] for name, values in self.columns.items()},
            annotations={name: values[sequences] for name, values in self.annotations.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from while it works."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: change(tensor) for name, tensor in value.items()}
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})
