"""Rewards: how good a reply is by a rule or by a model, as named figures in [0, 1].

One registry serves the evaluation (`data.sources.NAME.checker`) and training on a model's own samples (`reward=NAME`).
A preset is a file of conf/reward that names a class here and the keys it has. Classes of installed packages are found
by the entry points of the group `uft.rewards`, under the name that each has there.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from uft.data.rows import Row
from uft.errors import Problem, UftError
from uft.rewards.base import Checker, Unjudged, Verdict, gold
from uft.rewards.ifeval import IFEval
from uft.rewards.isolation import judge_apart
from uft.rewards.models import Classifier, Likelihood
from uft.rewards.parsed import Countdown, JsonSchema, Math
from uft.rewards.text import (
    Choice,
    Contains,
    Exact,
    FinalNumber,
    Format,
    KnightsKnaves,
    Length,
    Playground,
    Repetition,
)

if TYPE_CHECKING:
    import torch

__all__ = ["CHECKERS", "Checker", "Spec", "Unjudged", "Verdict", "check", "checkers", "gold", "judge", "make"]

Spec = str | Mapping[str, Any]
"""A checker by its name, or with its keys: the `reward` node of a configuration."""

CHECKERS: dict[str, type[Checker]] = {
    "playground": Playground,
    "final_number": FinalNumber,
    "exact": Exact,
    "contains": Contains,
    "choice": Choice,
    "math": Math,
    "countdown": Countdown,
    "knights_knaves": KnightsKnaves,
    "json_schema": JsonSchema,
    "ifeval": IFEval,
    "format": Format,
    "length": Length,
    "repetition": Repetition,
    "likelihood": Likelihood,
    "classifier": Classifier,
}
"""By `method`, those of this package."""


@cache
def checkers() -> Mapping[str, type[Checker]]:
    """All of them by `method`: ours, and those of installed packages whose names are not ours.

    Raises UftError naming the package of an entry point that cannot be loaded.
    """
    found = dict(CHECKERS)
    for point in entry_points(group="uft.rewards"):
        try:
            found.setdefault(point.name, point.load())
        except Exception as error:
            package = point.dist.name if point.dist else point.module
            what, why = f"the installed package {package}", f"its reward {point.name} cannot be loaded: {error!r}"
            raise UftError(Problem(what, why, advice=(f"pip uninstall {package}",))) from error
    return found


def make(spec: Spec) -> Checker:
    """The checker that a name, or a resolved `reward` node of the config, describes."""
    settings = {"method": spec, "name": spec} if isinstance(spec, str) else dict(spec)
    return _made(json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=64)
def _made(settings: str) -> Checker:
    keys = json.loads(settings)
    return checkers()[keys["method"]](**keys)


def spec_of(reward: Mapping[str, Any], checker: str | None) -> Spec | None:
    """How a source with this `checker` is judged: by the run's reward where that is the one, with its keys."""
    return dict(reward) if checker is not None and reward.get("method") == checker else checker


def problems_with(
    reward: Mapping[str, Any], checkers_by_key: Mapping[str, str | None]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(dotted key, what is wrong, advice) of the run's `reward` node and of checkers by the keys that name them: not
    known, without a package that they import, or with keys that contradict each other."""
    known, own = checkers(), reward.get("method")
    if reward and not reward.keys() & {"name", "method"}:
        yield "reward", "has keys, and no reward is chosen", ("choose one:  reward=NAME",)
    for key, method in {"reward": own, **{k: m for k, m in checkers_by_key.items() if m != own}}.items():
        if method is None:
            continue
        if method not in known:
            near = (f"did you mean  {key}={close} ?" for close in get_close_matches(method, known, 1))
            yield key, "no such choice", (*near, f"choices: {', '.join(known)}")
        elif missing := [name for name in known[method].packages if find_spec(name) is None]:
            why = f"{method} needs {', '.join(missing)}, which is not installed"
            yield key, why, ("pip install 'uft[rewards]'",)
        else:
            for leaf, why in make(reward if key == "reward" else method).problems():
                advice = (f"give it:  reward={method} reward.{leaf}=...",)
                yield (f"reward.{leaf}", why, ()) if key == "reward" else (key, f"its key {leaf} {why}", advice)


def check(spec: Spec, row: Row, reply: str) -> dict[str, float]:
    """The figures of one reply; {} where the row cannot be judged by this checker."""
    return judge([(spec, row, reply)])[0].figures


def judge(jobs: Sequence[tuple[Spec, Row, str]], device: torch.device | None = None) -> list[Verdict]:
    """The verdict on every reply, in the order of the jobs (spec, row, reply).

    Replies of isolated checkers are judged in the child process, whatever else they do to it. `device`: where models
    of checkers are put; None: the CPU. Raises UftError where the child, or a model, cannot be had.
    """
    groups: dict[Checker | None, list[int]] = defaultdict(list)
    made = [make(spec) for spec, _, _ in jobs]
    for number, checker in enumerate(made):
        groups[None if checker.isolated else checker].append(number)
    verdicts: dict[int, Verdict] = {}
    for checker_of_all, numbers in groups.items():
        if checker_of_all is None:
            found = judge_apart([(made[number], *jobs[number][1:]) for number in numbers])
        else:
            found = checker_of_all.verdicts([jobs[number][1:] for number in numbers], device)
        verdicts.update(zip(numbers, found, strict=True))
    return [verdicts[number] for number in range(len(jobs))]
