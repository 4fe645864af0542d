"""What to know before believing a comparison: unequal data, budgets, code, machines, seeds and searches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.report.differences import facts
from uft.report.figures import Figures
from uft.report.groups import Grouping
from uft.report.headlines import Headline
from uft.report.load import FINISHED, UNREADABLE, Loaded
from uft.report.words import listed, many

TOLERANCE = 0.02  # of a budget
BUDGETS = {"steps": "optimiser steps", "rows": "rows", "supervised_tokens": "supervised tokens"}
MEASURING = ("eval.rows", "eval.generate_rows", "eval.max_new_tokens", "data.holdout")
ORDERING = ("data.", "train.batch_size", "train.max_length", "model.name", "model.path", "model.revision")
"""Keys that decide which rows are drawn in which order, or how they read; beside the seeds."""
SEEDS = ("seed", "seeds.data")


@dataclass(frozen=True)
class Caution:
    what: str
    why: str
    runs: tuple[int, ...] = ()  # numbers of those it is about


@dataclass(frozen=True)
class Case:
    """What is looked at: every run, and the finished ones, which the figures are of."""

    runs: Sequence[Loaded]
    grouping: Grouping
    figures: Figures
    headlines: Sequence[Headline]
    waiting: Sequence[str] = ()  # names of jobs that have not started

    @property
    def finished(self) -> list[int]:
        return [number for number, run in enumerate(self.runs) if run.finished]


def cautions(case: Case) -> list[Caution]:
    """All there is to say, the gravest first."""
    return [caution for look in LOOKS for caution in look(case)]


def by(numbers: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    """The numbers by what `key` says of them; those of which it says None are left out."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        if (value := key(number)) is not None:
            found[value].append(number)
    return dict(found)


def minority(found: Mapping[Hashable, Sequence[int]]) -> tuple[int, ...]:
    """All runs but those of the most frequent value."""
    most = max(found, key=lambda value: len(found[value]))
    return tuple(sorted(number for value, numbers in found.items() if value != most for number in numbers))


def data(case: Case) -> Iterator[Caution]:
    """Whether runs that asked for the same rows got them; the first of these that is so: it explains the rest."""
    yield from list(contents(case)) or list(order(case)) or list(mixtures(case))


def contents(case: Case) -> Iterator[Caution]:
    """Other rows behind the same names."""
    keys = [key for key in case.grouping.varying if key.startswith("data.")]
    wrong = disagreeing(case, keys, "data contents")
    if wrong:
        yield Caution(
            "The data are not the same under one configuration",
            "A file or a hub data set changed between the runs, so they did not learn from the same rows.",
            wrong,
        )


def order(case: Case) -> Iterator[Caution]:
    """Runs of one seed and one data configuration that drew other rows, or the same rows in another order."""
    wrong = disagreeing(case, [*SEEDS, *deciding(case)], "data digest")
    if wrong:
        yield Caution(
            "Data digests differ between runs of the same seed",
            "They were asked for the same rows in the same order and did not get them: the data, the template or the"
            " seeds of the data are not the same.",
            wrong,
        )


def mixtures(case: Case) -> Iterator[Caution]:
    """Rows that differ because that was asked for."""
    keys = deciding(case)
    if keys and len(by(case.finished, lambda number: facts(case.runs[number]).get("data digest"))) > 1:
        yield Caution(
            f"Configurations saw different rows, as asked for by {listed(keys)}",
            "Their data digests differ. What the figures show is the effect of the rows together with everything else"
            " that varies.",
        )


def deciding(case: Case) -> list[str]:
    return [key for key in case.grouping.varying if key.startswith(ORDERING)]


def disagreeing(case: Case, keys: Sequence[str], fact: str) -> tuple[int, ...]:
    """Finished runs that have another `fact` than most runs with the same values of `keys`."""
    groups = by(case.finished, lambda number: tuple(str(case.runs[number].config.get(key)) for key in keys))
    found = (by(numbers, lambda number: facts(case.runs[number]).get(fact)) for numbers in groups.values())
    return tuple(sorted(number for values in found if len(values) > 1 for number in minority(values)))


def budgets(case: Case) -> Iterator[Caution]:
    """Steps, rows and supervised tokens, as the mean over each configuration's seeds."""
    for key, name in BUDGETS.items():
        means: dict[int, float] = {}
        for place, group in enumerate(case.grouping.groups):
            spent = [case.runs[number].total(key) for number in group.runs if case.runs[number].finished]
            known = [value for value in spent if value is not None and math.isfinite(value)]
            means |= {place: sum(known) / len(known)} if known else {}
        if len(means) < 2 or max(means.values()) <= (1 + TOLERANCE) * min(means.values()):
            continue
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        groups = case.grouping.groups
        yield Caution(
            f"Budgets differ: {means[least]:,.0f} to {means[most]:,.0f} {name}",
            f"{groups[least].name} had the fewest, {groups[most].name} the most."
            + (
                " Objectives that use more of each row learn from more tokens of the same rows." if "tok" in key else ""
            ),
        )


def measured(case: Case) -> Iterator[Caution]:
    """A battery of another size, or of another model's tokens."""
    unlike = [key for key in case.grouping.varying if key in MEASURING]
    if unlike:
        yield Caution(
            f"Not all runs were measured alike, by {listed(unlike)}",
            "Their figures are over different held-out rows or answers.",
        )
    models = by(case.finished, lambda number: case.runs[number].config.get("model.path"))
    if len(models) > 1:
        yield Caution(
            f"{len(models)} different base models",
            "Likelihoods under different tokenizers, and distances from different references, cannot be compared.",
        )


def code(case: Case) -> Iterator[Caution]:
    """Other versions of uft or of its code."""
    for fact, name in (("uft", "versions of uft"), ("commit", "commits of uft's code")):
        found = by(case.finished, lambda number, fact=fact: facts(case.runs[number]).get(fact))  # type: ignore[misc]
        if len(found) > 1:
            yield Caution(f"{len(found)} {name}", "The code may differ in what it computes.", minority(found))
    dirty = by(case.finished, lambda number: facts(case.runs[number]).get("uncommitted changes"))
    numbers = tuple(sorted(number for those in dirty.values() for number in those))
    if numbers:
        yield Caution(
            f"{many(len(numbers), 'run')} from code with uncommitted changes",
            "The commit does not say what ran" + (", and the changes differ." if len(dirty) > 1 else "."),
            numbers,
        )


def machine(case: Case) -> Iterator[Caution]:
    for fact, name in (("torch", "versions of torch"), ("device", "kinds of device")):
        found = by(case.finished, lambda number, fact=fact: facts(case.runs[number]).get(fact))  # type: ignore[misc]
        if len(found) > 1:
            yield Caution(
                f"{len(found)} {name}: {listed([str(value) for value in found])}",
                "Arithmetic differs a little between them, and speed and memory a lot.",
                minority(found),
            )


def seeds(case: Case) -> Iterator[Caution]:
    """How many seeds stand behind the figures, and whether each was counted once."""
    finished = set(case.finished)
    counts = []
    twice: list[int] = []
    for group in case.grouping.groups:
        found = by([n for n in group.runs if n in finished], case.grouping.seeds.get)
        counts.append(len(found))
        twice += [number for numbers in found.values() if len(numbers) > 1 for number in numbers]
    there = [count for count in counts if count]
    few = [group.name for group, count in zip(case.grouping.groups, counts, strict=True) if 0 < count < max(there)]
    if there and max(there) == 1:
        yield Caution("One seed per configuration", "Nothing can be said about noise: run more, e.g.  seed=1,2,3")
    elif len(set(there)) > 1:
        yield Caution(
            f"Unequal numbers of seeds: {min(there)} to {max(there)}",
            f"A mean over fewer seeds is less sure, and luckier when it is the best. Short of seeds: {listed(few)}.",
        )
    if twice:
        yield Caution(
            "Several runs of one configuration and seed",
            "They count as one, with their mean: repeating a seed is no new evidence.",
            tuple(sorted(twice)),
        )


def search(case: Case) -> Iterator[Caution]:
    """How many settings each objective was tried in."""
    tried = by(range(len(case.grouping.groups)), lambda number: case.grouping.groups[number].objective or None)
    counts = {str(name): len(numbers) for name, numbers in tried.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        yield Caution(
            f"Unequal search: configurations per objective: {said}",
            "The best of many tries is luckier than the best of few.",
        )


STATES = {
    "failed": ("failed", "They are missing from the means; if what failed is not chance, the rest is flattered."),
    "running": ("not finished yet", "They are not counted yet."),
    "stopped": ("stopped before the end", "uft resume goes on with them; until then they are not counted."),
    "interrupted": ("ended without a result", "uft resume goes on with them; until then they are not counted."),
    UNREADABLE: ("cannot be read", "Something in the folder is missing or damaged; the table of runs says what."),
}
UNKNOWN = ("in a state that this version does not know", "They are not counted.")


def states(case: Case) -> Iterator[Caution]:
    """Runs whose figures are not counted."""
    if case.runs and not case.finished:
        yield Caution("No run has finished", "There is nothing to judge yet.")
    for status, numbers in by(range(len(case.runs)), lambda number: case.runs[number].status).items():
        says, why = STATES.get(str(status), UNKNOWN)
        names = listed([case.runs[number].name for number in numbers])
        if status != FINISHED:
            yield Caution(f"{many(len(numbers), 'run')} {says}: {names}", why, tuple(numbers))
    if case.waiting:
        names = listed(list(case.waiting))
        yield Caution(f"{many(len(case.waiting), 'job')} of the sweep not started yet: {names}", "The grid has holes.")


def figures(case: Case) -> Iterator[Caution]:
    """Finished runs that ended at no number."""
    wrong: dict[int, Any] = {}
    for number in case.finished:
        final = case.runs[number].final
        bad = [h.metric for h in case.headlines if h.metric in final and not math.isfinite(final[h.metric])]
        wrong |= {number: bad} if bad else {}
    if wrong:
        names = list(dict.fromkeys(name for bad in wrong.values() for name in bad))
        yield Caution(
            f"{many(len(wrong), 'run')} ended at a figure that is not finite: {listed(names)}",
            "A mean over the others would hide it, so their configurations are not ranked in that metric.",
            tuple(wrong),
        )


LOOKS: tuple[Callable[[Case], Iterator[Caution]], ...] = (
    data,
    budgets,
    measured,
    states,
    figures,
    seeds,
    search,
    code,
    machine,
)
