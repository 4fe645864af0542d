"""Rewards: how good a reply is by a rule or by a model, as named figures in [0, 1].

One registry serves the evaluation (`data.sources.NAME.checker`) and training on a model's own samples (`reward=NAME`).
A preset is a file of conf/reward that names a class here and the keys it has. Classes of installed packages are found
by the entry points of the group `uft.rewards`, under the name that each has there.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from uft.data.rows import Row
from uft.errors import Problem, UftError, did_you_mean
from uft.rewards.base import Checker, Unjudged, Verdict, gold
from uft.rewards.ifeval import IFEval
from uft.rewards.isolation import judge_apart
from uft.rewards.models import Classifier, Likelihood
from uft.rewards.parsed import Countdown, JsonSchema, Math
from uft.rewards.text import Choice, Contains, Exact, FinalNumber, Format, KnightsKnaves, Length, Playground, Repetition

if TYPE_CHECKING:
    import torch

__all__ = [
    "CHECKERS",
    "Checker",
    "Spec",
    "Unjudged",
    "Verdict",
    "check",
    "checkers",
    "gold",
    "judge",
    "make",
    "spec_of",
]

Spec = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""A checker by its name, or with its keys (the `reward` node of a configuration); several as a list, or by names with +
between them. The figures of several are those of each."""

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
"""Method -> checker, those of this package."""


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


def parts(spec: Spec) -> Sequence[str | Mapping[str, Any]]:
    """The checkers of a spec, each by itself."""
    return spec.split("+") if isinstance(spec, str) else [spec] if isinstance(spec, Mapping) else spec


def make(part: str | Mapping[str, Any]) -> Checker:
    """The checker that a name, or a resolved `reward` node of the config, describes."""
    settings = {"method": part, "name": part} if isinstance(part, str) else dict(part)
    return _made(json.dumps(settings, sort_keys=True))


@lru_cache(maxsize=64)
def _made(settings: str) -> Checker:
    keys = json.loads(settings)
    return checkers()[keys["method"]](**keys)


def spec_of(reward: Mapping[str, Any], checker: str | None) -> Spec | None:
    """How a source with this `checker` is judged: the run's reward, where it is among them, has its keys."""
    if checker is None:
        return None
    return [dict(reward) if name == reward.get("method") else name for name in checker.split("+")]


def columns_of(checker: str | None) -> tuple[str, ...]:
    """Columns of the data set that are read beside the answer."""
    return tuple(column for name in parts(checker or []) for column in checkers()[str(name)].columns)


def problems_with(
    reward: Mapping[str, Any], checkers_by_key: Mapping[str, str | None]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(dotted key, what is wrong, advice) of the run's `reward` node and of checkers by the keys that name them: not
    known, without a package that they import, with keys that contradict each other, or with figures of one name."""
    known, own = checkers(), reward.get("method")
    if reward and not reward.keys() & {"name", "method"}:
        yield "reward", "has keys, and no reward is chosen", ("choose one:  reward=NAME",)
    named = {key: checker.split("+") for key, checker in checkers_by_key.items() if checker}
    for key, method in [
        ("reward", own),
        *((key, name) for key, names in named.items() for name in names if name != own),
    ]:
        if method is None:
            continue
        if method not in known:
            near = did_you_mean(method, known, shown=f"{key}={{}}".format)
            yield key, f"no such choice: {method}", (*near, f"choices: {', '.join(known)}")
        elif missing := [name for name in known[method].packages if find_spec(name) is None]:
            why = f"{method} needs {', '.join(missing)}, which is not installed"
            yield key, why, ("pip install 'uft-lm[rewards]'",)
        else:
            for leaf, why in make(reward if key == "reward" else method).problems():
                advice = (f"give it:  reward={method} reward.{leaf}=...",)
                yield (f"reward.{leaf}", why, ()) if key == "reward" else (key, f"its key {leaf} {why}", advice)
    for key, names in named.items():
        figures = Counter(figure for name in names if name in known for figure in known[name].figures)
        if twice := [figure for figure, count in figures.items() if count > 1]:
            yield key, f"has {', '.join(twice)} twice", ("name checkers whose figures have different names",)


def check(spec: Spec, row: Row, reply: str) -> dict[str, float]:
    """The figures of one reply; {} where the row cannot be judged."""
    return judge([(spec, row, reply)])[0].figures


def judge(jobs: Sequence[tuple[Spec, Row, str]], device: torch.device | None = None) -> list[Verdict]:
    """The verdict on every reply, in the order of the jobs (spec, row, reply).

    Replies of isolated checkers are judged in the child process, whatever else they do to it. `device`: where models
    of checkers are put; None: the CPU. Raises UftError where the child, or a model, cannot be had.
    """
    groups: dict[Checker | None, list[tuple[int, Checker]]] = defaultdict(list)
    for number, (spec, _, _) in enumerate(jobs):
        for checker in map(make, parts(spec)):
            groups[None if checker.isolated else checker].append((number, checker))
    verdicts = [Verdict({})] * len(jobs)
    for checker_of_all, asked in groups.items():
        if checker_of_all is None:
            found = judge_apart([(checker, *jobs[number][1:]) for number, checker in asked])
        else:
            found = checker_of_all.verdicts([jobs[number][1:] for number, _ in asked], device)
        for (number, _), verdict in zip(asked, found, strict=True):
            before = verdicts[number]
            verdicts[number] = Verdict(before.figures | verdict.figures, before.reason or verdict.reason)
    return verdicts
