"""Read the objectives' dataclasses without torch.

An objective's hyper-parameters are the schema of `objective.*`, and its file imports torch, which takes seconds.
`importlib.util.LazyLoader` does not help: the import statement itself wakes it. So the objectives are imported once
beside a stand-in that answers every attribute with :class:`Anything`, their fields are read, and the modules are
forgotten again: whoever imports them later gets them with the real torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

MODULES = ("torch", "torch.nn", "torch.nn.functional")


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
            if name in MODULES or name.startswith("uft.objectives") or holds_stand_in(sys.modules[name]):
                del sys.modules[name]


def holds_stand_in(module: ModuleType) -> bool:
    return any(isinstance(value, StandIn) or value is Anything for value in vars(module).values())
