"""docs/keys.md, made from the schema: `python scripts/keys_table.py` writes it anew.

Type, default, range and the line about each key are those that `uft VERB --help` shows and that requests are judged by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from uft.config.messages import bare, choices, expected, item_of, written
from uft.config.parameters import parameters
from uft.config.schema import MISSING, Config, Stage, default_of, fields_of, is_open

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
NAMES = {("data", "sources"): "NAME", ("stages",): "NAME"}  # groups of named groups
INTRO = """\
# Every key

What can be set, as `key=value` on the command line or in a YAML file of yours (`conf-user/`). Made from the schema by
`python scripts/keys_table.py`. `uft config` prints the values of a request and where each is from, `uft VERB --help`
the common ones; a wrong key or value is told with what was probably meant.

`-` has no default: it comes with a file (`data=mix`) or has to be given. `${other.key}` is the value of that key. A
file of `conf/` may set another value than the default here.
"""
OBJECTIVE = """\
The keys of an objective are those of its method; `objective=NAME` sets them to the method's values for that name, and
`uft config objective=NAME` prints these. A key that a name's file does not list is not one of it
([objectives](objectives.md)).
"""


def kind_of(field: FieldInfo) -> str:
    """The type of a key, its choices or its range."""
    listed = choices(field.annotation)
    limits = [f"{SIGNS[n]} {getattr(rule, n)}" for rule in field.metadata for n in SIGNS if hasattr(rule, n)]
    text = ", ".join(f"`{choice}`" for choice in listed) or expected(field.annotation)
    if is_open(field.annotation) and not fields_of(field.annotation):
        text = "a group of keys that you name"
    return ", ".join([text, *limits]).replace(", like [NAME] or [{key: value}]", "")


def default(field: FieldInfo) -> str:
    value = default_of(field)
    return "-" if value == MISSING else f"`{written(value)}`"


def row(key: str, field: FieldInfo, *more: str) -> str:
    cells = (f"`{key}`", kind_of(field), default(field), *more, field.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def rows(kind: Any, prefix: tuple[str, ...]) -> Iterator[str]:
    """The keys below a group, those of named groups as NAME."""
    for name, field in fields_of(kind).items():
        path = (*prefix, name)
        if fields_of(field.annotation):
            yield from rows(field.annotation, path)
        elif path in NAMES:
            inner = Stage if path == ("stages",) else bare(field.annotation).__args__[1]
            yield from rows(inner, (*path, NAMES[path]))
        else:
            yield row(".".join(path), field)
        if fields_of(item := item_of(field.annotation)):
            yield from rows(bare(item), (*prefix, f"{name}[]"))


def of_methods(group: str) -> Iterator[str]:
    """The keys of all methods of a group, each with the methods that have it so."""
    found: dict[str, tuple[str, FieldInfo, list[str]]] = {}
    for method, model in sorted(parameters(group).items()):
        for name, field in fields_of(model).items():
            if name not in ("name", "method"):
                found.setdefault(row(name, field), (name, field, []))[2].append(method)
    for name, field, methods in sorted(found.values(), key=lambda one: (one[0], one[2])):
        shown = "all" if len(methods) == len(parameters(group)) else ", ".join(methods)
        yield row(f"{group}.{name}", field, shown)


def table(lines: Iterator[str], *more: str) -> str:
    heads = ["key", "type", "default", *more, "what it is"]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])


def page() -> str:
    parts, plain = [INTRO], list[str]()
    for name, field in fields_of(Config).items():
        if name in ("objective", "reward"):
            text = OBJECTIVE if name == "objective" else "`reward=NAME` chooses one ([rewards](rewards.md)).\n"
            parts.append(f"## {name}\n\n{text}\n{table(of_methods(name), 'methods')}\n")
        elif fields_of(field.annotation) or (name,) in NAMES:
            about = field.description or ""
            inner = rows(Stage, (name, "NAME")) if (name,) in NAMES else rows(field.annotation, (name,))
            parts.append(f"## {name}\n\n{about}\n\n{table(inner)}\n" if about else f"## {name}\n\n{table(inner)}\n")
        else:
            plain.append(row(name, field))
    parts.insert(1, f"## Of the run\n\n{table(iter(plain))}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
