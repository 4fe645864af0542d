"""A frozen configuration with some keys changed, under the same checks as a fresh one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from uft.config.examine import examine
from uft.config.fitting import apply, fill, unfit
from uft.config.freeze import plain
from uft.config.loader import Request, Setting, leaves, make_loader
from uft.config.overrides import COMMAND_LINE, Sorted, sort_out
from uft.config.stages import STAGES, differing, expanded, without_stages
from uft.config.tree import Tree
from uft.errors import Problem, UftError

FROZEN = "config.yaml of the run"


def changed(settings: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """`settings` with `overrides` applied: a choice of a group (`data=pairs`) replaces that group's keys.

    In a run with stages it counts for every stage that has such a key. Raises UftError with every problem.
    """
    words = sort_out(overrides, make_loader(Request()).repository)
    tree, problems = fitted(without_stages(settings), words)
    if problems:
        raise UftError(*problems)
    run = plain(tree.root)
    for name, whole in expanded(settings).items():
        stage, _ = fitted(whole, words)  # what is wrong here only is a key that another stage's objective has
        node = {**settings[STAGES][name], "config": differing(plain(stage.root), run)}
        tree.root[STAGES][name] = node
    return tree.root


def fitted(settings: Mapping[str, Any], words: Sorted) -> tuple[Tree, list[Problem]]:
    """A tree of `settings` and `words`, and what is wrong with these."""
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
    return tree, problems
