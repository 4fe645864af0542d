"""Token sequences without rows: what the reference cache and the check of the head send through a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from uft.data.batch import Batch

TokenSequence = tuple[np.ndarray, np.ndarray]
"""ids (L,) int and supervised (L,) bool."""


def sequence_batch(sequences: Sequence[TokenSequence], pad_id: int) -> Batch:
    """Each sequence as a row of its own, padded on the right; targets in order, roles and rewards empty."""
    longest = max(len(ids) for ids, _ in sequences)
    count = len(sequences)
    input_ids = torch.full((count, longest), pad_id, dtype=torch.long)
    real = torch.zeros(count, longest, dtype=torch.long)
    supervised = torch.zeros(count, longest, dtype=torch.bool)
    for number, (ids, mask) in enumerate(sequences):
        input_ids[number, : len(ids)] = torch.from_numpy(np.array(ids, dtype=np.int64))
        supervised[number, : len(ids)] = torch.from_numpy(np.array(mask, dtype=bool))
        real[number, : len(ids)] = 1
    supervised[:, :1] = False  # nothing predicts the first token
    sequence, offset = supervised.nonzero(as_tuple=True)
    place = sequence * longest + offset
    each = torch.arange(count)
    return Batch(
        input_ids=input_ids,
        attention_mask=real,
        position_ids=torch.arange(longest).expand(count, longest).contiguous(),
        target_ids=input_ids.flatten()[place],
        predictor=place - 1,
        place=place,
        offset=offset,
        sequence=sequence,
        row=each,
        role=torch.ones(count, dtype=torch.long),
        target=torch.full((count,), torch.nan),
        good=torch.ones(count, dtype=torch.bool),
        pairs=torch.zeros(0, 2, dtype=torch.long),
        example=each,
        kind=torch.zeros(count, dtype=torch.long),
        columns={},
    )


def batches_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions sorted by length and grouped so that `longest * count <= budget`, one alone where it exceeds that."""
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[position] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups
