"""This process among those that torch's launcher started, and the notes that it leaves for its launcher; imports
without torch.

Nothing here imports torch: launchers read this, and workers before they have imported anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "UFT_FAILURES"
"""Environment variable: the folder where the ranks of a run leave their notes."""


class PeerLost(Exception):
    """Another process of the run ended, so that a collective operation will never complete."""


def launched() -> int:
    """The number of processes that torch's launcher started; 1 where it started none."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if launched() > 1 else 0


def local_rank() -> int:
    """The rank among the processes of this machine, which is the number of its device."""
    return int(os.environ["LOCAL_RANK"]) if launched() > 1 else 0


def note(text: str, name: str = "") -> None:
    """Leave word why this rank failed: rank 0 alone is heard on the console."""
    if folder := os.environ.get(FOLDER):
        Path(folder, name or f"why-{rank()}").write_text(text, encoding="utf-8", errors="replace")


def note_code(code: int) -> None:
    """Leave the exit code of the request: that of the first process of this machine, rank 0 on the first one."""
    if local_rank() == 0:
        note(str(code), "code")


def reasons(folder: Path) -> dict[int, str]:
    """Rank -> its note."""
    files = sorted(folder.glob("why-*"))
    return {int(file.name.removeprefix("why-")): file.read_text(encoding="utf-8") for file in files}


def noted_code(folder: Path) -> int | None:
    file = folder / "code"
    return int(file.read_text()) if file.is_file() else None


# --- Imports without torch, which takes seconds: where only the fields of classes are to be read.


TORCH = ("torch", "torch.nn", "torch.nn.functional")


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
    before, added = set(sys.modules), {point.module.partition(".")[0] for point in entry_points(group="uft.objectives")}
    sys.modules.update({name: StandIn(name) for name in TORCH})
    try:
        yield
    finally:
        for name in set(sys.modules) - before:
            values = vars(sys.modules[name]).values()
            holds = any(isinstance(value, StandIn) or value is Anything for value in values)
            if name in TORCH or name.startswith("uft.objectives") or name.partition(".")[0] in added or holds:
                del sys.modules[name]
