"""Hydra's config loader outside of a Hydra application, and the files that a request draws in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import OmegaConf

from uft.config.places import conf_dir, shown
from uft.config.register import register

VERSION_BASE = "1.3"


@dataclass(frozen=True)
class Request:
    """What was asked for: the overrides, and the rare options that decide where files are looked for."""

    overrides: tuple[str, ...] = ()
    config_name: str = "config"
    config_dir: str | None = None  # --config-dir: options that are added, not shadowed
    config_path: str | None = None  # --config-path: another conf/ altogether


@dataclass(frozen=True)
class Setting:
    """One value that a file or the command line sets."""

    path: tuple[str, ...]
    value: Any
    where: str  # "command line", "conf/data/mix.yaml:12"
    text: str  # as it was written, roughly: "objective.bta=0.2"

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def file(self) -> str:
        """Where, without the line."""
        return self.where.rpartition(":")[0] or self.where


Composed = tuple[list[list[Setting]], dict[str, str | None]]
"""The settings of every file that is composed, in order, and the option chosen in every group."""


def make_loader(request: Request) -> ConfigLoaderImpl:
    """The loader that `hydra.main` would make for this request, search path plugins included."""
    register()
    setup_globals()
    version.setbase(VERSION_BASE)
    search_path = create_config_search_path(str(Path(request.config_path or conf_dir()).resolve()))
    if request.config_dir is not None:
        folder = Path(request.config_dir).resolve()
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def defaults_of(loader: ConfigLoaderImpl, request: Request, overrides: list[str]) -> tuple[list[ResultDefault], dict]:
    """The files that are composed, in order, and the option chosen in every group."""
    found = loader.compute_defaults_list(request.config_name, overrides, RunMode.RUN)
    return found.defaults, dict(found.overrides.known_choices)


def settings_of(loader: ConfigLoaderImpl, path: str | None, package: str | None) -> Iterator[Setting]:
    """Every leaf that a YAML file sets, with its line. Nothing for schema nodes and for Hydra's own files.

    `path` and `package` are those of an entry of the defaults list.
    """
    if path is None or path.startswith("hydra/"):
        return
    loaded = loader.repository.load_config(path)
    if loaded is None or not str(loaded.path).startswith("file://"):
        return
    file = Path(str(loaded.path).removeprefix("file://")) / f"{path}.yaml"
    package = package if package is not None else loaded.header["package"]
    parts = tuple(package.split(".")) if package and package != "_global_" else ()
    if parts[:1] == ("hydra",):
        return
    lines = line_numbers(file.read_text(encoding="utf-8"))
    content = OmegaConf.to_container(loaded.config, resolve=False)
    assert isinstance(content, dict)
    for inner, value in leaves(content):
        if inner[0] not in ("defaults", "hydra"):
            where = f"{shown(file)}:{lines[inner]}" if inner in lines else shown(file)
            yield Setting((*parts, *inner), value, where, ".".join((*parts, *inner)))


def leaves(value: Mapping[Any, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of everything in a nested dict that is not itself a filled dict."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from leaves(item, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), item


@lru_cache(maxsize=256)
def line_numbers(text: str) -> dict[tuple[str, ...], int]:
    """Path -> 1-based line of every key in a YAML text."""
    import yaml

    found: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, prefix: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[(*prefix, str(key.value))] = key.start_mark.line + 1
                walk(value, (*prefix, str(key.value)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return found
