"""A stand-in for torch, beside which the files of objectives are imported to read their hyper-parameters.

`importlib.util.LazyLoader` does not help: the import statement itself wakes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

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
