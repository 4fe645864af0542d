"""Configurations: runs that differ in their seed alone are one group; axes are the keys by which groups differ.

Keys that cannot change a result do not split a group. A sweep over objectives changes many keys at once; of those,
only what is not settled by another axis stays an axis, so that a group is named by what was really chosen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uft.config.frozen import ABSENT, free
from uft.report.load import Loaded
from uft.report.versions import OBJECTIVE_NAME, completed, frozen
from uft.report.words import as_value, shorten

SEED, SEEDS = "seed", "seeds."
STAGE, IN_STAGE = re.compile(r"stages\.[^.]+\."), re.compile(r"^stages\.[^.]+\.config\.")
NO_RESULT = ("data.cache", "eval.best", "eval.best_mode", "eval.before", "eval.samples")
"""Beside what `free` knows: nothing here touches the last weights or the last figures."""

LONGEST_NAME, LONGEST_VALUE = 100, 40

Column = Mapping[int, Any]
"""A key's value by the number of the run; runs that lack the key are left out."""


@dataclass(frozen=True)
class Axis:
    """A key that tells groups apart."""

    key: str
    column: Column

    @property
    def values(self) -> list[Any]:
        """Distinct, in order, without null."""
        found = {frozen(value): value for value in self.column.values() if value is not None}
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
    runs: tuple[int, ...]  # their numbers


@dataclass(frozen=True)
class Grouping:
    axes: tuple[Axis, ...]
    groups: tuple[Group, ...]
    seeds: Column
    varying: tuple[str, ...]  # every key that differs between groups


def grouping(runs: Sequence[Loaded], seed_keys: Sequence[str] = ()) -> Grouping:
    """Axes and groups of the runs whose configuration can be read. Seeds are `seed_keys`, else seed and seeds.*"""
    configs = {number: with_stages(run.config) for number, run in enumerate(runs) if run.config}
    completed(configs.values())
    seeds = {number: seed_of({k: v for k, v in c.items() if is_seed(k, seed_keys)}) for number, c in configs.items()}
    keys = [key for key in all_keys(configs.values()) if matters(key) and not is_seed(key, seed_keys)]
    columns = {key: {number: c[key] for number, c in configs.items() if key in c} for key in keys}
    differing = {key: column for key, column in columns.items() if len(set(said(column, configs))) > 1}
    members: dict[Hashable, list[int]] = {}
    for number, signature in zip(configs, rows(differing, configs), strict=True):
        members.setdefault(signature, []).append(number)
    typed = swept({number: runs[number].overrides for number in configs}, differing, list(members.values()))
    axes = tuple(Axis(key, column) for key, column in chosen(typed, differing, list(configs)).items())
    groups = [make_group(numbers, axes, configs[numbers[0]]) for numbers in members.values()]
    return Grouping(axes, named(groups, axes), seeds, tuple(differing))


def all_keys(tables: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """Every key that one of them has, in the order they come."""
    return dict.fromkeys(key for table in tables for key in table)


def with_stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, its objective those of all its stages where it has some: `sft+dpo`.

    A stage says of its objective what differs from the run's, which is the last stage's.
    """
    names = dict.fromkeys(found[0] for key in config if (found := STAGE.match(key)))
    fits = [name for name in names if config.get(f"{name}do", "fit") == "fit"]
    last = config.get(OBJECTIVE_NAME)
    joined = "+".join(str(config.get(f"{name}config.{OBJECTIVE_NAME}", last)) for name in fits)
    return {**config, OBJECTIVE_NAME: joined} if joined else dict(config)


def is_seed(key: str, seed_keys: Sequence[str]) -> bool:
    key = IN_STAGE.sub("", key)
    return key in seed_keys if seed_keys else key == SEED or key.startswith(SEEDS)


def matters(key: str) -> bool:
    """Whether a key can change what a run ends at."""
    key = IN_STAGE.sub("", key)
    return not free(key) and key not in NO_RESULT


def seed_of(found: dict[str, Any]) -> Any:
    """A run's seed; where its seeds differ from each other, all of them as text."""
    parts = {key: value for key, value in found.items() if key != SEED} or found
    values = {frozen(value): as_value(value) for value in parts.values()}
    if len(values) < 2:
        return next(iter(values.values()), None)
    return " ".join(f"{key.rpartition('.')[2]}={as_value(value)}" for key, value in parts.items())


def said(column: Column, numbers: Mapping[int, Any] | Sequence[int]) -> tuple[Hashable, ...]:
    """A column as it can be compared, with a mark where a run lacks the key."""
    return tuple(frozen(column.get(number, ABSENT)) for number in numbers)


def rows(columns: Mapping[str, Column], numbers: Mapping[int, Any]) -> list[tuple[Hashable, ...]]:
    """What each run says in all columns."""
    if not columns:
        return [()] * len(numbers)
    return list(zip(*(said(column, numbers) for column in columns.values()), strict=True))


def swept(
    overrides: Mapping[int, Sequence[str]], differing: Mapping[str, Column], members: Sequence[Sequence[int]]
) -> dict[str, Column]:
    """What was swept, in the order it was typed: keys with several typed values, as the configuration has them.

    A word that no key holds (`experiment=...`) counts where every run has one and all runs of a group the same.
    """
    typed: dict[str, dict[int, str]] = {}
    for number, words in overrides.items():
        for key, equals, value in (word.lstrip("+~").partition("=") for word in words):
            if equals:
                typed.setdefault(key, {})[number] = value
    found: dict[str, Column] = {}
    for key, values in typed.items():
        name = next((name for name in (key, f"{key}.name") if name in differing), None)
        if len(set(values.values())) < 2:
            continue
        if name is not None:
            found[name] = differing[name]
        elif "." not in key and key != SEED and len(values) == len(overrides) and constant(values, members):
            found[key] = values
    return found


def constant(column: Column, members: Sequence[Sequence[int]]) -> bool:
    """Whether all runs of a group say the same."""
    return all(len({column[number] for number in numbers}) == 1 for numbers in members)


def chosen(typed: Mapping[str, Column], differing: Mapping[str, Column], numbers: Sequence[int]) -> dict[str, Column]:
    """The axes: what was swept, then what the names among the axes do not settle. No two that always say the same."""
    kept: dict[str, Column] = {}
    seen: set[tuple[Hashable, ...]] = set()
    names: list[tuple[Hashable, ...]] = []
    for key, column in {**typed, **differing}.items():
        mine = said(column, numbers)
        if mine in seen or (key not in typed and settled(mine, names)):
            continue
        kept[key] = column
        seen.add(mine)
        if not all(value is None or is_number(value) for value in column.values()):
            names.append(mine)
    return kept


def settled(mine: Sequence[Hashable], names: Sequence[Sequence[Hashable]]) -> bool:
    """Whether the other columns together say what this one says."""
    there: dict[Hashable, Hashable] = {}
    together = zip(*names, strict=True) if names else [()] * len(mine)
    return all(there.setdefault(key, value) == value for key, value in zip(together, mine, strict=True))


def make_group(numbers: Sequence[int], axes: Sequence[Axis], config: Mapping[str, Any]) -> Group:
    values = {axis.key: axis.column[numbers[0]] for axis in axes if numbers[0] in axis.column}
    return Group("", values, str(config.get(OBJECTIVE_NAME, "")), tuple(numbers))


def named(groups: list[Group], axes: Sequence[Axis]) -> tuple[Group, ...]:
    """The groups in the order of their values, each with a name of its own made of them."""
    labels = axis_labels([axis.key for axis in axes])
    groups = sorted(groups, key=lambda group: [rank(group.config.get(axis.key)) for axis in axes])
    found: dict[str, Group] = {}
    for group in groups:
        name = " ".join(filter(None, (part(labels[key], value) for key, value in group.config.items())))
        name = shorten(name or group.objective or "all runs", LONGEST_NAME)
        numbered = (f"{name} ({number})" for number in range(2, len(groups) + 2))
        unique = next(text for text in (name, *numbered) if text not in found)
        found[unique] = dataclasses.replace(group, name=unique)
    return tuple(found.values())


def axis_labels(keys: Sequence[str]) -> dict[str, str]:
    """Nothing for a choice of a group (objective, data, experiment), the last part of a key, or all of it."""
    last = [key.rpartition(".")[2] for key in keys]
    labels = {key: leaf if last.count(leaf) == 1 else key for key, leaf in zip(keys, last, strict=True)}
    return {key: "" if is_choice(key) else label for key, label in labels.items()}


def is_choice(key: str) -> bool:
    return "." not in key or (key.count(".") == 1 and key.endswith(".name"))


def part(label: str, value: Any) -> str:
    """`beta=0.1`; a value alone where it needs no label."""
    text = shorten(as_typed(value), LONGEST_VALUE)
    return f"{label}={text}" if label else text


def as_typed(value: Any) -> str:
    """A value as one types it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(as_value(value))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rank(value: Any) -> tuple[int, float, str]:
    """Order of values of any type: what is not there, numbers by size, the rest by its text."""
    if value is None:
        return (0, 0.0, "")
    return (1, float(value), "") if is_number(value) else (2, 0.0, str(value))
