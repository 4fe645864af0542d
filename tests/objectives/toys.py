"""Policies that say what they are told, or are small enough to differentiate exactly, and the shipped objectives."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
import yaml

from uft.objectives import make
from uft.objectives.base import PLAIN, ForwardOutput

FOLDER = Path(__file__).parents[2] / "conf" / "objective"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def written(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


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
        return ForwardOutput(
            log_probs, argmax if request.argmax else None, request.anchor and self.divergence(log_probs, request.anchor)
        )

    @staticmethod
    def divergence(log_probs, anchor):
        """The targets' own part of KL(anchor || self): there is no more of a vocabulary here."""
        theirs = anchor.log_probs.detach()
        return theirs.exp() * (theirs - log_probs)


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
        log_probs = torch.log_softmax(logits, -1).gather(1, batch.target_ids[:, None])[:, 0]
        divergence = request.anchor and divergence_of(logits, request.anchor.logits(batch).detach())
        return ForwardOutput(log_probs, logits.argmax(-1) if request.argmax else None, divergence)

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
        logits = self.logits(batch)
        log_probs = torch.log_softmax(logits, -1).gather(1, batch.target_ids[:, None])[:, 0]
        return ForwardOutput(
            log_probs, None, request.anchor and divergence_of(logits, request.anchor.logits(batch).detach())
        )

    def logits(self, batch):
        return self.given.flatten(0, 1)[batch.predictor]


def divergence_of(logits, theirs):
    """KL(theirs || ours) of every row (N, V)."""
    expected = torch.log_softmax(theirs, -1)
    return (expected.exp() * (expected - torch.log_softmax(logits, -1))).sum(-1)
