"""From a frozen `config.yaml` to the typed configuration that a worker works with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.schema import Config
from uft.errors import Problem, UftError


def load_config(path: str | Path) -> Config:
    """The configuration in `path` (YAML or JSON), as dataclasses; `objective` is a plain dict."""
    import yaml

    file = Path(path)
    try:
        return typed(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise UftError(
            Problem(str(file), "cannot be read by this version of uft", advice=(why,)),
            footer="See the difference:  uft config --diff RUN",
        ) from error


def typed(settings: Mapping[str, Any]) -> Config:
    """A resolved dict as dataclasses. Raises OmegaConfBaseException where a key or a type does not fit."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings))))
    assert isinstance(config, Config)
    return config
