"""Everything that is wrong with a request, at once.

Hydra stops at the first mistake. So the request is taken apart: every override is parsed and looked at by itself, the
group choices that exist decide which files are read, every value of every file and of the command line is put into a
typed tree one by one, and the result is checked as a whole. What is said names the place where it was set.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import split_key

from uft.config.checks import findings
from uft.config.loader import Request, Setting, defaults_of, leaves, make_loader, settings_of
from uft.config.overrides import COMMAND_LINE, sort_out
from uft.config.suggest import written
from uft.config.translate import BROKEN, translate
from uft.config.tree import OBJECTIVE, Tree
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
    chosen, tree = [*words.choices, *words.mended], Tree()
    try:
        defaults, choices = defaults_of(loader, request, chosen)
        settings = [setting for default in defaults for setting in settings_of(loader, default)]
    except BROKEN as error:
        return Examined(tree.root, {}, {}, [*words.problems, translate(error)], chosen)
    problems = [*words.problems, *fill(tree, settings)]
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


def fill(tree: Tree, settings: list[Setting]) -> list[Problem]:
    """Put what the files say into the tree: an objective's method first, since it decides about its other keys.

    An objective may hold others (`per_kind`): they come after it, as the files of a defaults list do not."""
    found: list[Problem | None] = []
    methods = {s.path: s for s in settings if s.path[0] == OBJECTIVE and s.path[-1] == "method"}
    for method in sorted(methods.values(), key=lambda setting: len(setting.path)):
        place = method.path[:-1]
        inside = [s for s in settings if s.path[: len(place)] == place]
        own = [s.path[len(place)] for s in inside if s.file == method.file or s.path[len(place) + 1 :] == ("method",)]
        bad = tree.use_objective(method, own)
        found.append(bad)
        settings = [s for s in settings if not (bad and s in inside)]
    found += [tree.put(setting) for setting in settings]
    return [problem for problem in found if problem is not None]


def apply(tree: Tree, override: Override) -> Iterator[Problem]:
    """Put one override of the command line into the tree; yields what is wrong with it."""
    line, key, value = str(override.input_line), override.key_or_group, override.value()
    path = tuple(split_key(key))
    if override.package is not None:
        yield Problem(line, f"{key} is not a group", COMMAND_LINE)
    elif override.is_delete():
        yield from delete(tree, line, path)
    elif override.is_add() and has_value(tree, key) and not isinstance(value, (dict, list)):
        yield Problem(line, "has a value already", COMMAND_LINE, (f"without the +:  {line[1:]}",))
    elif new_key(tree, path) and not (override.is_add() or override.is_force_add()):
        yield Problem(line, f"nothing of that name in {'.'.join(path[:-1])}", COMMAND_LINE, (f"to add it:  +{line}",))
    else:
        inner = leaves(value) if isinstance(value, dict) and value else [((), value)]
        problems = [tree.put(Setting((*path, *more), item, COMMAND_LINE, line)) for more, item in inner]
        yield from (problem for problem in problems if problem is not None)


def has_value(tree: Tree, key: str) -> bool:
    return OmegaConf.select(tree.root, key, throw_on_missing=False, throw_on_resolution_failure=False) is not None


def new_key(tree: Tree, path: tuple[str, ...]) -> bool:
    """Whether `path` leads to a new entry of a dict of free keys, the one place where + is right."""
    nodes = ((path[depth], OmegaConf.select(tree.root, ".".join(path[:depth]))) for depth in range(2, len(path)))
    return any(free_dict(node) and name not in node for name, node in nodes)


def free_dict(node: object) -> bool:
    return isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict


def delete(tree: Tree, line: str, path: tuple[str, ...]) -> Iterator[Problem]:
    parent = OmegaConf.select(tree.root, ".".join(path[:-1])) if len(path) > 1 else None
    if isinstance(parent, DictConfig) and free_dict(parent) and path[-1] in parent:
        tree.remove(path)
    else:
        yield Problem(line, "only named sources and free keys can be removed", COMMAND_LINE)


def unfit(tree: Tree) -> dict[str, Problem]:
    """By key: values that the schema's types allow and its rules do not."""
    problems: dict[str, Problem] = {}
    typed = [key for key, where in tree.origins.items() if where == COMMAND_LINE]
    for finding in findings(tree.root, typed):
        value = tree.value(finding.key)
        what = finding.key if value in (None, {}) else f"{finding.key}={written(value)}"
        problems.setdefault(finding.key, Problem(what, finding.why, tree.origins.get(finding.key, ""), finding.advice))
    return problems
