"""Everything that is wrong with a request, at once.

Hydra stops at the first mistake. So the request is taken apart: every override is parsed and looked at by itself, the
group choices that exist decide which files are read, every value of every file and of the command line is put into a
typed tree one by one, and the result is checked as a whole. What is said names the place where it was set.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import cache

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from uft.config.fitting import apply, fill, unfit
from uft.config.loader import Composed, Request, Setting, defaults_of, make_loader, settings_of
from uft.config.named_code import in_files, in_words
from uft.config.overrides import sort_out
from uft.config.staged import asked, fit_stages
from uft.config.translate import BROKEN, readable, translate
from uft.config.tree import Tree
from uft.errors import Problem, UftError


@dataclass
class Examined:
    """A request as it was understood."""

    tree: DictConfig  # typed, interpolations unresolved
    origins: dict[str, str]  # dotted key -> where its value was set; absent: the schema's default
    choices: dict[str, str | None] = field(default_factory=dict)  # group -> option
    problems: list[Problem] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # the overrides that are right, mended group choices among them


def examine(request: Request, loader: ConfigLoaderImpl | None = None) -> Examined:
    """Compose and check everything; never raises for what the user wrote."""
    loader = loader or make_loader(request)
    words = sort_out(request.overrides, loader.repository)
    words.problems += in_words(request.overrides)
    chosen, tree = [*words.choices, *words.mended], Tree()

    @cache
    def settings(file: str | None, package: str | None) -> list[Setting]:
        return list(settings_of(loader, file, package))

    @cache
    def read(choices: tuple[str, ...]) -> Composed:
        defaults, options = defaults_of(loader, request, list(choices))
        return [settings(default.config_path, default.package) for default in defaults], options

    try:
        files, choices = readable(request.config_dir, lambda: read(tuple(chosen)))
        words.problems += in_files(loader, request, chosen)
    except UftError as error:
        return Examined(tree.root, {}, {}, [*words.problems, *error.problems], chosen)
    except BROKEN as error:
        return Examined(tree.root, {}, {}, [*words.problems, translate(error)], chosen)
    if asked(files, words):
        return Examined(*fit_stages(files, words, read, loader.repository))
    problems = [*words.problems, *fill(tree, [setting for file in files for setting in file])]
    kept = []
    for override in words.values:
        if override.key_or_group.split(".")[0] in words.unclear:
            continue  # which keys there are depends on a choice that is not known
        found = list(apply(tree, override))
        problems += found
        kept += [] if found else [override]
    bad = unfit(tree)
    problems += bad.values()
    right = [str(override.input_line) for override in kept if override.key_or_group not in bad]
    return Examined(tree.root, tree.origins, choices, problems, [*chosen, *right])


def require(request: Request, loader: ConfigLoaderImpl | None = None) -> Examined:
    """`examine`; UftError with every problem when there is one."""
    examined = examine(request, loader)
    if examined.problems:
        raise UftError(*examined.problems, footer=footer(examined))
    return examined


def footer(examined: Examined) -> str:
    words = [quoted(word) for word in examined.kept if not word.lstrip("+~").startswith("hydra")]
    command = " ".join(["uft config", *words])
    return f"Nothing was started.  See what would run:  {command}"


def quoted(word: str) -> str:
    """A word as it goes on a command line; braces and brackets of values stay bare where the shell leaves them."""
    return shlex.quote(word) if set(word) & set(" '\"$*?;&|<>()`\\!#") else word
