"""The hyper-parameters of objectives and rewards, as pydantic models of their dataclasses.

The file of an objective imports torch, which takes seconds. So the objectives are imported once beside a stand-in for
torch, their fields are read, and the modules are forgotten again: a later import gets them with torch.
`importlib.util.LazyLoader` does not help: the import statement itself wakes it.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from pydantic import ConfigDict, Field, create_model

from uft.config.messages import bare
from uft.config.schema import STRICT, Config, Float, Int, KeyPath, Settings, default_of, fields_of, kind_at
from uft.errors import Problem, UftError

EXACT = {int: Int, float: Float, float | None: Float | None}


@cache
def parameters(group: str = "objective") -> Mapping[str, type]:
    """Method -> pydantic model with the public keys of that objective, or reward."""
    if group == "objective":
        return _objectives()[0]
    from uft.rewards import checkers

    return {method: _model(method, cls) for method, cls in checkers().items()}


@cache
def schema_with(objectives: tuple[tuple[KeyPath, str, tuple[str, ...]], ...]) -> Any:
    """`Config` with the keys of its objective and of those within it: place, method and keys of each, deepest first."""
    models: dict[KeyPath, Any] = {}
    for place, method, names in objectives:
        classes = parameters(place[0])
        known, fields, config = fields_of(classes.get(method)), dict[str, Any](), STRICT
        for name in (name for name in names if name in known):
            fields[name] = (models.get((*place, name), known[name].annotation), known[name])
        if not known:  # which keys it has is not known
            fields["method"], config = (Literal[tuple(classes)] | None, Field(None)), ConfigDict(extra="allow")
        model = create_model("Objective", __config__=config, **fields)
        models[place] = model | None if place[1:] else model
    groups: dict[str, Any] = {
        name: (models.get((name,), field.annotation), field) for name, field in fields_of(Config).items()
    }
    return create_model("Config", __config__=STRICT, **groups)


def objective_of(settings: Settings) -> Any:
    """The objective that an `objective` node describes, for its kinds of rows, its needs and its problems."""
    return _objectives()[1](settings)


def defaults_of(method: str, keys: Iterable[str]) -> dict[str, Any]:
    """Defaults of those of `keys` that the method has one for."""
    known = fields_of(parameters()[method])
    return {key: default for key in keys if key in known and (default := default_of(known[key])) != {}}


def whole_number(key: str, settings: Settings) -> bool:
    """Whether a dotted key takes whole numbers, in settings that say which objective there is."""
    method = settings["objective"]["method"]
    schema = schema_with(((("objective",), method, tuple(fields_of(parameters()[method]))),))
    return bare(kind_at(tuple(key.split(".")), schema)) is int


@cache
def _objectives() -> tuple[dict[str, type], Callable[[Settings], Any]]:
    """(hyper-parameters by method, `make`) of uft.objectives, read without torch where that can be done."""
    try:
        with without_torch():
            return _read()
    except Exception:  # an objective that works with torch's values as it is imported: slow to read, but as right
        try:
            return _read()
        except ImportError as error:
            why, advice = str(error), ("uninstall the package, or mend it",)
            raise UftError(Problem("installed objectives", why, advice=advice)) from error


def _read() -> tuple[dict[str, type], Callable[[Settings], Any]]:
    from uft.objectives import OBJECTIVES, make

    classes: Mapping[str, Any] = OBJECTIVES
    return {method: _model(method, cls) for method, cls in classes.items()}, make


def _model(method: str, cls: Any) -> type:
    """The public fields of an objective's dataclass, with their rules."""
    hints, fields = typing.get_type_hints(cls), dict[str, Any]()
    for field in dataclasses.fields(cls):
        rules = dict(field.metadata)
        if rules.pop("internal", False):
            continue
        kind, choices = hints[field.name], rules.pop("choices", ())
        if field.default is dataclasses.MISSING:
            rules["default_factory"] = field.default_factory
        else:
            rules["default"] = field.default
        help = rules.pop("help", "")
        fields[field.name] = (Literal[choices] if choices else EXACT.get(kind, kind), Field(description=help, **rules))
    return create_model(method, __config__=STRICT, **fields)


# --- a stand-in for torch

MODULES = ("torch", "torch.nn", "torch.nn.functional")


def _anything(owner: object, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything


class _Meta(type):
    __getattr__ = _anything


class Anything(metaclass=_Meta):
    """A type, a base class, a decorator, a constant: whatever is taken from the stand-in when a module is imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Anything


class StandIn(ModuleType):
    __path__: list[str] = []
    __getattr__ = _anything


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports of `uft` inside this block see a stand-in for torch, and are undone at its end.

    Does nothing when torch is there already.
    """
    if "torch" in sys.modules:
        yield
        return
    before, added = set(sys.modules), {point.module.partition(".")[0] for point in entry_points(group="uft.objectives")}
    sys.modules.update({name: StandIn(name) for name in MODULES})
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            values = vars(sys.modules[name]).values()
            holds = any(isinstance(value, StandIn) or value is Anything for value in values)
            if name in MODULES or name.startswith("uft.objectives") or name.partition(".")[0] in added or holds:
                del sys.modules[name]
