"""From a request to a configuration: composed, judged, and everything that is wrong with it told at once.

Hydra composes the files of a choice of options, once (:mod:`uft.config.files`); the values of the command line are laid
over them, and pydantic judges the whole (:mod:`uft.config.checks`). So jobs of a sweep that differ in values alone are
composed together.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from uft.config.checks import Draft
from uft.config.files import BROKEN, NAMES_CODE, Composed, Request, Words, files_of, read_words, translate
from uft.config.frozen import plain
from uft.config.messages import COMMAND_LINE
from uft.config.schema import Config, flat
from uft.config.stages import FILE, STAGES, compose_stages, differing, expanded, has_stages, without_stages
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
        return {key_of(problem.what) for problem in self.problems}


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
        composed = files.composed(words.chosen)
    except (UftError, *BROKEN) as error:
        unread = error.problems if isinstance(error, UftError) else (translate(error),)
        return Examined(asdict(Config()), problems=[*words.problems, *unread], kept=list(words.chosen))
    examined = Examined({}, choices=composed.options, problems=[*words.problems, *composed.problems])
    if composed.problems:
        draft, examined.settings = Draft(asdict(Config())), asdict(Config())
    elif has_stages(composed, words):
        examined.settings, draft, examined.origins, problems = compose_stages(composed, words, files)
        examined.problems += problems
    else:
        draft = Draft(composed.values, composed.settings)
        for override in words.values:
            if override.key_or_group.split(".")[0] not in words.unclear:  # else which keys there are is not known
                draft.apply(override)
        examined.settings, examined.origins = plain(draft.judge()), draft.origins()
        examined.problems += draft.problems
    examined.references = {key: value for key, value in flat(draft.values) if "${" in str(value)}
    wrong = {key_of(problem.what) for problem in examined.problems if problem not in words.problems}
    lines = [*words.chosen, *(str(override.input_line) for override in words.values)]
    examined.kept = [line for line in lines if key_of(line) not in wrong]
    return examined


def key_of(line: str) -> str:
    return line.lstrip("+~").partition("=")[0]


def refuse_named_code(request: Request) -> None:
    """UftError where this request would make Hydra run code that it names. To be asked before Hydra starts.

    Words that stand for several values are looked at job by job.
    """
    words = read_words(request.overrides, files_of(request))
    problems = [problem for problem in words.problems if problem.why == NAMES_CODE]
    if not problems and (composed := composed_of(request)):
        problems = [problem for problem in composed.problems if problem.why == NAMES_CODE]
    if problems:
        raise UftError(*problems)


def needs_hydra(request: Request) -> bool:
    """Whether a request is for Hydra to carry out: it sets something of Hydra's own, or draws in a file that does."""
    try:
        composed = composed_of(request)
    except UftError:
        return False
    return composed is not None and composed.needs_hydra


def composed_of(request: Request) -> Composed | None:
    """The files of the request's right choices; None where something is wrong with them, which is told elsewhere."""
    try:
        files = files_of(request)
        return files.composed(tuple(read_words(request.overrides, files).choices))
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
    draft = Draft.of(settings, FILE)
    for override in words.values:
        draft.apply(override)
    return plain(draft.judge()), [*problems, *draft.problems]
