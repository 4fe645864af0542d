"""Batch: rows as tensors, laid out for the model and described for the objective.

Two levels are kept apart. The model's input is `input_ids` and friends; its layout (padded or packed) concerns the
collation and the model alone. The targets are a flat list of N supervised tokens in sequence order. Objectives see only
the targets, so no objective knows how a batch was packed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from itertools import accumulate, groupby, pairwise, product
from typing import Any, NamedTuple

import numpy as np
import torch

from uft.data.rows import Completion, Kind, Role, Row, Selection, Tokens, View

Tensor = torch.Tensor

NOT_AN_INPUT = -1
"""The `place` of a target that is not among the inputs: packed, the last token of a sequence is only asked for."""


class Layout(Enum):
    """How the sequences of a batch lie in the model's input."""

    PADDED = "padded"  # a rectangle, filled up on the right
    PACKED = "packed"  # one after another, each with its own prompt
    SHARED = "shared"  # one after another, completions of a group after their common prompt


class Span(NamedTuple):
    """`length` tokens in a row that attend causally to each other and wholly to the first `prefix` tokens of the span
    number `prompt`."""

    length: int
    prompt: int
    prefix: int


@dataclass(frozen=True)
class Segments:
    """The attention pattern of one packed line of tokens: spans one after another that cover it."""

    spans: tuple[Span, ...]
    tokens: int  # of the sequences, as if each stood there whole


@dataclass(frozen=True)
class Batch:
    """S sequences (prompt + one completion each) of R rows with N supervised targets in all.

    Model level: `input_ids`, `attention_mask`, `position_ids` are (B, L) int64; mask 1 on real tokens. Packed, B is 1
    and `segments` is the attention pattern; without it every row of the rectangle is a sequence.
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
    columns: dict[str, Tensor]  # log-probs per target (N,) under others: "reference", "sampler", "old"; 0 if unknown
    annotations: dict[str, Tensor] = field(default_factory=dict)
    """Named extras per sequence (S,) float32, NaN where one has none: "score", and the names of rows.ANNOTATIONS."""
    segments: Segments | None = None  # of a packed batch

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, padding not counted: the same in every layout."""
        return self.segments.tokens if self.segments else int(self.attention_mask.sum())

    @property
    def company(self) -> Tensor:
        """(B, L) int64: tokens of the sequence that each input stands in; a shared prompt is in the first of them."""
        if self.segments is None:
            return self.attention_mask.sum(1, keepdim=True).expand_as(self.input_ids)
        spans = torch.tensor([(span.length + span.prefix + 1, span.length) for span in self.segments.spans])
        return spans[:, 0].repeat_interleave(spans[:, 1]).to(self.input_ids.device)[None]

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
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: change(one) for name, one in values.items() if isinstance(one, Tensor)}
        for name, group in values.items():
            if isinstance(group, dict):
                tensors[name] = {key: change(one) for key, one in group.items()}
        return replace(self, **tensors)


# --- Examples: rows as an objective uses them, in micro-batches under a budget of tokens.


@dataclass(frozen=True)
class Example:
    """A row as an objective uses it: `encoded[i]` is the completion of `parts[i]`."""

    example: int  # the row's number in the whole mixture
    row: Row
    parts: Selection
    encoded: tuple[Tokens, ...]
    reference: tuple[np.ndarray, ...] | None = None  # per part (targets,) float32: the reference's log-probs
    columns: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # likewise, under other models

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return max(encoded.length for encoded in self.encoded)


def make_example(row: Row, encoded: Sequence[Tokens], example: int, visit: int, view: View) -> Example | None:
    """The selection of `view` from a row; None when it is empty, or is of completions that are yet to be sampled.
    `encoded` has one entry per completion of the row."""
    parts = view(row, visit)
    if not parts or not row.completions:
        return None
    return Example(example, row, parts, tuple(encoded[part.completion] for part in parts))


def mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Every completion of a step under the prompt of the next other row of it, for statistics of unrelated answers.

    Cut at `max_length` tokens. Nothing for a single row.
    """
    sides = [(item, part, encoded) for item in examples for part, encoded in zip(item.parts, item.encoded, strict=True)]
    exchanged = []
    for number, (own, part, completion) in enumerate(sides):
        following = (sides[(number + k) % len(sides)] for k in range(1, len(sides)))
        item, _, prompt = next((side for side in following if side[0].example != own.example), (None, None, None))
        if item is None or prompt is None:
            continue
        ids = np.concatenate([prompt.ids[: prompt.prompt_length], completion.ids[completion.prompt_length :]])
        supervised = np.zeros(len(ids), bool)
        supervised[prompt.prompt_length :] = completion.supervised[completion.prompt_length :]
        joined = Tokens(ids[:max_length], supervised[:max_length], prompt.prompt_length)
        if joined.targets:
            exchanged.append(Example(item.example, own.row, (part,), (joined,)))
    return exchanged


def is_good(completion: Completion) -> bool:
    """Whether a completion is one to learn from: demonstrations, chosen, good labels, scores of a half and more."""
    if completion.sampled_by is not None:
        return False
    if completion.score is not None:
        return completion.score >= 0.5
    verdict = completion.label if completion.preferred is None else completion.preferred
    return verdict is not False


def micro_batches(examples: Sequence[Example], budget: int, pad_id: int, layout: Layout = Layout.PADDED) -> list[Batch]:
    """The examples as micro-batches of at most `budget` input tokens, padding counted; the longest rows first.

    Rows are never divided: one that exceeds the budget alone is a batch alone. Sorting by length keeps padding low, and
    a step that will not fit in memory fails on its first batch.
    """
    padded = layout is Layout.PADDED
    sizes = [
        item.length if padded else forwarded([Line(one.ids, one.supervised) for one in item.encoded], layout)
        for item in examples
    ]
    # Examples of one row keep the order in which they were drawn, each counted as large as the largest of them: the
    # state that an objective keeps for an example depends on that order, which no layout may change.
    largest: dict[int, int] = {}
    for size, item in zip(sizes, examples, strict=True):
        largest[item.example] = max(size, largest.get(item.example, 0))
    groups: list[list[Example]] = []
    width = used = 0  # the longest sequence of the group; its sequences (padded) or tokens
    for item in sorted(examples, key=lambda item: -largest[item.example]):
        size = largest[item.example]
        more = len(item.parts) if padded else size
        if not groups or (used + more) * (width if padded else 1) > budget:
            groups.append([])
            width, used = size, 0
        groups[-1].append(item)
        used += more
    return [collate(group, pad_id, layout) for group in groups]


def collate(examples: Sequence[Example], pad_id: int, layout: Layout = Layout.PADDED) -> Batch:
    """Examples as one batch. An example twice in it is two rows."""
    sequences = [
        (row, item.row.completions[part.completion], part, encoded)
        for row, item in enumerate(examples)
        for part, encoded in zip(item.parts, item.encoded, strict=True)
    ]
    completions = [completion for _, completion, _, _ in sequences]
    laid = lay_out([Line(one.ids, one.supervised, row) for row, _, _, one in sequences], layout, pad_id)
    sides: dict[tuple[int, Role], list[int]] = defaultdict(list)  # a row's sequences in either role
    for number, (row, _, part, _) in enumerate(sequences):
        sides[row, part.role].append(number)
    positives_and_negatives = ((sides[row, Role.POSITIVE], sides[row, Role.NEGATIVE]) for row in range(len(examples)))
    kinds = {kind: number for number, kind in enumerate(Kind)}
    known = [({} if c.score is None else {"score": c.score}) | dict(c.annotations) for c in completions]
    names = dict.fromkeys(name for numbers in known for name in numbers)
    return Batch(
        **laid,
        row=_integers(row for row, _, _, _ in sequences),
        role=_integers(part.role for _, _, part, _ in sequences),
        target=torch.tensor([part.target for _, _, part, _ in sequences], dtype=torch.float32),
        good=torch.tensor(list(map(is_good, completions)), dtype=torch.bool),
        pairs=_integers(pair for both in positives_and_negatives for pair in product(*both)).reshape(-1, 2),
        example=_integers(item.example for item in examples),
        kind=_integers(kinds[item.row.kind] for item in examples),
        columns=_columns(examples, completions, laid["sequence"].numpy()),
        annotations={n: torch.tensor([one.get(n, math.nan) for one in known], dtype=torch.float32) for n in names},
    )


def _columns(examples: Sequence[Example], completions: Sequence[Completion], sequence: np.ndarray) -> dict[str, Tensor]:
    """Per target: the reference's log-probs and those under the samplers, where the examples bring them."""
    columns = {}
    if examples and all(item.reference is not None for item in examples):
        values = np.concatenate([column for item in examples for column in item.reference or ()])
        assert len(values) == len(sequence), f"{len(values)} reference log-probs for {len(sequence)} targets"
        columns["reference"] = torch.from_numpy(values.astype(np.float32))
    for name in sorted({name for item in examples for name in item.columns}):
        unknown = lambda item: tuple(np.zeros(one.targets, np.float32) for one in item.encoded)  # noqa: E731
        values = np.concatenate([column for item in examples for column in item.columns.get(name) or unknown(item)])
        assert len(values) == len(sequence), f"{len(values)} values of {name} for {len(sequence)} targets"
        columns[name] = torch.from_numpy(values.astype(np.float32))
    if any(one.log_prob is not None for one in completions):
        # only sums over sequences are known, and only they are asked for: each stands at its first target
        spread = np.zeros(len(sequence), np.float32)
        numbers, firsts = np.unique(sequence, return_index=True)
        spread[firsts] = [completions[number].log_prob or 0.0 for number in numbers]
        columns["sampling_log_probs"] = torch.from_numpy(spread)
    return columns


def _integers(values: Iterable[Any]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


# --- Layouts: sequences as one rectangle with padding, or one after another without.
#
# Packed, all sequences of a batch are one line of tokens. Positions start anew with each, attention stays within it,
# and the last token of each is left out: nothing is predicted from it. Sequences of one group (the completions of a
# row) may share their prompt: it stands once, before the first of them; the others attend to it from where they are,
# and their first target is predicted from its last position.
#
# All layouts give the same targets in the same order.


PER_TARGET = ("target_ids", "predictor", "place", "offset", "sequence")


@dataclass(frozen=True)
class Line:
    """One sequence to be laid out. Lines of one group stand next to each other."""

    ids: np.ndarray  # (L,) int
    supervised: np.ndarray  # (L,) bool
    group: int = 0

    @cached_property
    def targets(self) -> np.ndarray:
        """Positions of the targets: the supervised ones but for the first token, which has no predictor."""
        return np.flatnonzero(self.supervised[1:]) + 1

    @property
    def fed(self) -> int:
        """Tokens that go into the model when lines are packed: those before the last target."""
        return int(self.targets[-1]) if len(self.targets) else 0


def lay_out(lines: Sequence[Line], layout: Layout, pad_id: int) -> dict[str, Any]:
    """The fields of a :class:`Batch` that describe the model's input and the targets."""
    return _padded(lines, pad_id) if layout is Layout.PADDED else _packed(lines, pad_id, layout is Layout.SHARED)


def forwarded(lines: Sequence[Line], layout: Layout) -> int:
    """Tokens that lines of one group put through the model when they are packed."""
    fed = [line for line in lines if line.fed]
    shared = _common_prompt(fed) if layout is Layout.SHARED else 0
    return sum(line.fed for line in fed) - shared * max(0, len(fed) - 1)


def _padded(lines: Sequence[Line], pad_id: int) -> dict[str, Any]:
    lengths = np.array([len(line.ids) for line in lines], np.int64)
    length = int(lengths.max(initial=0))
    real = np.arange(length) < lengths[:, None]
    input_ids, supervised = np.full(real.shape, pad_id, np.int64), np.zeros(real.shape, bool)
    input_ids[real] = np.concatenate([np.zeros(0, np.int64), *(line.ids for line in lines)])
    supervised[real] = np.concatenate([np.zeros(0, bool), *(line.supervised for line in lines)])
    supervised[:, :1] = False  # the first token has no predictor
    place = np.flatnonzero(supervised)
    sequence, offset = np.divmod(place, max(length, 1))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(real.astype(np.int64)),
        "position_ids": torch.arange(length).expand(len(lines), length).contiguous(),
        "target_ids": torch.from_numpy(input_ids.reshape(-1)[place]),
        "predictor": torch.from_numpy(place - 1),
        "place": torch.from_numpy(place),
        "offset": torch.from_numpy(offset),
        "sequence": torch.from_numpy(sequence),
    }


def _packed(lines: Sequence[Line], pad_id: int, share: bool) -> dict[str, Any]:
    length = 0  # of the packed line so far
    spans: list[Span] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    targets: dict[str, list[np.ndarray]] = {name: [] for name in PER_TARGET}
    for _, members in groupby(enumerate(lines), key=lambda pair: pair[1].group):
        group = [(number, line) for number, line in members if line.fed]
        shared = _common_prompt([line for _, line in group]) if share else 0
        prompt, prompt_span, prefix = length, len(spans), 0  # the first member brings the shared prefix of the others
        for number, line in group:
            own = length - prefix  # position j of the line stands at `prompt + j` in its prefix, at `own + j` after it
            if line.fed > prefix:
                spans.append(Span(line.fed - prefix, prompt_span if prefix else len(spans), prefix))
                ids.append(line.ids[prefix : line.fed])
                positions.append(np.arange(prefix, line.fed))
                length += line.fed - prefix
            before = line.targets - 1
            targets["target_ids"].append(line.ids[line.targets])
            targets["predictor"].append(before + np.where(before < prefix, prompt, own))
            targets["place"].append(np.where(line.targets < line.fed, line.targets + own, NOT_AN_INPUT))
            targets["offset"].append(line.targets)
            targets["sequence"].append(np.full(len(before), number))
            prefix = shared
    if not spans:  # there is no target: a model still needs a token
        spans, ids, positions = [Span(1, 0, 0)], [np.array([pad_id])], [np.zeros(1, np.int64)]
    input_ids = _concatenated(ids)[None]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": _concatenated(positions)[None],
        **{name: _concatenated(values) for name, values in targets.items()},
        "segments": Segments(tuple(spans), sum(len(line.ids) for line in lines)),
    }


def _common_prompt(group: Sequence[Line]) -> int:
    """Tokens that all lines of a group begin with, at most up to the first target of any; 0 for a line alone."""
    if len(group) < 2:
        return 0
    shared = min(int(line.targets[0]) for line in group)
    same = np.all([line.ids[:shared] == group[0].ids[:shared] for line in group], axis=0)
    return shared if same.all() else int(np.argmin(same))


def _concatenated(parts: Sequence[np.ndarray]) -> Tensor:
    """(sum of lengths,) int64."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False))


# --- Token sequences without rows, for the reference cache and the checks of a model.


TokenSequence = tuple[np.ndarray, np.ndarray]
"""ids (L,) int and supervised (L,) bool."""


def sequence_batch(sequences: Sequence[TokenSequence], pad_id: int, layout: Layout = Layout.PADDED) -> Batch:
    """Each sequence as a row of its own; targets in order, roles and rewards empty. Packed, neighbours with the same
    prompt may share it."""
    count = len(sequences)
    prompts = [prompt_of(one) for one in sequences]
    group = [0, *accumulate(before != after for before, after in pairwise(prompts))]
    each = torch.arange(count)
    return Batch(
        **lay_out([Line(ids, mask, group[number]) for number, (ids, mask) in enumerate(sequences)], layout, pad_id),
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
