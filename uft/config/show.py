"""A configuration for people: YAML, each value with the place it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from uft.config.freeze import plain, to_yaml

DEFAULT = "default"
WIDEST = 48  # column of the comments, unless a line is longer


def annotated(cfg: DictConfig, origins: Mapping[str, str]) -> str:
    """The resolved configuration as YAML with aligned comments: the command line, a file and its line, or `default`.

    A value that follows another key says so: `${model.lr}`.
    """
    lines = list(walk(plain(cfg), "", 0))
    width = min(max((len(text) for text, key in lines if key), default=0), WIDEST)
    return "\n".join(
        f"{text:<{width}}  # {origins.get(key, DEFAULT)}{reference(cfg, key)}" if key else text for text, key in lines
    )


def walk(value: Mapping[str, Any], prefix: str, depth: int) -> list[tuple[str, str]]:
    """(line of YAML, dotted key of the value on it or "" for a heading)."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines.append((f"{'  ' * depth}{name(key)}:", ""))
            lines += walk(item, f"{prefix}{key}.", depth + 1)
        else:
            lines.append((f"{'  ' * depth}{to_yaml({key: item}).strip()}", f"{prefix}{key}"))
    return lines


def name(key: Any) -> str:
    return yaml.safe_dump({key: 0}).partition(": 0")[0]


def reference(cfg: DictConfig, key: str) -> str:
    """`, ${model.lr}` for a value that is an interpolation."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, DictConfig) and leaf in node and OmegaConf.is_interpolation(node, leaf):
        return f", {OmegaConf.to_container(node, resolve=False)[leaf]}"  # type: ignore[index, call-overload]
    return ""
