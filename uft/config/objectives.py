"""The hyper-parameters of every objective, read from the dataclasses of uft.objectives without torch.

The file of an objective imports torch, which takes seconds. `importlib.util.LazyLoader` does not help: the import
statement itself wakes it. So the objectives are imported once beside a stand-in that answers every attribute with
:class:`Anything`, their fields are read, and the modules are forgotten again: a later import gets them with torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from uft.config.schema import MISSING, Key, key_at, keys_of

MODULES = ("torch", "torch.nn", "torch.nn.functional")
Settings = Mapping[str, Any]


def parameters() -> Mapping[str, Mapping[str, Key]]:
    """By method: the public hyper-parameters of that objective."""
    return _objectives()[0]


def problems_of(settings: Settings) -> list[tuple[str, str]]:
    """(key, what is wrong) where the keys of an objective contradict each other."""
    return list(_objectives()[1](settings).problems())


def defaults_of(method: str, keys: Iterable[str]) -> dict[str, Any]:
    """Those of `keys` that the method has a plain default for."""
    known = parameters()[method]
    return {key: known[key].default for key in keys if key in known and known[key].default not in (MISSING, {})}


def whole_number(key: str, settings: Settings) -> bool:
    """Whether a dotted key takes whole numbers, in settings that say which objective there is."""
    found = key_at(tuple(key.split(".")), {("objective",): parameters()[settings["objective"]["method"]]})
    return found is not None and found.kind in (int, int | None)


@cache
def _objectives() -> tuple[dict[str, dict[str, Key]], Callable[[Settings], Any]]:
    """(hyper-parameters by method, `make`) of uft.objectives, read without torch where that can be done."""
    try:
        with without_torch():
            return _read()
    except Exception:  # an objective that works with torch's values as it is imported: slow to read, but as right
        return _read()


def _read() -> tuple[dict[str, dict[str, Key]], Callable[[Settings], Any]]:
    from uft.objectives import OBJECTIVES, make

    classes: Mapping[str, Any] = OBJECTIVES
    return {method: keys_of(cls) for method, cls in classes.items()}, make


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_Anything):
    """A type, a base class, a decorator, a constant: whatever is taken from the stand-in when a module is imported."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return Anything


class StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


@contextmanager
def without_torch() -> Iterator[None]:
    """Imports of `uft` inside this block see a stand-in for torch, and are undone at its end.

    Does nothing when torch is there already.
    """
    if "torch" in sys.modules:
        yield
        return
    before = set(sys.modules)
    sys.modules.update({name: StandIn(name) for name in MODULES})
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            values = vars(sys.modules[name]).values()
            holds = any(isinstance(value, StandIn) or value is Anything for value in values)
            if name in MODULES or name.startswith("uft.objectives") or holds:
                del sys.modules[name]
