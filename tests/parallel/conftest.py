"""Two processes on this machine, as torch's launcher starts them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cases.py and outside.py

from outside import environment


@pytest.fixture(scope="session")
def two() -> Callable[..., None]:
    """two(folder, program, *arguments): a program in two processes, to its end."""

    def run(folder: Path, program: Path, *arguments: str, timeout: float = 900) -> None:
        options: Sequence[str] = ("--standalone", "--nproc-per-node=2", "--max-restarts=0")
        command = [sys.executable, "-m", "torch.distributed.run", *options, str(program), *arguments]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-8000:]}"

    return run
