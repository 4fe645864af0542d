"""What is judged, which way is better, and against what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from uft.errors import Problem, UftError
from uft.report import metrics
from uft.report.groups import Group, as_typed
from uft.report.load import Loaded
from uft.report.words import listed

BASELINE = "sft"
DIRECTIONS = ("min", "max")


@dataclass(frozen=True)
class Headline:
    metric: str
    direction: str  # min or max

    @property
    def sign(self) -> int:
        return 1 if self.direction == "max" else -1


def headlines(
    runs: Sequence[Loaded], there: Collection[str], wanted: Sequence[str], comparable: bool
) -> list[Headline]:
    """What is judged: the metrics asked for, what the runs chose their best step by, and the battery's own.

    `there` are the figures that some run has; `comparable`: all runs have one objective under one setting, so that even
    its loss may be judged. Raises UftError for a metric that was asked for and cannot be.
    """
    asked = [parse(word, there, comparable) for word in wanted if there]
    problems = [found for found in asked if isinstance(found, Problem)]
    if problems:
        raise UftError(*problems, footer="Figures there are:  " + listed([*there], 40))
    chosen = Counter((str(run.config.get("eval.best")), str(run.config.get("eval.best_mode"))) for run in runs)
    order = [headline for headline in asked if isinstance(headline, Headline)]
    order += [Headline(*pair) for pair, _ in chosen.most_common() if comparable or not metrics.of_objective(pair[0])]
    order += [Headline(name, metrics.direction(name) or "") for name in metrics.HEADLINES]
    found: dict[str, Headline] = {}
    for headline in order:
        if headline.metric in there and headline.direction in DIRECTIONS:
            found.setdefault(headline.metric, headline)
    return list(found.values())


def parse(word: str, there: Collection[str], comparable: bool) -> Headline | Problem:
    """`eval/nll`, `exact_match`, `eval/margin:max` as a headline, or what is wrong with it."""
    name, _, said = word.rpartition(":") if word.endswith((":min", ":max")) else (word, "", "")
    metric = next((full for full in (f"eval/{name}", name) if full in there), None)
    where = f"--metric {word}"
    if metric is None:
        return Problem(where, "no run has this figure")
    if metrics.of_objective(metric) and not comparable:
        advice = ("a lower one is not a better model; compare them by the battery:  --metric eval/nll",)
        return Problem(where, "the runs minimise different quantities, which cannot be compared", advice=advice)
    direction = said or metrics.direction(metric) or ("min" if metric in ("loss", "nll") else "")
    if not direction:
        return Problem(where, "neither more nor less of it is better by itself", advice=(f"say which:  {word}:max",))
    return Headline(metric, direction)


def baselines(groups: Sequence[Group], wanted: str | None) -> list[int]:
    """The groups that count as the baseline: those that `wanted` names, else objective=sft, else the first.

    `wanted` is a group's name or `key=value ...`, the keys being those of the axes, whole or their last part.
    """
    if wanted is not None:
        found = [number for number, group in enumerate(groups) if wanted == group.name or matches(group, wanted)]
        if not found:
            names = listed([group.name for group in groups], 30)
            raise UftError(
                Problem(f"--baseline {wanted}", "no configuration is called so"), footer=f"There are:  {names}"
            )
        return found
    return [number for number, group in enumerate(groups) if group.objective == BASELINE] or [*range(len(groups))][:1]


def matches(group: Group, wanted: str) -> bool:
    parts = [word.partition("=") for word in wanted.split()]
    return bool(parts) and all(equals and has(group, key, value) for key, equals, value in parts)


def has(group: Group, key: str, value: str) -> bool:
    if key in ("objective", "objective.name"):
        return group.objective == value
    keys = [axis for axis in group.config if axis in (key, f"{key}.name") or axis.rpartition(".")[2] == key]
    return any(as_typed(group.config[axis]) == value for axis in keys)
