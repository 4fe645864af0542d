"""What a request says of its stages, before any of them is put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig
from omegaconf._utils import split_key

from uft.config.fitting import apply
from uft.config.loader import Setting, leaves
from uft.config.overrides import COMMAND_LINE, Sorted, no_such_option
from uft.config.stages import STAGES
from uft.config.suggest import hint, nearest
from uft.config.tree import OBJECTIVE, Tree
from uft.errors import Problem

SET = "set"
OWN = ("objective", "data")  # what a stage may choose for itself
UNCLEAR = ""  # a choice that could not even be guessed: which keys the stage has is not known


def of_stages(override: Override) -> bool:
    return override.key_or_group.split(".")[0] == STAGES


def outlined(files: Sequence[Sequence[Setting]], words: Sorted) -> tuple[Tree, dict[str, list[Setting]], list[Problem]]:
    """(a tree of the stages as they were written, without their `set`; what was typed into each `set`; problems)."""
    tree, typed, problems = Tree(), dict[str, list[Setting]](), list[Problem | None]()
    for settings in files:
        for setting in settings:
            if setting.path[0] == STAGES and setting.path[1:]:
                inside = setting.path[2:3] == (SET,)
                problems.append(tree.put(replace(setting, path=setting.path[:2], value={}) if inside else setting))
    for override in filter(of_stages, words.values):
        path, line, names = tuple(split_key(override.key_or_group)), str(override.input_line), list(tree.root[STAGES])
        if override.is_delete():
            problems += apply(tree, override)
        elif path[1:] and path[1] not in names and not (override.is_add() or override.is_force_add()):
            near = nearest(path[1], names)
            advice = hint(near and f"{STAGES}.{near}", STAGES, names)
            problems.append(Problem(line, "no such stage", COMMAND_LINE, (advice,)))
        else:
            for setting in own_keys(path, override.value(), COMMAND_LINE, line):
                inside = setting.path[2:3] == (SET,)
                problems.append(tree.put(replace(setting, path=setting.path[:2], value={}) if inside else setting))
                if inside and (setting.path[3:] or setting.value not in (None, {})):
                    typed.setdefault(path[1], []).append(replace(setting, path=setting.path[3:]))
    return tree, typed, [problem for problem in problems if problem is not None]


def own_keys(path: tuple[str, ...], value: object, where: str, text: str) -> Iterator[Setting]:
    """The keys below `path`, whether they were written `objective.beta: 0.3` or as a tree; () where there are none."""
    inner = leaves(value) if isinstance(value, dict) and value else [((), value)]
    for more, item in inner:
        key = tuple(part for part in ".".join((*path, *more)).split(".") if part)
        if key or item not in (None, {}):
            yield Setting(key, item, where, text)


def refused_choices(words: Sorted, outline: Tree) -> Iterator[Problem]:
    """`objective=kto` where every stage names its own."""
    stages = outline.root[STAGES]
    for group in OWN:
        naming = {name: stage for name, stage in stages.items() if group == "data" or stage.do == "fit"}
        if not naming or any(stage[group] is None for stage in naming.values()):
            continue
        for line in words.choices:
            key, _, option = line.lstrip("+").partition("=")
            if key == group:
                each = [f"{STAGES}.{name}.{group}={option}" for name in naming]
                advice = (f"for one of them:  {'   or  '.join(each)}",)
                yield Problem(
                    line,
                    f"every stage has {'an objective' if group == OBJECTIVE else 'data'} of its own",
                    COMMAND_LINE,
                    advice,
                )


def unknown_choices(name: str, stage: DictConfig, outline: Tree, repository: IConfigRepository) -> Iterator[Problem]:
    """Objectives and data that have no file. The stage then has the one that was probably meant."""
    for group in OWN:
        option, key = stage[group], f"{STAGES}.{name}.{group}"
        if option is not None and not repository.config_exists(f"{group}/{option}"):
            advice, meant = no_such_option(group, option, repository.get_group_options(group), key)
            yield Problem(f"{key}={option}", f"no such file in conf/{group}", outline.origins.get(key, ""), advice)
            stage[group] = meant.partition("=")[2] if meant else UNCLEAR
