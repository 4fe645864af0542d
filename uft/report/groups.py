"""Configurations: runs that differ in their seed alone form one group; axes are the keys that tell groups apart.

Keys that cannot change a result do not split a group. A sweep over objectives changes many keys at once; a key whose
value is determined by the other axes is no axis, so that a group is named by the choices that were made.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from uft.config.frozen import ABSENT, may_change
from uft.config.messages import written
from uft.config.schema import Config, Source, flat
from uft.data.messages import is_number
from uft.errors import Problem, UftError
from uft.report.metrics import config_value, listed, truncated
from uft.report.runs import LoadedRun

OBJECTIVE, OBJECTIVE_NAME, SOURCES = "objective.", "objective.name", "data.sources."
COMPLETIONS = "rollout.completions"
STAGE, IN_STAGE = re.compile(r"stages\.[^.]+\."), re.compile(r"^stages\.[^.]+\.config\.")
NO_RESULT = ("data.cache", "eval.best", "eval.best_mode", "eval.before", "eval.samples")
"""Keys, beside those that `may_change` knows, that change neither the last weights nor the last metrics."""
SELECT_SEED = "select.seed"  # the run's seed, unless another is given
RUN_KEYS = ("run.", "sweep.")  # a run's name and place, which differ by nature
LONGEST_NAME, LONGEST_VALUE = 100, 40

Flat = dict[str, Any]  # by dotted key
Column = Mapping[int, Any]
"""A key's value by the number of the run; runs that lack the key are left out."""


@dataclass(frozen=True)
class Axis:
    """A key that tells groups apart."""

    key: str
    column: Column

    @property
    def values(self) -> list[Any]:
        """Distinct values in order, without null."""
        found = {hashable(value): value for value in self.column.values() if value is not None}
        return sorted(found.values(), key=rank)

    @property
    def numeric(self) -> bool:
        return bool(self.values) and all(map(is_number, self.values))


@dataclass(frozen=True)
class Group:
    """Runs of one configuration. `config` holds its axes alone, without those it does not have."""

    name: str
    config: Mapping[str, Any]
    objective: str
    runs: Sequence[int]  # their numbers


@dataclass(frozen=True)
class Grouping:
    axes: Sequence[Axis]
    groups: Sequence[Group]
    seeds: Column
    varying: Sequence[str]  # every key that differs between groups


def grouping(runs: Sequence[LoadedRun], seed_keys: Sequence[str] = ()) -> Grouping:
    """Axes and groups of the runs whose configuration can be read. Seeds are `seed_keys`, else seed and seeds.*"""
    configs = {number: with_stages(run.config) for number, run in enumerate(runs) if run.config}
    fill_defaults(list(configs.values()))
    for config in configs.values():
        if not config.get(COMPLETIONS):  # nothing is sampled, so how it would be has no effect
            for key in [key for key in config if key.startswith("rollout.") and key != COMPLETIONS]:
                del config[key]
    columns: dict[str, Column] = {}
    signatures: dict[int, list[Hashable]] = {number: [] for number in configs}  # of each run, by the keys that vary
    for key in all_keys(configs.values()):
        inner = IN_STAGE.sub("", key)
        of_stage = IN_STAGE.sub(lambda found: found[0].removesuffix("config."), key)  # a stage may work by this key
        if may_change(of_stage) or inner in NO_RESULT or is_seed(key, seed_keys):
            continue
        column = {number: config[key] for number, config in configs.items() if key in config}
        signature = signature_of(column, configs)
        if len(set(signature)) > 1:
            columns[key] = column
            for number, value in zip(configs, signature, strict=True):
                signatures[number].append(value)
    members = by(configs, lambda number: tuple(signatures[number]))
    axes = choose_axes(swept(runs, columns, list(members.values())), columns, list(configs))
    groups = [
        Group(
            name="",
            config={axis.key: axis.column[numbers[0]] for axis in axes if numbers[0] in axis.column},
            objective=str(configs[numbers[0]].get(OBJECTIVE_NAME, "")),
            runs=tuple(numbers),
        )
        for numbers in members.values()
    ]
    seeds = {number: seed_of(config, seed_keys) for number, config in configs.items()}
    return Grouping(axes, named(groups, axes), seeds, tuple(columns))


def by(numbers: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    """The numbers by their key; those whose key is None are left out."""
    grouped: dict[Hashable, list[int]] = defaultdict(list)
    for number in numbers:
        if (value := key(number)) is not None:
            grouped[value].append(number)
    return dict(grouped)


def all_keys(tables: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """Every key that one of them has, in the order they come."""
    return dict.fromkeys(key for table in tables for key in table)


def with_stages(config: Mapping[str, Any]) -> Flat:
    """The configuration, its objective those of all its training stages where it has some: `sft+dpo`.

    A stage's configuration holds what differs from the run's, which is the last stage's.
    """
    stages = dict.fromkeys(found[0] for key in config if (found := STAGE.match(key)))
    training = [stage for stage in stages if config.get(f"{stage}do", "fit") == "fit"]
    last = config.get(OBJECTIVE_NAME)
    works = {stage: config.get(f"{stage}do") for stage in stages if stage not in training}
    given = {
        f"{stage}config.{key}": value
        for stage, does in works.items()
        for key, value in config.items()
        if key.startswith(f"{does}.")
    }  # what is set for all stages, of what this one works by
    joined = "+".join(str(config.get(f"{stage}config.{OBJECTIVE_NAME}", last)) for stage in training)
    whole = {**given, **config, OBJECTIVE_NAME: joined} if joined else dict(config)
    same = {key for key in whole if key.endswith(SELECT_SEED) and whole[key] == config.get("seed")}
    return {key: value for key, value in whole.items() if key not in same}


def fill_defaults(configs: Sequence[Flat]) -> None:
    """Give every configuration the keys that only others have, so that runs of several versions can be compared.

    The value is the schema's default, as when such a run is resumed. A key of an objective gets the value that all
    other runs of that objective agree on: its defaults cannot be read without torch. Unknown values stay away.
    """
    agreed: dict[tuple[Any, str], Flat] = defaultdict(dict)
    for config in configs:
        for key in (key for key in config if key.startswith(OBJECTIVE)):
            agreed[config.get(OBJECTIVE_NAME), key][repr(config[key])] = config[key]
    keys = all_keys(configs)
    for config in configs:
        sources = {key.removeprefix(SOURCES).partition(".")[0] for key in config if key.startswith(SOURCES)}
        for key in [key for key in keys if key not in config]:
            values = list(agreed[config.get(OBJECTIVE_NAME), key].values())
            source, _, leaf = key.removeprefix(SOURCES).partition(".")
            if not key.startswith(SOURCES) and key in defaults(Config):
                values.append(defaults(Config)[key])
            elif key.startswith(SOURCES) and source in sources and leaf in defaults(Source):
                values.append(defaults(Source)[leaf])  # a source that the run does not have has no keys either
            if len(values) == 1:
                config[key] = values[0]


@cache
def defaults(kind: type) -> Flat:
    """Every default of a group of the schema by dotted key; no required values, interpolations or empty collections."""
    found = flat(asdict(kind()))
    return {key: value for key, value in found if value not in ({}, []) and not str(value).startswith(("${", "???"))}


def hashable(value: Any) -> Hashable:
    """A value as a key of a set: equal for equal numbers, apart for 1 and true."""
    plain = isinstance(value, Hashable) and not isinstance(value, (tuple, bool))
    return value if plain else repr(value)


def signature_of(column: Column, numbers: Iterable[int]) -> tuple[Hashable, ...]:
    """The column as it can be compared, with a mark where a run lacks the key."""
    return tuple(hashable(column.get(number, ABSENT)) for number in numbers)


def is_seed(key: str, seed_keys: Sequence[str]) -> bool:
    key = IN_STAGE.sub("", key)
    return key in seed_keys if seed_keys else key == "seed" or key.startswith("seeds.")


def seed_of(config: Mapping[str, Any], seed_keys: Sequence[str]) -> Any:
    """A run's seed; where its seeds differ from each other, all of them as text."""
    found = {key: value for key, value in config.items() if is_seed(key, seed_keys)}
    parts = {key: value for key, value in found.items() if key != "seed"} or found
    values = {hashable(value): config_value(value) for value in parts.values()}
    if len(values) < 2:
        return next(iter(values.values()), None)
    return " ".join(f"{key.rpartition('.')[2]}={config_value(value)}" for key, value in parts.items())


def swept(
    runs: Sequence[LoadedRun], varying: Mapping[str, Column], members: Sequence[Sequence[int]]
) -> dict[str, Column]:
    """The swept keys in the order they were typed: those with several typed values, with the configuration's values.

    A word without a key in the configuration (`experiment=...`) counts where every run has one and all runs of a group
    (`members`) the same.
    """
    typed: dict[str, dict[int, str]] = defaultdict(dict)
    numbers = sorted(number for group in members for number in group)
    for number in numbers:
        for key, equals, value in (word.lstrip("+~").partition("=") for word in runs[number].overrides):
            if equals:
                typed[key][number] = value
    axes: dict[str, Column] = {}
    for key, values in typed.items():
        if len(set(values.values())) < 2:
            continue
        name = next((name for name in (key, f"{key}.name") if name in varying), None)
        everywhere = "." not in key and key != "seed" and len(values) == len(numbers)
        if name is not None:
            axes[name] = varying[name]
        elif everywhere and all(len({values[number] for number in group}) == 1 for group in members):
            axes[key] = values
    if (arm := axes.get("arm")) is None:
        return axes
    arms = set(arm.values())  # what is the same in all runs of an arm is a setting of it
    pairs = {key: {(arm[n], hashable(column.get(n, ABSENT))) for n in arm} for key, column in axes.items()}
    return {"arm": arm} | {key: column for key, column in axes.items() if len(pairs[key]) > len(arms)}


def choose_axes(typed: Mapping[str, Column], varying: Mapping[str, Column], numbers: Sequence[int]) -> list[Axis]:
    """The swept keys, then the varying keys that the names among the axes do not determine; no two that are equal.

    Names are values that are no numbers. A key with one value tells only which runs have it: any axis may determine it.
    """
    axes: dict[tuple[Hashable, ...], Axis] = {}  # by signature
    names: list[tuple[Hashable, ...]] = [()] * len(numbers)  # of each run, its values of the axes of names
    for key, column in {**typed, **varying}.items():
        signature = signature_of(column, numbers)
        has_one_value = len({*signature} - {ABSENT}) == 1
        known = (list(zip(*axes, strict=True)) or names) if has_one_value else names
        determined = len({*zip(known, signature, strict=True)}) == len({*known})  # runs alike in those are alike in it
        if signature in axes or (determined and key not in typed):
            continue
        axes[signature] = Axis(key, column)
        if not all(value is None or is_number(value) for value in column.values()):
            names = [(*name, value) for name, value in zip(names, signature, strict=True)]
    return list(axes.values())


def named(groups: Iterable[Group], axes: Sequence[Axis]) -> list[Group]:
    """The groups in the order of their values, each with a name of its own made of them: `uft beta=0.1`."""
    last = [axis.key.rpartition(".")[2] for axis in axes]
    labels = {}
    for axis, leaf in zip(axes, last, strict=True):
        choice = "." not in axis.key or (axis.key.count(".") == 1 and axis.key.endswith(".name"))
        labels[axis.key] = "" if choice else f"{leaf if last.count(leaf) == 1 else axis.key}="
    by_name: dict[str, Group] = {}
    for group in sorted(groups, key=lambda group: [rank(group.config.get(axis.key)) for axis in axes]):
        parts = (f"{labels[key]}{truncated(as_typed(value), LONGEST_VALUE)}" for key, value in group.config.items())
        name = truncated(" ".join(filter(None, parts)) or group.objective or "all runs", LONGEST_NAME)
        candidates = (name, *(f"{name} ({count})" for count in range(2, len(by_name) + 2)))
        unique = next(text for text in candidates if text not in by_name)
        by_name[unique] = replace(group, name=unique)
    return list(by_name.values())


def as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return written(value) if value is None or isinstance(value, bool) else str(config_value(value))


def rank(value: Any) -> tuple[int, float, str]:
    """Order of values of any type: null, numbers by size, the rest by text."""
    if value is None:
        return (0, 0.0, "")
    return (1, float(value), "") if is_number(value) else (2, 0.0, str(value))


def differences(runs: Sequence[LoadedRun], seed_keys: Sequence[str]) -> list[tuple[str, list[tuple[Any, list[int]]]]]:
    """(key, [(value, numbers of the runs)]) of the configuration keys and facts that are not the same in all runs.

    Seeds and names are left out, and so are runs that cannot be read.
    """
    configs = {number: run.config for number, run in enumerate(runs) if run.config}
    facts = {number: run.facts for number, run in enumerate(runs) if run.info}
    keys = [key for key in all_keys(configs.values()) if not key.startswith(RUN_KEYS) and not is_seed(key, seed_keys)]
    following = {
        key for key in keys if key.endswith(SELECT_SEED) and not seed_keys
    }  # seeds too, if no others are given
    keys = [key for key in keys if key not in following or any(c.get(key) != c.get("seed") for c in configs.values())]
    columns = [(key, {number: config.get(key, ABSENT) for number, config in configs.items()}) for key in keys]
    columns += [(key, {n: of.get(key, ABSENT) for n, of in facts.items()}) for key in all_keys(facts.values())]
    differing = []
    for key, column in columns:
        values: dict[Hashable, list[int]] = defaultdict(list)
        for number, value in column.items():
            values[hashable(value)].append(number)
        if len(values) > 1:
            pairs = [(config_value(column[numbers[0]]), numbers) for numbers in values.values()]
            differing.append((key, sorted(pairs, key=lambda pair: rank(pair[0]))))
    return differing


def baselines(groups: Sequence[Group], wanted: str | None) -> list[int]:
    """The groups that count as the baseline: those that `wanted` names, else objective=sft, else the first.

    `wanted` is a group's name or `key=value ...`, the keys being those of the axes, whole or their last part.
    Raises UftError where it names none.
    """
    if wanted is None:
        return [number for number, group in enumerate(groups) if group.objective == "sft"] or [*range(len(groups))][:1]

    def has(group: Group, key: str, value: str) -> bool:
        if key in ("objective", OBJECTIVE_NAME):
            return group.objective == value
        keys = (axis for axis in group.config if axis in (key, f"{key}.name") or axis.rpartition(".")[2] == key)
        return any(as_typed(group.config[axis]) == value for axis in keys)

    words = [word.partition("=") for word in wanted.split()]
    chosen = [
        number
        for number, group in enumerate(groups)
        if wanted == group.name or (words and all(equals and has(group, key, value) for key, equals, value in words))
    ]
    if not chosen:
        footer = f"There are:  {listed([group.name for group in groups], 30)}"
        raise UftError(Problem(f"--baseline {wanted}", "no configuration has that name"), footer=footer)
    return chosen
