"""Ways for a session to end early: killed at any moment, or asked to stop at any safe point."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from uft.model import checkpoint
from uft.tracking.metrics import Files
from uft.training import trainer
from uft.training.liveness import Stop

UNEVEN = (
    "train.batch_size=5",
    "train.micro_batch_tokens=80",
    "train.log_every=2",
    "train.checkpoint_every=3",
    "train.eval_every=4",
    "train.keep_last=1",
    "data.holdout=0.2",
    "eval.rows=4",
    "eval.samples=1",
    "eval.max_new_tokens=3",
)
"""Lines, evaluations, checkpoints and the end all fall on different steps (a run of 7, a stage of 4 or 5)."""
LORA = ("model.adapter=lora", "model.lora.rank=2", "model.lora.dropout=0.2")


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Killed(BaseException):
    """SIGKILL as seen from inside: nothing that catches exceptions notices it."""


class Death:
    """Kills at the n-th of the moments where something was just about to be, or has just been, made permanent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.moments: list[str] = []
        self.at: int | None = None
        everywhere: list[tuple[Any, str]] = [
            (os, "replace"),
            (checkpoint, "save_file"),
            (checkpoint.shutil, "rmtree"),
            (Files, "_append"),
            (trainer, "optimiser_step"),
        ]
        own = [(m, name) for m in modules for name in ("evaluate", "write_json", "export") if hasattr(m, name)]
        for owner, name in [*everywhere, *own]:
            monkeypatch.setattr(owner, name, self._mortal(name, getattr(owner, name)))

    def _mortal(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._moment(f"before {name}")
            value = real(*arguments, **keywords)
            self._moment(f"after {name}")
            return value

        return call

    def _moment(self, name: str) -> None:
        self.moments.append(name)
        if self.at is not None and len(self.moments) > self.at:
            raise Killed(name)

    @contextlib.contextmanager
    def after(self, moments: int | None) -> Iterator[None]:
        self.moments, self.at = [], moments
        with contextlib.suppress(Killed):
            yield
        self.at = None


class StopAt(Stop):
    """Asks to stop when it is looked at for the n-th time: every safe point of a run has a number."""

    def __init__(self, number: int | None = None, name: int = signal.SIGTERM) -> None:
        super().__init__()
        self.looks, self.number, self.with_signal = 0, number, name

    def __call__(self) -> bool:
        self.looks += 1
        if self.number is not None and self.looks > self.number:
            self.signal = self.with_signal
        return super().__call__()
