"""Batches made by hand, rows of all kinds, a training step in ten lines, policies, and the shipped objectives."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import yaml

from uft.data.batch import Batch
from uft.data.rows import Completion, Kind, Message, Role, Row
from uft.model.head import divergence
from uft.objectives import make
from uft.objectives.base import PLAIN, ForwardOutput, StepContext

FOLDER = Path(__file__).parents[2] / "conf" / "objective"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
KINDS = list(Kind)


@cache
def written(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text().replace("${rollout.max_new_tokens}", "8"))


def settings(name, **changes):
    """The keys of conf/objective/NAME.yaml, what its defaults list places among them, and changes to keys it has."""
    values = deepcopy(written(name))
    for entry in values.pop("defaults", ()):
        if isinstance(entry, dict):
            ((place, option),) = entry.items()
            values[place.partition("@")[2]] = settings(option)
    assert changes.keys() <= values.keys(), (name, changes)
    return {**values, **changes}


def preset(name, examples=16, **changes):
    """The shipped objective, its state fresh."""
    objective = make(settings(name, **changes))
    objective.start(examples)
    return objective


def apart(names):
    """Of these shipped objectives one of each class, set of needs, state and set of kinds of rows. What is true of it
    in a model and a trainer is true of those like it, whose constants differ."""
    found = {}
    for name in sorted(names, key=lambda name: (name not in ("sft", "dpo", "orpo"), name)):
        made = preset(name)
        found.setdefault((type(made), repr(made.needs), tuple(made.state), frozenset(made.views)), name)
    return list(found.values())


# --- batches


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


OWN_REPLIES = (("4 4", 1.0), ("5 6 0 1", 0.25), ("0", 0.0), ("1 2 2", 0.25)), (("3 1", 0.5), ("2 2 6", 0.0))


def rows_for(objective) -> list[Row]:
    """Eight rows of all kinds, and two with the policy's own completions where the objective learns from those."""
    own = [[completion(text, sampled_by="policy", score=score) for text, score in row] for row in OWN_REPLIES]
    own = [[replace(one, annotations={"score_spread": 0.4}) for one in row] for row in own]
    rollouts = [row_of(8, completion("3 2 1"), *own[0]), row_of(9, *own[1])]
    return [*one_of_each(), *(rollouts if objective.needs.rollouts else ())]


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


def batch_for(objective, rows, empty=False, **how) -> Batch:
    """What the objective takes of rows; with an `empty` one, whose completion has no supervised target."""
    rows = used(objective, rows)
    seqs, examples, kinds = seqs_of(objective, rows), [row.index for row in rows], [row.kind for row in rows]
    if empty:
        seqs = [*seqs, Seq([0], [False], len(rows), target=1.0)]
        examples, kinds = [*examples, 15], [*kinds, Kind.DEMONSTRATION]
    return batch_of(seqs, examples=examples, kinds=kinds, **how)


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
    """The context of a step with these mismatched batches."""
    found = [objective.baseline_terms(batch, policy, reference) for batch in mismatched]
    names = dict.fromkeys(name for terms in found for name in terms)
    sums = {n: [sum(getattr(t[n], part) for t in found if n in t) for part in ("total", "count")] for n in names}
    kl_baseline = {name: (total / count.clamp(min=1)).detach() for name, (total, count) in sums.items()}
    return StepContext(**{"kl_baseline": kl_baseline, **settings})


def step(objective, batches, policy, parameters, reference=None, mismatched=()):
    """A training step in ten lines: the KL baseline, then sums, and one division by the counts over all batches."""
    now = step_context(objective, mismatched, policy, reference)
    losses = [objective(batch, policy, reference, now) for batch in batches]
    counted = [objective.counts(batch) for batch in batches]
    units = {name: sum(c[name] for c in counted).clamp(min=1) for name in counted[0]}
    means = {name: sum(loss[name].total for loss in losses) / units[name] for name in units}
    loss = sum(term.weight * means[name] for name, term in losses[0].items() if term.weight)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return Outcome(float(loss.detach()), {name: float(value.detach()) for name, value in means.items()}, gradients)


# --- policies


class Told:
    """A forward that says what it is told. `log_probs`, (N,) or () of every target, is a leaf: read its gradient."""

    def __init__(self, log_probs, dtype=torch.float64, argmax=None):
        self.log_probs = torch.as_tensor(log_probs, dtype=dtype).requires_grad_()
        self.argmax = argmax
        self.calls = []

    def __call__(self, batch, request=PLAIN):
        grad = torch.is_grad_enabled()
        self.calls.append({"guess": request.argmax, "mix": request.mix, "embed_grad": request.embed_grad, "grad": grad})
        argmax = batch.target_ids if self.argmax is None else self.argmax
        log_probs = self.log_probs.expand(batch.target_ids.shape)
        divergence = request.anchor and self.divergence(log_probs, request)
        rest = log_probs.detach().double().exp()  # the vocabulary has one token besides
        collision = (rest**2 + (1 - rest) ** 2).log().to(log_probs.dtype) if request.collision else None
        entropy = -log_probs.exp() * log_probs if request.entropy else None  # the targets' own part again
        return ForwardOutput(log_probs, argmax if request.argmax else None, divergence, collision, entropy)

    @staticmethod
    def divergence(log_probs, request):
        """The targets' own part of the divergence: there is no more of a vocabulary here."""
        theirs = request.anchor.log_probs.detach().expand(log_probs.shape)
        return divergence(theirs[:, None], log_probs[:, None], request.beta)


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

    def __call__(self, batch, request=PLAIN):
        logits = self.logits(batch, request)
        return of_logits(logits, batch, request)

    def logits(self, batch, request=PLAIN):
        table = self.embedding if request.embed_grad else self.embedding.detach()
        inputs = table[batch.input_ids]
        if request.replace is not None:
            mixed = (1 - request.mix) * table[batch.target_ids] + request.mix * table[request.replace]
            inputs = inputs.flatten(0, 1).index_copy(0, batch.place, mixed).view_as(inputs)
        segment = (batch.position_ids == 0).cumsum(1)
        seen = (segment[:, :, None] == segment[:, None, :]).tril().to(inputs.dtype)
        hidden = (seen @ inputs / seen.sum(-1, keepdim=True)).flatten(0, 1)[batch.predictor]
        return hidden @ self.head.T


class Logits:
    """Reads log-probs off given logits (B, L, V), a leaf whose gradient can be read."""

    def __init__(self, logits):
        self.given = torch.as_tensor(logits, dtype=torch.float64).clone().requires_grad_()

    def __call__(self, batch, request=PLAIN):
        return of_logits(self.logits(batch), batch, request)

    def logits(self, batch):
        return self.given.flatten(0, 1)[batch.predictor]


def of_logits(logits, batch, request):
    """What logits (N, V) say of a batch's targets."""
    ours = torch.log_softmax(logits, -1)
    theirs = request.anchor and torch.log_softmax(request.anchor.logits(batch).detach(), -1)
    return ForwardOutput(
        ours.gather(1, batch.target_ids[:, None])[:, 0],
        logits.argmax(-1) if request.argmax else None,
        request.anchor and divergence(theirs, ours, request.beta),
        torch.logsumexp(2 * ours.detach(), -1) if request.collision else None,
        -(ours.exp() * ours).sum(-1) if request.entropy else None,
    )


def told(objective, seqs, policy, reference=None, context=None, **how):
    """(loss, its slope by every log-prob, the mean of every term) where policy and reference say these log-probs."""
    said = Told(policy)
    known = None if reference is None else Told(reference)
    terms = objective(seqs if isinstance(seqs, Batch) else batch_of(seqs, **how), said, known, context or StepContext())
    loss = sum(term.weight * term.total / term.count.clamp(min=1) for term in terms.values() if term.weight)
    loss.backward()
    means = {name: float(term.total.detach() / term.count) for name, term in terms.items() if term.count > 0}
    return float(loss.detach()), said.log_probs.grad.tolist(), means
