"""What tests of all packages share: the program as a process of its own, away from the person's settings."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for program.py

import program as programs

Start = Callable[..., "subprocess.Popen[str]"]
Uft = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few long tests come first, then those of the most tests, so that all workers end together."""
    count, long = Counter(item.path for item in items), ("parallel", "faults", "end_to_end", "report")
    items.sort(key=lambda item: (item.path.parent.name not in long, -count[item.path], item.path))


@pytest.fixture
def environment(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of every process: this installation of uft, one thread, no network, folders of its own."""
    return programs.isolated(tmp_path_factory.mktemp("home"), tmp_path / "cache")


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    """start("train", ...): `uft train ...` in a session of its own; killed at the end if it still lives."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: Any, cwd: Path = tmp_path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        process = programs.Popen(
            [sys.executable, "-m", "uft", *arguments],
            cwd=cwd,
            env=environment | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def uft(tmp_path: Path, environment: dict[str, str]) -> Uft:
    """uft("train", "objective=sft", ..., code=0): run the program to its end; `code` None takes any exit code."""

    def run(
        *arguments: Any,
        code: int | None = 0,
        cwd: Path = tmp_path,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "uft", *arguments]
        options = {"capture_output": True, "text": True, "errors": "replace", "start_new_session": True} | options
        done = programs.run(command, cwd=cwd, env=environment | dict(env or {}), **options)
        assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def program(uft: Uft) -> Uft:
    """program("train", ..., cwd=..., env=...): as `uft`, whatever the exit code."""
    return lambda *words, **options: uft(*words, code=None, **options)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The launcher with a worker that takes milliseconds (launch/fake_worker.py), in an empty folder; the folder."""
    from uft.launch import process

    fake = Path(__file__).parent / "launch" / "fake_worker.py"
    monkeypatch.setattr(process, "COMMAND", (sys.executable, str(fake)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)
    return tmp_path
