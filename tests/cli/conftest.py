"""The launcher with a worker that takes milliseconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uft.launch import process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Work in an empty folder with the stand-in of fake_worker.py; returns the folder."""
    monkeypatch.setattr(
        process, "COMMAND", (sys.executable, str(Path(__file__).parents[1] / "launch" / "fake_worker.py"))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)
    return tmp_path


@pytest.fixture
def program():
    """`program(*words, cwd=..., **env)` runs the command line in a process of its own."""

    def run(*words, cwd, env=None, **more):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "uft", *words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, **more)

    return run
