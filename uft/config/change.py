"""A frozen configuration with some keys changed, under the same checks as a fresh one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from uft.config.examine import apply, examine, fill, unfit
from uft.config.freeze import plain
from uft.config.loader import Request, Setting, leaves, make_loader
from uft.config.overrides import COMMAND_LINE, sort_out
from uft.config.tree import Tree
from uft.errors import Problem, UftError

FROZEN = "config.yaml of the run"


def changed(settings: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """`settings` with `overrides` applied: a choice of a group (`data=pairs`) replaces that group's keys.

    Raises UftError with every problem.
    """
    words = sort_out(overrides, make_loader(Request()).repository)
    problems, settings = list(words.problems), dict(settings)
    for line in words.choices:
        group = line.partition("=")[0]
        if group in settings:
            settings[group] = plain(examine(Request((line,))).tree)[group]
        else:
            problems.append(Problem(line, "is for a fresh run: it is more than one group", COMMAND_LINE))
    tree = Tree()
    problems += fill(tree, [Setting(path, value, FROZEN, ".".join(path)) for path, value in leaves(settings)])
    for override in words.values:
        problems += apply(tree, override)
    problems += unfit(tree).values()
    if problems:
        raise UftError(*problems)
    return tree.root
