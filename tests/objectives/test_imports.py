"""Objectives see rows, views and batches, and nothing else of ours: no config, device, model class or tracker."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import uft.objectives

FILES = sorted(Path(uft.objectives.__file__).parent.glob("*.py"))
OURS = ("uft.objectives", "uft.data.rows", "uft.data.rows", "uft.data.batch")
STANDARD = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path):
    strangers = [
        name
        for name in imported(path)
        if not name.startswith(OURS) and name.split(".")[0] != "torch" and name.split(".")[0] not in STANDARD
    ]
    assert strangers == []
