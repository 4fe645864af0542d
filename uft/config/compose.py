"""From a request to a configuration: composed, judged, and everything that is wrong with it told at once.

Hydra decides which files are drawn in and in which order; their settings and those of the command line are laid one
over the other (:mod:`uft.config.tree`), which tells where each value is from, and the whole is judged.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from uft.config.files import BROKEN, NAMES_CODE, Layers, Request, Words, files_of, read_words, translate
from uft.config.frozen import plain
from uft.config.messages import COMMAND_LINE
from uft.config.stages import FILE, STAGES, compose_stages, differing, expanded, has_stages, without_stages
from uft.config.tree import Setting, Tree, leaves
from uft.errors import Problem, UftError


@dataclass
class Examined:
    """A request as it was understood."""

    settings: dict[str, Any]  # resolved; where there are problems, defaults stand in for what is wrong
    origins: dict[str, str] = field(default_factory=dict)  # dotted key -> where it was set; absent: the default
    references: dict[str, str] = field(default_factory=dict)  # dotted key -> the reference that it is
    choices: Mapping[str, str | None] = field(default_factory=dict)  # group -> option
    problems: list[Problem] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # the overrides that are right, mended choices of groups among them

    @property
    def wrong(self) -> set[str]:
        """The dotted keys that something is wrong with, and the groups whose choice is."""
        return {problem.what.lstrip("+~").partition("=")[0] for problem in self.problems}


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of `uft train OVERRIDES`. Raises UftError with every problem."""
    return OmegaConf.create(require(Request(tuple(overrides))).settings)


def require(request: Request) -> Examined:
    """`examine`; UftError with every problem when there is one."""
    examined = examine(request)
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


def examine(request: Request) -> Examined:
    """Compose and check everything; never raises for what the user wrote."""
    words = Words()
    try:
        files = files_of(request)
        words = read_words(request.overrides, files)
        layers = files.layers(words.chosen)
    except (UftError, *BROKEN) as error:
        unread = error.problems if isinstance(error, UftError) else (translate(error),)
        return Examined(Tree().judge()[0], problems=[*words.problems, *unread], kept=list(words.chosen))
    problems = [*words.problems, *layers.naming_code]
    if has_stages(layers, words):
        settings, tree, origins, more, kept = compose_stages(layers, words, files)
        problems += more
        return Examined(settings, origins, references(tree), layers.options, problems, kept)
    tree, right = Tree(), list[Override]()
    problems += tree.fill([setting for file in layers.files for setting in file])
    for override in words.values:
        if override.key_or_group.split(".")[0] not in words.unclear:  # else which keys there are is not known
            found = tree.apply(override)
            problems += found
            right += [] if found else [override]
    settings, wrong = tree.judge()
    problems += wrong.values()
    kept = [*words.chosen, *(str(override.input_line) for override in right if override.key_or_group not in wrong)]
    return Examined(plain(settings), tree.places, references(tree), layers.options, problems, kept)


def references(tree: Tree) -> dict[str, str]:
    return {".".join(path): value for path, value in leaves(tree.values) if "${" in str(value)}


def refuse_named_code(request: Request) -> None:
    """UftError where this request would make Hydra run code that it names. To be asked before Hydra starts.

    Words that stand for several values are looked at job by job.
    """
    words = read_words(request.overrides, files_of(request))
    problems = [problem for problem in words.problems if problem.why == NAMES_CODE]
    layers = None if problems else layers_of(request)
    if problems or (layers and layers.naming_code):
        raise UftError(*problems, *(layers.naming_code if layers else ()))


def needs_hydra(request: Request) -> bool:
    """Whether a request is for Hydra to carry out: it sets something of Hydra's own, or draws in a file that does."""
    try:
        layers = layers_of(request)
    except UftError:
        return False
    return layers is not None and layers.needs_hydra


def layers_of(request: Request) -> Layers | None:
    """The files of the request's right choices; None where something is wrong with them, which is told elsewhere."""
    try:
        files = files_of(request)
        return files.layers(tuple(read_words(request.overrides, files).choices))
    except BROKEN:
        return None


def changed(settings: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Frozen `settings` with `overrides`, under the checks of a fresh request. UftError with every problem.

    A choice of a group (`data=pairs`) replaces that group's keys. In a run with stages an override counts for every
    stage that has such a key.
    """
    words = read_words(overrides, files_of(Request()))
    run, problems = _changed(without_stages(settings), words)
    if problems:
        raise UftError(*problems)
    stages: dict[str, Any] = {}
    for name, whole in expanded(settings).items():
        stage, _ = _changed(whole, words)  # wrong here alone is a key that another stage's objective has
        stages[name] = {**settings[STAGES][name], "config": differing(stage, run)}
    return run | ({STAGES: stages} if stages else {})


def _changed(settings: Mapping[str, Any], words: Words) -> tuple[dict[str, Any], list[Problem]]:
    """(`settings` with `words`, what is wrong with these)."""
    problems, settings = list(words.problems), dict(settings)
    for line in words.choices:
        group = line.partition("=")[0]
        if group in settings:
            settings[group] = examine(Request((line,))).settings[group]
        else:
            problems.append(Problem(line, "is for a fresh run: it is more than one group", COMMAND_LINE))
    tree = Tree()
    problems += tree.fill([Setting(path, value, FILE, ".".join(path)) for path, value in leaves(settings)])
    for override in words.values:
        problems += tree.apply(override)
    whole, wrong = tree.judge()
    return plain(whole), [*problems, *wrong.values()]
