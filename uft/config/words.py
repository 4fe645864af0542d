"""The words of a command line, each looked at by itself: can it be read, does the file that it chooses exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from uft.config.files import NAMES_CODE, PLUGINS, Files, first_line, names_code, parser
from uft.config.messages import COMMAND_LINE, conf_dir, groups, no_such_option
from uft.errors import Problem


@dataclass
class Words:
    """Overrides by what they do, and what is wrong with some of them."""

    choices: list[str] = field(default_factory=list)  # of groups, and Hydra's own keys: right as they stand
    mended: list[str] = field(default_factory=list)  # what bad choices of a group probably meant
    values: list[Override] = field(default_factory=list)  # of keys; not looked at yet
    problems: list[Problem] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)  # groups whose choice could not even be guessed

    @property
    def chosen(self) -> tuple[str, ...]:
        return (*self.choices, *self.mended)


def read_words(lines: Iterable[str], files: Files) -> Words:
    """Parse every override and check the choices of groups."""
    words = Words()
    for line in lines:
        if names_code(line):
            words.problems.append(Problem(line, NAMES_CODE, COMMAND_LINE, PLUGINS))
            continue
        try:
            override = parser().parse_override(line)
        except HydraException as error:
            words.problems.append(_unreadable(line, error))
            continue
        if override.is_sweep_override():
            words.problems.append(_several_values(override))
        elif override.is_hydra_override():
            words.choices.append(line)
        elif not files.is_group(override.key_or_group) or isinstance(override.value(), dict):
            words.values.append(override)
        else:
            _choose(override, files, words)
    return words


def _unreadable(line: str, error: HydraException) -> Problem:
    key, equals, value = line.partition("=")
    advice = first_line(error)
    if not equals:
        advice = f"write  {key}=VALUE"
    elif not set(value) & set("'\""):
        advice = f"quote a value with special characters:  '{key}=\"{value}\"'"
    return Problem(line, "cannot be read as key=value", COMMAND_LINE, (advice,))


def _several_values(override: Override) -> Problem:
    key, value = override.get_key_element(), override.get_value_string()
    advice = [f"to run each of them:  uft train -m {key}={value}"]
    if override.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
        advice.append(f"for a list:  {key}=[{value}]   for text with a comma:  '{key}=\"{value}\"'")
    return Problem(str(override.input_line), "several values need -m", COMMAND_LINE, tuple(advice))


def _choose(override: Override, files: Files, words: Words) -> None:
    """Note one choice of a group as right or wrong."""
    group, value, line = override.key_or_group, override.value(), str(override.input_line)
    added = (override.is_add() or override.is_force_add()) and not override.package
    if added and group in groups([conf_dir()]):  # the defaults list has a choice already: Hydra would see two
        meant = line.lstrip("+")
        words.problems.append(
            Problem(line, f"{group} has a choice already", COMMAND_LINE, (f"without the +:  {meant}",))
        )
        words.mended.append(meant)
        return
    asked = [] if override.is_delete() else value if isinstance(value, list) else [value]
    options = [str(option) for option in asked if option is not None]
    lost = next((option for option in options if not files.has(group, option)), None)
    if lost is None:
        words.choices.append(line)
        return
    place = f"{group}@{override.package}" if override.package else group
    advice, near = no_such_option(group, lost, files.options(group), place)
    words.problems.append(Problem(line, f"no such file in conf/{group}", COMMAND_LINE, advice))
    words.mended += [near] if near else []
    words.unclear |= set() if near else {group}
