"""From a frozen `config.yaml` to the typed configuration that a worker works with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.freeze import flat
from uft.config.schema import Config
from uft.errors import Problem, UftError


def load_config(path: str | Path) -> Config:
    """The configuration in `path` (YAML or JSON), as dataclasses; `objective` is a plain dict."""
    import yaml

    file = Path(path)
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise UftError(
            Problem(str(file), "cannot be read as YAML", advice=tuple(str(error).splitlines()[:1]))
        ) from error
    if not isinstance(settings, Mapping):
        raise UftError(Problem(str(file), "holds no configuration"))
    try:
        return typed(settings)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise UftError(
            Problem(str(file), "cannot be read by this version of uft", advice=(why,)),
            footer="See the difference:  uft config --diff RUN",
        ) from error


def refuse_references(settings: Mapping[str, Any]) -> None:
    """A frozen configuration is resolved. A reference in one was put there by hand, and may ask for the environment."""
    found = [(key, value) for key, value in flat(settings) if "${" in str(value)]
    if found:
        raise UftError(*(Problem(f"{key}={value}", "a run's configuration refers to nothing") for key, value in found))


def typed(settings: Mapping[str, Any]) -> Config:
    """A resolved dict as dataclasses. Raises OmegaConfBaseException where a key or a type does not fit."""
    refuse_references(settings)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings))))
    assert isinstance(config, Config)
    return config
