"""Objectives see rows, views and batches, and nothing else of ours: no config, device, model class or tracker."""

from __future__ import annotations

import ast
from pathlib import Path

import uft.objectives

OURS = ("uft.objectives", "uft.data.rows", "uft.data.batch")
STANDARD = {"__future__", "collections", "dataclasses", "functools", "importlib", "math", "typing", "torch"}


def test_imports():
    for path in Path(uft.objectives.__file__).parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert [n for n in names if not n.startswith(OURS) and n.split(".")[0] not in STANDARD] == [], path.name
