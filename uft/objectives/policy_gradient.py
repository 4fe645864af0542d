"""Policy gradients over groups of the policy's own completions, with or without demonstrations beside them.

`PolicyGradient`: a published method is a file of conf/objective that sets its keys. `SRFT` is a class of its own.

| preset | centre, scale | ratio | clip low/high | mean over | beside it |
|---|---|---|---|---|---|
| `grpo` (arXiv 2402.03300) | mean, group | token | .2 / .2 | sequences | |
| `dr_grpo` (2503.20783) | mean, none | token | .2 / .2 | a constant | |
| `dapo` (2503.14476) | mean, group | token | .2 / .28 | tokens | flat groups leave the counts |
| `gspo` (2507.18071) | mean, group | sequence | 3e-4 / 4e-4 | sequences | |
| `cispo` (2506.13585) | mean, group | detached | - / .2 | tokens | |
| `rloo` (2402.14740) | leave one out, none | token | .2 / .2 | a constant | k1 in the reward |
| `reinforce` | mean, none | token | .2 / .2 | tokens | |
| `lite` (2508.08221) | mean, batch | token | .2 / .2 | tokens | |
| `uft_rl` (2505.16984) | mean, group | token | .2 / .2 | tokens | k3, entropy, the likelihood of hints |
| `luffy` (2504.14945) | mean with the demonstration, none | token | - | tokens | shaped demonstration |
| `chord_mu`, `chord_phi` (2508.11408) | mean, group | token | .2 / .2 | tokens | demonstrations |
| `hpt` (2509.04419) | mean, none | token | - | tokens | the demonstration where none is solved |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from uft.data.batch import Batch
from uft.data.rows import ANSWERED, Kind, Role, Row, Selected, Selection, View
from uft.objectives import terms, views
from uft.objectives.base import Forward, ForwardRequest, Loss, Needs, Objective, StepContext, key

Tensor = torch.Tensor

EPSILON = 1e-6
"""Beside the spread that advantages are divided by; TRL adds 1e-4."""
LARGEST_LOG_RATIO = 20.0
SHAPED = 0.1
"""gamma of LUFFY's shaping."""
SPREAD = "score_spread"
"""Annotation of `scale=batch`: the spread of the scores of all groups of the step."""

KL: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.exp(-d) - 1 + d,
}
"""Estimators of the divergence by d = log pi - log ref of sampled tokens. In the loss, the expected gradient of k2 is
that of KL(policy, reference), that of k3 that of KL(reference, policy), and that of k1 nothing; in the reward, k1 has
the gradient of KL(policy, reference)."""

SHOWN_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "probability": lambda p: p,
    "bell": lambda p: p * (1 - p),
    "shaped": lambda p: SHAPED * p / (p + SHAPED) ** 2,
}
"""Of the probability (N,) of a demonstration's tokens: their weight, a constant to the gradient."""

REDUCTIONS = {
    "token": "every sampled token of the step counts once",
    "sequence": "every completion counts once: mean over its tokens, then mean over completions",
    "constant": "sum over sampled tokens, divided by completions x longest allowed",
}


def selected(row: Row, visit: int, *, shown: str, gate: int) -> Selection:
    """The sampled completions with their scores, and the demonstration as `shown` says. On which side an own one
    stands, its advantage decides."""
    places = [i for i, completion in enumerate(row.completions) if views.is_own(completion)]
    own = tuple(Selected(i, Role.OWN, views.reward(row.completions[i])) for i in places)
    if shown == "none":
        return own
    demonstrations = tuple(Selected(i, Role.POSITIVE) for i in views.demonstrations(row))
    if shown != "unsolved":
        return (*demonstrations, *own)
    solved = sum(part.target >= views.GOOD_ENOUGH for part in own)
    return demonstrations if demonstrations and solved <= gate else own


class Groups(NamedTuple):
    """The sequences of a batch, (S,) each."""

    own: Tensor  # bool: sampled from the policy
    shown: Tensor  # bool: demonstrations
    live: Tensor  # bool: own ones that count
    advantage: Tensor  # float32, of own ones, and of demonstrations that belong to the group; else 0


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """Clipped policy gradient with advantages within the group of a prompt (GRPO, arXiv 2402.03300, and its kin).

    max(-A q, -A clip(q)) over own completions, q = pi / old (N,) and A (S,) their advantage, plus kl x an estimate of
    the divergence from the reference, minus entropy x the entropy, plus the demonstrations' part.

    Where a rollout serves one update, old is the policy itself: q is 1, the clip is idle and the gradient is that of
    REINFORCE with A. The value is then no measure of progress: with sequences as units it is exactly 0.

    A group is a row, rows are never divided between micro-batches, and scores are known before the forward pass: so
    neither accumulation nor layout changes anything. Scores of all completions equal: A is exactly 0.

    Where others differ. TRL adds 1e-4 to the spread and takes no demonstrations; its CISPO bounds the ratio by
    `epsilon_high` itself, here by 1 + clip_high; verl takes a group of one for its own advantage, here it is refused.
    """

    reduction: str = key("token", "what counts once in the mean", choices=tuple(REDUCTIONS))
    longest: int | None = key(None, "reduction=constant: tokens of the longest allowed completion", ge=1)
    centre: str = key(
        "mean", "subtracted from a score: the group's mean or that of the others", choices=("mean", "leave_one_out")
    )
    scale: str = key(
        "group",
        "an advantage is divided by the spread of: its group, the step, nothing",
        choices=("group", "batch", "none"),
    )
    ratio: str = key(
        "token", "pi / old by token, by sequence, or as a detached weight", choices=("token", "sequence", "detached")
    )
    clip_low: float | None = key(0.2, "ratios below 1 - this give no gradient; null: never", ge=0, le=1)
    clip_high: float | None = key(0.2, "ratios above 1 + this give no gradient; null: never", ge=0)
    dual_clip: float | None = key(None, "largest ratio where the advantage is negative; null: none", gt=1)
    kl: float = key(0.0, "weight of the divergence from the reference", ge=0)
    kl_kind: str = key("k3", "its estimator", choices=tuple(KL))
    kl_in: str = key("loss", "where it stands: in the loss, or in the reward, detached", choices=("loss", "reward"))
    entropy: float = key(0.0, "weight of the entropy of the policy, over the whole vocabulary", ge=0)
    drop_flat: bool = key(False, "groups whose scores are all equal leave the counts")
    sampler_cap: float | None = key(None, "bound of the weight old / sampler of each token; null: no weight", gt=0)
    overlong: int = key(0, "last tokens before `longest` over which a reward falls by 1 in all; 0: none", ge=0)
    shown: str = key(
        "none",
        "the demonstration: left out, beside, in the group, or where unsolved",
        choices=("none", "beside", "group", "unsolved"),
    )
    shown_weight: float = key(1.0, "weight of the demonstrations' part", ge=0)
    shown_as: str = key("one", "weight of a demonstration's token, by its probability", choices=tuple(SHOWN_WEIGHTS))
    shown_reduction: str = key("token", "what counts once in that part", choices=("token", "sequence"))
    gate: int = key(0, "shown=unsolved: the demonstration where at most so many of its prompt are solved")
    mix: dict[str, float] | None = key(None, "weights 1 - mu and mu of the parts, mu from peak to valley; null: 1, 1")

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.kl > 0, rollouts=2)

    @property
    def views(self) -> Mapping[Kind, View]:
        taken: dict[Kind, View] = dict.fromkeys(ANSWERED, views.positives) if self.shown != "none" else {}
        return {**taken, Kind.ROLLOUT: partial(selected, shown=self.shown, gate=self.gate)}

    @property
    def length_convention(self) -> str:
        return REDUCTIONS[self.reduction] + (f" ({self.longest})" if self.reduction == "constant" else "")

    def problems(self) -> list[tuple[str, str]]:
        problems = []
        if self.kl > 0 and self.kl_kind == "k1" and self.kl_in == "loss":
            problems.append(("kl_kind", "k1 in the loss has no effect but noise: its expected gradient is 0"))
        if self.longest is None and (self.reduction == "constant" or self.overlong):
            problems.append(("longest", "give the tokens of the longest allowed completion"))
        if self.mix is not None and (unlike := self.mix.keys() ^ {"peak", "valley", "warm", "decay"}):
            problems.append(("mix", f"has the keys peak, valley, warm and decay, not {', '.join(sorted(unlike))}"))
        if self.mix is not None and self.shown == "none":
            problems.append(("mix", "weighs demonstrations, which shown=none leaves out"))
        return problems

    def cautions(self) -> list[str]:
        if self.kl > 0 and (self.kl_in, self.kl_kind) == ("loss", "k3"):
            return ["kl: k3 in the loss anchors by KL(reference, policy); kl_kind=k2 anchors by KL(policy, reference)"]
        return []

    def groups(self, batch: Batch, penalty: Tensor | None = None) -> Groups:
        """`penalty` (S,) is subtracted from the scores."""
        own, shown = batch.role == Role.OWN, batch.role == Role.POSITIVE
        members = own | shown if self.shown == "group" else own
        scores = torch.where(own, terms.promote(batch.target), 1.0)
        if self.overlong and self.longest:
            # one without a target was cut, and so is as long as any may be
            over = torch.where(terms.present(batch), batch.lengths, self.longest) - (self.longest - self.overlong)
            scores = scores - torch.where(own, over.clamp(min=0) / self.overlong, 0.0)
        rows, row = batch.example.numel(), batch.row

        def extreme(least: float, reduce: str) -> Tensor:
            inside = torch.where(members, scores, least)
            return scores.new_full((rows,), least).scatter_reduce_(0, row, inside, reduce)

        flat = (extreme(-math.inf, "amax") <= extreme(math.inf, "amin"))[row]
        shaped = scores if penalty is None else scores - penalty

        def summed(values: Tensor) -> Tensor:
            return values.new_zeros(rows).index_add_(0, row, torch.where(members, values, 0.0))[row]

        number = summed(torch.ones_like(scores))
        mean = summed(shaped) / number.clamp(min=1)
        base = mean if self.centre == "mean" else (summed(shaped) - shaped) / (number - 1).clamp(min=1)
        advantage = shaped - base
        if self.scale == "group":
            advantage = advantage / ((summed((shaped - mean).square()) / (number - 1).clamp(min=1)).sqrt() + EPSILON)
        elif self.scale == "batch":
            advantage = advantage / (torch.where(own, terms.promote(batch.annotations[SPREAD]), 1.0) + EPSILON)
        silent = ~members if penalty is not None else ~members | flat
        live = own & ~flat if self.drop_flat else own
        return Groups(own, shown, live, torch.where(silent, 0.0, advantage).detach())

    def advantages(self, batch: Batch) -> Tensor:
        return self.groups(batch).advantage

    def units(self, batch: Batch, sequences: Tensor, reduction: str) -> Tensor:
        """() units of a part over `sequences` (S,) bool."""
        if reduction == "constant":
            return terms.units(batch, sequences) * float(self.longest or 1)
        return terms.reduced_count(batch, reduction, sequences)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        groups = self.groups(batch, torch.zeros_like(batch.target) if self.kl_in == "reward" else None)
        counted, tokens = groups.live, terms.reduced_count(batch, "token", groups.own)
        counts = {"nll": terms.nll_count(batch), "entropy": tokens, "ratio": tokens, "clip_low": tokens}
        counts |= {"clip_high": tokens, "sampler_gap": tokens}
        if self.shown == "group":  # own completions and demonstrations are terms of one mean
            counted = counted | groups.shown
            counts["shown"] = self.units(batch, counted, self.reduction)
        elif self.shown != "none":
            counts["shown"] = self.units(batch, groups.shown, self.shown_reduction)
        if self.kl > 0:
            counts["kl"] = self.units(batch, groups.own, self.reduction)
        return {"pg": self.units(batch, counted, self.reduction), **counts}

    def __call__(self, batch: Batch, policy: Forward, reference: Forward | None, context: StepContext) -> Loss:
        output = policy(batch, ForwardRequest(entropy=self.entropy > 0))
        log_probs, seq = terms.promote(output.log_probs), batch.sequence
        difference = log_probs - terms.reference_log_probs(batch, reference) if self.kl > 0 else log_probs
        old = terms.promote(batch.columns["old"]) if "old" in batch.columns else log_probs.detach()
        is_penalty = self.kl > 0 and self.kl_in == "reward"
        groups = self.groups(batch, self.kl * batch.sum(difference).detach() if is_penalty else None)
        own = groups.own[seq]

        advantage = groups.advantage[seq]
        log_ratio = (log_probs - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        ratio = torch.exp(batch.mean(log_ratio)[seq] if self.ratio == "sequence" else log_ratio)
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        high = math.inf if self.clip_high is None else 1 + self.clip_high
        if self.ratio == "detached":
            surrogate = -advantage * ratio.detach().clamp(max=high) * log_probs
        else:
            surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
        if self.dual_clip is not None:
            surrogate = torch.where(advantage < 0, surrogate.minimum(-advantage * self.dual_clip), surrogate)
        sampler = terms.promote(batch.columns["sampler"]) if "sampler" in batch.columns else old
        if self.sampler_cap is not None:
            surrogate = surrogate * torch.exp(old - sampler).clamp(max=self.sampler_cap).detach()

        def mean_of(values: Tensor) -> Tensor:
            return torch.where(own, values.detach().to(log_probs.dtype), 0.0).sum()

        entropy = -log_probs.detach() if output.entropy is None else terms.promote(output.entropy)
        totals = {
            "pg": terms.reduced_total(batch, surrogate, self.reduction, groups.live),
            "nll": terms.nll_total(batch, log_probs),
            "entropy": torch.where(own, entropy, 0.0).sum(),
            "ratio": mean_of(ratio),
            "clip_low": mean_of((advantage < 0) & (ratio < low)),
            "clip_high": mean_of((advantage > 0) & (ratio > high)),
            "sampler_gap": mean_of((old - sampler).abs()),
        }
        if self.shown != "none":
            weight = SHOWN_WEIGHTS[self.shown_as](log_probs.detach().exp())
            in_group = self.shown == "group"
            values = -weight * log_probs * (advantage if in_group else 1.0)
            reduction = self.reduction if in_group else self.shown_reduction
            totals["shown"] = terms.reduced_total(batch, values, reduction, groups.shown)
        if self.kl > 0:
            divergence = KL[self.kl_kind](difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
            totals["kl"] = terms.reduced_total(batch, divergence, self.reduction, groups.own)
        mu = self.mixed(context.step)
        weights = {"pg": 1 - mu if self.mix else 1.0, "shown": self.shown_weight * (mu if self.mix else 1.0)}
        weights |= {"kl": self.kl} if self.kl > 0 and self.kl_in == "loss" else {}
        weights |= {"entropy": -self.entropy} if self.entropy > 0 else {}
        counts = self.counts(batch)
        return terms.assemble({name: totals[name] for name in counts}, counts, weights)

    def mixed(self, step: int) -> float:
        """mu at a 0-based step: linear warm-up to the peak, cosine down to the valley (CHORD, arXiv 2508.11408)."""
        if self.mix is None:
            return 0.0
        peak, valley, warm, decay = (self.mix[name] for name in ("peak", "valley", "warm", "decay"))
        if step < warm:
            return peak * step / warm
        progress = min(1.0, (step - warm) / decay) if decay > 0 else 1.0
        return valley + (peak - valley) / 2 * (1 + math.cos(math.pi * progress))

    def at_reference(self, batch: Batch) -> dict[str, Tensor]:
        return {"kl": torch.zeros_like(batch.target[:0].sum())} if self.kl > 0 else {}


CLIMB = "srft pushes wrong completions down without a bound: watch objective/wrong and eval/*/nll"


@dataclass(frozen=True)
class SRFT(Objective):
    """SRFT (arXiv 2506.19767): supervised and reinforcement fine-tuning in one step, each weighed by the entropy.

    No code of the authors was found: the form is that of a reimplementation and of notes on the paper. Of two readings
    of the weight of right completions, the one that grows with the entropy is taken, as its text says.

    e^-H imitation and a shaped policy gradient of the demonstration, e^H likelihood of right own completions, minus
    the likelihood of wrong ones; H (S,) is the mean entropy of a sequence's tokens, a constant to the gradient.

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
        return {**dict.fromkeys(ANSWERED, views.positives), Kind.ROLLOUT: partial(selected, shown="group", gate=0)}

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
