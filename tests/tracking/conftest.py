"""Every test has a home of its own, no W&B variables, and a W&B service that ends with it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from uft.runs import Run, create_run
from uft.tracking.wandb import Wandb

sys.path.insert(0, str(Path(__file__).parent))  # for standin.py and records.py

from standin import KEY, Standin


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("WANDB_", "NETRC")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    monkeypatch.setenv("WANDB_DISABLE_GIT", "true")
    yield folder
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it read this test's variables
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    """A W&B server on loopback, with a key for it in the environment."""
    standin = Standin()
    monkeypatch.setenv("WANDB_BASE_URL", standin.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield standin
    standin.close()


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> str:
    """The host of a W&B server that does not answer, with a key for it in the environment."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return host


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    def new(name: str = "ift-mix", **info: object) -> Run:
        return create_run(tmp_path / name, "{}\n", [], **info)

    return new


@pytest.fixture
def config() -> Callable[..., dict]:
    def make(mode: str = "online", **tracking: object) -> dict:
        keys = {"mode": mode, "project": "uft", "entity": None, "group": None, "tags": [], "job_type": "train"}
        return {
            "seed": 3,
            "objective": {"name": "ift", "beta": 0.1},
            "data": {"name": "mix", "sources": {"a": {"path": "builtin:a", "share": None}}},
            "model": {"name": "playground"},
            "optim": {"betas": [0.9, 0.999]},
            "sweep": {"name": None},
            "tracking": {**keys, **tracking},
        }

    return make


@pytest.fixture
def open_wandb(new_run, config) -> Callable[..., Wandb]:
    """A W&B tracker that has started."""

    def start(mode: str = "online", run: Run | None = None, say=lambda line: None, **tracking: Any) -> Wandb:
        limits = {key: tracking.pop(key) for key in ("init_timeout", "finish_timeout") if key in tracking}
        tracker = Wandb(run or new_run(), config(mode, **tracking), say, **limits)
        tracker.start()
        return tracker

    return start
