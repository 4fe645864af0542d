"""Reasons to doubt a comparison: unequal data, budgets, code, machines, seeds and searches."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from uft.report.groups import Grouping, by
from uft.report.metrics import Headline, listed, plural
from uft.report.runs import FINISHED, UNREADABLE, LoadedRun, numbers
from uft.tracking.metrics import collapses

TOLERANCE = 0.02  # of a budget
COLLAPSES = {
    "likelihood": "Good answers have become less likely",
    "entropy": "Own samples are all alike",
    "kl": "There is no estimate of kl",
}
BUDGETS = {"steps": "optimiser steps", "rows": "rows", "supervised_tokens": "supervised tokens"}
MEASURING = ("eval.rows", "eval.generate_rows", "eval.max_new_tokens", "data.holdout")
ORDERING = ("data.", "train.batch_size", "train.max_length", "model.name", "model.path", "model.revision")
"""Keys that decide which rows are drawn in which order, or how they read; beside the seeds."""
STATES = {
    "failed": ("failed", "They are missing from the means; if what failed is not chance, the rest is flattered."),
    "running": ("not finished yet", "They are not counted yet."),
    "stopped": ("stopped before the end", "uft resume goes on with them; until then they are not counted."),
    "interrupted": ("ended without a result", "uft resume goes on with them; until then they are not counted."),
    UNREADABLE: ("cannot be read", "Something in the folder is missing or damaged; the table of runs says what."),
}
UNKNOWN_STATE = ("in a state that this version does not know", "They are not counted.")


@dataclass(frozen=True)
class Caution:
    what: str
    why: str
    runs: tuple[int, ...] = ()  # numbers of those it is about


@dataclass(frozen=True)
class Case:
    """Every run, and the finished ones, which the figures are of."""

    runs: Sequence[LoadedRun]
    grouping: Grouping
    headlines: Sequence[Headline]
    waiting: Sequence[str] = ()  # names of jobs that have not started

    @cached_property
    def finished(self) -> list[int]:
        return [number for number, run in enumerate(self.runs) if run.finished]

    @cached_property
    def ordering(self) -> list[str]:
        """The keys among those that differ which decide the rows and their order."""
        return [key for key in self.grouping.varying if key.startswith(ORDERING)]

    def by_fact(self, fact: str, among: Iterable[int] | None = None) -> dict[Hashable, list[int]]:
        """Finished runs by a fact; those without it are left out."""
        return by(self.finished if among is None else among, lambda number: self.runs[number].facts.get(fact))

    def disagreeing(self, keys: Sequence[str], fact: str) -> tuple[int, ...]:
        """Finished runs that have another `fact` than most runs with the same values of `keys`."""
        alike = by(self.finished, lambda number: tuple(str(self.runs[number].config.get(key)) for key in keys))
        found = (self.by_fact(fact, numbers) for numbers in alike.values())
        return tuple(sorted(number for values in found if len(values) > 1 for number in minority(values)))


def cautions(case: Case) -> list[Caution]:
    """All cautions, the gravest first."""
    checks = (data, budgets, evaluations, states, not_finite, collapsed, seeds, search, code, machine)
    return [caution for check in checks for caution in check(case)]


def minority(found: Mapping[Hashable, Sequence[int]]) -> tuple[int, ...]:
    """All runs but those of the most frequent value."""
    most = max(found, key=lambda value: len(found[value]))
    return tuple(sorted(number for value, numbers in found.items() if value != most for number in numbers))


def data(case: Case) -> Iterator[Caution]:
    """Whether runs that asked for the same rows got them; the first that applies explains the rest."""
    sources = [key for key in case.grouping.varying if key.startswith("data.")]
    if wrong := case.disagreeing(sources, "data contents"):
        yield Caution(
            "The data are not the same under one configuration",
            "A file or a hub data set changed between the runs, so they did not learn from the same rows.",
            wrong,
        )
    elif wrong := case.disagreeing(["seed", "seeds.data", *case.ordering], "data digest"):
        yield Caution(
            "Data digests differ between runs of the same seed",
            "They were asked for the same rows in the same order and did not get them: the data, the template or the"
            " seeds of the data are not the same.",
            wrong,
        )
    elif case.ordering and len(case.by_fact("data digest")) > 1:
        yield Caution(
            f"Configurations saw different rows, as asked for by {listed(case.ordering)}",
            "Their data digests differ. What the figures show is the effect of the rows together with everything else"
            " that varies.",
        )


def budgets(case: Case) -> Iterator[Caution]:
    """Steps, rows and supervised tokens, as the mean over each configuration's seeds."""
    for key, noun in BUDGETS.items():
        means: dict[str, float] = {}
        for group in case.grouping.groups:
            spent = [case.runs[number].total(key) for number in group.runs if case.runs[number].finished]
            if known := [value for value in spent if value is not None and math.isfinite(value)]:
                means[group.name] = sum(known) / len(known)
        if len(means) < 2 or max(means.values()) <= (1 + TOLERANCE) * min(means.values()):
            continue
        least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        why = f"{least} had the fewest, {most} the most."
        if key == "supervised_tokens":
            why += " Objectives that use more of each row learn from more tokens of the same rows."
        yield Caution(f"Budgets differ: {means[least]:,.0f} to {means[most]:,.0f} {noun}", why)


def evaluations(case: Case) -> Iterator[Caution]:
    """An evaluation of another size, or with another model's tokens."""
    unlike = [key for key in case.grouping.varying if key in MEASURING]
    if unlike:
        yield Caution(
            f"Not all runs were measured alike, by {listed(unlike)}",
            "Their figures are over different held-out rows or answers.",
        )
    figures = dict.fromkeys(name for number in case.finished for name in case.runs[number].evals)
    how = {name: {case.runs[n].evals[name][1] for n in case.finished if name in case.runs[n].evals} for name in figures}
    if apart := [name for name in figures if len(how[name]) > 1]:
        yield Caution(
            f"Figures of uft eval were not measured alike: {listed(apart)}",
            "Their rows, few-shot examples, template, limits or versions differ; evals/ in the runs has them.",
        )
    models = by(case.finished, lambda number: case.runs[number].config.get("model.path"))
    if len(models) > 1:
        yield Caution(
            f"{len(models)} different base models",
            "Likelihoods under different tokenizers, and distances from different references, cannot be compared.",
        )


def states(case: Case) -> Iterator[Caution]:
    """Runs that are not counted."""
    if case.runs and not case.finished:
        yield Caution("No run has finished", "There is nothing to judge yet.")
    for status, members in by(range(len(case.runs)), lambda number: case.runs[number].status).items():
        if status != FINISHED:
            state, why = STATES.get(str(status), UNKNOWN_STATE)
            names = listed([case.runs[number].name for number in members])
            yield Caution(f"{plural(len(members), 'run')} {state}: {names}", why, tuple(members))
    if case.waiting:
        jobs = f"{plural(len(case.waiting), 'job')} of the sweep not started yet: {listed(case.waiting)}"
        yield Caution(jobs, "The grid has holes.")


def not_finite(case: Case) -> Iterator[Caution]:
    """Finished runs whose last figure is nan or infinite."""
    heads = [headline.metric for headline in case.headlines]
    wrong = {n: [name for name in heads if not math.isfinite(case.runs[n].final.get(name, 0.0))] for n in case.finished}
    numbers = tuple(number for number, names in wrong.items() if names)
    if numbers:
        names = list(dict.fromkeys(name for names in wrong.values() for name in names))
        yield Caution(
            f"{plural(len(numbers), 'run')} ended at a figure that is not finite: {listed(names)}",
            "A mean over the others would hide it, so their configurations are not ranked in that metric.",
            numbers,
        )


def collapsed(case: Case) -> Iterator[Caution]:
    """Finished runs that said so themselves, while they trained and at their end, in the same words."""
    by_run = dict[int, dict[str, str]]()
    for number in case.finished:
        run = case.runs[number]
        lines = [{**numbers(line), "stage": line.get("stage")} for line in run.lines]
        by_run[number] = collapses([*lines, run.final])
    for kind, what in COLLAPSES.items():
        if members := tuple(number for number, notes in by_run.items() if kind in notes):
            names = [case.runs[number].name for number in members]
            why = f"{names[0]}: {by_run[members[0]][kind]}."
            yield Caution(f"{what} in {plural(len(members), 'run')}: {listed(names)}", why, members)


def seeds(case: Case) -> Iterator[Caution]:
    """The number of seeds behind the figures, and runs that repeat a seed."""
    counts: dict[str, int] = {}  # of the configurations with a finished run
    twice: list[int] = []
    for group in case.grouping.groups:
        finished = [number for number in group.runs if case.runs[number].finished]
        found = by(finished, case.grouping.seeds.get)
        counts |= {group.name: len(found)} if found else {}
        twice += [number for numbers in found.values() if len(numbers) > 1 for number in numbers]
    least, most = min(counts.values(), default=0), max(counts.values(), default=0)
    if most == 1:
        yield Caution("One seed per configuration", "Nothing can be said about noise: run more, e.g.  seed=1,2,3")
    elif least < most:
        few = listed([name for name, count in counts.items() if count < most])
        yield Caution(
            f"Unequal numbers of seeds: {least} to {most}",
            f"A mean over fewer seeds is less sure, and luckier when it is the best. Short of seeds: {few}.",
        )
    if twice:
        yield Caution(
            "Several runs of one configuration and seed",
            "They count as one, with their mean: repeating a seed is no new evidence.",
            tuple(sorted(twice)),
        )


def search(case: Case) -> Iterator[Caution]:
    """The number of settings that each objective was tried in."""
    groups = case.grouping.groups
    tried = by(range(len(groups)), lambda number: groups[number].objective or None)
    counts = sorted(((str(name), len(numbers)) for name, numbers in tried.items()), key=lambda pair: -pair[1])
    if len({count for _, count in counts}) > 1:
        yield Caution(
            f"Unequal search: configurations per objective: {', '.join(f'{name} {count}' for name, count in counts)}",
            "The best of many tries is luckier than the best of few.",
        )


def code(case: Case) -> Iterator[Caution]:
    """Versions of uft and of its code."""
    for fact, noun in (("uft", "versions of uft"), ("commit", "commits of uft's code")):
        if len(found := case.by_fact(fact)) > 1:
            yield Caution(f"{len(found)} {noun}", "The code may differ in what it computes.", minority(found))
    if dirty := case.by_fact("uncommitted changes"):
        numbers = tuple(sorted(number for those in dirty.values() for number in those))
        yield Caution(
            f"{plural(len(numbers), 'run')} from code with uncommitted changes",
            "The commit does not say what ran" + (", and the changes differ." if len(dirty) > 1 else "."),
            numbers,
        )


def machine(case: Case) -> Iterator[Caution]:
    """Versions of torch, and devices."""
    for fact, noun in (("torch", "versions of torch"), ("device", "kinds of device")):
        if len(groups := case.by_fact(fact)) > 1:
            yield Caution(
                f"{len(groups)} {noun}: {listed([str(value) for value in groups])}",
                "Arithmetic differs a little between them, and speed and memory a lot.",
                minority(groups),
            )
