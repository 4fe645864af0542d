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
    "product lines": 23_172,
    "modules": 90,
    "functions named once": 331,
    "circles of files": 0,
    "circles of packages": 0,
    "uses of private names": 11,
    "test lines": 30_946,
}
FILE_LINES, FUNCTION_LINES = 600, 80
LONGER = 2
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
    "config",
    "model",
    "sampling",
    "evaluation",
    "tracking",
    "report",
    "training",
    "launch",
    "cli",
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


def package(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "uft" and len(relative) > 1 else relative[0]


def imported(path: Path) -> set[str]:
    """Top packages of ours that a file imports, also within functions, unless only for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "uft":
            names |= {f"uft.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = (name.split(".") for name in names if name.startswith("uft."))
    return {part[1] for part in parts} & set(ORDER)


def test_imports_run_one_way():
    wrong = set()
    for path in (p for p in SOURCES if package(p) in ORDER):
        mine = package(path)
        later = {other for other in imported(path) if ORDER.index(other) > ORDER.index(mine)}
        wrong |= {(str(path.relative_to(ROOT)), other) for other in later}
    assert wrong == set()


def test_the_program_does_not_grow():
    spec = importlib.util.spec_from_file_location("structure", ROOT / "scripts" / "structure.py")
    structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    found = structure.figures(ROOT)
    assert {name: found[name] for name in MOST if found[name] > MOST[name]} == {}


def test_few_files_and_functions_are_long():
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        long += [str(path)] if text.count("\n") > FILE_LINES else []
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        long += [f"{path}:{node.name}" for node in functions if node.end_lineno - node.lineno >= FUNCTION_LINES]
    assert len(long) <= LONGER, long


def test_objectives_see_no_config_device_or_tracker():
    for path in (ROOT / "uft" / "objectives").glob("*.py"):
        assert imported(path) <= {"data", "objectives"}, path


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
