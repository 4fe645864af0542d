"""Objectives: one file per family, each objective a frozen dataclass of hyper-parameters above a short pure method.

A published method is a file of conf/objective that names a class here and the keys it has; what differs from another by
constants needs no class of its own. Classes of installed packages are found by the entry points of the group
`uft.objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from uft.objectives.base import Objective
from uft.objectives.dft import DFT
from uft.objectives.ift import IFT
from uft.objectives.likelihood import FSFT, Distill, PoFT, WeightedNLL
from uft.objectives.pairwise import Contrastive, Pairwise
from uft.objectives.per_kind import PerKind
from uft.objectives.pointwise import KTO, UFT
from uft.objectives.policy_gradient import SRFT, PolicyGradient

OBJECTIVES: dict[str, type[Objective]] = {
    "nll": WeightedNLL,
    "ift": IFT,
    "uft": UFT,
    "dft": DFT,
    "distill": Distill,
    "f_sft": FSFT,
    "poft": PoFT,
    "pairwise": Pairwise,
    "contrastive": Contrastive,
    "kto": KTO,
    "policy_gradient": PolicyGradient,
    "srft": SRFT,
    "per_kind": PerKind,
}
"""By `method`. Public names (`objective=NAME`) are the YAML files of conf/objective, each naming its method."""


def make(settings: Mapping[str, Any]) -> Objective:
    """The objective that a resolved `objective` node of the config describes, a fresh state with it."""

    def value(setting: Any) -> Any:
        if not isinstance(setting, Mapping):
            return setting
        return make(setting) if "method" in setting else dict(setting)

    plain = {name: value(setting) for name, setting in settings.items()}
    return OBJECTIVES[plain["method"]](**plain)


# Those of installed packages, by the names that they have there; none takes a name of ours.
for point in entry_points(group="uft.objectives"):
    if point.name in OBJECTIVES:
        continue
    try:
        OBJECTIVES[point.name] = point.load()
    except Exception as error:
        package = point.dist.name if point.dist else point.module
        raise ImportError(f"the objective {point.name} of the package {package} cannot be loaded: {error!r}") from error
