"""Programs on one process, and on two as torch's launcher starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for program.py and outside.py

from outside import environment

PROGRAM = Path(__file__).with_name("program.py")


def run(folder: Path, *words: str) -> None:
    command = [sys.executable, *words]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-8000:]}"


@pytest.fixture(scope="session")
def one() -> Callable[..., None]:
    """one(folder, *words): program.py, to its end."""
    return lambda folder, *words: run(folder, str(PROGRAM), str(folder), *words)


@pytest.fixture(scope="session")
def two() -> Callable[..., None]:
    """two(folder, *words): the same in two processes."""
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0")
    return lambda folder, *words: run(folder, *options, str(PROGRAM), str(folder), *words)
