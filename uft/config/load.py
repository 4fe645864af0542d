"""From a frozen `config.yaml` to the typed configuration that a worker works with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.checks import Finding, walk
from uft.config.freeze import flat
from uft.config.schema import Config
from uft.errors import Problem, UftError
from uft.runs import bounded


def load_config(path: str | Path) -> Config:
    """The configuration in `path` (YAML or JSON), as dataclasses; `objective` is a plain dict."""
    import yaml

    file = Path(path)
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        bounded(settings)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UftError(
            Problem(str(file), "cannot be read as YAML", advice=tuple(str(error).splitlines()[:1]))
        ) from error
    if not isinstance(settings, Mapping):
        raise UftError(Problem(str(file), "holds no configuration"))
    try:
        config = typed(settings)
        problems = [Problem(f.key, f.why, str(file), f.advice) for f in (*ranges(settings), *objective(settings))]
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise UftError(
            Problem(str(file), "cannot be read by this version of uft", advice=(why,)),
            footer="See the difference:  uft config --diff RUN",
        ) from error
    if problems:
        raise UftError(*problems)
    return config


def refuse_references(settings: Mapping[str, Any]) -> None:
    """A frozen configuration is resolved. A reference in one was put there by hand, and may ask for the environment."""
    found = [(key, value) for key, value in flat(settings) if "${" in str(value)]
    if found:
        raise UftError(*(Problem(f"{key}={value}", "a run's configuration refers to nothing") for key, value in found))


def ranges(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Values that no request could have had: whoever wrote the file, or the disk, changed them."""
    yield from walk(merged(Config, settings), "", {})


def objective(settings: Mapping[str, Any], name: str = "objective") -> Iterator[Finding]:
    """Likewise of the objective under `name`, and of those within it. Raises OmegaConfBaseException as `typed` does."""
    from uft.config.register import objective_schemas

    node, schemas = settings[name], objective_schemas()
    method = node.get("method") if isinstance(node, Mapping) else None
    if not isinstance(method, str) or method not in schemas:
        yield Finding(f"{name}.method={method}", "no such method")
        return
    yield from walk(merged(schemas[method], node), f"{name}.", {})
    inside = {f"{name}.{key}": item for key, item in node.items() if isinstance(item, Mapping) and "method" in item}
    for key in inside:
        yield from objective(inside, key)


def merged(schema: type, settings: Mapping[str, Any]) -> DictConfig:
    tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(settings)))
    assert isinstance(tree, DictConfig)
    return tree


def typed(settings: Mapping[str, Any]) -> Config:
    """A resolved dict as dataclasses. Raises OmegaConfBaseException where a key or a type does not fit."""
    refuse_references(settings)
    config = OmegaConf.to_object(merged(Config, settings))
    assert isinstance(config, Config)
    return config
