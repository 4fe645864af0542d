"""A different objective for each kind of row, weighted: the multi-task baseline of every unified method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from uft.data.batch import Batch
from uft.data.rows import ANSWERED, Kind, View
from uft.objectives import terms
from uft.objectives.base import (
    PLAIN,
    Forward,
    ForwardOutput,
    ForwardRequest,
    Loss,
    Needs,
    Objective,
    StepContext,
    Term,
    key,
)

Tensor = torch.Tensor
Value = TypeVar("Value")


@dataclass(frozen=True)
class PerKind(Objective):
    """The sum over kinds of weight x that kind's own loss, each divided by its own counts.

    Each field is the configuration of a whole objective, named in conf/objective/per_kind.yaml and exchanged by
    `objective@objective.preference=simpo`. The policy runs once over the rows of all kinds; objectives that
    need more (IFT's second pass) run it again on their own targets.

    An objective that shows something else than what it differentiates (DFT) is shown here by what it differentiates.
    """

    weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "weight per kind of row, e.g. preference: 0.5; default 1"}
    )
    demonstration: Any = key(None, "objective of demonstrations")
    preference: Any = key(None, "objective of preference pairs")
    binary: Any = key(None, "objective of labelled completions")
    scored: Any = key(None, "objective of scored completions")
    negatives: Any = key(None, "objective of demonstrations with sampled negatives")
    rollout: Any = key(None, "objective of completions that the policy samples while it trains")

    @cached_property
    def parts(self) -> dict[Kind, Objective]:
        """The objective of every kind that has one; what state they carry is kept in ours."""
        given = {kind: getattr(self, kind.value) for kind in ANSWERED}
        return {k: replace(o, state=_Below(self.state, f"{k.value}.")) for k, o in given.items() if o is not None}

    @property
    def needs(self) -> Needs:
        needs = [part.needs for part in self.parts.values()]
        return Needs(
            reference=any(n.reference for n in needs),
            distributions=any(n.distributions for n in needs),
            teacher=any(n.teacher for n in needs),
            mismatched=any(n.mismatched for n in needs),
            rollouts=max((n.rollouts for n in needs), default=0),
            embeddings=any(n.embeddings for n in needs),
            columns=frozenset[str]().union(*(n.columns for n in needs)),
            annotations=frozenset[str]().union(*(n.annotations for n in needs)),
        )

    def annotations(self, kind: Kind) -> frozenset[str]:
        return self.parts[kind].annotations(kind) if kind in self.parts else frozenset()

    def refined_by(self, kind: Kind) -> frozenset[str]:
        return self.parts[kind].refined_by(kind) if kind in self.parts else frozenset()

    @property
    def views(self) -> Mapping[Kind, View]:
        return {kind: part.views[kind] for kind, part in self.parts.items() if kind in part.views}

    @property
    def length_convention(self) -> str:
        return "; ".join(f"{kind.value}: {part.length_convention}" for kind, part in self.parts.items())

    def problems(self) -> list[tuple[str, str]]:
        kinds = [kind.value for kind in ANSWERED]
        problems = [
            ("weights", f"{n} is no kind of row; kinds: {', '.join(kinds)}") for n in self.weights if n not in kinds
        ]
        problems += [(f"weights.{n}", "must be at least 0") for n, weight in self.weights.items() if not weight >= 0]
        problems += [
            (f"{kind.value}", f"{part.name or part.method} cannot use rows of this kind")
            for kind, part in self.parts.items()
            if kind not in part.views
        ]
        problems += [
            (f"{kind.value}", f"{part.name or part.method} matches pairs over the whole step, not those of one kind")
            for kind, part in self.parts.items()
            if part.needs.matched
        ]
        taught = [kind for kind, part in self.parts.items() if part.needs.teacher]
        anchored = [kind for kind, part in self.parts.items() if part.needs.reference and kind not in taught]
        problems += [
            (f"{kind.value}", f"has a teacher, {anchored[0].value} a reference: one run compares with one other model")
            for kind in taught
            if anchored
        ]
        return problems + [
            (f"{kind.value}.{name}", why) for kind, part in self.parts.items() for name, why in part.problems()
        ]

    def cautions(self) -> list[str]:
        return [f"{kind.value}: {caution}" for kind, part in self.parts.items() for caution in part.cautions()]

    def start(self, examples: int) -> None:
        for part in self.parts.values():
            part.start(examples)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {"nll": terms.nll_count(batch)}
        for kind, own in self.shares(batch).items():
            counts |= _named(kind, self.parts[kind].counts(own))
        return counts

    def baseline_terms(self, batch: Batch, policy: Forward, reference: Forward | None) -> Loss:
        shares = {kind: own for kind, own in self.shares(batch).items() if self.parts[kind].needs.mismatched}
        found = [_named(kind, self.parts[kind].baseline_terms(own, policy, reference)) for kind, own in shares.items()]
        return {name: term for terms_ in found for name, term in terms_.items()}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        scores = policy(batch)
        needs = [part.needs for part in self.parts.values()]
        if any(n.reference and not n.distributions for n in needs):  # once, for the columns of all
            column = terms.reference_log_probs(batch, reference)
            batch = replace(batch, columns={**batch.columns, "reference": column})
        log_probs = terms.promote(scores.log_probs.detach())
        loss = {"nll": Term(terms.nll_total(batch, log_probs), terms.nll_count(batch), 0.0)}
        for kind, own in self.shares(batch).items():
            seen = _Seen(policy, scores.log_probs[batch.targets_of(_rows(batch, kind))])
            kl_baseline = {name.removeprefix(f"{kind.value}."): mean for name, mean in context.kl_baseline.items()}
            found = self.parts[kind](own, seen, reference, replace(context, kl_baseline=kl_baseline))
            weight = self.weights.get(kind.value, 1.0)
            loss |= _named(kind, {n: replace(term, weight=weight * term.weight) for n, term in found.items()})
        return loss

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        found = [_named(kind, self.parts[kind].at_reference(own)) for kind, own in self.shares(batch).items()]
        return {name: total for totals in found for name, total in totals.items()}

    def shares(self, batch: Batch) -> dict[Kind, Batch]:
        """The rows of every kind as a batch of their own."""
        return {kind: batch.only(_rows(batch, kind)) for kind in self.parts}


def _rows(batch: Batch, kind: Kind) -> Tensor:
    """(R,) bool."""
    return batch.kind == list(Kind).index(kind)


def _named(kind: Kind, values: Mapping[str, Value]) -> dict[str, Value]:
    """Under names that tell the kind; `nll` is measured once, over all of them."""
    return {f"{kind.value}.{name}": value for name, value in values.items() if name != "nll"}


@dataclass(frozen=True)
class _Seen:
    """The policy for the rows of one kind, whose plain log-probs are known from the pass over all rows."""

    policy: Forward
    log_probs: Tensor

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        return ForwardOutput(self.log_probs) if request == PLAIN else self.policy(batch, request)


class _Below(MutableMapping[str, Tensor]):
    """The part of a state whose names begin with `prefix`, under names without it."""

    def __init__(self, whole: MutableMapping[str, Tensor], prefix: str) -> None:
        self.whole, self.prefix = whole, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[self.prefix + name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.whole[self.prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self.whole[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.whole if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
