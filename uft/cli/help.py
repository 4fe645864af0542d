"""`uft VERB --help`: the choices found on disk with a line each, the keys one needs most, examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omegaconf import MISSING

from uft.cli import VERBS
from uft.config.places import config_dirs, groups, headline
from uft.config.schema import Config
from uft.config.suggest import written

FLAGS = ("-h", "--help")
FIRST = ("objective", "data", "model", "optim", "hardware", "eval", "tracking", "experiment", "sweep", "debug")


@dataclasses.dataclass(frozen=True)
class Help:
    verb: str
    keys: tuple[str, ...]
    examples: Mapping[str, str]
    usage: str = ""
    notes: tuple[str, ...] = ()


def shown(page: Help, arguments: list[str]) -> bool:
    """Show the page if it is asked for; whether it was."""
    asked = any(word in FLAGS for word in arguments)
    if asked:
        print(text(page, option(arguments, "--config-dir", "-cd")))
    return asked


def option(arguments: list[str], *names: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return None


def text(page: Help, extra: str | None = None) -> str:
    lines = [
        f"uft {page.verb}: {VERBS[page.verb]}",
        "",
        f"usage: {page.usage or f'uft {page.verb} [options] [key=value ...]'}",
        *choices(extra),
        "",
        "Keys one needs most  (all of them:  uft config)",
        *columns({key: describe(key) for key in page.keys}),
        "",
        "Examples",
        *columns(page.examples),
        "",
        *(f"  {note}" for note in page.notes),
        "Options are Hydra's: -m (several values), --cfg job (print, do nothing), --info, --config-dir DIR, -cn NAME;",
        "--hydra-help tells of them. Your own files: ./conf-user or $UFT_CONF (they win over the shipped ones).",
    ]
    return "\n".join(lines)


def choices(extra: str | None) -> list[str]:
    """Every group that has options, in the order of importance, then what users added."""
    found = groups(config_dirs(extra))
    order = [group for group in FIRST if group in found] + [group for group in found if group not in FIRST]
    lines: list[str] = []
    for group in order:
        lines += ["", f"{group}=", *columns({name: headline(file) for name, file in found[group].items()})]
    return lines


def columns(table: Mapping[str, str]) -> list[str]:
    width = min(max((len(name) for name in table), default=0), 48)
    return [f"  {name:<{width}}  {says}".rstrip() for name, says in table.items()]


def describe(key: str) -> str:
    """A key's line of help and its default in the schema."""
    kind: Any = Config
    parts = key.split(".")
    for part in parts[:-1]:
        kind = next(f.default_factory for f in dataclasses.fields(kind) if f.name == part)
    field = next(f for f in dataclasses.fields(kind) if f.name == parts[-1])
    choices = field.metadata.get("choices")
    listed = f" ({', '.join(written(choice) for choice in choices)})" if choices else ""
    default = field.default
    shown = "" if default is dataclasses.MISSING or default in (MISSING, None) else f"  [{written(default)}]"
    return f"{field.metadata.get('help', '')}{listed}{shown}"
