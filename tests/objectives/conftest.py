"""Batches made by hand, rows of all kinds, and a training step in ten lines. Policies are in toys.py."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from uft.data.batch import Batch
from uft.data.rows import Completion, Kind, Message, Role, Row
from uft.objectives.base import StepContext

sys.path.insert(0, str(Path(__file__).parent))  # for toys.py and formulas.py
from toys import Logits, Told, Toy, preset, settings

KINDS = list(Kind)


@dataclass
class Seq:
    """A prompt with one completion: token ids, which of them are supervised, and its part in the row."""

    ids: list[int]
    supervised: list[bool]
    row: int = 0
    role: int = Role.POSITIVE
    target: float = math.nan
    good: bool | None = None
    annotations: dict[str, float] = field(default_factory=dict)


def of_length(n: int, **part) -> Seq:
    """A one-token prompt and n supervised tokens."""
    return Seq([0] + [1] * n, [False] + [True] * n, **part)


def batch_of(seqs, *, examples=None, kinds=None, layout="padded", extra=0, columns=None) -> Batch:
    """Sequences as a Batch, padded on the right (by `extra` more columns) or packed into one row."""
    rows = max(s.row for s in seqs) + 1
    longest = max(len(s.ids) for s in seqs) + extra
    starts, at = [], 0
    for s in seqs:
        starts.append(at)
        at += longest if layout == "padded" else len(s.ids)
    ids, mask, positions = (torch.zeros(at + (extra if layout == "packed" else 0), dtype=torch.int64) for _ in range(3))
    flat = {name: [] for name in ("target_ids", "predictor", "place", "offset", "sequence")}
    for k, (s, start) in enumerate(zip(seqs, starts, strict=True)):
        ids[start : start + len(s.ids)] = torch.tensor(s.ids)
        mask[start : start + len(s.ids)] = 1
        positions[start : start + len(s.ids)] = torch.arange(len(s.ids))
        for offset in [i for i, on in enumerate(s.supervised) if on]:
            values = (s.ids[offset], start + offset - 1, start + offset, offset, k)
            for name, value in zip(flat, values, strict=True):
                flat[name].append(value)
    width = longest if layout == "padded" else len(ids)
    pairs = [
        (i, j)
        for i, a in enumerate(seqs)
        for j, b in enumerate(seqs)
        if a.row == b.row and a.role == Role.POSITIVE and b.role == Role.NEGATIVE
    ]
    good = [s.role == Role.POSITIVE if s.good is None else s.good for s in seqs]
    noted = dict.fromkeys(name for s in seqs for name in s.annotations)
    return Batch(
        input_ids=ids.view(-1, width),
        attention_mask=mask.view(-1, width),
        position_ids=positions.view(-1, width),
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in flat.items()},
        row=torch.tensor([s.row for s in seqs]),
        role=torch.tensor([int(s.role) for s in seqs]),
        target=torch.tensor([s.target for s in seqs], dtype=torch.float32),
        good=torch.tensor(good),
        pairs=torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        example=torch.tensor(list(range(rows)) if examples is None else examples),
        kind=torch.tensor([KINDS.index(k) for k in (kinds or [Kind.DEMONSTRATION] * rows)]),
        columns=columns or {},
        annotations={n: torch.tensor([s.annotations.get(n, math.nan) for s in seqs]) for n in noted},
    )


def mismatched(seqs, kinds):
    """(sequences, kinds) of a step of its own: each completion under the prompt of the next sequence of another row."""
    found, of = [], []
    for k, seq in enumerate(seqs):
        other = next((o for o in (*seqs[k + 1 :], *seqs[:k]) if o.row != seq.row), None)
        if other is not None:
            start, prompt = seq.supervised.index(True), other.ids[: other.supervised.index(True)]
            supervised = [False] * len(prompt) + seq.supervised[start:]
            found.append(replace(seq, ids=prompt + seq.ids[start:], supervised=supervised, row=len(found)))
            of.append(kinds[seq.row])
    return found, of


# --- rows ------------------------------------------------------------------------------------------------------------


def completion(text: str, **feedback) -> Completion:
    """With all that annotations can say of it, but for the soft label of what has a score."""
    noted = {"baseline_logp": -0.15 * len(text)}
    noted |= {} if "score" in feedback else {"soft_label": 0.55 + 0.04 * len(text)}
    return Completion((Message("assistant", text),), **feedback, annotations=noted)


def row_of(index: int, *completions: Completion) -> Row:
    """Texts are token ids with blanks between; the prompt is short or long with the index."""
    prompt = " ".join(str((index + k) % 7) for k in range(1 + index % 3))
    return Row("source", index, (Message("user", prompt),), completions)


def one_of_each() -> list[Row]:
    """Eight rows of all kinds, of unequal lengths."""
    return [
        row_of(0, completion("1 2 3 4")),
        row_of(1, completion("2 2 5", preferred=True), completion("6 1", preferred=False)),
        row_of(2, completion("3", label=True)),
        row_of(3, completion("4 4 1 2 6", label=False)),
        row_of(4, completion("5 1", score=0.75), completion("0 3 3", score=0.25), completion("6", score=0.5)),
        row_of(5, completion("6 5 4"), completion("1 1", sampled_by="m"), completion("2 3 4 5", sampled_by="m")),
        row_of(6, completion("1 0", preferred=True), completion("3 3 3 2", preferred=False)),
        row_of(7, completion("2 4 6 1 3 5")),
    ]


def seqs_of(objective, rows, visit=0) -> list[Seq]:
    """What the objective takes of rows, in the batch's words. Rows of which it takes nothing are absent."""
    seqs, number = [], 0
    for row in rows:
        view = objective.views.get(row.kind)
        parts = (view(row, visit) if view else None) or ()
        prompt = [int(t) for t in row.prompt[0].content.split()]
        for part in parts:
            reply = [int(t) for t in row.completions[part.completion].text.split()]
            supervised = [False] * len(prompt) + [True] * len(reply)
            chosen = row.completions[part.completion]
            noted = {**({} if chosen.score is None else {"score": chosen.score}), **chosen.annotations}
            seqs.append(Seq(prompt + reply, supervised, number, part.role, part.target, annotations=noted))
        number += bool(parts)
    return seqs


def used(objective, rows) -> list[Row]:
    """The rows of which it takes something."""
    return [row for row in rows if (view := objective.views.get(row.kind)) and view(row, 0)]


def batch_for(objective, rows, **how) -> Batch:
    rows = used(objective, rows)
    return batch_of(seqs_of(objective, rows), examples=[r.index for r in rows], kinds=[r.kind for r in rows], **how)


def mismatched_for(objective, rows, size=100, **how) -> list[Batch]:
    """The mismatched completions of a step of `rows`, `size` in a batch, where the objective asks for them."""
    if not objective.needs.mismatched:
        return []
    rows = used(objective, rows)
    seqs, kinds = mismatched(seqs_of(objective, rows), [row.kind for row in rows])
    parts = [range(i, min(i + size, len(seqs))) for i in range(0, len(seqs), size)]
    return [
        batch_of([replace(seqs[k], row=k - part[0]) for k in part], kinds=[kinds[k] for k in part], **how)
        for part in parts
    ]


# --- what a training step does ----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    loss: float
    terms: dict[str, float]
    gradients: list[torch.Tensor] = field(default_factory=list)


def step_context(objective, mismatched, policy, reference=None, **settings) -> StepContext:
    """The clock of a step with these mismatched batches."""
    found = [objective.baseline_terms(batch, policy, reference) for batch in mismatched]
    names = dict.fromkeys(name for terms in found for name in terms)
    sums = {n: [sum(getattr(t[n], part) for t in found if n in t) for part in ("total", "count")] for n in names}
    kl_baseline = {name: (total / count.clamp(min=1)).detach() for name, (total, count) in sums.items()}
    return StepContext(**{"kl_baseline": kl_baseline, **settings})


def step(objective, batches, policy, parameters, reference=None, mismatched=()):
    """A survey first; then sums, and one division by the counts over all batches: the training step in ten lines."""
    now = step_context(objective, mismatched, policy, reference)
    losses = [objective(batch, policy, reference, now) for batch in batches]
    counted = [objective.counts(batch) for batch in batches]
    units = {name: sum(c[name] for c in counted).clamp(min=1) for name in counted[0]}
    means = {name: sum(loss[name].total for loss in losses) / units[name] for name in units}
    loss = sum(term.weight * means[name] for name, term in losses[0].items() if term.weight)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return Outcome(float(loss.detach()), {name: float(value.detach()) for name, value in means.items()}, gradients)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Everything above: with importlib imports, tests share code through fixtures."""
    return SimpleNamespace(
        settings=settings,
        preset=preset,
        Seq=Seq,
        of_length=of_length,
        batch_of=batch_of,
        batch_for=batch_for,
        Told=Told,
        Toy=Toy,
        Logits=Logits,
        completion=completion,
        row_of=row_of,
        one_of_each=one_of_each,
        used=used,
        mismatched=mismatched,
        mismatched_for=mismatched_for,
        step_context=step_context,
        step=step,
    )


@pytest.fixture
def policy():
    return Toy.random(0)


@pytest.fixture
def reference():
    return Toy.random(1)
