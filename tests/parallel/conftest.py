"""Two processes on this machine, as torch's launcher starts them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cases.py and outside.py

from outside import environment
from program import Popen


@pytest.fixture(scope="session")
def two() -> Callable[..., None]:
    """two(folder, program, *arguments): a program in two processes, to its end."""

    def run(folder: Path, program: Path, *arguments: str, timeout: float = 900) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        variables = environment(folder) | meeting | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = []
        for rank in ("0", "1"):
            with open(folder / f"rank-{rank}.txt", "w") as said:
                own = variables | {"RANK": rank, "LOCAL_RANK": rank}
                command = [sys.executable, str(program), *arguments]
                ranks.append(Popen(command, env=own, stdout=said, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        said = "\n".join((folder / f"rank-{rank}.txt").read_text()[-6000:] for rank in (0, 1))
        assert codes == [0, 0], said

    return run
