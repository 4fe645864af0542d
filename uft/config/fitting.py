"""Values put into a typed tree one by one, each with what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import split_key

from uft.config.checks import findings
from uft.config.loader import Setting, leaves
from uft.config.overrides import COMMAND_LINE
from uft.config.suggest import written
from uft.config.tree import OBJECTIVE, Tree
from uft.errors import Problem


def fill(tree: Tree, settings: list[Setting], leave: Callable[[Setting], bool] | None = None) -> list[Problem]:
    """Put what the files say into the tree: an objective's method first, since it decides about its other keys.

    An objective may hold others (`per_kind`): they come after it, as the files of a defaults list do not. `leave`,
    asked of each setting when its turn comes, leaves it out.
    """
    found: list[Problem | None] = []
    methods = {s.path: s for s in settings if s.path[0] == OBJECTIVE and s.path[-1] == "method"}
    for method in sorted(methods.values(), key=lambda setting: len(setting.path)):
        place = method.path[:-1]
        inside = [s for s in settings if s.path[: len(place)] == place]
        own = [s.path[len(place)] for s in inside if s.file == method.file or s.path[len(place) + 1 :] == ("method",)]
        bad = tree.use_objective(method, own)
        found.append(bad)
        settings = [s for s in settings if not (bad and s in inside)]
    found += [tree.put(setting) for setting in settings if not (leave and leave(setting))]
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
        yield Problem(line, "only named sources, stages and free keys can be removed", COMMAND_LINE)


def unfit(tree: Tree) -> dict[str, Problem]:
    """By key: values that the schema's types allow and its rules do not."""
    problems: dict[str, Problem] = {}
    typed = [key for key, where in tree.origins.items() if where == COMMAND_LINE]
    for finding in findings(tree.root, typed):
        value = tree.value(finding.key)
        what = finding.key if value in (None, {}) else f"{finding.key}={written(value)}"
        problems.setdefault(finding.key, Problem(what, finding.why, tree.origins.get(finding.key, ""), finding.advice))
    return problems
