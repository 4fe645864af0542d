"""From overrides to a configuration, without a Hydra application around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from uft.config.examine import Examined, require
from uft.config.freeze import plain
from uft.config.loader import Request, make_loader
from uft.config.register import objective_schema
from uft.config.schema import Config
from uft.config.stages import STAGES, differing, expanded
from uft.config.translate import BROKEN, translate
from uft.errors import UftError


def compose(overrides: list[str] | tuple[str, ...] = ()) -> DictConfig:
    """The configuration of `uft train OVERRIDES`, checked. Raises UftError with every problem."""
    return composed(Request(tuple(overrides)))[0]


def composed(request: Request) -> tuple[DictConfig, Examined]:
    """(the configuration as Hydra composes it, what was found out on the way)."""
    loader = make_loader(request)
    examined = require(request, loader)
    try:
        cfg = loader.load_configuration(request.config_name, list(request.overrides), RunMode.RUN)
    except BROKEN as error:
        raise UftError(translate(error)) from error
    return settled(cfg, examined), examined


def settled(cfg: DictConfig, examined: Examined) -> DictConfig:
    """What Hydra composed, in its typed form; with stages, what was made of it here: Hydra does not know of them."""
    return settle(examined.tree if examined.tree.stages else cfg)


def settle(cfg: DictConfig | Mapping[str, Any]) -> DictConfig:
    """A composed configuration in its typed form: without `hydra`, and with every source's defaults filled in."""
    content = OmegaConf.to_container(cfg, resolve=False) if isinstance(cfg, DictConfig) else dict(cfg)
    assert isinstance(content, dict)
    content.pop("hydra", None)
    base = OmegaConf.structured(Config)
    base.objective = objective_node(content["objective"])
    settled = OmegaConf.merge(base, OmegaConf.create(content))
    assert isinstance(settled, DictConfig)
    return settled


def completed(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A frozen configuration as this version writes it: keys that came since have their defaults, in stages too."""
    settings = plain(settle(cfg))
    for name, whole in expanded(settings).items():
        settings[STAGES][name]["config"] = differing(plain(settle(whole)), settings)
    return settings


def objective_node(content: Mapping[str, Any]) -> DictConfig:
    """The schema of an objective that has these keys, and of the objectives that it holds."""
    node = OmegaConf.structured(objective_schema(content["method"], content))
    for key, value in content.items():
        if isinstance(value, Mapping) and "method" in value:
            node[key] = objective_node(value)
    return node
