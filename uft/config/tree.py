"""A typed configuration tree that is filled one setting at a time, so that one bad setting does not hide the next."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.loader import Setting
from uft.config.places import config_dirs, groups
from uft.config.register import objective_schema, objective_schemas
from uft.config.schema import Config, Source, Stage
from uft.config.suggest import expected, hint, listing, nearest, right_type, written
from uft.errors import Problem

OBJECTIVE = "objective"
SOURCES = ("data", "sources")
NAMED: dict[tuple[str, ...], type] = {SOURCES: Source, ("stages",): Stage}
"""Where entries have names of the user's, and what an entry is."""
NOT_CHOSEN = ("name", "method")  # keys of an objective that its file sets and nobody types


class Tree:
    """The configuration while it is put together."""

    def __init__(self) -> None:
        self.root: DictConfig = OmegaConf.structured(Config)
        self.origins: dict[str, str] = {}

    def use_objective(self, setting: Setting, keys: Iterable[str]) -> Problem | None:
        """Give `objective` those `keys` of its method that its file names."""
        schemas, method = objective_schemas(), str(setting.value)
        if method not in schemas:
            meant = nearest(method, schemas)
            advice = hint(meant and f"{setting.key}={meant}", "methods", list(schemas))
            return Problem(f"{setting.key}={method}", "no such method", setting.where, (advice,))
        OmegaConf.update(self.root, ".".join(setting.path[:-1]), OmegaConf.structured(objective_schema(method, keys)))
        return None

    def node_at(self, path: tuple[str, ...]) -> tuple[DictConfig | None, int]:
        """(the deepest mapping on the way to `path`, how many parts of `path` lead to it); None where a leaf is in
        the way."""
        node, depth = self.root, 0
        for depth, part in enumerate(path[:-1]):
            child = node._get_node(part) if part in node else None
            if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
                return (node if child is None else None), depth
            node = child
        return node, len(path) - 1

    def knows(self, path: tuple[str, ...]) -> bool:
        """Whether the schema has this key: a field of a dataclass, or anything in a dict of free keys."""
        node, depth = self.node_at(path)
        if node is None or depth < len(path) - 1:
            return False
        keys = fields_of(node)
        return keys is None or path[-1] in keys

    def put(self, setting: Setting) -> Problem | None:
        """Set one value, or say why it cannot be set."""
        path = setting.path
        for place, kind in NAMED.items():
            if path[: len(place)] == place and len(path) > len(place):
                OmegaConf.select(self.root, ".".join(place)).setdefault(path[len(place)], OmegaConf.structured(kind))
                if len(path) == len(place) + 1:
                    return None if setting.value in (None, {}) else bad_type(setting, kind)
        if not self.knows(path):
            return self.unknown(setting)
        node, _ = self.node_at(path)
        try:
            OmegaConf.update(self.root, setting.key, setting.value, merge=True, force_add=True)
        except (OmegaConfBaseException, OverflowError):  # a whole number too large to be a float
            return bad_type(setting, field_type(node, path[-1]))
        self.origins[setting.key] = setting.where
        return None

    def remove(self, path: tuple[str, ...]) -> None:
        node, depth = self.node_at(path)
        if node is not None and depth == len(path) - 1:
            node.pop(path[-1], None)
        key = ".".join(path)
        self.origins = {k: v for k, v in self.origins.items() if k != key and not k.startswith(f"{key}.")}

    def value(self, key: str) -> Any:
        """What is at a dotted key, resolved where it can be; None where nothing is."""
        value = OmegaConf.select(self.root, key, throw_on_missing=False, throw_on_resolution_failure=False)
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    def unknown(self, setting: Setting) -> Problem:
        """The problem of a key that is not in the schema."""
        path = setting.path
        node, depth = self.node_at(path)
        if node is None:
            parent = ".".join(path[: depth + 1])
            return Problem(setting.text, f"{parent} is a value and has no keys of its own", setting.where)
        prefix, siblings = path[:depth], fields_of(node) or []
        near = nearest(path[depth], siblings)
        meant = ".".join((*prefix, near, *path[depth + 1 :])) if near else self.elsewhere(path)
        if len(path) == 1 and near in groups(config_dirs()):
            meant = f"{near}={written(setting.value)}"
        shown = [key for key in siblings if prefix[:1] != (OBJECTIVE,) or key not in NOT_CHOSEN]
        advice = hint(meant, "keys" if prefix else "groups and keys", shown)
        more = belongs_to(path[-1]) if prefix[:1] == (OBJECTIVE,) else ()
        return Problem(setting.text, f"no such key{self.place(prefix)}", setting.where, (advice, *more))

    def place(self, prefix: tuple[str, ...]) -> str:
        if prefix[:1] == (OBJECTIVE,) and "method" in (fields_of(self.node_at((*prefix, ""))[0] or self.root) or []):
            named = OmegaConf.select(self.root, ".".join(prefix))
            return f" in {'.'.join(prefix)}={named.get('name') or named.get('method')}"
        return f" in {'.'.join(prefix)}" if prefix else ""

    def elsewhere(self, path: tuple[str, ...]) -> str | None:
        """The same last name somewhere else in the tree: `lr` is optim.lr."""
        leaf = path[-1]
        groups = {str(name): fields_of(node) or [] for name, node in self.subtrees()}
        matches = [f"{name}.{leaf}" for name, keys in groups.items() if leaf in keys]
        matches.sort(key=lambda match: match.split(".")[0] in ("model", "generate", "seeds"))
        return matches[0] if matches else None

    def subtrees(self) -> list[tuple[str, DictConfig]]:
        nodes = ((str(name), self.root._get_node(name)) for name in self.root)
        return [(name, node) for name, node in nodes if isinstance(node, DictConfig) and not node._is_missing()]


def belongs_to(key: str) -> tuple[str, ...]:
    """The objectives that do have a key, in words."""
    import yaml

    files = groups(config_dirs()).get(OBJECTIVE, {})
    names = [name for name, file in files.items() if key in (yaml.safe_load(file.read_text(encoding="utf-8")) or {})]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (f"{key} is a key of:  {', '.join(names[:6])}{more}",) if names else ()


def fields_of(node: DictConfig) -> list[str] | None:
    """Keys of a dataclass node in their order, own ones before inherited; None for a dict of free keys."""
    kind = OmegaConf.get_type(node)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None


def field_type(node: DictConfig | None, name: str) -> Any:
    kind = OmegaConf.get_type(node) if node is not None else None
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    return hints.get(name, str)


def bad_type(setting: Setting, kind: Any) -> Problem:
    keys = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    advice = right_type(kind, setting.value) or ((f"its keys: {listing(keys)}",) if keys else ())
    what = setting.text if "=" in setting.text else f"{setting.text}={written(setting.value)}"
    return Problem(what, f"must be {expected(kind)}", setting.where, advice)
