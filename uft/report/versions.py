"""Configurations of several versions beside each other: keys that one of them lacks get the value they stand for."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any

from uft.config.schema import Config, Source

SOURCES = "data.sources."
OBJECTIVE, OBJECTIVE_NAME = "objective.", "objective.name"
UNKNOWN = ("${", "???")  # interpolations and required values say nothing by themselves

Flat = dict[str, Any]


def completed(configs: Iterable[Flat]) -> None:
    """Give every configuration (by dotted key) the keys that only others have, where their value is known.

    That is the schema's default, as when such a run is resumed. A key of an objective counts as what all other runs of
    that objective agree on: its defaults cannot be had without torch.
    """
    configs = list(configs)
    agreed: dict[tuple[Any, str], Flat] = defaultdict(dict)
    for config in configs:
        for key in (key for key in config if key.startswith(OBJECTIVE)):
            agreed[config.get(OBJECTIVE_NAME), key][repr(config[key])] = config[key]
    keys = {key for config in configs for key in config}
    for config in configs:
        for key in keys - config.keys():
            values = [*known(key, config), *agreed[config.get(OBJECTIVE_NAME), key].values()]
            if len(values) == 1:
                config[key] = values[0]


def known(key: str, config: Flat) -> list[Any]:
    """The default of a key; [] where there is none. A source that the run does not have has no keys either."""
    name, _, leaf = key.removeprefix(SOURCES).partition(".")
    if not key.startswith(SOURCES):
        return [defaults(Config)[key]] if key in defaults(Config) else []
    if leaf not in defaults(Source) or not any(other.startswith(f"{SOURCES}{name}.") for other in config):
        return []
    return [defaults(Source)[leaf]]


@cache
def defaults(kind: type) -> Flat:
    """Every default of a dataclass and those within it, by dotted key."""
    return dict(walk(kind, ""))


def walk(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(made):
            yield from walk(type(made), f"{prefix}{field.name}.")
        elif field.default is dataclasses.MISSING:
            if made:
                yield f"{prefix}{field.name}", made
        elif not str(field.default).startswith(UNKNOWN):
            yield f"{prefix}{field.name}", field.default


def frozen(value: Any) -> Hashable:
    """A value as a key of a set: equal for equal numbers, apart for 1 and true."""
    plain = isinstance(value, Hashable) and not isinstance(value, (tuple, bool))
    return value if plain else repr(value)
