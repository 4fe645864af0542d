"""A source of a million rows: memory does not grow with it, at the first start and from the cache.

`pytest -m slow tests/inputs/test_large.py`; LARGE_ROWS (1,000,000) of them, a quarter of an hour. The peak that
`result.json` tells is of the process that trains; the checking process before it is measured too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uft.playground.world import CONTENT

pytestmark = pytest.mark.slow
ROWS = int(os.environ.get("LARGE_ROWS", "1000000"))
FIXED, PER_ROW = 60e6, 90  # bytes over a run of a thousand rows: blocks and buffers; indexes, and pages of token files
MODEL = ["model=playground", "objective=sft", "hardware=cpu", "tracking=none", "eval=none"]
REQUEST = [*MODEL, "data=files", "train.steps=2"]
MEASURED = (  # a program that runs another and tells the peak of the largest process below it, in KiB
    "import resource, subprocess, sys; code = subprocess.run([sys.executable, '-m', 'uft', *sys.argv[1:]]).returncode; "
    "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def written(path: Path, count: int) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for n in range(count):
            words = [CONTENT[n // len(CONTENT) ** place % len(CONTENT)] for place in range(6)]  # another row each
            prompt, reply = " ".join(3 * words), " ".join(2 * words)
            file.write(json.dumps({"prompt": prompt, "completion": reply}) + "\n")
    return path


def peaks(verb: str, file: Path, folder: Path, *words: str) -> int:
    """Bytes at the peak of the largest process of a request."""
    command = [sys.executable, "-c", MEASURED, verb, *REQUEST, f"+data.sources.mine.path={file}", *words]
    environment = os.environ | {"UFT_CACHE": str(folder / "cache"), "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return int(done.stdout.rpartition("peak ")[2]) * 1024


def test_memory_does_not_grow_with_a_source(tmp_path: Path) -> None:
    few, many = written(tmp_path / "few.jsonl", 1000), written(tmp_path / "many.jsonl", ROWS)
    base = peaks("train", few, tmp_path, "run.dir=few")
    told = json.loads((tmp_path / "few" / "result.json").read_text())["peak_memory_bytes"]
    bound = FIXED + PER_ROW * ROWS
    grown = {}
    for name, state in (("first", "miss"), ("again", "hit")):
        grown[name] = peaks("train", many, tmp_path, f"run.dir={name}") - base
        run = tmp_path / name
        source = json.loads((run / "data.json").read_text())["sources"]["mine"]
        assert (source["cache"], source["rows"] + source["held_out"]) == (state, ROWS)
        grown[f"{name}, trained"] = json.loads((run / "result.json").read_text())["peak_memory_bytes"] - told
    for verb in ("data", "check"):
        grown[verb] = peaks(verb, many, tmp_path) - peaks(verb, few, tmp_path)
    print({name: f"{size / 1e6:.0f} MB" for name, size in grown.items()})
    assert max(grown.values()) < bound, grown
