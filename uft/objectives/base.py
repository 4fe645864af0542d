"""Objective: a frozen dataclass of hyper-parameters and one pure method from log-probs to sums.

An objective never divides: it returns the sum of each term and the training step divides once, by the count over all
micro-batches of the optimiser step and all ranks. Gradient accumulation, padding and packing then change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, View

Tensor = torch.Tensor


@dataclass(frozen=True)
class ForwardOutput:
    """Result of one forward pass over a batch with N targets."""

    log_probs: Tensor  # (N,) float32: log-probability of each supervised target
    argmax: Tensor | None = None  # (N,) int64: the most likely token in each target's place, if asked for
    divergence: Tensor | None = None  # (N,) float32: from the anchor at each target, if asked for
    collision: Tensor | None = None  # (N,) float32: log sum over the vocabulary of p^2, no gradient, if asked for
    entropy: Tensor | None = None  # (N,) float32, nats: of the distribution that each target is drawn from, if asked


@dataclass(frozen=True)
class ForwardRequest:
    """Outputs of a forward pass besides the log-probs of the targets, and changes of its inputs."""

    argmax: bool = False  # the argmax token in every target's place
    replace: Tensor | None = None  # (N,) int64, with `mix` in [0, 1]: the input embedding in each target's place
    mix: float = 0.0  # becomes (1 - mix) E[target] + mix E[replace]; prompt positions stay bit-equal
    embed_grad: bool = True  # False: no gradient reaches the input embeddings
    anchor: Forward | None = None  # the divergence from this one, over the whole vocabulary
    beta: float = 0.0  # which: 0 KL(anchor || policy), 1 KL(policy || anchor), between them the generalised JSD
    collision: bool = False  # the probability that two tokens drawn at every target are the same
    entropy: bool = False  # of the whole vocabulary at every target

    @property
    def distributions(self) -> bool:
        """Whether more is asked for than log-probs and argmax of the targets, which the fused head gives."""
        return self.anchor is not None or self.entropy or self.collision


PLAIN = ForwardRequest()
MATCHED = ("second_above_matched", "matched_above_first")
"""Annotations that the step writes for objectives with `needs.matched`, as their `matched_values` says; a batch outside
a step has none."""


class Forward(Protocol):
    """The policy or the reference as objectives see it. Everything calls it once; IFT calls it twice."""

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput: ...


@dataclass(frozen=True)
class StepContext:
    """Position of the run at one optimiser step. `learning` is False in evaluation: objectives must not change
    state."""

    step: int = 0  # 0-based optimiser step
    steps: int = 1
    warmup: int = 0  # warm-up steps of the learning rate
    noise: float = 0.0  # one standard normal draw, the same for all micro-batches of a step
    learning: bool = True
    kl_baseline: Mapping[str, Tensor] = field(default_factory=dict)  # () means of `baseline_terms` over the whole step


@dataclass(frozen=True)
class Term:
    """One term of a loss: `weight * total / count`, the count summed over the whole optimiser step."""

    total: Tensor  # () float32 sum
    count: Tensor  # () float32 units it is a sum over
    weight: float = 1.0  # 0: logged, not differentiated


Loss = dict[str, Term]


@dataclass(frozen=True)
class Needs:
    """Requirements to be met before step 0."""

    reference: bool = False
    distributions: bool = False  # of the reference over the whole vocabulary: no column of log-probs can stand in
    teacher: bool = False  # what comes as the reference is the model of `teacher.path`
    mismatched: bool = False  # completions under other rows' prompts, for `baseline_terms` (KTO)
    matched: bool = False  # pairs that are matched by rank over the whole step, by their `matched_values` (AOT)
    rollouts: int = 0  # completions that the policy samples of each prompt while it trains, at least
    embeddings: bool = False  # in place of tokens: mixed ones, or some that are kept from learning
    columns: frozenset[str] = frozenset()  # of Batch.columns, written beforehand
    annotations: frozenset[str] = frozenset()  # of Completion.annotations, written beforehand


def key(default: Any, help: str, **rules: Any) -> Any:
    """A hyper-parameter, and so a config key: default, one line of help, rules (ge, gt, le, lt, choices)."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass(frozen=True)
class Objective:
    """Hyper-parameters every objective has, and the contract it fulfils."""

    name: str = field(default="", metadata={"help": "public name of the method"})
    method: str = field(default="", metadata={"help": "which class of uft/objectives computes it"})
    state: MutableMapping[str, Tensor] = field(
        default_factory=dict, repr=False, compare=False, metadata={"internal": True}
    )
    """One float per example for those that need it; checkpointed with the optimiser, never part of the config."""

    headline: ClassVar[str] = ""  # the term that is shown as `loss`; "": the weighted sum of all terms

    @property
    def needs(self) -> Needs:
        return Needs()

    def annotations(self, kind: Kind) -> frozenset[str]:
        """Annotations that selected completions of rows of this kind must carry."""
        return self.needs.annotations

    def refined_by(self, kind: Kind) -> frozenset[str]:
        """Annotations that completions of rows of this kind may carry; without one a label counts as certain."""
        return frozenset()

    @property
    def views(self) -> Mapping[Kind, View]:
        """Kind of row -> the view that selects its completions. A row of an absent kind stops the run."""
        raise NotImplementedError

    @property
    def length_convention(self) -> str:
        """One line for the start card: over what the loss is averaged and how log-probs of a sequence are joined."""
        raise NotImplementedError

    def problems(self) -> list[tuple[str, str]]:
        """(key, problem) where keys contradict each other; the limits of a single key are in its metadata."""
        return []

    def cautions(self) -> list[str]:
        """Warnings about these hyper-parameters, shown at the start of a run."""
        return []

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        """() totals that terms must have while the policy equals the reference; checked on the first step of a run."""
        return {}

    def advantages(self, batch: Batch) -> Tensor | None:
        """(S,) what tells own completions of a prompt apart, for the table of rollouts; None: it has none."""
        return None

    def start(self, examples: int) -> None:
        """Make the state of a fresh run over `examples` rows; most objectives have none."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Units of each term, () float32 each, from the batch alone: known before any forward pass."""
        raise NotImplementedError

    def baseline_terms(self, batch: Batch, policy: Forward, reference: Forward | None) -> Loss:
        """Sums and counts of a KL baseline over the mismatched completions of the step, without gradient, before any
        loss.

        The step divides once over all of its micro-batches and passes the means on as `context.kl_baseline`.
        """
        return {}

    def matched_values(self, batch: Batch, policy: Forward, reference: Forward | None) -> Tensor:
        """(P, 2) two numbers u, v of every pair, without gradient, before any loss.

        Over all pairs of the step, the k-th smallest u is matched with the k-th smallest v. The step writes two
        annotations (`MATCHED`) on the second sequence of every pair: its v minus the v that is matched with its u, and
        the u that is matched with its v minus its u.
        """
        raise NotImplementedError

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        """Sums and counts per term; the keys and counts equal those of :meth:`counts`."""
        raise NotImplementedError
