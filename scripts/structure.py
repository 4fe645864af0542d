"""How large the program is and how far one thing travels through it: `python scripts/structure.py [CHECKOUT]`.

Prints the table of figures that tests/test_structure.py keeps from growing. The static figures are read from the
sources; the traced ones come from one real run of two steps (`uft train objective=dpo data=pairs debug=fast`, packed
rows, one process) under a profiler that notes every function of the program that is entered.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = {"hydra", "omegaconf", "torch", "argparse", "transformers", "wandb", "datasets", "optuna"}
OUTSIDE_OF_ROWS = ("cli", "config", "launch", "tracking", "report", "runs.py", "errors.py", "heartbeat.py", "alive.py")
"""Packages and files that run beside a row on its way from the file to its loss, and do not touch it."""

TRACER = """
import atexit, json, os, sys, threading
if os.environ.get("STRUCTURE_TRACE"):
    root = os.environ["STRUCTURE_ROOT"] + os.sep
    seen, marks, step = set(), {}, [None, 0]
    def write():
        name = os.path.join(os.environ["STRUCTURE_TRACE"], f"{os.getpid()}.json")
        json.dump({"seen": sorted(seen), **{k: sorted(v) for k, v in marks.items()}}, open(name, "w"))
    def profile(frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(root) or code.co_name.startswith("<"):
            return
        key = (code.co_filename[len(root):], code.co_qualname if hasattr(code, "co_qualname") else code.co_name)
        if event == "call":
            seen.add(key)
            if key[1] in STEP:
                if step[0] is None:
                    step[0], step[1] = frame, step[1] + 1
                    marks["step"] = set()
            if step[0] is not None:
                marks["step"].add(key)
            if key[1] == "load_sources":
                marks.setdefault("rows", set())
            if "rows" in marks and "step_over" not in marks:
                marks["rows"].add(key)
        elif event == "return" and frame is step[0]:
            step[0] = None
            if "step_over" not in marks:
                marks["step_over"], marks["start"] = set(), set(seen)
            write()
    STEP = {"Trainer._step"}
    atexit.register(write)
    threading.setprofile(profile)
    sys.setprofile(profile)
"""
"""As `sitecustomize`: every process of the run loads it by itself."""


def sources(root: Path) -> dict[Path, str]:
    """The program's files that hold more than a docstring."""
    files = [*sorted((root / "uft").rglob("*.py")), *sorted((root / "hydra_plugins").rglob("*.py"))]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    return {file: text for file, text in texts.items() if not _is_empty(text)}


def _is_empty(text: str) -> bool:
    return all(isinstance(node, ast.Expr) for node in ast.iter_child_nodes(nodes_of(text)[0]))


@cache
def nodes_of(text: str) -> tuple[ast.AST, ...]:
    """The nodes of a file's tree, the module first."""
    return tuple(ast.walk(ast.parse(text)))


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports when it is loaded or within a function, but for type checking."""
    names = {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in sources(root)}
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        nodes = nodes_of(file.read_text(encoding="utf-8"))
        guarded = {
            id(inner)
            for node in nodes
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }
        targets: set[str] = set()
        for node in nodes:
            if id(node) not in guarded and isinstance(node, ast.ImportFrom) and node.module:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= full if full <= names.keys() else full | {node.module}
            elif id(node) not in guarded and isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        found[name] = (targets & names.keys()) - {name}
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def packages(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between top packages (`uft.data`) and top modules (`uft.runs`)."""

    def top(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        found.setdefault(top(name), set()).update(top(target) for target in targets if top(target) != top(name))
    return found


def functions_named_once(texts: Iterable[str]) -> tuple[int, int]:
    """(functions that the program names in one place at most besides their definition, all functions)."""
    nodes = [node for text in texts for node in nodes_of(text)]
    names: Counter[str] = Counter()
    for node in nodes:
        if isinstance(node, ast.Name):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute):
            names[node.attr] += 1
        elif isinstance(node, ast.alias):
            names[node.name] += 1
    defined = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    plain = [node for node in defined if not node.name.startswith("__")]
    return sum(names[node.name] <= 1 for node in plain), len(defined)


def private_uses(texts: Mapping[Path, str]) -> dict[Path, int]:
    """File -> how often it imports or touches an underscored name that is not the program's own."""
    found: dict[Path, int] = {}
    for file, text in texts.items():
        own, count = set(re.findall(r"(?:def |class |self\.|cls\.)(_\w+)", text)), 0
        own |= set(re.findall(r"^\s*(_\w+)\s*[:=]", text, re.MULTILINE)) | {"_exit", "_replace", "_asdict"}
        for node in nodes_of(text):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                path = (node.module or "").split(".")
                count += sum(any(part.startswith("_") for part in [*path, alias.name]) for alias in node.names)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr) and node.attr not in own:
                count += 1
        if count:
            found[file] = count
    return found


def traced(root: Path) -> dict[str, set[tuple[str, str]]]:
    """What one short run enters: `parent` and `start` up to the end of the first step, `rows`, one `step`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "sitecustomize.py").write_text(TRACER)
        words = ["train", "objective=dpo", "data=pairs", "debug=fast", "tracking=none", f"run.dir={folder / 'run'}"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), str(root)]),
            "STRUCTURE_TRACE": place,
            "STRUCTURE_ROOT": str(root / "uft"),
            "UFT_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-m", "uft", *words], env=environment, cwd=place, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"the traced run failed:\n{done.stdout}{done.stderr}")
        found: dict[str, set[tuple[str, str]]] = {"parent": set(), "start": set(), "rows": set(), "step": set()}
        for file in folder.glob("*.json"):
            record = json.loads(file.read_text())
            kind = "start" if "start" in record else "parent"
            found[kind] |= {tuple(key) for key in record.get("start", record["seen"])}
            found["rows"] |= {tuple(key) for key in record.get("rows", ())}
            found["step"] |= {tuple(key) for key in record.get("step", ())}
        return found


def figures(root: Path) -> dict[str, int]:
    """The static figures, by the names that tests/test_structure.py uses."""
    texts, graph = sources(root), imports(root)
    once, functions = functions_named_once(texts.values())
    private = private_uses(texts)
    product = [*(root / "uft").rglob("*.py"), *(root / "hydra_plugins").rglob("*.py")]
    return {
        "product lines": sum(file.read_text(encoding="utf-8").count("\n") for file in product),
        "modules": len(texts),
        "functions": functions,
        "functions named once": once,
        "circles of files": len(circles(graph)),
        "circles of packages": len(circles(packages(graph))),
        "uses of private names": sum(private.values()),
        "modules with private names": len(private),
        "test lines": sum(f.read_text(encoding="utf-8").count("\n") for f in (root / "tests").rglob("*.py")),
    }


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    rows: dict[str, object] = dict(figures(root))
    trace = traced(root)
    rows["modules of one optimiser step"] = len({file for file, _ in trace["step"]})
    rows["functions of one optimiser step"] = len(trace["step"])
    start = trace["parent"] | trace["start"]
    rows["functions from the shell to the first step"] = len(start)
    rows["modules from the shell to the first step"] = len({file for file, _ in start})
    travelled = {file for file, _ in trace["rows"] if not file.startswith(OUTSIDE_OF_ROWS)}
    rows["files that a JSONL row passes before its loss"] = len(travelled)
    for name, value in rows.items():
        print(f"{name:<48}{value:>8}")


if __name__ == "__main__":
    main()
