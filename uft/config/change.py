"""A frozen configuration with some keys changed, under the same checks as a fresh one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from uft.config.examine import apply, fill, unfit
from uft.config.loader import Request, Setting, leaves, make_loader
from uft.config.overrides import sort_out
from uft.config.tree import Tree
from uft.errors import Problem, UftError

FROZEN = "config.yaml of the run"


def changed(settings: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """`settings` with `overrides` applied. Groups cannot be chosen anew. Raises UftError with every problem."""
    words = sort_out(overrides, make_loader(Request()).repository)
    problems = list(words.problems)
    problems += [Problem(line, "a run's choices are made; only values can be changed", "command line") for line in words.choices]
    tree = Tree()
    problems += fill(tree, [Setting(path, value, FROZEN, ".".join(path)) for path, value in leaves(settings)])
    for override in words.values:
        problems += apply(tree, override)
    problems += unfit(tree).values()
    if problems:
        raise UftError(*problems)
    return tree.root
