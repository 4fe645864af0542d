"""Batch: rows as tensors, laid out for the model and described for the objective.

Two levels are kept apart. *What goes into the model* is `input_ids` and friends; its layout (`uft.data.batch`) is the
business of the batcher and the model alone. *What is asked of the model* is a flat list of N supervised targets in
sequence order. Objectives see only the second level, so no objective knows how a batch was packed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
import torch

from uft.data.chat import Tokens
from uft.data.rows import Completion, Kind, Role, Row, Selected, Selection, View

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


# --- Layouts: sequences as one rectangle with padding, or one after another without.
#
# Packed, all sequences of a batch are one line of tokens. Positions start anew with each, attention stays within it,
# and
# the last token of each is left out: nothing is predicted from it. Sequences of one group (the completions of a row)
# may
# share their prompt: it stands once, before the first of them; the others attend to it from where they are, and their
# first target is predicted from its last position.
#
# Both layouts give the same targets in the same order, so what is asked of the model does not depend on them.


PER_TARGET = ("target_ids", "predictor", "place", "offset", "sequence")


class Layout(Enum):
    """How the sequences of a batch lie in the model's input."""

    PADDED = "padded"  # a rectangle, filled up on the right
    PACKED = "packed"  # one after another, each with its own prompt
    SHARED = "shared"  # one after another, completions of a group after their common prompt


class Line(NamedTuple):
    """One sequence to be laid out. Lines of one group stand next to each other."""

    ids: np.ndarray  # (L,) int
    supervised: np.ndarray  # (L,) bool
    group: int = 0

    @property
    def targets(self) -> np.ndarray:
        """Positions that are asked for: the supervised ones but for the first token, which has no predictor."""
        return np.flatnonzero(self.supervised[1:]) + 1


def lay_out(lines: Sequence[Line], layout: Layout, pad_id: int) -> dict[str, Any]:
    """The fields of a :class:`Batch` that describe the model's input and the targets."""
    return _padded(lines, pad_id) if layout is Layout.PADDED else _packed(lines, pad_id, layout is Layout.SHARED)


def forwarded(lines: Sequence[Line], layout: Layout) -> int:
    """Tokens that lines of one group put through the model when they are packed."""
    placed = [_Placed.of(line) for line in lines]
    shared = _common_prompt(placed) if layout is Layout.SHARED else 0
    fed = [one.fed for one in placed if one.fed]
    return sum(fed) - shared * max(0, len(fed) - 1)


def _padded(lines: Sequence[Line], pad_id: int) -> dict[str, Any]:
    length = max((len(line.ids) for line in lines), default=0)
    input_ids = np.full((len(lines), length), pad_id, np.int64)
    attention_mask = np.zeros((len(lines), length), np.int64)
    supervised = np.zeros((len(lines), length), bool)
    for number, line in enumerate(lines):
        real = len(line.ids)
        input_ids[number, :real] = line.ids
        attention_mask[number, :real] = 1
        supervised[number, :real] = line.supervised
    supervised[:, :1] = False  # the first token has no predictor
    place = np.flatnonzero(supervised)
    sequence, offset = np.divmod(place, max(length, 1))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "position_ids": torch.arange(length).expand(len(lines), length).contiguous(),
        "target_ids": torch.from_numpy(input_ids.reshape(-1)[place]),
        "predictor": torch.from_numpy(place - 1),
        "place": torch.from_numpy(place),
        "offset": torch.from_numpy(offset),
        "sequence": torch.from_numpy(sequence),
    }


class _Placed(NamedTuple):
    """A line with what of it is needed."""

    line: Line
    targets: np.ndarray  # positions within the line
    fed: int  # tokens that go into the model: those before its last target

    @classmethod
    def of(cls, line: Line) -> _Placed:
        targets = line.targets
        return cls(line, targets, int(targets[-1]) if len(targets) else 0)


def _common_prompt(group: Iterable[_Placed]) -> int:
    """Tokens that all lines of a group begin with, at most up to the first target of any; 0 for a line alone."""
    asked = [one for one in group if one.fed]
    if len(asked) < 2:
        return 0
    first = asked[0].line.ids
    shared = min(int(one.targets[0]) for one in asked)
    for other in asked[1:]:
        differs = np.flatnonzero(first[:shared] != other.line.ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
    return shared


class _Pack:
    """A line of tokens as it grows."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.targets: dict[str, list[np.ndarray]] = {name: [] for name in PER_TARGET}

    def add_group(self, group: Sequence[tuple[int, _Placed]], shared: int) -> None:
        """Numbered lines, the first `shared` tokens of all of them put in once."""
        prompt, prompt_span, prefix = self.length, len(self.spans), 0
        for number, one in group:
            if not one.fed:
                continue
            own = self.length - prefix  # where its token 0 would stand
            self._add_span(one, prompt_span if prefix else len(self.spans), prefix)
            self._add_targets(one, number, prompt, own, prefix)
            prefix = shared

    def _add_span(self, one: _Placed, prompt_span: int, prefix: int) -> None:
        length = one.fed - prefix
        if length:
            self.spans.append(Span(length, prompt_span, prefix))
            self.ids.append(one.line.ids[prefix : one.fed])
            self.positions.append(np.arange(prefix, one.fed))
            self.length += length

    def _add_targets(self, one: _Placed, number: int, prompt: int, own: int, prefix: int) -> None:
        """Position j of the line stands at `prompt + j` within its prefix, at `own + j` after it."""
        before = one.targets - 1
        values = (
            one.line.ids[one.targets],
            before + np.where(before < prefix, prompt, own),
            np.where(one.targets < one.fed, one.targets + own, NOT_AN_INPUT),
            one.targets,
            np.full(len(one.targets), number),
        )
        for name, value in zip(PER_TARGET, values, strict=True):
            self.targets[name].append(value)

    def fields(self, pad_id: int, tokens: int) -> dict[str, Any]:
        if not self.spans:  # nothing is asked: a model still wants a token
            self.spans, self.ids, self.positions = [Span(1, 0, 0)], [np.array([pad_id])], [np.zeros(1, np.int64)]
        input_ids = _joined(self.ids)[None]
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": _joined(self.positions)[None],
            **{name: _joined(values) for name, values in self.targets.items()},
            "segments": Segments(tuple(self.spans), tokens),
        }


def _joined(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """(sum of lengths,) int64."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64, copy=False))


def _packed(lines: Sequence[Line], pad_id: int, share: bool) -> dict[str, Any]:
    pack = _Pack()
    numbered = ((number, _Placed.of(line)) for number, line in enumerate(lines))
    for _, members in groupby(numbered, key=lambda pair: pair[1].line.group):
        group = list(members)
        pack.add_group(group, _common_prompt(one for _, one in group) if share else 0)
    return pack.fields(pad_id, sum(len(line.ids) for line in lines))


# --- Batches: rows as an objective uses them, laid out as tensors under a budget of tokens.
#
# Objectives see only the flat targets of a :class:`Batch` and never know its layout.


_KINDS = {kind: number for number, kind in enumerate(Kind)}
_GOOD_SCORE = 0.5


@dataclass(frozen=True)
class Example:
    """A row as an objective uses it: `encoded[i]` is the completion of `parts[i]`."""

    example: int  # the row's number in the whole mixture
    row: Row
    parts: Selection
    encoded: tuple[Tokens, ...]
    reference: tuple[np.ndarray, ...] | None = None  # per part (targets,) float32: the reference's log-probs

    @property
    def length(self) -> int:
        """Tokens of its longest sequence."""
        return max(encoded.length for encoded in self.encoded)


def make_example(row: Row, encoded: Sequence[Tokens], example: int, visit: int, view: View) -> Example | None:
    """What `view` takes of a row; None when it takes nothing. `encoded` has one entry per completion of the row."""
    parts = view(row, visit)
    if not parts:
        return None
    return Example(example, row, parts, tuple(encoded[part.completion] for part in parts))


def mismatched(items: Sequence[Example], max_length: int) -> list[Example]:
    """Every completion of a step under the prompt of the next other row of it, for statistics of unrelated answers.

    Cut at `max_length` tokens. Nothing for a single row.
    """
    sides = [(item, part, encoded) for item in items for part, encoded in zip(item.parts, item.encoded, strict=True)]
    found = []
    for number, (item, _, _) in enumerate(sides):
        following = (sides[(number + k) % len(sides)] for k in range(1, len(sides)))
        other = next((side for side in following if side[0].example != item.example), None)
        if other is not None:
            found.append(_under(other, sides[number], max_length))
    return [item for item in found if item.encoded[0].targets]


def _under(side: tuple[Example, Selected, Tokens], other: tuple[Example, Selected, Tokens], max_length: int) -> Example:
    """The completion of `other` under the prompt of `side`."""
    item, _, prompt = side
    _, part, completion = other
    ids = np.concatenate([prompt.ids[: prompt.prompt_length], completion.ids[completion.prompt_length :]])
    supervised = np.zeros(len(ids), bool)
    supervised[prompt.prompt_length :] = completion.supervised[completion.prompt_length :]
    encoded = Tokens(ids[:max_length], supervised[:max_length], prompt.prompt_length)
    return replace(item, row=other[0].row, parts=(part,), encoded=(encoded,), reference=None)


def is_good(completion: Completion) -> bool:
    """Whether a completion is one to learn from: demonstrations, chosen, good labels, scores of a half and more."""
    if completion.sampled_by is not None:
        return False
    if completion.score is not None:
        return completion.score >= _GOOD_SCORE
    verdict = completion.label if completion.preferred is None else completion.preferred
    return verdict is not False


def micro_batches(items: Sequence[Example], budget: int, pad_id: int, layout: Layout = Layout.PADDED) -> list[Batch]:
    """The items in batches of at most `budget` tokens as the model meets them; the longest rows first.

    Rows are never divided: one that exceeds the budget alone is a batch alone. Sorting by length keeps padding low, and
    a step that will not fit in memory fails on its first batch.
    """
    groups = _rectangles(items, budget) if layout is Layout.PADDED else _packs(items, budget, layout)
    return [collate(group, pad_id, layout) for group in groups]


def _rectangles(items: Sequence[Example], budget: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    width = sequences = 0
    for length, item in _largest_first(items, [item.length for item in items]):
        if group and (sequences + len(item.parts)) * width > budget:
            yield group
            group, sequences = [], 0
        if not group:
            width = length
        group.append(item)
        sequences += len(item.parts)
    if group:
        yield group


def _packs(items: Sequence[Example], budget: int, layout: Layout) -> Iterator[list[Example]]:
    group: list[Example] = []
    tokens = 0
    sizes = [forwarded([Line(one.ids, one.supervised) for one in item.encoded], layout) for item in items]
    for size, item in _largest_first(items, sizes):
        if group and tokens + size > budget:
            yield group
            group, tokens = [], 0
        group.append(item)
        tokens += size
    if group:
        yield group


def _largest_first(items: Sequence[Example], sizes: Sequence[int]) -> list[tuple[int, Example]]:
    """(size, item), the items of one example in the order in which they were drawn, each as large as the largest of
    them: what an objective remembers of an example depends on that order, which no layout may change."""
    largest: dict[int, int] = {}
    for size, item in zip(sizes, items, strict=True):
        largest[item.example] = max(size, largest.get(item.example, 0))
    return sorted(((largest[item.example], item) for item in items), key=lambda pair: -pair[0])


def collate(items: Sequence[Example], pad_id: int, layout: Layout = Layout.PADDED) -> Batch:
    """Items as one batch. An item twice in it is two rows."""
    lines = [
        _Line(row, item, *line) for row, item in enumerate(items) for line in zip(item.parts, item.encoded, strict=True)
    ]
    laid = lay_out([Line(line.encoded.ids, line.encoded.supervised, line.row) for line in lines], layout, pad_id)
    return Batch(
        **laid,
        row=_integers(line.row for line in lines),
        role=_integers(line.part.role for line in lines),
        target=torch.tensor([line.part.target for line in lines], dtype=torch.float32),
        good=torch.tensor(
            [is_good(line.item.row.completions[line.part.completion]) for line in lines], dtype=torch.bool
        ),
        pairs=_pairs(lines),
        example=_integers(item.example for item in items),
        kind=_integers(_KINDS[item.row.kind] for item in items),
        columns=_columns(items, lines, laid["sequence"].numpy()),
        annotations=_annotations(lines),
    )


class _Line(NamedTuple):
    """One sequence of a batch."""

    row: int
    item: Example
    part: Selected
    encoded: Tokens


def _pairs(lines: Sequence[_Line]) -> torch.Tensor:
    """(P, 2): every positive with every negative of its row."""
    sides: dict[tuple[int, Role], list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        sides[line.row, line.part.role].append(number)
    rows = dict.fromkeys(line.row for line in lines)
    pairs = [pair for row in rows for pair in product(sides[row, Role.POSITIVE], sides[row, Role.NEGATIVE])]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _columns(items: Sequence[Example], lines: Sequence[_Line], sequence: np.ndarray) -> dict[str, torch.Tensor]:
    """Per target: the reference's log-probs and those under the samplers, where the items bring them."""
    columns = {}
    if items and all(item.reference is not None for item in items):
        values = np.concatenate([column for item in items for column in item.reference or ()])
        assert len(values) == len(sequence), f"{len(values)} reference log-probs for {len(sequence)} targets"
        columns["reference"] = torch.from_numpy(values.astype(np.float32))
    sampled = [line.item.row.completions[line.part.completion].log_prob for line in lines]
    if any(log_prob is not None for log_prob in sampled):
        columns["sampling_log_probs"] = torch.from_numpy(_at_first_target(sampled, sequence))
    return columns


def _annotations(lines: Sequence[_Line]) -> dict[str, torch.Tensor]:
    """Per sequence: scores and whatever else was written beside completions; NaN where one has none."""
    completions = [line.item.row.completions[line.part.completion] for line in lines]
    known = [{**({} if c.score is None else {"score": c.score}), **c.annotations} for c in completions]
    names = dict.fromkeys(name for numbers in known for name in numbers)
    return {name: torch.tensor([n.get(name, math.nan) for n in known], dtype=torch.float32) for name in names}


def _at_first_target(totals: Sequence[float | None], sequence: np.ndarray) -> np.ndarray:
    """(N,) float32 whose sums over sequences are `totals`: only those are known, and only they are asked for."""
    spread = np.zeros(len(sequence), np.float32)
    firsts, where = np.unique(sequence, return_index=True)
    spread[where] = [totals[number] or 0.0 for number in firsts]
    return spread


def _integers(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor([int(value) for value in values], dtype=torch.int64)


# --- Token sequences without rows: what the reference cache and the checks of a model send through it.


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
