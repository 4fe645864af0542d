"""Token sequences without rows: what the reference cache and the checks of a model send through it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from uft.data.batch import Batch
from uft.data.packing import Layout, Line, lay_out

TokenSequence = tuple[np.ndarray, np.ndarray]
"""ids (L,) int and supervised (L,) bool."""


def sequence_batch(sequences: Sequence[TokenSequence], pad_id: int, layout: Layout = Layout.PADDED) -> Batch:
    """Each sequence as a row of its own; targets in order, roles and rewards empty. Packed, neighbours with the same
    prompt may share it."""
    count = len(sequences)
    groups = _neighbours(sequences)
    lines = [Line(ids, mask, group) for (ids, mask), group in zip(sequences, groups, strict=True)]
    each = torch.arange(count)
    return Batch(
        **lay_out(lines, layout, pad_id),
        row=each,
        role=torch.ones(count, dtype=torch.long),
        target=torch.full((count,), torch.nan),
        good=torch.ones(count, dtype=torch.bool),
        pairs=torch.zeros(0, 2, dtype=torch.long),
        example=each,
        kind=torch.zeros(count, dtype=torch.long),
        columns={},
    )


def prompt_of(sequence: TokenSequence) -> bytes:
    """The tokens before the first supervised one."""
    ids, supervised = sequence
    return np.asarray(ids, dtype="<i4")[: int(np.argmax(supervised))].tobytes()


def _neighbours(sequences: Sequence[TokenSequence]) -> list[int]:
    """A number per sequence, the same for neighbours with the same prompt."""
    numbers: list[int] = []
    for position, sequence in enumerate(sequences):
        alike = position > 0 and prompt_of(sequence) == prompt_of(sequences[position - 1])
        numbers.append(numbers[-1] + (not alike) if numbers else 0)
    return numbers


def batches_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions sorted by length and grouped so that `longest * count <= budget`, one alone where it exceeds that."""
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[position] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def packs_of(sequences: Sequence[TokenSequence], budget: int) -> list[list[int]]:
    """Positions of neighbours of at most `budget` tokens, a prompt that several share counted once; one alone where it
    exceeds that."""
    groups: list[list[int]] = []
    total, last = 0, None
    for position, sequence in enumerate(sequences):
        prompt, size = prompt_of(sequence), len(sequence[0])
        more = size - int(np.argmax(sequence[1])) if prompt == last else size
        if groups and total + more <= budget:
            groups[-1].append(position)
            total += more
        else:
            groups.append([position])
            total = size
        last = prompt
    return groups
