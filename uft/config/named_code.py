"""Configurations name no code: what Hydra would import and call because a file or a command line says so is refused.

An installed plugin (`hydra/launcher=joblib`) is chosen by its name and brings its own `_target_`. Nobody else's is
followed, no package is searched for configurations, no logging handler is made, no environment is set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from uft.config.loader import Request, defaults_of, leaves, make_loader
from uft.config.overrides import COMMAND_LINE
from uft.config.places import conf_dir, shown, user_dir
from uft.config.translate import BROKEN, readable
from uft.errors import Problem, UftError

FORBIDDEN = re.compile(
    r"(^|\.)_target_\."  # what is imported and called
    r"|^hydra\.(callbacks|job_logging|hydra_logging)\."  # objects of Hydra's, and of Python's logging
    r"|^hydra\.job\.env_set\."  # PYTHONPATH, LD_PRELOAD
)
"""Matched against a dotted key and a dot."""

PACKAGE = "pkg://"  # to look into a package is to import it
SEARCHPATH = "hydra.searchpath"
WHY = "names code to run, and configurations cannot"
HOW = ("an installed plugin is chosen by its name:  hydra/launcher=NAME",)


def refuse_named_code(request: Request) -> None:
    """UftError where this request would make Hydra run code that it names. To be asked before Hydra starts."""
    problems = list(in_words(request.overrides))
    if not problems:
        loader, words = make_loader(request), list(not_swept(request.overrides))
        problems = list(in_primary(loader.repository, request))
        with suppress(*BROKEN):  # Hydra meets it too, and then it is told with whatever else is wrong
            problems = problems or list(readable(request.config_dir, lambda: list(in_files(loader, request, words))))
    if problems:
        raise UftError(*problems)


def in_words(words: Iterable[str]) -> Iterator[Problem]:
    """Words of a command line, whatever their grammar."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if FORBIDDEN.search(f"{key.partition('@')[0]}.") or "_target_" in value or PACKAGE in value:
            yield Problem(word, WHY, COMMAND_LINE, HOW)


def not_swept(words: Iterable[str]) -> Iterator[str]:
    """The words that stand for themselves; those of a sweep are looked at job by job."""
    parser = OverridesParser.create()
    for word in words:
        try:
            if not parser.parse_override(word).is_sweep_override():
                yield word
        except BROKEN:
            continue


def in_primary(repository: IConfigRepository, request: Request) -> Iterator[Problem]:
    """The one file that may say where else to look for configurations."""
    loaded = repository.load_config(request.config_name)
    places = OmegaConf.select(loaded.config, SEARCHPATH) if loaded is not None else None
    for place in places or ():
        if str(place).startswith(PACKAGE):
            yield Problem(f"{SEARCHPATH}={place}", WHY, f"{request.config_name}.yaml", HOW)


def in_files(loader: ConfigLoaderImpl, request: Request, words: list[str]) -> Iterator[Problem]:
    """The files that are composed, but for those that came with uft and with plugins."""
    searched = [word for word in words if word.lstrip("+").startswith(f"{SEARCHPATH}=")]
    if not (searched or user_dir() or request.config_dir or request.config_path):
        return
    repository = loader._parse_overrides_and_create_caching_repo(request.config_name, searched)[1]
    for default in defaults_of(loader, request, words)[0]:
        loaded = repository.load_config(default.config_path) if default.config_path else None
        folder = str(loaded.path).removeprefix("file://") if loaded is not None else ""
        if loaded is None or not str(loaded.path).startswith("file://") or Path(folder) == conf_dir():
            continue
        package = default.package if default.package is not None else loaded.header["package"]
        for key in keys_of(package, OmegaConf.to_container(loaded.config, resolve=False)):
            if FORBIDDEN.search(f"{key}."):
                yield Problem(key, WHY, shown(Path(folder) / f"{default.config_path}.yaml"), HOW)


def keys_of(package: str | None, content: Any) -> Iterator[str]:
    """The dotted key of every leaf of a file, where it is put."""
    before = () if package in (None, "", "_global_") else tuple(str(package).split("."))
    if isinstance(content, dict):
        yield from (".".join((*before, *path)) for path, _ in leaves(content))
