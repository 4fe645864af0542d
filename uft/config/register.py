"""The schema: of the root as Hydra's ConfigStore node `schema/config`, and of each objective as its file has it."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uft.config.lazy import without_torch
from uft.config.schema import Config, Data

Settings = Mapping[str, Any]
Complaints = list[tuple[str, str]]


@cache
def objectives() -> tuple[dict[str, type], Callable[[Settings], Any]]:
    """(class by method, `make`) of uft.objectives, read without torch where that can be done."""
    try:
        with without_torch():
            from uft.objectives import OBJECTIVES, make
    except Exception:  # an objective that works with torch's values as it is imported: slow to read, but as right
        from uft.objectives import OBJECTIVES, make
    return dict(OBJECTIVES), make


@cache
def objective_schemas() -> dict[str, type]:
    """By method: the hyper-parameters of that objective as a plain dataclass.

    Not the objective's class itself: that one is frozen, and OmegaConf makes frozen nodes read-only.
    """
    return {method: plain_dataclass(cls) for method, cls in objectives()[0].items()}


def objective_schema(method: str, keys: Iterable[str]) -> type:
    """The schema of an objective whose file names `keys`: they are the keys it has.

    A method knows more of them than one preset of it has a use for: `objective=dpo` says nothing of `lam`.
    """
    return narrowed(method, tuple(dict.fromkeys(keys)))


@cache
def narrowed(method: str, keys: tuple[str, ...]) -> type:
    whole = objective_schemas()[method]
    known = {f.name: f for f in dataclasses.fields(whole)}
    shown = [known[key] for key in keys if key in known]
    return dataclasses.make_dataclass(whole.__name__, [(f.name, f.type, field_like(f)) for f in shown])


def objective_problems(settings: Settings) -> Complaints:
    """(key, what is wrong) where the keys of an objective contradict each other."""
    return list(objectives()[1](settings).problems())


def plain_dataclass(cls: type, **types: Any) -> type:
    """The public fields of a dataclass as a new, mutable dataclass, some of them with another type.

    Fields with metadata `internal` stay behind.
    """
    shown = [f for f in dataclasses.fields(cls) if not f.metadata.get("internal")]
    specs = [(f.name, types.get(f.name) or annotation(f.type, cls), field_like(f)) for f in shown]
    return dataclasses.make_dataclass(cls.__name__, specs)


OPEN = ("objective", "data.sources", "stages")
"""Where Hydra takes any key: what a stage alone may have (its objective's keys, its sources) is known to us alone."""


def root_schema() -> DictConfig:
    """`Config` for Hydra: what is in an open place holds anything here, and is checked by us. OmegaConf (2.3) could not
    grow a dict of dataclasses key by key either, as in `+data.sources.mine.path=x.jsonl`."""
    data = plain_dataclass(Data, sources=dict[str, Any])
    fields: list[Any] = [
        ("data", data, dataclasses.field(default_factory=data)),
        ("objective", dict[str, Any], dataclasses.field(default_factory=dict)),
    ]
    schema: DictConfig = OmegaConf.structured(dataclasses.make_dataclass("Config", fields, bases=(Config,)))
    for place in OPEN:
        OmegaConf.set_struct(OmegaConf.select(schema, place), False)
    return schema


def annotation(text: Any, cls: type) -> Any:
    """A type from its annotation. Hyper-parameters are made of builtins, so no name of torch is ever looked up."""
    scope = {**vars(typing), **vars(sys.modules.get(cls.__module__, typing))}
    kind = eval(text, scope) if isinstance(text, str) else text
    mapping = getattr(typing.get_origin(kind), "__name__", "") == "Mapping"
    return dict[typing.get_args(kind)] if mapping else kind  # type: ignore[misc]


def field_like(field: dataclasses.Field[Any]) -> Any:
    """The same default and metadata, for a new dataclass."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory, metadata=field.metadata)
    return dataclasses.field(default=field.default, metadata=field.metadata)


@cache
def register() -> None:
    """Put the schema into Hydra's ConfigStore, once."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=root_schema(), provider="uft")
