"""The structure of the program: imports run one way, and its size may only sink.

A feature that needs more lines, modules or functions raises a number of `MOST` and says so in its commit.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "uft").rglob("*.py")) + sorted((ROOT / "hydra_plugins").rglob("*.py"))

MOST = {
    "product lines": 34_824,
    "modules": 122,
    "functions named once": 375,
    "circles of files": 0,
    "circles of packages": 0,
    "uses of private names": 4,
    "test lines": 38_723,
}
FILE_LINES, FUNCTION_LINES = 600, 80
LONGER = 0
"""Files and functions beyond these soft limits, at most: a concept is not cut in two for a number."""

# A package may import those before it, never one after it.
ORDER = [
    "heartbeat",
    "errors",
    "runs",
    "environment",
    "distributed",
    "playground",
    "data",
    "objectives",
    "rewards",
    "config",
    "model",
    "sampling",
    "evaluation",
    "tracking",
    "report",
    "training",
    "launch",
    "cli",
    "api",
]
HEAVY = {"torch", "transformers", "datasets", "wandb", "hydra", "pyarrow", "peft"}
LIGHT = [
    "uft/__init__.py",
    "uft/__main__.py",
    "uft/heartbeat.py",
    "uft/environment.py",
    "uft/errors.py",
    "uft/runs.py",
    "uft/cli/__init__.py",
]


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "scripts" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imported(structure) -> dict[str, set[str]]:
    """Package or top module of ours -> those that it imports, also within functions."""
    graph = structure.packages(structure.imports(ROOT))
    names = {name: name.removeprefix("uft.") for name in graph}
    return {names[name]: {names[target] for target in targets} & set(ORDER) for name, targets in graph.items()}


def test_imports_run_one_way(imported):
    assert set(ORDER) <= set(imported)
    assert {"data", "model"} <= imported["training"], "imports are found at all"
    later = {name: {t for t in imported[name] if ORDER.index(t) > ORDER.index(name)} for name in ORDER}
    assert {name: targets for name, targets in later.items() if targets} == {}


def test_the_program_does_not_grow(structure):
    found = structure.figures(ROOT)
    assert {name: found[name] for name in MOST if found[name] > MOST[name]} == {}


def test_few_files_and_functions_are_long(structure):
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        long += [str(path)] if text.count("\n") > FILE_LINES else []
        functions = (node for node in structure.nodes_of(text) if isinstance(node, ast.FunctionDef))
        long += [f"{path}:{node.name}" for node in functions if node.end_lineno - node.lineno >= FUNCTION_LINES]
    assert len(long) <= LONGER, long


def test_objectives_see_no_config_device_or_tracker(imported):
    assert imported["objectives"] <= {"data"}


@pytest.mark.parametrize("name", LIGHT)
def test_start_of_the_program_imports_nothing_heavy(name: str):
    body = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
    modules = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
    assert not {module.split(".")[0] for module in modules} & HEAVY


def test_ci_installs_what_the_constraints_say_and_every_file_has_its_hash():
    lines = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8").splitlines()[2:]
    found = [re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found)
    installed = {match[1].lower().replace("_", "-"): match[2].partition("+")[0] for match in found if match}
    wanted = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    exact = dict(line.split("==") for line in wanted if "==" in line)
    assert len(exact) > 100
    for name, version in exact.items():
        assert installed[name.lower().replace("_", "-")] == version, name
