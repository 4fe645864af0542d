"""What Hydra and OmegaConf raise, in one line for the person at the keyboard.

Most mistakes are found before Hydra sees them (:mod:`uft.config.examine`); this is for the rest: a broken YAML file,
a defaults list that names a file which is not there, a plugin that is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load

from uft.config.suggest import hint, nearest
from uft.errors import Problem, UftError
from uft.runs import bounded

T = TypeVar("T")

BROKEN = (HydraException, OmegaConfBaseException, YAMLError)
"""What composition raises for a mistake of the user's."""

NO_FILE = re.compile(r"Could not find '([^']+)'")
OPTIONS = re.compile(r"Available options in '([^']+)':\n((?:\t.+\n?)+)")
PARENT = re.compile(r"In '([^']+)': ")
NO_CONFIG = re.compile(r"Cannot find primary config '([^']+)'")
NO_MATCH = re.compile(r"Could not override '([^']+)'")
YAML_AT = re.compile(r'in "([^"]+)", line (\d+)')

HEADER = 512
"""Characters that Hydra looks through for a header."""

EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}
"""What brings the options that are no file of ours."""


def first_line(error: BaseException) -> str:
    """The first line of the innermost message that says anything."""
    texts = [str(e).strip() for e in chain(error)]
    return next((text.splitlines()[0] for text in texts if text), type(error).__name__)


def chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes, innermost first."""
    found: list[BaseException] = []
    while error is not None:
        found.insert(0, error)
        error = error.__cause__
    return found


def readable(config_dir: str | None, read: Callable[[], T]) -> T:
    """What `read` makes of configuration files. Raises UftError naming the file where something breaks that is no error
    of YAML's or Hydra's own: bytes that are not UTF-8, nesting without end, a number of thousands of digits; and where
    one would grow without end, as Hydra writes out whatever a name in it stands for."""
    from uft.config.places import conf_dir, config_dirs, shown

    own = [folder for folder in config_dirs(config_dir) if folder != conf_dir()]
    grown = [(file, overgrown(file)) for folder in own for file in sorted(folder.rglob("*.yaml"))]
    if problems := [Problem(shown(file), f"cannot be read as YAML: {why}") for file, why in grown if why]:
        raise UftError(*problems)
    try:
        return read()
    except BROKEN:
        raise
    except Exception as error:
        files = [file for folder in config_dirs(config_dir) for file in sorted(folder.rglob("*.yaml"))]
        found = [Problem(shown(file), f"cannot be read as YAML: {why}") for file in files if (why := stumbling(file))]
        if not found:
            raise
        raise UftError(*found) from error


def overgrown(file: Path) -> str | None:
    """Whether a file's names for parts of it stand for more than anybody wrote; other faults are told elsewhere."""
    try:
        text = file.read_text(encoding="utf-8")
        if "&" in text and "*" in text:
            found = safe_load(text)
        else:
            return None
    except (YAMLError, ValueError, OSError, RecursionError):
        return None
    try:
        bounded(found)
    except ValueError as error:
        return first_line(error)
    return None


def stumbling(file: Path) -> str | None:
    """What YAML, or Hydra reading the header and the defaults list, stumbles over in a file."""
    try:
        text = file.read_text(encoding="utf-8")
        content = safe_load(text)
    except RecursionError:
        return "nested too deeply"
    except (YAMLError, ValueError, OSError) as error:
        return first_line(error)
    try:
        ConfigSource._get_header_dict(text[:HEADER])
    except ValueError:
        return "a header is written  # @package NAME"
    if not isinstance(content, dict | None):
        return "a file of configuration holds keys and values"
    defaults = content.get("defaults", []) if content else []
    if not isinstance(defaults, list):
        return "defaults must be a list"
    return next((f"{item!r} is no entry of a defaults list" for item in defaults if not _is_entry(item)), None)


def _is_entry(item: Any) -> bool:
    """`name`, or `group: name`, or `group: [name, name]`; null may stand for the one name of a group."""
    if not isinstance(item, dict):
        return isinstance(item, str)
    lists = [value if isinstance(value, list) else [value] for value in item.values() if value is not None]
    return all(isinstance(name, str) for names in lists for name in names)


def not_installed(option: str) -> str | None:
    """What installs `option`, such as hydra/launcher/ray; None: no extra of ours brings it."""
    extra = EXTRAS.get(option)
    return f"pip install 'uft[{extra}]'" if extra else None


def translate(error: BaseException) -> Problem:
    """An exception of composition as a problem."""
    text = "\n".join(str(e) for e in reversed(chain(error)))
    broken = YAML_AT.search(text)
    if broken:
        from uft.config.places import shown

        where = f"{shown(Path(broken[1]))}:{broken[2]}"
        return Problem(where, f"cannot be read as YAML: {first_line(error)}")
    missing = NO_CONFIG.search(text)
    if missing:
        return Problem(missing[1], "no such primary config", "command line")
    parent = PARENT.search(text)
    where = f"conf/{parent[1]}.yaml" if parent else ""
    lost = NO_FILE.search(text)
    if lost:
        found = OPTIONS.search(text)
        if plugin := not_installed(lost[1]):
            return Problem(lost[1], "this plugin of Hydra is not installed", "", (plugin,))
        group, options = (found[1], found[2].split()) if found else ("", [])
        near = nearest(lost[1].rpartition("/")[2], options)
        advice = hint(f"{group}={near}" if near else None, "choices", options)
        return Problem(lost[1], "no such file in conf/", where, (advice,) if advice else ())
    unused = NO_MATCH.search(text)
    if unused:
        return Problem(unused[1], "is not in the defaults list, so there is nothing to override", where)
    return Problem(first_line(error), "", where)
