"""The views that objectives share: which completions of a row a method takes, and on which side of its loss.

All rest on one reading of feedback, :func:`reward`. A function here is a :data:`uft.data.rows.View` once its keywords
are bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from uft.data.rows import ANSWERED, Completion, Kind, Message, Role, Row, Selected, Selection, View
from uft.objectives.base import Objective

GOOD_ENOUGH = 0.5
"""Score from which a completion counts as good."""


def reward(completion: Completion) -> float:
    """Explicit reward of a completion by its feedback, in [0, 1]: shown, chosen and good are 1; sampled ones are 0
    unless they were scored."""
    if completion.sampled_by is not None:
        return completion.score or 0.0
    if completion.preferred is not None:
        return float(completion.preferred)
    if completion.label is not None:
        return float(completion.label)
    return 1.0 if completion.score is None else completion.score


def good_completion(row: Row) -> Completion | None:
    """The best completion by its feedback, the first of equals; None where even that is not good, or none is there."""
    best = max(row.completions, key=reward, default=None)
    return best if best is not None and reward(best) >= GOOD_ENOUGH else None


def positives(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Selection:
    """The good completions only; nothing of a row that has none."""
    return tuple(Selected(i) for i, completion in enumerate(row.completions) if reward(completion) >= min_score)


def pointwise(row: Row, visit: int, *, demonstration_score: float = 1.0) -> Selection:
    """Every completion with its explicit reward."""

    def part(index: int, target: float) -> Selected:
        return Selected(index, Role.POSITIVE if target >= GOOD_ENOUGH else Role.NEGATIVE, target)

    if row.kind is Kind.DEMONSTRATION:
        return tuple(Selected(i, Role.POSITIVE, demonstration_score) for i in range(len(row.completions)))
    return tuple(part(i, reward(completion)) for i, completion in enumerate(row.completions))


def judged(row: Row, visit: int, *, min_score: float = GOOD_ENOUGH) -> Selection:
    """Every completion as good or bad."""
    rewards = [reward(completion) for completion in row.completions]
    return tuple(Selected(i, Role.POSITIVE if r >= min_score else Role.NEGATIVE) for i, r in enumerate(rewards))


def against_each(row: Row, visit: int, *, negatives: int | None = None) -> Selection:
    """The positive, and the others as its negatives: all, or `negatives` of them, other ones at every visit.

    Visit e takes columns [e B, (e + 1) B) modulo what is there, as DFT's recipe does (arXiv 2502.18679, code).
    """
    good = [i for i, completion in enumerate(row.completions) if reward(completion) >= GOOD_ENOUGH]
    bad = [i for i in range(len(row.completions)) if i not in good]
    take = len(bad) if negatives is None else min(negatives, len(bad))
    chosen = [bad[(visit * take + j) % len(bad)] for j in range(take)]
    return (*(Selected(i) for i in good), *(Selected(i, Role.NEGATIVE) for i in chosen))


def against_each_known(row: Row, visit: int, *, negatives: int | None = None) -> Selection | None:
    """As :func:`against_each`; None if the sampling log-prob of a sampled one is unknown."""
    known = all(completion.log_prob is not None for completion in row.completions if completion.sampled_by is not None)
    return against_each(row, visit, negatives=negatives) if known else None


def best_against_worst(row: Row, visit: int) -> Selection | None:
    """The best-scored completion against the worst; None when no two scores differ. Of equals the first is taken."""
    rewards = [reward(completion) for completion in row.completions]
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    return None if best == worst else (Selected(best), Selected(worst, Role.NEGATIVE))


# --- Views of rollouts: rows with completions that the policy sampled, each with a score. They take nothing, rather
# than refuse the row, where the scores of a step tie.


def is_own(completion: Completion) -> bool:
    """Whether it was sampled: in a rollout, by the policy."""
    return completion.sampled_by is not None


def demonstrations(row: Row) -> list[int]:
    """The good completions that were not sampled, by their places."""
    return [i for i, one in enumerate(row.completions) if not is_own(one) and reward(one) >= GOOD_ENOUGH]


def of_own(view: View) -> View:
    """`view` of the sampled completions alone."""

    def selection(row: Row, visit: int) -> Selection:
        own = [i for i, completion in enumerate(row.completions) if is_own(completion)]
        taken = view(replace(row, completions=tuple(row.completions[i] for i in own)), visit) if own else ()
        return tuple(replace(part, completion=own[part.completion]) for part in taken or ())

    return selection


def best_of_n(row: Row, visit: int) -> Selection:
    """The completion with the highest score, the first of equals (best of n)."""
    rewards = [reward(completion) for completion in row.completions]
    return (Selected(rewards.index(max(rewards))),)


def likelihood(min_score: float) -> dict[Kind, View]:
    """The good completions of every kind of row, of rollouts the best of n."""
    return {**dict.fromkeys(ANSWERED, partial(positives, min_score=min_score)), Kind.ROLLOUT: of_own(best_of_n)}


def against_own(row: Row, visit: int, *, negatives: int | None = None) -> Selection:
    """The demonstration, and the sampled completions as its negatives, whatever their scores."""
    unscored = tuple(replace(one, score=None) if is_own(one) else one for one in row.completions)
    taken = against_each(replace(row, completions=unscored), visit, negatives=negatives)
    return taken if any(part.role is Role.POSITIVE for part in taken) else ()


# --- Table of kinds: each objective's use of each kind of row, computed by running its views on sample rows


def kind_table(objectives: Mapping[str, Objective]) -> list[list[str]]:
    """A header and one line per named objective: the completions it takes of a sample row of each kind.

    A cell is a list of phrases such as "chosen positive" or "2 of 4 sampled negative", `stops` or `nothing`.
    """
    lines = [["objective", *(kind.value for kind in SAMPLES)]]
    for name, objective in objectives.items():
        cells = []
        for kind in SAMPLES:
            phrases: list[str] = []
            for row, names in SAMPLES[kind]:
                view = objective.views.get(kind)
                taken = view(row, 0) if view else None
                phrases += ["stops"] if taken is None else _phrases(taken, names)
            cells.append(", ".join(dict.fromkeys(phrases)) or "nothing")
        lines.append([name, *cells])
    return lines


def uses_of(row: Row, objective: Objective) -> list[str]:
    """Of every completion its feedback and what the objective makes of it: `chosen: positive`, `score 0.75: r=0.75`."""
    view = objective.views.get(row.kind)
    taken = {one.completion: _use(one) for one in (view(row, 0) if view else None) or ()}
    uses = [f"{feedback(one)}: {taken.get(place, 'not used')}" for place, one in enumerate(row.completions)]
    return uses or ["asked: no reply"]


def feedback(completion: Completion) -> str:
    """What the row says of a completion."""
    if completion.preferred is not None:
        return "chosen" if completion.preferred else "rejected"
    if completion.label is not None:
        return "good" if completion.label else "bad"
    if completion.score is not None:
        return f"score {completion.score:g}"
    return "shown" if completion.sampled_by is None else "sampled"


def _use(one: Selected) -> str:
    return one.role.name.lower() if math.isnan(one.target) else f"r={one.target:g}"


def _phrases(taken: Selection, names: tuple[str, ...]) -> list[str]:
    uses: Counter[tuple[str, str]] = Counter()
    for one in taken:
        uses[names[one.completion], _use(one)] += 1
    phrases = []
    for (name, use), count in uses.items():
        of = names.count(name)
        share = "" if of == 1 else "each " if count == of else f"{count} of {of} "
        phrases.append(f"{share}{name} {use}")
    return phrases


def _sample(**completions: Completion) -> tuple[Row, tuple[str, ...]]:
    """A row, and a name for every completion; a trailing digit counts those of the same name."""
    names = tuple(name.rstrip("0123456789").replace("_", " ") for name in completions)
    return Row("sample", 0, (Message("user", "a prompt"),), tuple(completions.values())), names


_TURN = (Message("assistant", "a reply"),)
SAMPLES: dict[Kind, list[tuple[Row, tuple[str, ...]]]] = {
    Kind.DEMONSTRATION: [_sample(shown=Completion(_TURN))],
    Kind.PREFERENCE: [_sample(chosen=Completion(_TURN, preferred=True), rejected=Completion(_TURN, preferred=False))],
    Kind.BINARY: [_sample(good=Completion(_TURN, label=True)), _sample(bad=Completion(_TURN, label=False))],
    Kind.SCORED: [
        _sample(
            high_score=Completion(_TURN, score=0.9),
            middling_score=Completion(_TURN, score=0.6),
            low_score=Completion(_TURN, score=0.2),
        )
    ],
    Kind.NEGATIVES: [
        _sample(
            shown=Completion(_TURN),
            **{f"sampled{n}": Completion(_TURN, sampled_by="model", log_prob=-1.0) for n in range(4)},
        )
    ],
    Kind.ROLLOUT: [
        _sample(
            shown=Completion(_TURN),
            own_right=Completion(_TURN, sampled_by="policy", score=1.0, log_prob=-1.0),
            own_wrong=Completion(_TURN, sampled_by="policy", score=0.0, log_prob=-1.0),
        )
    ],
}
