"""The launcher with a worker that takes milliseconds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tracking"))  # for standin.py

from uft.launch import process


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Work in an empty folder with the stand-in of fake_worker.py; returns the folder."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(Path(__file__).with_name("fake_worker.py"))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)
    return tmp_path
