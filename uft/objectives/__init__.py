"""Objectives: one file per method or family, each a frozen dataclass of hyper-parameters above a short pure method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uft.objectives.base import Objective
from uft.objectives.dft import DFT
from uft.objectives.ift import IFT
from uft.objectives.pairwise import Pairwise
from uft.objectives.sft import SFT
from uft.objectives.uft import UFT

OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT, "ift": IFT, "uft": UFT, "dft": DFT, "pairwise": Pairwise}
"""By `method`. Public names (`objective=NAME`) are the YAML files of conf/objective, each naming its method."""


def make(settings: Mapping[str, Any]) -> Objective:
    """The objective that a resolved `objective` node of the config describes, a fresh state with it."""
    plain: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}
    return OBJECTIVES[plain["method"]](**plain)
