"""uft: unified fine-tuning of language models, one stage, any objective, side by side.

In Python: `uft.load("RUN")`, `uft.compare(["SWEEP"])`, `uft.compose(["objective=ift"])` (:mod:`uft.api`). They are
imported when they are first used, so that the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uft.api import Comparison, RunRecord, compare, compose, load

__version__ = "0.1.0"
__all__ = ["Comparison", "RunRecord", "__version__", "compare", "compose", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("uft.api"), name)
    raise AttributeError(f"module 'uft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
