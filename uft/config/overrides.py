"""The words of a command line, each looked at by itself: can it be read, does the file that it chooses exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hydra._internal.config_repository import IConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from uft.config.places import conf_dir, groups
from uft.config.suggest import ambiguous, hint, nearest
from uft.config.translate import first_line, not_installed
from uft.errors import Problem

COMMAND_LINE = "command line"


@dataclass
class Sorted:
    """Overrides by what they do, and what is wrong with some of them."""

    choices: list[str] = field(default_factory=list)  # of groups, and Hydra's own keys: right as they stand
    mended: list[str] = field(default_factory=list)  # what bad choices of a group probably meant
    values: list[Override] = field(default_factory=list)  # of keys; not looked at yet
    problems: list[Problem] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)  # groups whose choice could not even be guessed


def sort_out(lines: Iterable[str], repository: IConfigRepository) -> Sorted:
    """Parse every override and check the group choices."""
    parser, result = OverridesParser.create(), Sorted()
    for line in lines:
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            result.problems.append(Problem(line, "cannot be read as key=value", COMMAND_LINE, unreadable(line, error)))
            continue
        if override.is_sweep_override():
            result.problems.append(several_values(override))
        elif override.is_hydra_override():
            result.choices.append(line)
        elif not repository.group_exists(override.key_or_group) or isinstance(override.value(), dict):
            result.values.append(override)
        else:
            choose(override, repository, result)
    return result


def unreadable(line: str, error: HydraException) -> tuple[str, ...]:
    key, equals, value = line.partition("=")
    if not equals:
        return (f"write  {key}=VALUE",)
    if not set(value) & set("'\""):
        return (f"quote a value with special characters:  '{key}=\"{value}\"'",)
    return (first_line(error),)


def several_values(override: Override) -> Problem:
    key, value = override.get_key_element(), override.get_value_string()
    advice = [f"to run each of them:  uft train -m {key}={value}"]
    if override.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
        advice.append(f"for a list:  {key}=[{value}]   for text with a comma:  '{key}=\"{value}\"'")
    return Problem(str(override.input_line), "several values need -m", COMMAND_LINE, tuple(advice))


def choose(override: Override, repository: IConfigRepository, result: Sorted) -> None:
    """Note one group choice as right or wrong."""
    line, bad = str(override.input_line), None
    if not override.is_delete():
        bad = chosen_already(override) or next(missing_options(override, repository), None)
    if bad is None:
        result.choices.append(line)
    else:
        problem, meant = bad
        result.problems.append(problem)
        result.mended += [meant] if meant else []
        result.unclear |= set() if meant else {override.key_or_group}


def chosen_already(override: Override) -> tuple[Problem, str] | None:
    """`+data=mix` where the defaults list has a choice of data: Hydra would see two."""
    group, line = override.key_or_group, str(override.input_line)
    if not (override.is_add() or override.is_force_add()) or override.package or group not in groups([conf_dir()]):
        return None
    meant = line.lstrip("+")
    return Problem(line, f"{group} has a choice already", COMMAND_LINE, (f"without the +:  {meant}",)), meant


def missing_options(override: Override, repository: IConfigRepository) -> Iterator[tuple[Problem, str | None]]:
    group, value = override.key_or_group, override.value()
    options = repository.get_group_options(group)
    for option in value if isinstance(value, list) else [value]:
        if option is None or repository.config_exists(f"{group}/{option}"):
            continue
        place = f"{group}@{override.package}" if override.package else group
        advice, meant = no_such_option(group, str(option), options, place)
        yield Problem(str(override.input_line), f"no such file in conf/{group}", COMMAND_LINE, advice), meant


def no_such_option(group: str, option: str, options: list[str], key: str) -> tuple[tuple[str, ...], str | None]:
    """(advice, what was probably meant) for an option without a file; `key` is what it was given to."""
    plugin = not_installed(f"{group}/{option}")
    explained = ambiguous(option) if group == "objective" else (plugin,) if plugin else ()
    near = None if explained else nearest(option, options)
    meant = f"{key}={near}" if near else None
    return tuple(line for line in (*explained, hint(meant, "choices", options)) if line), meant
