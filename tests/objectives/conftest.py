"""Batches made by hand and two policies: one that says what it is told, one small enough to differentiate on paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from uft.data.batch import Batch
from uft.data.rows import Completion, Kind, Message, Row
from uft.data.views import Role
from uft.objectives.base import PLAIN, Clock, Scores

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
    )


class Told:
    """A forward that says what it is told: `log_probs` (N,) is a leaf whose gradient can be read."""

    def __init__(self, log_probs, dtype=torch.float64, guesses=None):
        self.log_probs = torch.as_tensor(log_probs, dtype=dtype).requires_grad_()
        self.guesses = guesses
        self.calls = []

    def __call__(self, batch, ask=PLAIN):
        self.calls.append({"guess": ask.guess, "mix": ask.mix, "embed_grad": ask.embed_grad, "grad": torch.is_grad_enabled()})
        guesses = batch.target_ids if self.guesses is None else self.guesses
        return Scores(self.log_probs, guesses if ask.guess else None)


class Toy:
    """h_t = mean(e_0..e_t) over the sequence's own tokens, logits_t = W h_t: causal, and differentiable on paper."""

    def __init__(self, embedding, head, dtype=torch.float64):
        self.embedding = torch.as_tensor(embedding, dtype=dtype).clone().requires_grad_()
        self.head = torch.as_tensor(head, dtype=dtype).clone().requires_grad_()

    @classmethod
    def random(cls, seed, vocabulary=7, width=5):
        generator = torch.Generator().manual_seed(seed)
        shape = (vocabulary, width)
        return cls(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))

    @property
    def parameters(self):
        return [self.embedding, self.head]

    def __call__(self, batch, ask=PLAIN):
        table = self.embedding if ask.embed_grad else self.embedding.detach()
        inputs = table[batch.input_ids]
        if ask.replace is not None:
            mixed = (1 - ask.mix) * table[batch.target_ids] + ask.mix * table[ask.replace]
            inputs = inputs.flatten(0, 1).index_copy(0, batch.place, mixed).view_as(inputs)
        segment = (batch.position_ids == 0).cumsum(1)
        seen = (segment[:, :, None] == segment[:, None, :]).tril().to(inputs.dtype)
        hidden = (seen @ inputs / seen.sum(-1, keepdim=True)).flatten(0, 1)[batch.predictor]
        logits = hidden @ self.head.T
        log_probs = torch.log_softmax(logits, -1).gather(1, batch.target_ids[:, None])[:, 0]
        return Scores(log_probs, logits.argmax(-1) if ask.guess else None)


class Logits:
    """Reads log-probs off given logits (B, L, V)."""

    def __init__(self, logits):
        self.logits = torch.as_tensor(logits, dtype=torch.float64)

    def __call__(self, batch, ask=PLAIN):
        chosen = self.logits.flatten(0, 1)[batch.predictor]
        return Scores(torch.log_softmax(chosen, -1).gather(1, batch.target_ids[:, None])[:, 0])


# --- rows ------------------------------------------------------------------------------------------------------------


def completion(text: str, **feedback) -> Completion:
    return Completion((Message("assistant", text),), **feedback)


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
            seqs.append(Seq(prompt + reply, supervised, number, part.role, part.target))
        number += bool(parts)
    return seqs


def batch_for(objective, rows, **how) -> Batch:
    used = [row for row in rows if (v := objective.views.get(row.kind)) and v(row, 0)]
    return batch_of(seqs_of(objective, used), examples=[r.index for r in used], kinds=[r.kind for r in used], **how)


# --- what a training step does ----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    loss: float
    terms: dict[str, float]
    gradients: list[torch.Tensor] = field(default_factory=list)


def step(objective, batches, policy, parameters, reference=None, clock=None) -> Outcome:
    """Sums now, one division by the counts over all batches: the training step in ten lines."""
    losses = [objective(batch, policy, reference, clock or Clock()) for batch in batches]
    counted = [objective.counts(batch) for batch in batches]
    units = {name: sum(c[name] for c in counted) for name in counted[0]}
    means = {name: sum(loss[name].total for loss in losses) / units[name] for name in units}
    loss = sum(term.weight * means[name] for name, term in losses[0].items() if term.weight)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return Outcome(float(loss.detach()), {name: float(value.detach()) for name, value in means.items()}, gradients)


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Everything above: with importlib imports, tests share code through fixtures."""
    return SimpleNamespace(
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
        step=step,
    )
