"""SRFT, supervised and reinforcement fine-tuning in one step, each part weighed by the policy's entropy.

No code of the authors was found: the form is that of a reimplementation and of notes on the paper (arXiv 2506.19767).
Of two readings of the weight of right completions, the one that grows with the entropy is taken, as its text says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from uft.data.batch import Batch
from uft.data.rows import Kind, Role, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, ForwardRequest, Loss, Needs, Objective, StepContext, key
from uft.objectives.policy_gradient import SHOWN_WEIGHTS, PolicyGradient, selected

Tensor = torch.Tensor

CLIMB = "srft pushes wrong completions down without a bound: watch objective/wrong and eval/*/nll"


@dataclass(frozen=True)
class SRFT(Objective):
    """e^-H imitation and a shaped policy gradient of the demonstration, e^H likelihood of right own completions, minus
    the likelihood of wrong ones; H is the mean entropy of the sequence's tokens, a constant to the gradient.

    Each part is a mean over its own tokens of the step. The shaped part has the demonstration's advantage among the
    group's scores, its own being 1, and no division by the spread (as LUFFY).
    """

    reduction: str = key("token", "what counts once in the means of the parts", choices=("token",))
    imitation: float = key(0.5, "weight of the demonstration's likelihood, times e^-H", ge=0)
    shaped: float = key(1.0, "weight of the demonstration's shaped policy gradient", ge=0)
    right: float = key(0.1, "weight of the likelihood of right own completions, times e^H", ge=0)
    wrong: float = key(1.0, "weight of the likelihood of wrong own completions, which is pushed down", ge=0)

    @property
    def needs(self) -> Needs:
        return Needs(rollouts=2)

    @property
    def views(self) -> Mapping[Kind, View]:
        return {**dict.fromkeys(Kind, views.positives), Kind.ROLLOUT: partial(selected, shown="group", gate=0)}

    @property
    def length_convention(self) -> str:
        return "every token of each part counts once"

    def cautions(self) -> list[str]:
        return [CLIMB] if self.wrong > 0 else []

    def parts(self, batch: Batch) -> dict[str, Tensor]:
        """(S,) bool: the sequences of each part."""
        shown, own, good = batch.role == Role.POSITIVE, batch.role == Role.OWN, batch.target >= views.GOOD_ENOUGH
        return {"imitation": shown, "shaped": shown, "right": own & good, "wrong": own & ~good}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        counts = {name: terms.reduced_count(batch, "token", sides) for name, sides in self.parts(batch).items()}
        tokens = terms.units(batch, torch.ones_like(batch.target_ids, dtype=torch.bool))
        return {**counts, "entropy": tokens, "nll": terms.nll_count(batch)}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        output = policy(batch, ForwardRequest(entropy=True))
        assert output.entropy is not None
        log_probs, entropy = terms.promote(output.log_probs), terms.promote(output.entropy.detach())
        mean = batch.mean(entropy)[batch.sequence]
        advantage = PolicyGradient(shown="group", scale="none").groups(batch).advantage[batch.sequence]
        values = {
            "imitation": -torch.exp(-mean) * log_probs,
            "shaped": -advantage * SHOWN_WEIGHTS["shaped"](log_probs.detach().exp()) * log_probs,
            "right": -torch.exp(mean) * log_probs,
            "wrong": log_probs,
        }
        sides = self.parts(batch)
        totals = {name: terms.reduced_total(batch, value, "token", sides[name]) for name, value in values.items()}
        totals |= {"entropy": entropy.sum(), "nll": terms.nll_total(batch, log_probs)}
        return terms.assemble(totals, self.counts(batch), {name: getattr(self, name) for name in values})
